package codec

import "encoding/binary"

// DATA coming in: windows are charged when a frame begins, its payload is turned into messages as it
// arrives. A message that lies whole in one piece is handed on as a view of it.

// beginData starts a DATA frame; p holds its pad length if it is padded.
func (c *Conn) beginData(h frameHeader, p []byte) error {
	if h.stream == 0 {
		return connErr(h2Protocol, "DATA on stream 0")
	}
	payload, pad := int(h.length), 0
	if h.has(flagPadded) {
		if len(p) == 0 {
			return connErr(h2FrameSize, "padded DATA without a pad length")
		}
		pad = int(p[0])
		if payload--; pad > payload {
			return connErr(h2Protocol, "padding longer than the frame")
		}
		payload -= pad
	}
	if c.isIdle(h.stream) {
		return connErr(h2Protocol, "DATA on an idle stream")
	}
	if c.recvWin -= int64(h.length); c.recvWin < 0 {
		return connErr(h2FlowControl, "DATA beyond the connection's window")
	}
	if h.length == 0 && !h.has(flagEndStream) {
		if err := c.spendIdle(); err != nil {
			return err
		}
	}
	c.inData, c.dataID, c.dataLeft, c.dataPad, c.dataEnd = true, h.stream, payload, pad, h.has(flagEndStream)
	overhead := int(h.length) - payload - pad
	s := c.streams.get(h.stream)
	if s == nil || s.stream.remoteClosed {
		known, byUs := c.closedIDs.find(h.stream)
		var err error
		switch {
		case s != nil || known && !byUs:
			// RFC 9113 5.1: closed, or half-closed by the peer.
			err = c.streamErr(h.stream, h2StreamClosed, "DATA after the end of the stream")
		case !known:
			// It ended too long ago to tell by whom. What an honest peer has under way when we end many
			// streams at once comes so late, so it must not cost the budget of resets.
			err = c.spendIdle()
		}
		if err != nil {
			return err
		}
		c.dataEnd = false
		c.consumedConn(overhead)
		return c.endData(nil)
	}
	st := &s.stream
	// An empty frame may come whatever the window, which our SETTINGS may have made negative (6.9.2).
	if st.recvWin -= int64(h.length); st.recvWin < -c.recvSlack && h.length > 0 {
		if err := c.streamErr(h.stream, h2FlowControl, "DATA beyond the stream's window"); err != nil {
			return err
		}
		c.dataEnd = false
		c.consumedConn(overhead)
		return c.endData(nil)
	}
	if st.bodyLeft >= 0 {
		if st.bodyLeft -= int64(payload); st.bodyLeft < 0 {
			if err := c.streamErr(h.stream, h2Protocol, "more DATA than content-length"); err != nil {
				return err
			}
			c.dataEnd = false
			c.consumedConn(overhead)
			return c.endData(nil)
		}
	}
	c.consumedConn(overhead)
	c.consumedStream(s, overhead)
	return c.endData(s)
}

// readData takes what p has of the DATA frame that is under way.
func (c *Conn) readData(p []byte) (used int, err error) {
	s := c.streams.get(c.dataID)
	if n := min(len(p), c.dataLeft); n > 0 {
		c.dataLeft -= n
		used = n
		if s != nil && !s.stream.remoteClosed {
			if err := c.consume(s, p[:n]); err != nil {
				return used, err
			}
		}
	}
	if c.dataLeft == 0 {
		n := min(len(p)-used, c.dataPad)
		c.dataPad -= n
		used += n
	}
	c.consumedConn(used)
	// The handlers may have ended s; an ended stream is not recycled before Feed returns.
	if s != nil && s.stream.phase != phaseDead {
		c.consumedStream(s, used)
	}
	return used, c.endData(s)
}

// endData finishes the DATA frame if all of it is there.
func (c *Conn) endData(s *Stream) error {
	if c.dataLeft > 0 || c.dataPad > 0 {
		return nil
	}
	c.inData = false
	if c.dataEnd && s != nil && s.stream.phase != phaseDead && c.usable() {
		return c.remoteEnd(s)
	}
	return nil
}

// consume turns payload into messages.
func (c *Conn) consume(s *Stream, p []byte) error {
	st := &s.stream
	switch {
	case st.phase == phasePlain:
		return c.swallow(s, len(p))
	case st.phase != phaseLive:
		return nil
	case c.client && !st.headersRecv:
		return c.streamErr(s.ID, h2Protocol, "DATA before HEADERS")
	}
	for len(p) > 0 && st.phase == phaseLive && c.usable() {
		if st.prefixN < prefixLen {
			n := copy(st.prefix[st.prefixN:], p)
			st.prefixN += uint8(n)
			p = p[n:]
			if st.prefixN < prefixLen {
				return nil
			}
			size := binary.BigEndian.Uint32(st.prefix[1:])
			if s.Reserved > 0 && uint64(size) > uint64(s.Reserved) {
				c.abort(s, Status{ResourceExhausted, "the message is larger than what was set aside for it"})
				return nil
			}
			if bad := checkPrefix(st.prefix[0], size, c.cfg.MaxMessageBytes, st.encoding, c.client); bad.Code != OK {
				if bad.Code == ResourceExhausted {
					c.hit(LimitMessage)
				}
				c.abort(s, bad)
				return nil
			}
			st.msgLen = int(size)
		}
		if st.msg == nil && len(p) >= st.msgLen {
			msg := p[:st.msgLen]
			p = p[st.msgLen:]
			c.message(s, msg)
			continue
		}
		if len(p) == 0 {
			return nil // the next piece may hold all of it
		}
		n := min(len(p), st.msgLen-s.Received())
		if !c.keep(s, p[:n]) {
			c.hit(LimitPartial)
			c.abort(s, Status{ResourceExhausted, "too many messages received in part on this connection"})
			return nil
		}
		p = p[n:]
		if st.got == st.msgLen {
			// The handler may end s, which would give the buffer back: take it first.
			whole := st.msg
			st.msg = nil
			c.assemble(s, -cap(whole.b))
			plain := st.prefix[0] == 0
			if plain {
				c.whole = whole
			}
			c.message(s, whole.b)
			if !plain || c.whole != nil {
				putBuffer(whole)
			}
			c.whole = nil
		}
	}
	return nil
}

// message hands one message on.
func (c *Conn) message(s *Stream, msg []byte) {
	s.stream.prefixN = 0
	if c.idle < idleFrameBurst {
		c.idle++
	}
	if s.stream.prefix[0] == 1 {
		c.inflated(s, msg)
		return
	}
	c.deliverMessage(s, msg)
}

// KeepMessage makes the message that OnMessage is being called with the handler's: its bytes stay valid (Recycle may
// take them later). false: they are a view of what Feed was given, and have to be copied.
func (c *Conn) KeepMessage() bool {
	kept := c.whole != nil
	c.whole = nil
	return kept
}

func (c *Conn) deliverMessage(s *Stream, msg []byte) {
	if c.client {
		c.cli.OnMessage(s, msg)
	} else {
		c.srv.OnMessage(s, msg)
	}
}

// keep appends p to the message that is being received. Its buffer doubles, so that a stream that announces
// much and sends little costs little; a server that has sent a part of a reply is taken at its word. false means that the connection keeps too much already.
func (c *Conn) keep(s *Stream, p []byte) bool {
	st := &s.stream
	have := s.Received()
	if st.msg == nil || have+len(p) > cap(st.msg.b) {
		size := max(have+len(p), min(2*have, st.msgLen))
		if c.client && have >= st.msgLen/memberHaste {
			size = st.msgLen
		}
		much := c.assembling + size
		if c.client {
			much = st.msgLen // a large answer gives way, not whatever comes beside it
		}
		switch {
		case s.Spared && st.msgLen <= MaxSparedBytes:
		case c.assembling+size > c.cfg.MaxPartialBytes, much > c.cfg.FullBytes && s.Reserved == 0 && c.cfg.Full != nil && c.cfg.Full():
			return false
		}
		b := getBuffer(size)
		c.assemble(s, cap(b.b))
		if old := st.msg; old != nil {
			b.b = append(b.b, old.b...)
			c.assemble(s, -cap(old.b))
			putBuffer(old)
		}
		st.msg = b
	}
	if st.got = have + len(p); s.Rewriter != nil && st.prefix[0] == 0 {
		st.msg.b = s.Rewriter.Rewrite(st.msg.b, p)
	} else {
		st.msg.b = append(st.msg.b, p...)
	}
	return true
}

// assemble counts n bytes more of buffers, or fewer, for the message that s receives.
func (c *Conn) assemble(s *Stream, n int) {
	c.assembling += n
	if s.Reserved > 0 {
		c.reserved += n
	}
}

// dropPartial forgets a message received in part.
func (c *Conn) dropPartial(s *Stream) {
	if b := s.stream.msg; b != nil {
		c.assemble(s, -cap(b.b))
		putBuffer(b)
		s.stream.msg = nil
	}
}

// swallow counts the body of a request that the Conn answers itself.
func (c *Conn) swallow(s *Stream, n int) error {
	if s.stream.swallowed += n; s.stream.swallowed > maxPlainBody {
		c.answerPlain(s)
	}
	return nil
}

// remoteEnd handles END_STREAM.
func (c *Conn) remoteEnd(s *Stream) error {
	st := &s.stream
	if st.bodyLeft > 0 {
		return c.streamErr(s.ID, h2Protocol, "less DATA than content-length")
	}
	st.remoteClosed = true
	switch st.phase {
	case phasePlain:
		c.answerPlain(s)
		return nil
	case phaseDone:
		return nil // what is queued still goes out
	}
	if c.client {
		if !st.headersRecv {
			return c.streamErr(s.ID, h2Protocol, "DATA before HEADERS")
		}
		c.endClient(s, Status{Internal, "server closed the stream without sending trailers"})
		return nil
	}
	if st.prefixN > 0 {
		c.abort(s, Status{Internal, "unexpected EOF"})
		return nil
	}
	c.srv.OnHalfClose(s)
	return nil
}
