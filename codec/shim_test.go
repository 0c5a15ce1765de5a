package codec

import (
	"io"
	"net"
	"sync"
)

// shim gives a Conn a socket: one goroutine owns the Conn, another reads. Tests only.
type shim struct {
	c      *Conn
	nc     net.Conn
	cmds   chan func()
	done   chan struct{}
	ferr   error // what Feed returned; read after done
	once   sync.Once
	closed chan struct{}
}

func newShim(nc net.Conn, c *Conn) *shim {
	s := &shim{c: c, nc: nc, cmds: make(chan func(), 1024), done: make(chan struct{}), closed: make(chan struct{})}
	go s.loop()
	return s
}

// do runs f on the goroutine of the Conn, soon.
func (s *shim) do(f func()) {
	select {
	case s.cmds <- f:
	case <-s.done:
	}
}

// call is do, and waits.
func (s *shim) call(f func()) {
	ch := make(chan struct{})
	s.do(func() { f(); close(ch) })
	select {
	case <-ch:
	case <-s.done:
	}
}

func (s *shim) close() {
	s.once.Do(func() { close(s.closed); s.nc.Close() })
	<-s.done
}

func (s *shim) loop() {
	defer close(s.done)
	chunks := make(chan []byte)
	free := make(chan []byte, 1)
	free <- make([]byte, 64<<10)
	go func() {
		defer close(chunks)
		for {
			var b []byte
			select {
			case b = <-free:
			case <-s.done:
				return
			}
			n, err := s.nc.Read(b[:cap(b)])
			if n > 0 {
				select {
				case chunks <- b[:n]:
				case <-s.done:
					return
				}
			}
			if err != nil {
				return
			}
		}
	}()
	defer s.nc.Close()
	defer s.c.Close()
	if s.flush() != nil {
		return
	}
	for {
		select {
		case b, ok := <-chunks:
			if !ok {
				return
			}
			if s.ferr = s.c.Feed(b); s.ferr != nil {
				s.flush()
				// As a server does: half-close, and wait a little for the peer to read GOAWAY.
				if t, ok := s.nc.(*net.TCPConn); ok {
					t.CloseWrite()
				}
				free <- b
				for b := range chunks {
					free <- b
				}
				return
			}
			free <- b
		case f := <-s.cmds:
			f()
		case <-s.closed:
			return
		}
		if s.flush() != nil {
			return
		}
	}
}

func (s *shim) flush() error {
	for out := s.c.Output(); len(out) > 0; out = s.c.Output() {
		if _, err := s.nc.Write(out); err != nil {
			return io.ErrClosedPipe
		}
		s.c.Flushed()
	}
	return nil
}

// echo is a server that answers each RPC by its path:
//
//	/t/Unary   one message back (the request's), OK
//	/t/Stream  each message back at once
//	/t/Error   status from the message: first byte is the code, the rest is the text
//	/t/Hang    nothing, ever
//	others     Unimplemented
type echo struct {
	c        *Conn
	requests int
	canceled int
	drained  int
	onCancel func(*Stream)
	onReq    func(*Stream)
}

type echoCall struct{ got []byte }

func (e *echo) OnRequest(s *Stream) {
	e.requests++
	if e.onReq != nil {
		e.onReq(s)
	}
}

func (e *echo) OnMessage(s *Stream, msg []byte) {
	switch s.Path {
	case "/t/Unary", "/t/Error":
		s.User = &echoCall{got: append([]byte(nil), msg...)}
	case "/t/Stream":
		e.c.Send(s, msg)
	}
}

func (e *echo) OnHalfClose(s *Stream) {
	switch s.Path {
	case "/t/Unary":
		if call, ok := s.User.(*echoCall); ok {
			e.c.Send(s, call.got)
		}
		e.c.Finish(s, Status{})
	case "/t/Stream":
		e.c.Finish(s, Status{})
	case "/t/Error":
		call, ok := s.User.(*echoCall)
		if !ok || len(call.got) == 0 {
			e.c.Finish(s, Status{InvalidArgument, "no message"})
			return
		}
		e.c.Finish(s, Status{Code(call.got[0]), string(call.got[1:])})
	case "/t/Hang":
	default:
		e.c.Finish(s, Status{Unimplemented, "unknown method " + s.Path})
	}
}

func (e *echo) OnCancel(s *Stream) {
	e.canceled++
	if e.onCancel != nil {
		e.onCancel(s)
	}
}
func (e *echo) OnDrained(*Stream) { e.drained++ }

// listenEcho serves echo on a loopback port.
func listenEcho(cfg ConnConfig) (net.Listener, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			e := &echo{}
			e.c = NewServerConn(cfg, e)
			newShim(nc, e.c)
		}
	}()
	return l, nil
}
