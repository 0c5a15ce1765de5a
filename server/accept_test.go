package server

import (
	"net"
	"testing"
	"time"
)

// busy keeps l from its work until the returned function is called.
func busy(t *testing.T, l *Loop) (release func()) {
	t.Helper()
	held, begun := make(chan struct{}), make(chan struct{})
	l.Post(func() { close(begun); <-held })
	receive(t, "the loop is busy", begun)
	return func() { close(held) }
}

// A loop that is busy does not keep clients from the others, and is given as many as they are.
func TestAcceptPastABusyLoop(t *testing.T) {
	s := startServer(t, Config{Loops: 2, GreetTimeout: time.Minute})
	release := busy(t, s.Loops()[0])
	var late []net.Conn
	for range 10 {
		late = append(late, s.dialTCP(t)) // the first loop's, since the numbers are equal
		newPeer(t, s.dialTCP(t)).ping()
	}
	for _, l := range s.Loops() {
		if n := l.clients.Load(); n != 10 {
			t.Errorf("%d clients on loop %d", n, l.index)
		}
	}
	release()
	for _, c := range late {
		newPeer(t, c).ping()
	}
	if n := s.conns.Load(); n != 20 {
		t.Errorf("%d clients of 20 are counted", n)
	}
}

// Of clients that their loop does not take no more than maxComing are accepted, and the others come later.
func TestAcceptIsBounded(t *testing.T) {
	s := startServer(t, Config{Loops: 1, GreetTimeout: time.Minute})
	release := busy(t, s.Loops()[0])
	var all []net.Conn
	for range maxComing + 20 {
		all = append(all, s.dialTCP(t))
	}
	eventually(t, "the door is full", func() bool { return s.conns.Load() == maxComing })
	release()
	for _, c := range all {
		p := newPeer(t, c)
		p.ping()
		if n := s.conns.Load(); n > int64(len(all)) {
			t.Errorf("%d clients of %d are counted", n, len(all))
		}
	}
	for _, c := range all {
		_ = c.Close()
	}
	eventually(t, "they are gone", func() bool { return s.conns.Load() == 0 && s.Loops()[0].clients.Load() == 0 })
}

// Clients that are on their way when the engine stops count as clients: it waits for them, and they are told to go.
func TestStopWaitsForClientsOnTheirWay(t *testing.T) {
	s := startServer(t, Config{Loops: 1, DrainTimeout: 10 * guard})
	release := busy(t, s.Loops()[0])
	c := s.dialTCP(t)
	eventually(t, "it is accepted", func() bool { return s.conns.Load() == 1 })
	stopped := make(chan error, 1)
	go func() { stopped <- s.Stop(testContext(t)) }()
	eventually(t, "Stop has begun", s.draining.Load)
	release()
	p := newPeer(t, c)
	p.goAwayOK = true
	p.ping()
	_ = c.Close()
	if err := receive(t, "Stop", stopped); err != nil {
		t.Error(err)
	}
}
