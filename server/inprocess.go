package server

import (
	"errors"
	"net"
	"os"
	"time"
)

var errStopping = errors.New("spindle: the engine is stopping")

// Dial opens a client connection to this engine that needs no listener and no network: one end of a socket
// pair becomes a client of the last event loop, the other is returned. It counts like any other client's, and
// Stop closes it. Any goroutine may call it, once the engine is ready.
func (e *Engine) Dial() (net.Conn, error) {
	if e.draining.Load() {
		return nil, errStopping
	}
	near, fd, err := socketPair()
	if err != nil {
		return nil, err
	}
	far := os.NewFile(uintptr(fd), "client")
	defer far.Close() // FileConn makes a duplicate
	peer, err := net.FileConn(far)
	if err != nil {
		_ = near.Close()
		return nil, err
	}
	x, err := newClientConn(e.loops[len(e.loops)-1]).enroll(near)
	if err != nil {
		_ = peer.Close()
		return nil, err
	}
	go x.wait()
	return peer, peer.SetDeadline(time.Time{})
}
