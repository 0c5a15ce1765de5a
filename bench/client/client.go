// Package client is the load tester's connection to an etcd endpoint: gRPC over HTTP/2 on codec, a goroutine a
// connection, nothing allocated for each request, so that the generator takes little of the machine that it measures.
package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"spindle/codec"
)

// Sink hears what a call or stream brings. It is called on the connection's goroutine, with the connection locked: it
// may start further calls on it, and must not block.
type Sink interface {
	// Message reports a message; msg is valid during the call only.
	Message(msg []byte)
	// End is called exactly once.
	End(st codec.Status)
}

const (
	// dialTimeout bounds connecting, the TLS handshake and the wait for the server's SETTINGS.
	dialTimeout = 10 * time.Second
	// writeTimeout is how long one write may wait for a server that does not read. Then the connection is lost.
	writeTimeout = 10 * time.Second
	// The windows are large enough that the server never waits for them.
	streamWindow = 8 << 20
	connWindow   = 64 << 20
	// maxMessage bounds an answer: kube-apiserver takes 2 GiB.
	maxMessage = 1 << 30
	// The buffer for reading begins small, so that thousands of idle connections fit, and doubles while reads fill it.
	minReadBuffer = 4 << 10
	maxReadBuffer = 256 << 10
	tickInterval  = time.Second
)

var errMute = fmt.Errorf("no answer in %v", dialTimeout)

// Conn is one HTTP/2 connection. Its methods may be called on any goroutine; those that say "locked" only from
// within a Sink, or between Lock and Unlock.
type Conn struct {
	mu       sync.Mutex
	nc       net.Conn
	socket   net.Conn // what nc writes to; nc itself without TLS
	h2       *codec.Conn
	err      error
	closed   bool
	patience time.Duration // writeTimeout
	greet    chan struct{} // closed when the server's SETTINGS are here, or the connection is gone
	gone     chan struct{} // closed when nothing is called any more
}

// Dial connects to address (host:port); with TLS if cfg is not nil. Its requests carry token, unless that is empty. The end of ctx
// ends the wait for the server, and means nothing to the connection afterwards.
func Dial(ctx context.Context, address string, cfg *tls.Config, token string) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	socket, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	nc := socket
	if cfg != nil {
		cfg = cfg.Clone()
		cfg.NextProtos = []string{"h2"}
		if cfg.ServerName == "" {
			cfg.ServerName, _, _ = net.SplitHostPort(address)
		}
		t := tls.Client(nc, cfg)
		if err := t.HandshakeContext(ctx); err != nil {
			_ = nc.Close()
			if ctx.Err() != nil {
				err = errMute
			}
			return nil, fmt.Errorf("TLS handshake: %w", err)
		}
		nc = t
	}
	c := &Conn{nc: nc, socket: socket, patience: writeTimeout, greet: make(chan struct{}), gone: make(chan struct{})}
	c.h2 = codec.NewClientConn(codec.ConnConfig{
		StreamWindow: streamWindow, ConnWindow: connWindow, MaxMessageBytes: maxMessage, Secure: cfg != nil, Token: token,
	}, address, (*events)(c))
	c.Lock()
	c.Unlock() // writes the preface
	go c.read()
	inTime := context.AfterFunc(ctx, c.Sever)
	<-c.greet // before it the server's limit of streams is not known
	err = c.Err()
	if !inTime() {
		err = errMute
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("no HTTP/2: %w", err)
	}
	return c, nil
}

// Err says why the connection is gone, nil while it is not.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Lost is Err, locked; nil also for a connection that only takes no more streams.
func (c *Conn) Lost() error { return c.err }

// Lock takes the connection; what is started until Unlock travels in one write.
func (c *Conn) Lock() { c.mu.Lock() }

// Unlock writes what was started, and lets go.
func (c *Conn) Unlock() {
	c.flush()
	c.mu.Unlock()
}

func (c *Conn) flush() {
	for !c.closed {
		out := c.h2.Output()
		if len(out) == 0 {
			return
		}
		_ = c.nc.SetWriteDeadline(time.Now().Add(c.patience))
		if _, err := c.nc.Write(out); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = fmt.Errorf("the server does not read: %w", err)
			}
			c.fail(err)
			return
		}
		c.h2.Flushed()
	}
}

func (c *Conn) fail(err error) {
	if c.err == nil {
		c.err = err
	}
	if !c.closed {
		c.closed = true
		_ = c.nc.Close()
	}
}

func (c *Conn) read() {
	defer close(c.gone)
	buf := make([]byte, minReadBuffer)
	greeted, tick := false, time.Now()
	for {
		n, err := c.nc.Read(buf)
		c.mu.Lock()
		if n > 0 && !c.closed {
			if ferr := c.h2.Feed(buf[:n]); ferr != nil && err == nil {
				err = ferr
			}
			if now := time.Now(); now.Sub(tick) >= tickInterval {
				tick = now
				c.h2.Tick()
			}
			c.flush()
		}
		end := err != nil || c.closed
		if end {
			c.fail(err)
			c.h2.Close()
		}
		if !greeted && (end || c.h2.Greeted()) {
			greeted = true
			close(c.greet)
		}
		c.mu.Unlock()
		if end {
			return
		}
		if n == len(buf) && n < maxReadBuffer {
			buf = make([]byte, 2*n)
		}
	}
}

// Call starts a request of one message, locked. msg is read before it returns. It returns false, and sink hears nothing, if
// the connection takes no more streams.
func (c *Conn) Call(path string, msg []byte, sink Sink) bool {
	s := c.open(path, msg, sink)
	if s != nil {
		c.h2.CloseSend(s)
	}
	return s != nil
}

// Stream opens a stream that stays open and sends msg, locked. It returns false, and sink hears nothing, if the connection takes no
// more streams.
func (c *Conn) Stream(path string, msg []byte, sink Sink) bool { return c.open(path, msg, sink) != nil }

func (c *Conn) open(path string, msg []byte, sink Sink) *codec.Stream {
	if c.closed {
		return nil
	}
	s := c.h2.Open(path, false, 0)
	if s != nil {
		s.User = sink
		c.h2.Send(s, msg)
	}
	return s
}

// Sever closes the socket. It never waits, not even for a write that does and holds the lock meanwhile; Close is still to be called.
func (c *Conn) Sever() { _ = c.socket.Close() }

// Close ends the connection. Open calls end with Unavailable before it returns. Not locked, and not from within a
// Sink.
func (c *Conn) Close() {
	_ = c.nc.Close() // a write that waits holds the lock
	c.mu.Lock()
	c.fail(net.ErrClosed)
	c.mu.Unlock()
	<-c.gone
}

// events is the Conn as codec sees it.
type events Conn

// OnMessage implements codec.ClientEvents.
func (e *events) OnMessage(s *codec.Stream, msg []byte) { s.User.(Sink).Message(msg) }

// OnEnd implements codec.ClientEvents.
func (e *events) OnEnd(s *codec.Stream, st codec.Status, _ bool) { s.User.(Sink).End(st) }

// OnGoAway implements codec.ClientEvents.
func (e *events) OnGoAway() {}

// OnPong implements codec.ClientEvents.
func (e *events) OnPong() {}
