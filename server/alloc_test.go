//go:build !race

package server

import (
	"testing"
)

// TestUnaryAllocations runs the whole road of a unary request but the socket and the core.
func TestUnaryAllocations(t *testing.T) {
	for _, timeout := range []string{"", "5S"} {
		r := newRig(t, timeout)
		r.request() // the first one fills pools and tables
		before := r.sock.written
		if n := testing.AllocsPerRun(2000, r.request); n > 0 {
			t.Errorf("timeout %q: %v allocations a request", timeout, n)
		}
		if r.core.n < 2000 || r.sock.written == before {
			t.Errorf("%d requests reached the core, %d bytes were answered", r.core.n, r.sock.written-before)
		}
		if n := r.loop.inflight.Load(); n != 0 {
			t.Errorf("%d in flight", n)
		}
	}
}
