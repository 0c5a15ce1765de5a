package tlsconn

import (
	"errors"
	"fmt"
)

// The handshake: a goroutine that reads what Receive has collected, and whose output waits for Output.

func (c *Conn) start() {
	c.started = true
	c.wake, c.turn, c.quit = make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{})
	if c.gate != nil {
		c.gate.enter(c)
	}
	go c.handshake()
}

// feedHandshake gives p to the goroutine.
func (c *Conn) feedHandshake(p []byte) error {
	c.mu.Lock()
	if c.dead != nil || c.done && c.result != nil { // Advance will say so
		c.mu.Unlock()
		return nil
	}
	waiting := len(c.early) - c.earlyOff + len(p)
	if waiting > maxHandshakeInput || c.gate != nil && !c.gate.hold(len(p)) {
		c.mu.Unlock()
		return c.end(ErrFlood)
	}
	c.early = append(c.early[:0], c.early[c.earlyOff:]...)
	c.earlyOff = 0
	c.early = append(c.early, p...)
	c.mu.Unlock()
	c.signal()
	return nil
}

func (c *Conn) signal() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// abandon makes the handshake fail with err, or forgets what it left. On any goroutine.
func (c *Conn) abandon(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.done:
		c.letGo()
	case c.dead == nil:
		c.dead = err
		close(c.quit)
	}
}

// handshake is the goroutine.
func (c *Conn) handshake() {
	err := c.shake()
	if c.gate != nil {
		if c.token {
			c.gate.release()
		}
		c.gate.leave(c)
	}
	c.mu.Lock()
	if c.dead != nil && (err == nil || errors.Is(err, ErrClosed)) {
		err = c.dead
	}
	if err != nil {
		c.forgetInput()
	}
	c.done, c.result = true, err
	c.mu.Unlock()
	c.notify()
}

func (c *Conn) shake() (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic in a TLS handshake: %v", r)
		}
	}()
	if err := c.compute(); err != nil {
		return err
	}
	if err := c.tls.Handshake(); err != nil {
		return err
	}
	if c.tls.ConnectionState().NegotiatedProtocol != "h2" {
		_ = c.tls.CloseWrite()
		return ErrNoHTTP2
	}
	return nil
}

// compute waits for the right to compute.
func (c *Conn) compute() error {
	if c.gate == nil || c.token {
		return nil
	}
	if !c.gate.take(c) {
		return ErrClosed
	}
	c.token = true
	return nil
}

// maxAlert is more than an alert takes on the wire, encrypted and behind a change of ciphers.
const maxAlert = 64

// dying says that the handshake is to give up. When the socket is gone, what has come before is still looked at, if it
// is an answer and may be an alert, which says why. It costs next to nothing, unlike a handshake for nobody.
func (c *Conn) dying(waiting int) bool {
	return c.dead != nil && !(c.dead == ErrClosed && c.waited && waiting > 0 && waiting < maxAlert)
}

func (c *Conn) notify() {
	c.mu.Lock()
	tell := !c.told
	c.told = true
	c.mu.Unlock()
	if tell {
		c.owner.TLSNotify()
	}
}

// readEarly is the handshake's Read: it waits for bytes, and lets others compute meanwhile.
func (c *Conn) readEarly(p []byte) (int, error) {
	for {
		c.mu.Lock()
		waiting, unsent := len(c.early)-c.earlyOff, len(c.earlyOut) > 0
		dead, dying := c.dead, c.dying(waiting)
		c.mu.Unlock()
		switch {
		case dying:
			return 0, dead
		case waiting > 0 && dead != nil:
			return c.takeEarly(p), nil // an alert; no turn is waited for
		case waiting > 0:
			if err := c.compute(); err == nil {
				return c.takeEarly(p), nil
			}
			continue // dead now
		}
		c.waited = true
		if unsent {
			c.notify()
		}
		if c.token {
			c.token = false
			c.gate.release()
		}
		select {
		case <-c.wake:
		case <-c.quit:
		}
	}
}

func (c *Conn) takeEarly(p []byte) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := copy(p, c.early[c.earlyOff:])
	c.earlyOff += n
	if c.gate != nil {
		c.gate.hold(-n)
	}
	return n
}

// writeEarly is the handshake's Write. What it holds goes out when the handshake waits or ends: one write for a
// flight of records, and an alert not before its reason is known here.
func (c *Conn) writeEarly(p []byte) {
	c.mu.Lock()
	c.earlyOut = append(c.earlyOut, p...)
	c.mu.Unlock()
}
