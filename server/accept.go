package server

import (
	"errors"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Clients are accepted here, counted, and enrolled in a loop like any other socket. gnet would do it itself, but an accept
// that fails ends its loops.

const (
	// acceptPause is how long nothing is accepted when accept failed and turning the client away did not help.
	acceptPause = 100 * time.Millisecond
	// maxComing is how many clients of one door may have been accepted and not yet be taken by their loops, which may be
	// busy. Beyond, nobody is accepted at the door: who comes waits in the kernel's queue, until one was taken.
	maxComing = 64
	// shortageWindow is how often the log hears that descriptors are wanted, or that accept fails otherwise.
	shortageWindow = 10 * time.Second
)

// door is a listener at which clients come in.
type door struct {
	ln *listen
	l  net.Listener
	// spare is a descriptor that is given up for a moment when none is left: one that a client can be taken out of the
	// queue with, and closed, so that it goes elsewhere instead of waiting for an answer. -1: it is used up. It is opened
	// early, so it has a low number, which counts when the limit is lowered. accept's.
	spare int
	// coming has a place for each client on its way to a loop, and for the one that is waited for.
	coming chan struct{}
	// failed is when the log heard last that accept failed for another reason. accept's.
	failed time.Time
}

func openDoor(ln *listen) (*door, error) {
	l, err := ln.open()
	if err != nil {
		return nil, err
	}
	return &door{ln: ln, l: l, spare: -1, coming: make(chan struct{}, maxComing)}, nil
}

func (d *door) refill() {
	var err error
	if d.spare, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		d.spare = -1
	}
}

// closeDoors ends the listeners, and with them accept.
func (e *Engine) closeDoors() {
	for _, d := range e.doors {
		_ = d.l.Close()
	}
}

// accept serves one door until it is closed.
func (e *Engine) accept(d *door) {
	d.refill()
	defer func() {
		if d.spare >= 0 {
			_ = unix.Close(d.spare)
		}
	}()
	for {
		select {
		case d.coming <- struct{}{}:
		case <-e.done:
			return
		}
		nc, err := d.l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			if !e.turnAway(d, err) {
				select {
				case <-time.After(acceptPause):
				case <-e.done:
					return
				}
			}
		case !e.admits():
			_ = nc.Close()
		default:
			repace(nc)
			c := newClientConn(e.idlest())
			if d.ln.tls {
				c.secure()
			}
			if x, err := c.enroll(nc); err == nil {
				go func() {
					x.wait()
					<-d.coming
				}()
				continue
			}
		}
		<-d.coming
	}
}

// enroll counts the client and gives it to its loop, by whose OnClose it counts no more.
func (c *clientConn) enroll(nc net.Conn) (*enrollment, error) {
	c.count(1)
	x, err := c.loop.register(nc, c)
	if err != nil {
		c.count(-1)
	}
	return x, err
}

func (c *clientConn) count(n int64) {
	c.eng.conns.Add(n)
	c.loop.clients.Add(n)
}

// turnAway closes the client that could not be accepted for want of descriptors. It reports false if it could not either.
func (e *Engine) turnAway(d *door, why error) (gone bool) {
	if !noDescriptors(why) {
		if now := time.Now(); now.Sub(d.failed) >= shortageWindow {
			d.failed = now
			e.log.Error("cannot accept clients, trying again", "url", d.ln.url, "error", why)
		}
		return false
	}
	if d.spare >= 0 {
		_ = unix.Close(d.spare)
		if rc, err := d.l.(syscall.Conn).SyscallConn(); err == nil {
			_ = rc.Control(func(fd uintptr) {
				if c, _, err := unix.Accept4(int(fd), unix.SOCK_CLOEXEC); err == nil {
					_ = unix.Close(c)
					gone = true
				}
			})
		}
	}
	d.refill()
	e.short(gone)
	return gone
}

// noDescriptors says that the process, or the machine, has no file descriptor left.
func noDescriptors(err error) bool { return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) }

// short notes that a descriptor was wanted in vain, and whether that turned a client away.
func (e *Engine) short(client bool) {
	if client {
		metricConnsRefused.Inc()
		hitLimit(limitDescriptors)
	}
	e.shortage.say(e.conns.Load(), client)
}

// shortage is the log about want of descriptors. Any goroutine may call it.
type shortage struct {
	log *slog.Logger

	mu     sync.Mutex
	said   time.Time
	turned int // clients since then
}

// say tells of a failure once in shortageWindow: how many clients there are, and whether another was turned away.
func (s *shortage) say(clients int64, turned bool) {
	now := time.Now()
	s.mu.Lock()
	if turned {
		s.turned++
	}
	if now.Sub(s.said) < shortageWindow {
		s.mu.Unlock()
		return
	}
	n := s.turned
	s.said, s.turned = now, 0
	s.mu.Unlock()
	var lim unix.Rlimit
	_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &lim)
	s.log.Error("no file descriptors are left: new clients are turned away, and lost connections to members cannot be made anew; "+
		"raise the limit of open files (ulimit -n, LimitNOFILE of systemd) or have fewer clients", "limit", lim.Cur, "clients", clients, "turned away", n)
}

// admits says that one more client may come.
func (e *Engine) admits() bool {
	if !e.ready.Load() {
		return false
	}
	most := e.cfg.MaxConns
	if most <= 0 {
		most = defaultMaxConns() // asked each time: the limit may be changed from outside
	}
	if e.conns.Load() >= int64(most) {
		metricConnsRefused.Inc()
		hitLimit(limitConns)
		return false
	}
	return true
}

// idlest is the loop with the fewest clients.
func (e *Engine) idlest() *Loop {
	best := e.loops[0]
	for _, l := range e.loops[1:] {
		if l.clients.Load() < best.clients.Load() {
			best = l
		}
	}
	return best
}
