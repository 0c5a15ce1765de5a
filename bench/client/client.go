// Package client is the load tester's connection to an etcd endpoint: gRPC over HTTP/2 on codec, a goroutine a
// connection, nothing allocated for each request, so that the generator takes little of the machine that it measures.
package client

import (
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"time"

	"spindle/codec"
)

// Done hears how a call ended. It is called on the connection's goroutine, with the connection locked: it may start
// further calls on it, and must not block. resp is valid during the call only.
type Done interface {
	Done(resp []byte, st codec.Status)
}

// Sink hears what a stream brings, called as Done is.
type Sink interface {
	Message(msg []byte)
	End(st codec.Status)
}

const (
	dialTimeout  = 10 * time.Second
	streamWindow = 8 << 20
	connWindow   = 64 << 20
	maxMessage   = 1 << 30
	readBuffer   = 256 << 10
)

// Conn is one HTTP/2 connection. Its methods may be called on any goroutine; those that say "locked" only from
// within a Done or a Sink, or between Lock and Unlock.
type Conn struct {
	mu     sync.Mutex
	nc     net.Conn
	h2     *codec.Conn
	err    error
	closed bool
	free   []*call
	gone   chan struct{}
}

// call is a request under way (done) or an open stream (sink).
type call struct {
	stream *codec.Stream
	done   Done
	sink   Sink
	resp   []byte
	got    bool
}

// Dial connects to address (host:port); with TLS if cfg is not nil.
func Dial(address string, cfg *tls.Config) (*Conn, error) {
	nc, err := net.DialTimeout("tcp", address, dialTimeout)
	if err != nil {
		return nil, err
	}
	if cfg != nil {
		cfg = cfg.Clone()
		cfg.NextProtos = []string{"h2"}
		if cfg.ServerName == "" {
			cfg.ServerName, _, _ = net.SplitHostPort(address)
		}
		t := tls.Client(nc, cfg)
		_ = t.SetDeadline(time.Now().Add(dialTimeout))
		if err := t.Handshake(); err != nil {
			_ = nc.Close()
			return nil, fmt.Errorf("TLS handshake with %s: %w", address, err)
		}
		_ = t.SetDeadline(time.Time{})
		nc = t
	}
	c := &Conn{nc: nc, gone: make(chan struct{})}
	c.h2 = codec.NewClientConn(codec.ConnConfig{
		StreamWindow: streamWindow, ConnWindow: connWindow, MaxMessageBytes: maxMessage,
	}, address, (*events)(c))
	c.Lock()
	c.Unlock()
	go c.read()
	return c, nil
}

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
		if _, err := c.nc.Write(out); err != nil {
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
	buf := make([]byte, readBuffer)
	for {
		n, err := c.nc.Read(buf)
		c.mu.Lock()
		if n > 0 && !c.closed {
			if ferr := c.h2.Feed(buf[:n]); ferr != nil && err == nil {
				err = ferr
			}
			c.flush()
		}
		if err != nil || c.closed {
			c.fail(err)
			c.h2.Close()
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
	}
}

// Call starts a unary request, locked. msg is read before it returns. done may be called from within Call only if
// the connection takes no more streams.
func (c *Conn) Call(path string, msg []byte, done Done) {
	k := c.open(path)
	if k == nil {
		done.Done(nil, codec.Status{Code: codec.Unavailable, Msg: "bench: the connection takes no more requests"})
		return
	}
	k.done = done
	c.h2.Send(k.stream, msg)
	c.h2.CloseSend(k.stream)
}

// Stream is an open stream.
type Stream struct {
	c *Conn
	k *call
}

// Stream opens a stream and sends msg, locked. It returns nil if the connection takes no more streams.
func (c *Conn) Stream(path string, msg []byte, sink Sink) *Stream {
	k := c.open(path)
	if k == nil {
		return nil
	}
	k.sink = sink
	c.h2.Send(k.stream, msg)
	return &Stream{c, k}
}

// Send sends one more message, locked.
func (s *Stream) Send(msg []byte) {
	if s.k.stream != nil {
		s.c.h2.Send(s.k.stream, msg)
	}
}

// CloseSend says that no more messages follow, locked.
func (s *Stream) CloseSend() {
	if s.k.stream != nil {
		s.c.h2.CloseSend(s.k.stream)
	}
}

func (c *Conn) open(path string) *call {
	if c.closed {
		return nil
	}
	s := c.h2.Open(path, false, 0)
	if s == nil {
		return nil
	}
	var k *call
	if n := len(c.free); n > 0 {
		k, c.free = c.free[n-1], c.free[:n-1]
	} else {
		k = new(call)
	}
	*k = call{stream: s, resp: k.resp[:0]}
	s.User = k
	return k
}

// Close ends the connection. Open calls end with Unavailable before it returns.
func (c *Conn) Close() {
	c.mu.Lock()
	c.fail(net.ErrClosed)
	c.mu.Unlock()
	<-c.gone
}

// events is the Conn as codec sees it.
type events Conn

// OnMessage implements codec.ClientEvents.
func (e *events) OnMessage(s *codec.Stream, msg []byte) {
	k := s.User.(*call)
	if k.sink != nil {
		k.sink.Message(msg)
		return
	}
	k.resp, k.got = append(k.resp[:0], msg...), true
}

// OnEnd implements codec.ClientEvents.
func (e *events) OnEnd(s *codec.Stream, st codec.Status, _ bool) {
	k := s.User.(*call)
	k.stream = nil
	if k.sink != nil {
		k.sink.End(st)
		return
	}
	if st.Code == codec.OK && !k.got {
		st = codec.Status{Code: codec.Internal, Msg: "bench: no answer in a call that ended well"}
	}
	done := k.done
	k.done = nil
	done.Done(k.resp, st)
	(*Conn)(e).free = append((*Conn)(e).free, k)
}

// OnGoAway implements codec.ClientEvents.
func (e *events) OnGoAway() {}

// OnPong implements codec.ClientEvents.
func (e *events) OnPong() {}
