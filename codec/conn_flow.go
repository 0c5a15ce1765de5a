package codec

import "encoding/binary"

// SETTINGS and flow control (RFC 9113 6.5, 6.9). Windows are int64, so that sums never wrap before they are
// compared with the limits of the protocol.

// openConnWindow raises the connection's receive window from the protocol's to ours.
func (c *Conn) openConnWindow() {
	if n := int64(c.cfg.ConnWindow) - c.recvWin; n > 0 {
		c.out = appendWindowUpdate(c.o(), 0, uint32(n))
		c.recvWin += n
	}
}

// consumedConn gives n bytes back to the connection's receive window, by a WINDOW_UPDATE when a quarter of
// it has come together. The bytes were handed on or are counted in assembling, so the connection's window
// is never what bounds memory.
func (c *Conn) consumedConn(n int) {
	c.recvUnacked += int64(n)
	if c.recvUnacked >= int64(c.cfg.ConnWindow/4) && c.usable() {
		c.out = appendWindowUpdate(c.o(), 0, uint32(c.recvUnacked))
		c.recvWin += c.recvUnacked
		c.recvUnacked = 0
	}
}

// consumedStream is consumedConn for s, unless the owner holds it or the peer sends no more.
func (c *Conn) consumedStream(s *Stream, n int) {
	st := &s.stream
	st.recvUnacked += int64(n)
	if st.hold || st.remoteClosed || st.phase != phaseLive {
		return
	}
	if st.recvUnacked >= max(1, int64(c.cfg.StreamWindow/4)) && c.usable() {
		c.out = appendWindowUpdate(c.o(), s.ID, uint32(st.recvUnacked))
		st.recvWin += st.recvUnacked
		st.recvUnacked = 0
	}
}

// Hold withholds (true) or gives back (false) receive window of s.
func (c *Conn) Hold(s *Stream, hold bool) {
	if s.stream.phase != phaseLive {
		return
	}
	s.stream.hold = hold
	if !hold {
		c.consumedStream(s, 0)
	}
}

func (c *Conn) onWindowUpdate(h frameHeader, p []byte) error {
	if len(p) != 4 {
		return connErr(h2FrameSize, "WINDOW_UPDATE of a wrong length")
	}
	n := int64(binary.BigEndian.Uint32(p) & maxWindow)
	if h.stream == 0 {
		if n == 0 {
			return connErr(h2Protocol, "WINDOW_UPDATE of 0")
		}
		if c.sendWin += n; c.sendWin > maxWindow {
			return connErr(h2FlowControl, "the connection's window overflows")
		}
		return nil // Feed pumps at its end
	}
	if c.isIdle(h.stream) {
		return connErr(h2Protocol, "WINDOW_UPDATE on an idle stream")
	}
	s := c.streams.get(h.stream)
	if s == nil {
		return c.spendIdle() // it crossed the end of the stream
	}
	if n == 0 {
		return c.streamErr(h.stream, h2Protocol, "WINDOW_UPDATE of 0")
	}
	st := &s.stream
	if st.sendWin += n; st.sendWin > maxWindow {
		return c.streamErr(h.stream, h2FlowControl, "the stream's window overflows")
	}
	c.wake(s)
	return nil
}

func (c *Conn) onSettings(h frameHeader, p []byte) error {
	if h.stream != 0 {
		return connErr(h2Protocol, "SETTINGS on a stream")
	}
	if h.has(flagAck) {
		if len(p) != 0 {
			return connErr(h2FrameSize, "acknowledgement of SETTINGS with a payload")
		}
		c.recvSlack = 0
		return c.spendIdle()
	}
	if len(p)%6 != 0 {
		return connErr(h2FrameSize, "SETTINGS of a wrong length")
	}
	first := !c.sawSettings
	c.sawSettings = true
	if first {
		c.peerStreams = maxStreamID // unlimited, unless these SETTINGS say otherwise
	}
	if c.idle -= settingsCost; c.idle < 0 {
		return limitErr(LimitIdleFrames, "too many frames without use")
	}
	init := c.peerInit
	for ; len(p) > 0; p = p[6:] {
		if err := c.applySetting(binary.BigEndian.Uint16(p), binary.BigEndian.Uint32(p[2:]), &init); err != nil {
			return err
		}
	}
	if err := c.moveWindows(init - c.peerInit); err != nil {
		return err
	}
	c.out = appendSettingsAck(c.o())
	return c.spendControl()
}

// applySetting applies one setting. The initial window goes to init: all streams move once a frame, by what
// the last value says.
func (c *Conn) applySetting(id uint16, v uint32, init *int64) error {
	switch id {
	case settingHeaderTableSize:
		c.req.setTableSize(v)
	case settingEnablePush:
		if v > 1 || (v == 1 && c.client) {
			return connErr(h2Protocol, "invalid SETTINGS_ENABLE_PUSH")
		}
	case settingMaxConcurrentStreams:
		c.peerStreams = v
	case settingMaxFrameSize:
		// Ours are never larger than the smallest value that is allowed.
		if v < maxFrameSize || v > 1<<24-1 {
			return connErr(h2Protocol, "invalid SETTINGS_MAX_FRAME_SIZE")
		}
	case settingInitialWindowSize:
		if v > maxWindow {
			return connErr(h2FlowControl, "invalid SETTINGS_INITIAL_WINDOW_SIZE")
		}
		*init = int64(v)
	}
	return nil
}

// moveWindows applies a change of the peer's initial window to all streams (RFC 9113 6.9.2); a window may
// become negative.
func (c *Conn) moveWindows(delta int64) error {
	if delta == 0 {
		return nil
	}
	c.peerInit += delta
	for _, s := range c.streams.slots {
		if s == nil {
			continue
		}
		if s.stream.sendWin += delta; s.stream.sendWin > maxWindow {
			return connErr(h2FlowControl, "a stream's window overflows by SETTINGS")
		}
		c.wake(s)
	}
	return nil
}
