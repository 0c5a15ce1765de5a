//go:build !race

package server

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
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

// TestKeepAliveAllocations sends messages on one LeaseKeepAlive stream.
func TestKeepAliveAllocations(t *testing.T) {
	r := openRig(t)
	r.openStream(leaseKeepAlivePath)
	msg := r.data(marshal(t, &pb.LeaseKeepAliveRequest{ID: 1<<60 + 1}))
	send := func() {
		r.feed(msg)
		r.mail()
	}
	send()
	before := r.sock.written
	if n := testing.AllocsPerRun(2000, send); n > 0 {
		t.Errorf("%v allocations a keep-alive", n)
	}
	if r.core.n < 2000 || r.sock.written-before < 2000*len(r.core.resp) {
		t.Errorf("%d messages reached the core, %d bytes were answered", r.core.n, r.sock.written-before)
	}
}
