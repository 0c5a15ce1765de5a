package client

import (
	"context"
	"crypto/tls"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"spindle/codec"
)

// echo is a gRPC server that sends every message back. A request to /bye closes the connection.
type echo struct {
	conn *codec.Conn
	msg  []byte
	bye  bool
}

func (e *echo) OnRequest(s *codec.Stream)             { e.bye = s.Path == "/bye" }
func (e *echo) OnMessage(s *codec.Stream, msg []byte) { e.conn.Send(s, msg) }
func (e *echo) OnHalfClose(s *codec.Stream)           { e.conn.Finish(s, codec.Status{}) }
func (e *echo) OnCancel(*codec.Stream)                {}
func (e *echo) OnDrained(*codec.Stream)               {}

func serveEcho(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer nc.Close()
				e := new(echo)
				e.conn = codec.NewServerConn(codec.ConnConfig{}, e)
				buf := make([]byte, 64<<10)
				for {
					for out := e.conn.Output(); len(out) > 0; out = e.conn.Output() {
						if _, err := nc.Write(out); err != nil {
							return
						}
						e.conn.Flushed()
					}
					n, err := nc.Read(buf)
					if err != nil || e.conn.Feed(buf[:n]) != nil || e.bye {
						return
					}
				}
			})
		}
	})
	return l.Addr().String()
}

// once is a call that is waited for.
type once struct {
	msg  []byte
	st   codec.Status
	over chan struct{}
}

func (o *once) Message(m []byte)    { o.msg = append(o.msg[:0], m...) }
func (o *once) End(st codec.Status) { o.st = st; o.over <- struct{}{} }

func await(t *testing.T, o *once) {
	t.Helper()
	select {
	case <-o.over:
	case <-time.After(time.Minute):
		t.Fatal("the call does not end")
	}
}

func TestCall(t *testing.T) {
	c, err := Dial(t.Context(), serveEcho(t), nil, "")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	o := &once{over: make(chan struct{}, 1)}
	msg := []byte("hello")
	call := func() {
		c.Lock()
		ok := c.Call("/etcdserverpb.KV/Range", msg, o)
		c.Unlock()
		if !ok {
			t.Fatal("no call")
		}
		<-o.over // await would allocate
		if o.st.Code != codec.OK || string(o.msg) != "hello" {
			t.Fatal(o.st, string(o.msg))
		}
	}
	for range 300 { // more than the streams that are allowed before the SETTINGS
		call()
	}
	if raceEnabled {
		return // the race detector makes sync.Pool forget
	}
	if n := testing.AllocsPerRun(1000, call); n >= 1 {
		t.Errorf("%v allocations for a request, both sides together", n)
	}
}

// When the connection goes, every call ends, and no further one begins.
func TestLost(t *testing.T) {
	c, err := Dial(t.Context(), serveEcho(t), nil, "")
	if err != nil {
		t.Fatal(err)
	}
	o := &once{over: make(chan struct{}, 1)}
	c.Lock()
	c.Stream("/bye", nil, o)
	c.Unlock()
	await(t, o)
	if o.st.Code != codec.Unavailable || c.Err() == nil {
		t.Error(o.st, c.Err())
	}
	c.Lock()
	if c.Call("/x/y", nil, o) {
		t.Error("a call on a connection that is gone")
	}
	c.Unlock()
	c.Close()
	c.Close()

	if c, err = Dial(t.Context(), serveEcho(t), nil, ""); err != nil {
		t.Fatal(err)
	}
	c.Lock()
	c.Stream("/x/y", nil, o)
	c.Unlock()
	c.Close()
	select {
	case <-o.over:
	default:
		t.Error("Close returned before the end of a call")
	}
}

// deaf accepts one connection, grants it all windows that there are, and reads nothing more. Tests end it.
func deaf(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		t.Cleanup(func() { nc.Close() })
		c := codec.NewServerConn(codec.ConnConfig{StreamWindow: 1 << 30, ConnWindow: 1 << 30}, new(echo))
		_, _ = nc.Write(c.Output())
	}()
	return l.Addr().String()
}

// fill starts calls that no socket has room for, and says when the connection is free again.
func fill(c *Conn, patience time.Duration) (free chan struct{}) {
	free = make(chan struct{})
	c.Lock()
	c.patience = patience
	go func() {
		defer close(free)
		defer c.Unlock()
		for range 64 {
			c.Call("/x/y", make([]byte, 1<<20), &once{over: make(chan struct{}, 1)})
		}
	}()
	return free
}

// A server that does not read loses the connection after a while; who cannot wait so long severs it.
func TestDeaf(t *testing.T) {
	for name, sever := range map[string]bool{"patience": false, "sever": true} {
		t.Run(name, func(t *testing.T) {
			c, err := Dial(t.Context(), deaf(t), nil, "")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			patience := 50 * time.Millisecond
			if sever {
				patience = time.Hour
			}
			free := fill(c, patience)
			if sever {
				c.Sever()
			}
			select {
			case <-free:
			case <-time.After(30 * time.Second):
				c.Sever()
				t.Fatal("the write waits for ever")
			}
			if err := c.Err(); err == nil || strings.Contains(err.Error(), "does not read") == sever {
				t.Error(err)
			}
		})
	}
}

// The end of its context ends the wait for a server that accepts and says nothing.
func TestDialCanceled(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, cfg := range []*tls.Config{nil, {}} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		begin := time.Now()
		if _, err := Dial(ctx, l.Addr().String(), cfg, ""); err == nil || time.Since(begin) > dialTimeout/2 {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
	}
}

// A server that is none is an error.
func TestDialErrors(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		nc, err := l.Accept()
		if err == nil {
			nc.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
			nc.Close()
		}
	}()
	if _, err := Dial(t.Context(), l.Addr().String(), nil, ""); err == nil {
		t.Error("no error where no HTTP/2 is spoken")
	}
	l.Close()
	if _, err := Dial(t.Context(), l.Addr().String(), nil, ""); err == nil {
		t.Error("no error where nobody listens")
	}
}
