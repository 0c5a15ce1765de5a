package codec

import (
	"encoding/binary"
	"strconv"
	"time"
)

// HEADERS coming in: a request becomes a Stream or an answer, a response becomes the end of one.

func (c *Conn) onHeaders(h frameHeader, p []byte) error {
	if h.stream&1 == 0 {
		return connErr(h2Protocol, "HEADERS on a stream that no client opens")
	}
	if c.client && c.isIdle(h.stream) {
		return connErr(h2Protocol, "HEADERS on an idle stream")
	}
	pad := 0
	if h.has(flagPadded) {
		if len(p) < 1 {
			return connErr(h2FrameSize, "HEADERS too short")
		}
		pad, p = int(p[0]), p[1:]
	}
	selfDep := false
	if h.has(flagPriority) {
		if len(p) < 5 {
			return connErr(h2FrameSize, "HEADERS too short")
		}
		selfDep = binary.BigEndian.Uint32(p)&maxStreamID == h.stream
		p = p[5:]
	}
	if pad > len(p) {
		return connErr(h2Protocol, "padding longer than the frame")
	}
	p = p[:len(p)-pad]
	if h.has(flagEndHeaders) {
		return c.headersDone(h.stream, h.has(flagEndStream), selfDep, p)
	}
	c.cont = contState{id: h.stream, endStream: h.has(flagEndStream), selfDep: selfDep}
	return c.keepFragment(p)
}

func (c *Conn) onContinuation(h frameHeader, p []byte) error {
	if c.cont.id == 0 {
		return connErr(h2Protocol, "CONTINUATION without HEADERS")
	}
	if c.cont.frames++; c.cont.frames > maxContinuations {
		return limitErr(LimitContinuations, "too many CONTINUATION frames")
	}
	if err := c.keepFragment(p); err != nil {
		return err
	}
	if !h.has(flagEndHeaders) {
		return nil
	}
	done := c.cont
	c.cont = contState{}
	err := c.headersDone(done.id, done.endStream, done.selfDep, done.block.b)
	putBuffer(done.block)
	return err
}

// keepFragment appends a piece of a header block to the open one.
func (c *Conn) keepFragment(p []byte) error {
	b := c.cont.block
	have := 0
	if b != nil {
		have = len(b.b)
	}
	need := have + len(p)
	if need > max(maxFragmentFactor*c.cfg.MaxHeaderBytes, maxFrameSize) {
		return limitErr(LimitHeaderBlock, "header block too large")
	}
	if b == nil || need > cap(b.b) {
		b = getBuffer(max(need, 2*have))
		if old := c.cont.block; old != nil {
			b.b = append(b.b, old.b...)
			putBuffer(old)
		}
		c.cont.block = b
	}
	b.b = append(b.b, p...)
	return nil
}

// headersDone handles a complete header block.
func (c *Conn) headersDone(id uint32, endStream, selfDep bool, block []byte) error {
	s := c.streams.get(id)
	slot := 0
	if s != nil && (!c.client || s.stream.headersRecv) {
		slot = 1
	}
	f, err := c.hd.decode(block, slot)
	if err != nil {
		return connErr(h2Compression, err.Error())
	}
	switch {
	case s == nil && !c.isIdle(id):
		known, byUs := c.closedIDs.find(id)
		switch {
		case byUs || c.client:
			return c.spendIdle() // it crossed our end of the stream
		case known:
			return connErr(h2StreamClosed, "HEADERS on a closed stream")
		}
		return connErr(h2Protocol, "a stream's identifier below one used before")
	case s == nil:
		return c.request(id, endStream, selfDep, f)
	case selfDep:
		return c.streamErr(id, h2Protocol, "a stream that depends on itself")
	case s.stream.remoteClosed:
		return c.streamErr(id, h2StreamClosed, "HEADERS after the end of the stream")
	case c.client:
		return c.response(s, f, endStream)
	}
	if why := f.checkTrailers(); why != "" {
		return c.streamErr(id, h2Protocol, why)
	}
	if !endStream {
		return c.streamErr(id, h2Protocol, "trailers without END_STREAM")
	}
	return c.remoteEnd(s)
}

// request opens a stream for a client's request, or answers it, in the order in which grpc-go looks at it.
func (c *Conn) request(id uint32, endStream, selfDep bool, f *fields) error {
	c.lastPeer = id
	switch {
	case id > c.goneID:
		return c.refuse(id, endStream, h2RefusedStream)
	case selfDep:
		return c.refuse(id, endStream, h2Protocol)
	case f.overLimit:
		c.hit(LimitHeaderList)
		return c.answer(id, endStream, 431, Status{ResourceExhausted, "request header fields too large"})
	case f.checkRequest() != "":
		return c.refuse(id, endStream, h2Protocol)
	case endStream && f.contentLength > 0:
		return c.refuse(id, endStream, h2Protocol)
	case c.streams.n+c.work >= int(c.cfg.MaxConcurrentStreams):
		c.hit(LimitStreams)
		return c.refuse(id, endStream, h2RefusedStream)
	case f.hosts > 1:
		return c.answer(id, endStream, 400, Status{Internal, "more than one host header field"})
	case !isGRPCContentType(f.contentType):
		return c.plainRequest(id, endStream, f)
	}
	var timeout time.Duration
	var timeoutErr error
	if f.hasTimeout {
		timeout, timeoutErr = parseTimeout(f.timeout)
	}
	switch {
	case timeoutErr != nil:
		return c.answer(id, endStream, 400, Status{Internal, "malformed grpc-timeout: " + timeoutErr.Error()})
	case f.pseudo&sawAuthority == 0 && f.hosts == 0:
		return c.answer(id, endStream, 400, Status{Internal, "no host or :authority header present"})
	case f.method != "POST":
		return c.answer(id, endStream, 405, Status{Internal, "Received a HEADERS frame with :method " +
			quote(f.method) + " which should be POST"})
	case f.hasTimeout && timeout == 0:
		return c.answer(id, endStream, 200, Status{DeadlineExceeded, "context deadline exceeded"})
	}
	s := c.newStream(id)
	s.Path, s.HasLeader, s.Timeout = f.path, f.hasLeader, timeout
	s.stream.encoding = f.encoding
	s.stream.bodyLeft = f.contentLength
	c.srv.OnRequest(s)
	if s.stream.phase == phaseLive && c.usable() && !knownEncoding(f.encoding) {
		c.abort(s, Status{Unimplemented, "grpc: Decompressor is not installed for grpc-encoding " + quote(f.encoding)})
		return nil
	}
	if endStream && s.stream.phase != phaseDead && c.usable() {
		return c.remoteEnd(s)
	}
	return nil
}

// refuse resets a stream that is not opened.
func (c *Conn) refuse(id uint32, endStream bool, code h2Code) error {
	c.closedIDs.add(id, !endStream)
	return c.streamErr(id, code, "")
}

// answer ends a request at once, by a response without messages.
func (c *Conn) answer(id uint32, endStream bool, http int, st Status) error {
	out, mark := beginHeaders(c.o(), id, true)
	out = appendHTTPStatus(out, http)
	out = appendLiteralIdx(out, hpContentType, "application/grpc")
	c.out = endHeaders(appendStatusFields(out, st), mark)
	if !endStream {
		c.out = appendRSTStream(c.out, id, h2NoError)
	}
	c.closedIDs.add(id, !endStream)
	return c.spendControl()
}

func appendHTTPStatus(dst []byte, http int) []byte {
	if http == 200 {
		return append(dst, hpStatus200)
	}
	return appendLiteralIdx(dst, hpStatus, strconv.Itoa(http))
}

// plainBody is the body of the answer to a request that is not gRPC.
const plainBody = "this port speaks gRPC (content-type application/grpc) only\n"

// plainRequest takes a request that is not gRPC. It is answered when it is complete, so that what is wrong
// with its body is still seen.
func (c *Conn) plainRequest(id uint32, endStream bool, f *fields) error {
	s := c.newStream(id)
	st := &s.stream
	st.phase = phasePlain
	st.bodyLeft = f.contentLength
	st.st = Status{InvalidArgument, "invalid gRPC request content-type " + quote(f.contentType)}
	if endStream {
		st.remoteClosed = true
		c.answerPlain(s)
	}
	return nil
}

// answerPlain answers as grpc-go does (415, with the gRPC status in the headers), and with a text for people.
func (c *Conn) answerPlain(s *Stream) {
	st := &s.stream
	if st.phase != phasePlain {
		return
	}
	st.phase = phaseDone
	out, mark := beginHeaders(c.o(), s.ID, false)
	out = appendHTTPStatus(out, 415)
	out = appendLiteralIdx(out, hpContentType, "text/plain; charset=utf-8")
	c.out = endHeaders(appendStatusFields(out, st.st), mark)
	c.control++
	st.headersSent = true
	st.ending = endData
	st.q.push([]byte(plainBody))
	c.queued += len(plainBody)
	c.queueMem += st.q.mem // it was empty
	c.wake(s)
}

// response handles a server's HEADERS on s.
func (c *Conn) response(s *Stream, f *fields, endStream bool) error {
	st := &s.stream
	initial := !st.headersRecv
	fail := func(code h2Code, status Status) error {
		c.out = appendRSTStream(c.o(), s.ID, code)
		st.localClosed = true
		c.end(s, status, false)
		return nil
	}
	if !initial && !endStream {
		return fail(h2Protocol, Status{Internal, "a HEADERS frame cannot appear in the middle of a stream"})
	}
	if f.overLimit {
		c.hit(LimitHeaderList)
		return fail(h2FrameSize, Status{Internal, "peer header list size exceeded limit"})
	}
	why := ""
	if initial {
		why = f.checkResponse()
	} else {
		why = f.checkTrailers()
	}
	if why != "" {
		return fail(h2Protocol, Status{Internal, "malformed response: " + why})
	}
	if initial && !isGRPCContentType(f.contentType) {
		if len(f.status) == 3 && f.status[0] == '1' {
			if endStream {
				return fail(h2Protocol, Status{Internal, "protocol error: informational header with status code " +
					f.status + " must not have END_STREAM set"})
			}
			return nil
		}
		st.remoteClosed = endStream
		c.endClient(s, statusOfHTTP(f.status, f.contentType))
		return nil
	}
	status, ok := parseGRPCStatus(f)
	if !ok {
		return fail(h2Protocol, status)
	}
	if !endStream {
		st.headersRecv = true
		st.encoding = f.encoding
		st.bodyLeft = f.contentLength
		return nil
	}
	if st.bodyLeft > 0 {
		return fail(h2Protocol, Status{Internal, "less DATA than content-length"})
	}
	if st.prefixN > 0 && status.Code == OK {
		status = Status{Internal, "unexpected EOF"}
	}
	st.remoteClosed = true
	c.endClient(s, status)
	return nil
}

// endClient ends an RPC of a client with st, and tells the server if that still waits for it.
func (c *Conn) endClient(s *Stream, status Status) {
	st := &s.stream
	switch {
	case !st.remoteClosed:
		c.out = appendRSTStream(c.o(), s.ID, h2Cancel)
	case !st.localClosed:
		c.out = appendRSTStream(c.o(), s.ID, h2NoError)
	}
	c.end(s, status, false)
}
