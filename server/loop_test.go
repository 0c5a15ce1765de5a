package server

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/panjf2000/gnet/v2"
	"golang.org/x/sys/unix"
)

func TestPostKeepsOrder(t *testing.T) {
	s := startServer(t, Config{Loops: 2})
	const senders, each = 4, 5000
	for _, l := range s.Loops() {
		got := make([][]int, senders)
		var wg sync.WaitGroup
		for g := range senders {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for i := range each {
					l.Post(func() { got[g] = append(got[g], i) })
				}
			}()
		}
		wg.Wait()
		onLoop(l, func() {})
		for g := range got {
			if len(got[g]) != each {
				t.Fatalf("sender %d: %d of %d arrived", g, len(got[g]), each)
			}
			for i, v := range got[g] {
				if v != i {
					t.Fatalf("sender %d: place %d holds %d", g, i, v)
				}
			}
		}
	}
}

func TestTurnEnd(t *testing.T) {
	s := startServer(t, Config{Loops: 1})
	l := s.Loops()[0]
	var trace []string
	l.OnTurnEnd(func() { trace = append(trace, "first") })
	l.OnTurnEnd(func() { trace = append(trace, "second") })
	onLoop(l, func() {}) // the hooks of an earlier turn may still be due
	onLoop(l, func() { trace = trace[:0] })
	onLoop(l, func() {
		// Everything since the reset: the end of that turn, and this one's beginning.
		if len(trace) != 2 || trace[0] != "first" || trace[1] != "second" {
			t.Errorf("hooks ran as %v", trace)
		}
	})
}

// echoConn sends back what it gets.
type echoConn struct {
	opened, traffic int
	closed          chan error
}

func (e *echoConn) OnOpen(gnet.Conn) { e.opened++ }
func (e *echoConn) OnTraffic(c gnet.Conn) {
	e.traffic++
	p, _ := c.Peek(-1)
	_, _ = c.Write(p)
	_, _ = c.Discard(len(p))
}
func (e *echoConn) OnClose(_ gnet.Conn, err error) { e.closed <- err }

func TestEnroll(t *testing.T) {
	s := startServer(t, Config{Loops: 2})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, l := range s.Loops() {
		near, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		far, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		h := &echoConn{closed: make(chan error, 2)}
		if err := l.Enroll(near, h); err != nil {
			t.Fatal(err)
		}
		if _, err := far.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 5)
		_ = far.SetReadDeadline(time.Now().Add(guard))
		if _, err := io.ReadFull(far, buf); err != nil || string(buf) != "hello" {
			t.Fatalf("echo: %q, %v", buf, err)
		}
		_ = far.Close()
		receive(t, "OnClose", h.closed)
		onLoop(l, func() {
			if h.opened != 1 || h.traffic == 0 {
				t.Errorf("opened %d times, %d events", h.opened, h.traffic)
			}
		})
	}

	a, b := net.Pipe()
	defer b.Close()
	if err := s.Loops()[0].Enroll(a, &echoConn{}); err == nil {
		t.Error("a pipe was enrolled")
	}
	// A socket that is closed already cannot be enrolled; that is told by OnClose alone.
	dead, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	_ = dead.Close()
	h := &echoConn{closed: make(chan error, 2)}
	if err := s.Loops()[0].Enroll(dead, h); err == nil {
		if err := receive(t, "OnClose of a dead socket", h.closed); err == nil || h.opened != 0 {
			t.Errorf("dead socket: err %v, opened %d", err, h.opened)
		}
	}
}

// panicConn panics at its first byte.
type panicConn struct{ closed chan error }

func (p *panicConn) OnOpen(gnet.Conn)               {}
func (p *panicConn) OnTraffic(gnet.Conn)            { panic("boom") }
func (p *panicConn) OnClose(_ gnet.Conn, err error) { p.closed <- err }

func TestPanicClosesTheConnection(t *testing.T) {
	panics := make(chan bool, 10)
	s := startServer(t, Config{Loops: 1})
	s.cfg.OnPanic = func(_ error, fatal bool) { panics <- fatal }
	l := s.Loops()[0]
	near, far := tcpPair(t)
	h := &panicConn{closed: make(chan error, 2)}
	if err := l.Enroll(near, h); err != nil {
		t.Fatal(err)
	}
	if _, err := far.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	receive(t, "OnClose", h.closed)
	if !receive(t, "OnPanic", panics) {
		t.Error("a panic of an enrolled connection is not fatal")
	}
	if _, err := far.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the peer read %v", err)
	}
	l.Post(func() { panic("in the mailbox") })
	if !receive(t, "OnPanic", panics) {
		t.Error("a panic in the mailbox is not fatal")
	}
	onLoop(l, func() {}) // still alive
}

// A write in a hook fails, gnet calls OnClose from within it, and the hooks do not run within themselves.
func TestOnCloseWithinTurnEnd(t *testing.T) {
	s := startServer(t, Config{Loops: 1})
	l := s.Loops()[0]
	near, far := tcpPair(t)
	h := &hookConn{opened: make(chan struct{}), closed: make(chan error, 2)}
	if err := l.Enroll(near, h); err != nil {
		t.Fatal(err)
	}
	receive(t, "OnOpen", h.opened)
	depth := 0
	l.OnTurnEnd(func() {
		depth++
		defer func() { depth-- }()
		if depth > 1 {
			t.Error("a hook ran within a hook")
		}
		if h.c != nil && h.abort {
			// The descriptor is shut down behind gnet's back, so the write fails at once.
			h.abort = false
			shutdown(h.c.Fd())
			_, _ = h.c.Write([]byte("x"))
			if h.c != nil {
				t.Error("OnClose was not called within Write")
			}
		}
	})
	onLoop(l, func() { h.abort = true })
	receive(t, "OnClose", h.closed)
	_ = far.Close()
}

type hookConn struct {
	c      gnet.Conn
	abort  bool
	opened chan struct{}
	closed chan error
}

func (h *hookConn) OnOpen(c gnet.Conn)             { h.c = c; close(h.opened) }
func (h *hookConn) OnTraffic(c gnet.Conn)          { _, _ = c.Discard(-1) }
func (h *hookConn) OnClose(_ gnet.Conn, err error) { h.c = nil; h.closed <- err }

func tcpPair(t *testing.T) (near, far net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if near, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if far, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close(); _ = far.Close() })
	return near, far
}

// countdown is a Driven that wants a tick once.
type countdown struct {
	now     func() int64
	at      int64
	flushes int
	ticked  chan int64
}

func (d *countdown) Flush()          { d.flushes++ }
func (d *countdown) Deadline() int64 { return d.at }
func (d *countdown) Tick()           { d.at = 0; d.ticked <- d.now() }

func TestDrive(t *testing.T) {
	s := startServer(t, Config{Loops: 1})
	l := s.Loops()[0]
	d := &countdown{now: s.now, ticked: make(chan int64, 10)}
	d.at = s.now() + int64(3*time.Millisecond)
	due := d.at
	stop := l.Drive(d)
	if at := receive(t, "Tick", d.ticked); at < due {
		t.Errorf("ticked %v early", time.Duration(due-at))
	}
	// Later first, then sooner: the sooner one counts.
	onLoop(l, func() { d.at = s.now() + int64(time.Hour) })
	onLoop(l, func() { d.at = s.now() + int64(time.Millisecond) })
	receive(t, "second Tick", d.ticked)
	stop()
	onLoop(l, func() {
		if d.flushes == 0 {
			t.Error("never flushed")
		}
		d.at = s.now() + 1
	})
	onLoop(l, func() {})
	select {
	case <-d.ticked:
		t.Error("ticked after stop")
	default:
	}
}

// An engine whose loops cannot be found lets go of the doorbells that it has hung.
func TestAbandonedLoopsLeaveNothing(t *testing.T) {
	e := newEngine(Config{Log: quiet(), Loops: 2})
	if err := e.startGnet(1); err != nil { // one is not there
		t.Fatal(err)
	}
	if err := e.findLoops(); err == nil || len(e.loops) != 1 {
		t.Fatalf("%d loops, %v", len(e.loops), err)
	}
	bell := e.loops[0].bell
	var was, is unix.Stat_t
	if err := unix.Fstat(bell, &was); err != nil {
		t.Fatal(err)
	}
	e.abandonLoops()
	if unix.Fstat(bell, &is) == nil && is.Ino == was.Ino {
		t.Error("a doorbell is left")
	}
}
