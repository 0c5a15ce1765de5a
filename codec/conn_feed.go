package codec

import "encoding/binary"

// Reading: bytes in arbitrary pieces become frames. DATA is handled as it comes; every other frame is handled
// as a whole, from p where it lies whole in it, else from a buffer of at most one frame.

// contState is a header block that is not complete: CONTINUATION frames must follow (RFC 9113 6.10).
type contState struct {
	id        uint32 // 0 when no block is open
	endStream bool
	selfDep   bool
	frames    int
	block     *buffer
}

func (c *Conn) feed(p []byte) error {
	for len(p) > 0 {
		if !c.usable() {
			return nil
		}
		if c.preface > 0 {
			n := min(c.preface, len(p))
			done := len(clientPreface) - c.preface
			if string(p[:n]) != clientPreface[done:done+n] {
				return connErr(h2Protocol, "not the preface of an HTTP/2 client")
			}
			c.preface -= n
			p = p[n:]
			continue
		}
		var n int
		var err error
		if c.inData {
			n, err = c.readData(p)
		} else {
			n, err = c.readFrame(p)
		}
		if err != nil {
			return err
		}
		p = p[n:]
		// After each frame, not once a piece: what a frame lets go out does not depend on how the network
		// cut the bytes, nor on a frame behind it.
		c.pump()
	}
	return nil
}

// readFrame takes one frame (of DATA: its header), or a part of it, from the start of p.
func (c *Conn) readFrame(p []byte) (int, error) {
	if c.part == nil && len(p) >= frameHeaderLen {
		h := parseFrameHeader(p)
		need, err := c.checkHeader(h)
		if err != nil {
			return 0, err
		}
		if len(p) >= need {
			return need, c.handleFrame(h, p[frameHeaderLen:need])
		}
		c.part = getBuffer(need)
		c.part.b = append(c.part.b, p...)
		c.partNeed = need
		return len(p), nil
	}
	if c.part == nil {
		c.part, c.partNeed = getBuffer(frameHeaderLen), 0
	}
	used := 0
	if c.partNeed == 0 {
		used = min(len(p), frameHeaderLen-len(c.part.b))
		c.part.b = append(c.part.b, p[:used]...)
		if len(c.part.b) < frameHeaderLen {
			return used, nil
		}
		need, err := c.checkHeader(parseFrameHeader(c.part.b))
		if err != nil {
			return 0, err
		}
		c.partNeed = need
		if need > cap(c.part.b) {
			b := getBuffer(need)
			b.b = append(b.b, c.part.b...)
			putBuffer(c.part)
			c.part = b
		}
	}
	n := min(len(p)-used, c.partNeed-len(c.part.b))
	c.part.b = append(c.part.b, p[used:used+n]...)
	used += n
	if len(c.part.b) < c.partNeed {
		return used, nil
	}
	whole := c.part
	c.part = nil
	err := c.handleFrame(parseFrameHeader(whole.b), whole.b[frameHeaderLen:])
	putBuffer(whole)
	return used, err
}

// checkHeader judges a frame by its header, and returns how many bytes must be there to handle it.
func (c *Conn) checkHeader(h frameHeader) (need int, err error) {
	if !c.sawSettings && (h.typ != frameSettings || h.has(flagAck)) {
		return 0, connErr(h2Protocol, "first frame is not SETTINGS")
	}
	if h.length > maxFrameSize {
		return 0, connErr(h2FrameSize, "frame larger than SETTINGS_MAX_FRAME_SIZE")
	}
	if c.cont.id != 0 && (h.typ != frameContinuation || h.stream != c.cont.id) {
		return 0, connErr(h2Protocol, "frame within a header block")
	}
	if h.typ == frameData {
		if h.has(flagPadded) && h.length > 0 {
			return frameHeaderLen + 1, nil
		}
		return frameHeaderLen, nil
	}
	return frameHeaderLen + int(h.length), nil
}

// handleFrame handles a frame whose payload p is complete (DATA: its pad length, if it has one).
func (c *Conn) handleFrame(h frameHeader, p []byte) error {
	switch h.typ {
	case frameData:
		return c.beginData(h, p)
	case frameHeaders:
		return c.onHeaders(h, p)
	case frameContinuation:
		return c.onContinuation(h, p)
	case frameRSTStream:
		return c.onRSTStream(h, p)
	case frameSettings:
		return c.onSettings(h, p)
	case framePing:
		return c.onPing(h, p)
	case frameGoAway:
		return c.onGoAway(h, p)
	case frameWindowUpdate:
		return c.onWindowUpdate(h, p)
	case framePriority:
		return c.onPriority(h, p)
	case framePushPromise:
		return connErr(h2Protocol, "PUSH_PROMISE is not allowed")
	}
	return c.spendIdle() // RFC 9113 4.1: unknown types are ignored
}

// spendIdle counts a frame without use.
func (c *Conn) spendIdle() error {
	if c.idle--; c.idle < 0 {
		return limitErr(LimitIdleFrames, "too many frames without use")
	}
	return nil
}

// spendControl counts a reply that the peer caused.
func (c *Conn) spendControl() error {
	if c.control++; c.control > maxControlQueued {
		return limitErr(LimitControl, "too many replies wait for the socket")
	}
	return nil
}

// spendReset counts a stream that ended by RST_STREAM. A client trusts its server not to be an attacker with
// resets, and a server that resets all is better asked again than cut off.
func (c *Conn) spendReset() error {
	if c.client {
		return nil
	}
	if c.resets--; c.resets < 0 {
		return limitErr(LimitResets, "too many streams reset")
	}
	return nil
}

// isIdle says that stream id was never opened (RFC 9113 5.1).
func (c *Conn) isIdle(id uint32) bool {
	if id&1 == 0 {
		return true // we push nothing, and accept no push
	}
	if c.client {
		return id >= c.nextID
	}
	return id > c.lastPeer
}

// streamErr ends a stream for an error of the peer (RFC 9113 5.4.2).
func (c *Conn) streamErr(id uint32, code h2Code, reason string) error {
	if err := c.spendReset(); err != nil {
		return err
	}
	c.out = appendRSTStream(c.o(), id, code)
	if err := c.spendControl(); err != nil {
		return err
	}
	if s := c.streams.get(id); s != nil {
		c.end(s, Status{Internal, reason}, false)
	}
	return nil
}

func (c *Conn) onPriority(h frameHeader, p []byte) error {
	if h.stream == 0 {
		return connErr(h2Protocol, "PRIORITY on stream 0")
	}
	if len(p) != 5 {
		return c.streamErr(h.stream, h2FrameSize, "PRIORITY of a wrong length")
	}
	if binary.BigEndian.Uint32(p)&maxStreamID == h.stream {
		return c.streamErr(h.stream, h2Protocol, "a stream that depends on itself")
	}
	return c.spendIdle()
}

func (c *Conn) onRSTStream(h frameHeader, p []byte) error {
	if h.stream == 0 || c.isIdle(h.stream) {
		return connErr(h2Protocol, "RST_STREAM on an idle stream")
	}
	if len(p) != 4 {
		return connErr(h2FrameSize, "RST_STREAM of a wrong length")
	}
	s := c.streams.get(h.stream)
	if s == nil {
		return c.spendIdle()
	}
	// A client whose deadlines pass, while a member is away say, resets without an answer too. Not at once, though: and
	// what it keeps open meanwhile has other bounds.
	if !s.stream.headersSent && c.ticks-s.stream.born < freeResetTicks {
		if err := c.spendReset(); err != nil {
			return err
		}
	}
	code := h2Code(binary.BigEndian.Uint32(p))
	s.stream.remoteClosed = true
	c.end(s, statusOfReset(code), code == h2RefusedStream)
	return nil
}

func (c *Conn) onPing(h frameHeader, p []byte) error {
	if h.stream != 0 {
		return connErr(h2Protocol, "PING on a stream")
	}
	if len(p) != 8 {
		return connErr(h2FrameSize, "PING of a wrong length")
	}
	data := [8]byte(p)
	if !h.has(flagAck) {
		if c.holdPing(data) {
			return nil
		}
		c.out = appendPing(c.o(), true, data)
		if err := c.spendControl(); err != nil {
			return err
		}
		return c.judgePing()
	}
	switch {
	case c.pinging && data == c.pingData():
		c.pinging = false
		if c.client {
			c.cli.OnPong()
		}
	case c.goneAway && !c.client && c.goneID == maxStreamID && data == drainPing:
		c.goneID = c.lastPeer
		c.out = appendGoAway(c.o(), c.goneID, h2NoError, "")
	default:
		return c.spendIdle()
	}
	return nil
}

func (c *Conn) onGoAway(h frameHeader, p []byte) error {
	if h.stream != 0 {
		return connErr(h2Protocol, "GOAWAY on a stream")
	}
	if len(p) < 8 {
		return connErr(h2FrameSize, "GOAWAY of a wrong length")
	}
	if !c.client {
		return c.spendIdle() // it speaks of streams that we never open
	}
	last := binary.BigEndian.Uint32(p) & maxStreamID
	c.goneAway = true
	if !c.peerGone {
		c.peerGone = true
		c.cli.OnGoAway()
	}
	for _, s := range c.streams.sorted() {
		if !c.usable() {
			break
		}
		if s.ID > last && s.stream.phase == phaseLive {
			s.stream.remoteClosed = true
			c.end(s, statusDraining, true)
		}
	}
	return nil
}
