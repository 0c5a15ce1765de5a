package sim

import (
	"testing"
	"time"
)

// TestReconcileAgain: a copy of a lease that has ended is found by listing the leases of all shards. A shard that
// does not answer then is listed again soon, not a minute later: its keys have outlived their lease. (Seed 2379 of
// TestSimulation.)
func TestReconcileAgain(t *testing.T) {
	w := newScript(t, Config{Seed: 1, Shards: 2, Proxies: 1, Keys: 8, Base: time.Millisecond, RingSize: 1 << 10, MaxTxnOps: 128,
		MaxRequestBytes: defaultMaxRequestBytes, Window: 250 * time.Millisecond, Timeout: 5 * time.Second, SnapshotEvery: 100})
	const m = 1 << 40 // on one of them it is at home, on the other one a copy of a lease that is gone
	for _, c := range w.net.Members {
		c.leases[m] = &lease{ttl: 1 << 30}
		c.Pause()
	}
	p := w.proxies[0]
	w.wait("a turn that fails", func() bool { return p.core.Stats().LeaseReconciliations > 0 })
	if p.core.Stats().LeaseOrphans > 0 {
		t.Fatal("the shards answered")
	}
	for _, c := range w.net.Members {
		c.Resume()
	}
	start := w.net.now
	left := func() (n int) {
		for _, c := range w.net.Members {
			if c.leases[m] != nil {
				n++
			}
		}
		return n
	}
	w.wait("the end of the copy", func() bool { return left() < 2 })
	if took := time.Duration(w.net.now - start); left() != 1 || took > 15*time.Second {
		t.Errorf("%d leases are left after %v", left(), took)
	}
}

// TestReconcileWhenShardIsBack: a shard that was away for long, with or without a connection, has the copies of ended leases revoked within
// seconds, and cost its proxy little meanwhile. (Seed 301183: it took up to a minute.)
func TestReconcileWhenShardIsBack(t *testing.T) {
	for _, mute := range []bool{false, true} {
		w := newScript(t, Config{Seed: 1, Shards: 2, Proxies: 1, Keys: 8, Base: time.Millisecond, RingSize: 1 << 10, MaxTxnOps: 128,
			MaxRequestBytes: defaultMaxRequestBytes, Window: 250 * time.Millisecond, Timeout: 5 * time.Second, SnapshotEvery: 100})
		const m = 1 << 40 // on one of them it is at home, on the other one a copy of a lease that is gone
		for _, c := range w.net.Members {
			c.leases[m] = &lease{ttl: 1 << 30}
		}
		p := w.proxies[0]
		away := w.net.Members[1]
		if w.home(m) == away {
			away = w.net.Members[0]
		}
		link := p.host.Link(away.ID)
		if mute {
			away.Pause()
		} else {
			link.Reset()
			link.Down = true
		}
		w.until(10*time.Minute, func() bool { return false })
		if away.leases[m] == nil {
			t.Fatal("it was not away")
		}
		if away.Resume(); !mute {
			link.Down = false
			link.up()
		}
		start := w.net.now
		limit := 3 * time.Second
		if mute {
			limit = 15 * time.Second // what was asked last has its timeout
		}
		w.wait("the end of the copy", func() bool { return away.leases[m] == nil })
		if took := time.Duration(w.net.now - start); took > limit {
			t.Errorf("mute %v: after %v", mute, took)
		}
	}
}
