package server

import (
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"spindle/codec/tlsconn"
)

// refusalBurst lines about refused clients are logged in each refusalWindow; further ones are counted.
const (
	refusalBurst  = 5
	refusalWindow = 10 * time.Second
)

var (
	metricTLSRefused    = metrics.NewCounter(`spindle_client_tls_refused_total`)    // no TLS connection came about
	metricTLSHandshakes = metrics.NewCounter(`spindle_client_tls_handshakes_total`) // done
)

// refusals is the log about clients that could not be served because of TLS. Its methods may be called on any
// goroutine.
type refusals struct {
	log *slog.Logger

	mu      sync.Mutex
	since   time.Time
	logged  int
	dropped int
}

// say tells of one refused client.
func (r *refusals) say(client net.Addr, why string) {
	metricTLSRefused.Inc()
	now := time.Now()
	r.mu.Lock()
	if now.Sub(r.since) >= refusalWindow {
		r.since, r.logged = now, 0
	}
	if r.logged++; r.logged > refusalBurst {
		r.dropped++
		r.mu.Unlock()
		return
	}
	dropped := r.dropped
	r.dropped = 0
	r.mu.Unlock()
	args := []any{"client", client, "why", why}
	if dropped > 0 {
		args = append(args, "others, not logged", dropped)
	}
	r.log.Warn("client refused", args...)
}

// secure puts TLS between the socket and the codec. Before OnOpen.
func (c *clientConn) secure() {
	c.tls = tlsconn.Server(c.eng.h2TLS, c.eng.gate, c)
}

// receive takes bytes of the socket.
func (c *clientConn) receive(p []byte) error {
	if c.tls != nil {
		return c.tlsEnded(c.tls.Receive(p))
	}
	greeted := c.h2.Greeted()
	err := c.h2.Feed(p)
	if err != nil && !greeted && p[0] == tlsRecordHandshake {
		c.eng.refusals.say(c.sock.RemoteAddr(), "the client speaks TLS on a plain-text port: it must use http:// here")
	}
	return err
}

// tlsRecordHandshake is what a TLS client begins with.
const tlsRecordHandshake = 0x16

// tlsEnded tells why no connection came about, if err says so, and passes err on. What goes wrong later is an
// end like any other, and so is a client that goes away by itself.
func (c *clientConn) tlsEnded(err error) error {
	if l, ok := c.tlsLimit(err); ok {
		hitLimit(l)
	}
	if err != nil && err != io.EOF && !c.heard {
		c.heard = true
		c.eng.refusals.say(c.remote, tlsconn.ExplainClient(err))
	}
	return err
}

// tlsLimit is the bound that err means, if it is TLS that ended the connection.
func (c *clientConn) tlsLimit(err error) (limit, bool) {
	switch err {
	case nil, c.plainErr:
		return 0, false
	case errNoHandshake:
		return limitHandshakeTime, true
	case tlsconn.ErrCrowded:
		return limitHandshakes, true
	case tlsconn.ErrFlood:
		return limitHandshakeBytes, true
	case tlsconn.ErrRecords:
		return limitTLSRecords, true
	}
	return limitTLSErrors, tlsconn.Broke(err)
}

// TLSNotify implements tlsconn.Owner.
func (c *clientConn) TLSNotify() { c.loop.Post(c.advance) }

// advance goes on with the handshake.
func (c *clientConn) advance() {
	if c.closed {
		if err := c.tls.Advance(); err != tlsconn.ErrClosed {
			_ = c.tlsEnded(err)
		}
		return
	}
	if c.ending != nil {
		return
	}
	defer func() {
		if r := recover(); r != nil { // as attachment.handle, since this is no event of gnet's
			c.loop.panicked("tls", r, true)
			c.kill()
		}
	}()
	c.ending = c.tlsEnded(c.tls.Advance())
	if c.tls.Open() {
		metricTLSHandshakes.Inc()
	}
	c.touch()
}

// TLSPlain implements tlsconn.Owner.
func (c *clientConn) TLSPlain(p []byte) error {
	c.heard = true
	c.plainErr = c.h2.Feed(p)
	return c.plainErr
}

// output is what is to be written to the socket next; written is to be called when it was.
func (c *clientConn) output() []byte {
	if c.tls == nil {
		return c.h2.Output()
	}
	if c.tls.Open() {
		if out := c.h2.Output(); len(out) > 0 {
			err := c.tls.Seal(out)
			c.h2.Flushed()
			if err != nil && c.ending == nil {
				c.ending = err
			}
		}
	}
	return c.tls.Output()
}

func (c *clientConn) written() {
	if c.tls == nil {
		c.h2.Flushed()
	} else {
		c.tls.Written()
	}
}

// farewell tells a TLS client that the end of the connection is meant (RFC 8446 6.1).
func (c *clientConn) farewell() {
	if c.tls == nil || c.blocked || !c.tls.Open() {
		return
	}
	c.tls.Finish()
	if out := c.tls.Output(); len(out) > 0 {
		if _, err := c.sock.Write(out); err == nil && !c.closed {
			c.tls.Written()
		}
	}
}
