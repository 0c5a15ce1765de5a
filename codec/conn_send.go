package codec

import (
	"math"
	"time"
)

// Writing. A message goes straight into Output when nothing stands before it, Output is below outputTarget and
// the windows allow; else it waits on its stream, and the streams take turns of one DATA frame (at most maxFrameSize) each.

// Send queues one gRPC message on s; msg is copied (or framed into Output) before return.
func (c *Conn) Send(s *Stream, msg []byte) { c.send(s, nil, msg, msgCopied) }

// SendOwned is Send, but takes msg over instead of copying it: for answers so large that two of them would hurt.
// The memory is freed when all of it was sent.
func (c *Conn) SendOwned(s *Stream, msg []byte) { c.send(s, nil, msg, msgOwned) }

// SendParts is Send of head and body as one message. A body that is shared, because many streams get it, is not copied
// if it has to wait. kept says so: then nobody may ever change it, and its memory is the garbage collector's.
func (c *Conn) SendParts(s *Stream, head, body []byte, shared bool) (kept bool) {
	if shared {
		return c.send(s, head, body, msgShared)
	}
	return c.send(s, head, body, msgCopied)
}

// Whose the bytes of a message's body are.
const (
	msgCopied = iota // the caller's
	msgOwned         // the Conn's
	msgShared        // nobody's, once they wait
)

// send queues head and body as one message.
func (c *Conn) send(s *Stream, head, body []byte, whose int) (kept bool) {
	st := &s.stream
	if st.phase != phaseLive || st.ending != endNone || st.localClosed || !c.usable() {
		return false
	}
	size := len(head) + len(body)
	if c.queued > hardQueueFactor*c.cfg.MaxQueuedBytes || size > math.MaxUint32 {
		c.giveUp(s)
		return false
	}
	var room [prefixLen + leadRoom]byte
	lead := append(appendPrefix(room[:0], size), head...)
	rest := body
	if st.q.n == 0 && c.ready.head == nil && !c.blocked && len(c.out) < outputTarget && min(st.sendWin, c.sendWin) >= int64(len(lead)) && len(lead) <= maxFrameSize {
		rest = c.sendDirect(s, lead, body)
		if len(rest) == 0 {
			return false
		}
		lead = nil
	}
	mem := st.q.mem
	st.q.push(lead)
	kept = whose == msgShared && len(rest) >= minShared
	switch {
	case kept: // without its spare capacity, which is everybody's; all of it counts as memory as long as a part waits
		st.q.pushBlock(&buffer{b: body[:len(body):len(body)], off: len(body) - len(rest), shared: true})
	case whose == msgOwned: // all of body counts as memory, which ends up in the pools, if they take its size
		st.q.pushBlock(&buffer{b: body, off: len(body) - len(rest)})
	default:
		st.q.push(rest)
	}
	c.queued += len(lead) + len(rest)
	c.queueMem += st.q.mem - mem
	c.wake(s)
	c.pump()
	st.wantDrained = st.wantDrained || st.q.n > 0
	return kept
}

// SendFrom is Send for a message that src makes as it is sent. It calls Drop when all is sent, or nothing more will be.
func (c *Conn) SendFrom(s *Stream, src Source) {
	st := &s.stream
	if st.phase != phaseLive || st.ending != endNone || st.localClosed || !c.usable() {
		src.Drop()
		return
	}
	if c.queued > hardQueueFactor*c.cfg.MaxQueuedBytes || src.Len() > math.MaxUint32 {
		src.Drop()
		c.giveUp(s)
		return
	}
	var room [prefixLen]byte
	n, mem := st.q.n, st.q.mem
	st.q.push(appendPrefix(room[:0], src.Len()))
	if src.Len() == 0 {
		src.Drop()
	} else {
		st.q.pushSource(src)
	}
	c.queued += st.q.n - n
	c.queueMem += st.q.mem - mem
	c.wake(s)
	c.pump()
	st.wantDrained = st.wantDrained || st.q.n > 0
}

// sendDirect frames as much of a message as the windows and outputTarget allow, and returns the rest.
func (c *Conn) sendDirect(s *Stream, prefix, msg []byte) []byte {
	st := &s.stream
	c.pingExcused = true
	c.startResponse(s)
	for {
		n := int(min(int64(len(prefix)+len(msg)), maxFrameSize, st.sendWin, c.sendWin))
		out := c.room(frameHeaderLen + n)
		st.dataAt, st.dataEpoch = len(out), c.epoch+1
		out = appendFrameHeader(out, n, frameData, 0, s.ID)
		out = append(out, prefix...)
		k := n - len(prefix)
		c.out = append(out, msg[:k]...)
		st.sendWin -= int64(n)
		c.sendWin -= int64(n)
		c.sentData += int64(n)
		msg, prefix = msg[k:], nil
		if len(msg) == 0 || st.sendWin <= 0 || c.sendWin <= 0 || len(c.out) >= outputTarget && len(msg) > outputSlack {
			return msg
		}
	}
}

// wake puts s where it waits for its turn, if it has something to send and may.
func (c *Conn) wake(s *Stream) {
	st := &s.stream
	switch {
	case st.q.n > 0 && st.sendWin > 0:
		c.ready.push(s)
	case st.q.n > 0:
		s.unring()
	}
}

// pump moves what waits into Output, as the windows, the socket and outputTarget allow. It calls no handler.
func (c *Conn) pump() {
	if !c.usable() {
		return
	}
	for !c.blocked && len(c.out) < outputTarget {
		if s := c.enders.head; s != nil {
			s.unring()
			c.finishOut(s)
			continue
		}
		s := c.ready.head
		if s == nil || c.sendWin <= 0 {
			return
		}
		c.emitData(s)
	}
}

// emitData writes one DATA frame of s, the head of the ready ring.
func (c *Conn) emitData(s *Stream) {
	st := &s.stream
	c.pingExcused = true
	c.startResponse(s)
	n := int(min(int64(st.q.n), maxFrameSize, st.sendWin, c.sendWin))
	flags := uint8(0)
	if n == st.q.n && st.ending == endData {
		flags = flagEndStream
	}
	out := c.room(frameHeaderLen + n)
	st.dataAt, st.dataEpoch = len(out), c.epoch+1
	mem := st.q.mem
	c.out = st.q.popAppend(appendFrameHeader(out, n, frameData, flags, s.ID), n)
	st.sendWin -= int64(n)
	c.sendWin -= int64(n)
	c.sentData += int64(n)
	c.queued -= n
	c.queueMem += st.q.mem - mem
	switch {
	case st.q.n == 0:
		s.unring()
		c.queueEmpty(s)
	case st.sendWin <= 0:
		s.unring()
	default:
		c.ready.head = st.next
	}
}

// queueEmpty does what waited for the queue of s.
func (c *Conn) queueEmpty(s *Stream) {
	st := &s.stream
	switch st.ending {
	case endTrailers, endData:
		c.finishOut(s)
	default:
		if st.wantDrained {
			c.note(s)
		}
	}
}

// finishOut ends the sending side of s, whose queue is empty; END_STREAM of endData is already out.
func (c *Conn) finishOut(s *Stream) {
	st := &s.stream
	st.localClosed = true
	if c.client {
		return // the server's answer is still to come
	}
	if st.ending == endTrailers {
		c.writeTrailers(s, st.st)
	}
	if !st.remoteClosed {
		// RFC 9113 8.1: the answer is complete, the rest of the request is not wanted.
		c.out = appendRSTStream(c.o(), s.ID, h2NoError)
	}
	c.release(s)
}

// startResponse writes the HEADERS of a server's response, once.
func (c *Conn) startResponse(s *Stream) {
	if s.stream.headersSent {
		return
	}
	s.stream.headersSent = true
	c.earnReset()
	out := appendFrameHeader(c.o(), len(responseHeaders), frameHeaders, flagEndHeaders, s.ID)
	c.out = append(out, responseHeaders...)
}

// earnReset gives back one of the resets of the budget.
func (c *Conn) earnReset() {
	if c.resets < resetBurst {
		c.resets++
	}
}

// writeTrailers ends a server's stream with st; without any message the trailers are also the headers.
func (c *Conn) writeTrailers(s *Stream, st Status) {
	c.pingExcused = true
	out, mark := beginHeaders(c.o(), s.ID, true)
	if !s.stream.headersSent {
		s.stream.headersSent = true
		c.earnReset()
		out = append(out, responseHeaders...)
	}
	c.out = endHeaders(appendStatusFields(out, st), mark)
}

// beginHeaders opens a HEADERS frame whose block the caller appends; endHeaders sets its length.
func beginHeaders(dst []byte, id uint32, endStream bool) (out []byte, mark int) {
	flags := uint8(flagEndHeaders)
	if endStream {
		flags |= flagEndStream
	}
	mark = len(dst)
	return appendFrameHeader(dst, 0, frameHeaders, flags, id), mark
}

// endHeaders closes the frame opened at mark. A block that is larger than a frame is framed anew.
func endHeaders(dst []byte, mark int) []byte {
	n := len(dst) - mark - frameHeaderLen
	if n > maxFrameSize {
		h := parseFrameHeader(dst[mark:])
		block := append([]byte(nil), dst[mark+frameHeaderLen:]...)
		return appendHeaders(dst[:mark], h.stream, h.has(flagEndStream), block)
	}
	dst[mark], dst[mark+1], dst[mark+2] = byte(n>>16), byte(n>>8), byte(n)
	return dst
}

// Finish ends s with trailers (server role), after what is queued. s must not be used afterwards.
func (c *Conn) Finish(s *Stream, status Status) {
	st := &s.stream
	if st.phase != phaseLive || c.client {
		return
	}
	st.phase, st.ending, st.st = phaseDone, endTrailers, status
	c.dropPartial(s)
	if st.q.n > 0 || !c.usable() {
		return
	}
	if c.blocked {
		c.enders.push(s)
		return
	}
	c.finishOut(s)
}

// abort ends s for what the peer sent: with status to the client (server role) or to the owner (client role).
func (c *Conn) abort(s *Stream, status Status) {
	st := &s.stream
	if c.client {
		c.endClient(s, status)
		return
	}
	c.writeTrailers(s, status)
	if !st.remoteClosed {
		c.out = appendRSTStream(c.o(), s.ID, h2NoError)
	}
	c.control++
	c.end(s, status, false)
}

// giveUp resets a stream that queues beyond all measure. The owner learns of it later, since it is in Send.
func (c *Conn) giveUp(s *Stream) {
	code := h2EnhanceYourCalm
	if c.client {
		code = h2Cancel
	}
	c.hit(LimitQueue)
	c.out = appendRSTStream(c.o(), s.ID, code)
	s.stream.st, s.stream.endNoted = statusQueueFull, true
	c.note(s)
	c.release(s)
}

// Open starts an RPC (client role). It returns nil when the peer's stream limit is reached, the identifiers are
// used up or the connection is going away. The deadline itself is the owner's (Reset).
func (c *Conn) Open(path string, hasLeader bool, timeout time.Duration) *Stream {
	if !c.client || !c.usable() || c.goneAway || c.nextID > maxStreamID || c.streams.n >= int(c.peerStreams) {
		return nil
	}
	s := c.newStream(c.nextID)
	c.nextID += 2
	s.Path, s.HasLeader, s.Timeout = path, hasLeader, timeout
	s.stream.headersSent = true
	out, mark := beginHeaders(c.o(), s.ID, false)
	c.out = endHeaders(c.req.append(out, path, hasLeader, timeout), mark)
	return s
}

// CloseSend half-closes s (client role), after what is queued.
func (c *Conn) CloseSend(s *Stream) {
	st := &s.stream
	if !c.client || st.phase != phaseLive || st.ending != endNone || st.localClosed || !c.usable() {
		return
	}
	st.ending = endData
	if st.q.n > 0 {
		return
	}
	st.localClosed = true
	if st.dataEpoch == c.epoch+1 {
		// The last DATA frame is still in Output: it takes the END_STREAM, and no empty frame is needed.
		c.out[st.dataAt+4] |= flagEndStream
		return
	}
	c.out = appendFrameHeader(c.o(), 0, frameData, flagEndStream, s.ID)
}

// Reset abandons s with RST_STREAM CANCEL; no further event comes for it.
func (c *Conn) Reset(s *Stream) {
	if s.stream.phase != phaseLive {
		return
	}
	if c.usable() {
		c.out = appendRSTStream(c.o(), s.ID, h2Cancel)
	}
	c.release(s)
}
