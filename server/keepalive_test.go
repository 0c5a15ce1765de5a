package server

import (
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// A silent client is asked for a sign of life after the interval, and dropped when none comes.
func TestKeepalive(t *testing.T) {
	open := func() *clockRig {
		r := newClockRig(t)
		r.loop.eng.cfg.KeepaliveInterval, r.loop.eng.cfg.KeepaliveTimeout = time.Minute, 20*time.Second
		r.greet(1 << 20)
		return r
	}
	r := open()
	written := r.sock.written
	r.pass(58 * time.Second)
	if r.sock.written != written || r.conn.closed {
		t.Error("asked early")
	}
	r.pass(3 * time.Second)
	if r.sock.written != written+17 {
		t.Errorf("%d bytes instead of a PING", r.sock.written-written)
	}
	r.pass(18 * time.Second)
	if r.conn.closed {
		t.Error("dropped early")
	}
	hits := limitHits[limitKeepalive].Get()
	if r.pass(3 * time.Second); !r.conn.closed || limitHits[limitKeepalive].Get() != hits+1 {
		t.Error("not dropped")
	}

	r = open()
	for range 10 { // anything is a sign of life
		r.pass(70 * time.Second)
		r.frames(func(fr *http2.Framer) { _ = fr.WriteSettings() })
	}
	if r.conn.closed {
		t.Error("a client that answers was dropped")
	}

	r = open()
	r.loop.eng.cfg.KeepaliveTimeout = 0
	if r.pass(10 * time.Minute); r.conn.closed {
		t.Error("dropped without keepalive")
	}
}
