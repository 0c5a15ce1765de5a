package sim

import (
	"strings"
	"testing"
	"time"

	"spindle/codec"
	"spindle/shard"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// restores makes restored members nearly all that happens.
func restores(c *Config) {
	c.Shards, c.Proxies, c.Clients, c.Keys, c.Ops, c.Think = 1+int(c.Seed)%3, 1+int(c.Seed)%2, 4, 6, 160, 5*time.Millisecond
	c.MaxTxnOps, c.MaxRequestBytes = 128, defaultMaxRequestBytes
	c.AutoCompact = shard.AutoCompact{}
	c.Chaos, c.Events = 40*time.Millisecond, ChaosEvents{Restore: true, Stall: c.Seed%2 == 0, Crash: c.Seed%3 == 0, Reset: c.Seed%5 == 0}
}

// TestRestoredMembers runs seeds in which members are restored to older states, while batches are on their way, proxies
// stand still, die and start, and the newest state comes back.
func TestRestoredMembers(t *testing.T) {
	var sum Stats
	for seed := uint64(1); seed <= 25 && !t.Failed(); seed++ {
		cfg := ConfigOf(seed)
		restores(&cfg)
		stats, err := Go(cfg)
		if err != nil {
			report(t, cfg, err)
		}
		sum.Restores += stats.Restores
		sum.Crashes += stats.Crashes
		sum.OK += stats.OK
		sum.Unknown += stats.Unknown
	}
	t.Logf("%d restores, %d crashes, %d operations were answered, %d got an error", sum.Restores, sum.Crashes, sum.OK, sum.Unknown)
	if sum.Restores < 30 {
		t.Errorf("only %d members were restored", sum.Restores)
	}
}

// TestRestoredMemberAlone: while a member has an older state its requests fail at once and say why, those for others are
// served, and when the newest state is back it is used again.
func TestRestoredMemberAlone(t *testing.T) {
	w := newScript(t, Config{Seed: 1, Shards: 3, Proxies: 2, Keys: 8, Base: time.Millisecond, RingSize: 1 << 10, MaxTxnOps: 128,
		MaxRequestBytes: defaultMaxRequestBytes, Window: 250 * time.Millisecond, Timeout: 5 * time.Second, SnapshotEvery: 100})
	p := w.proxies[1]
	keys := map[*Cluster]string{}
	for i := range 64 {
		k := keyName(i)
		keys[w.memberOf(k)] = k
	}
	for range 5 {
		for _, k := range keys {
			w.put(w.proxies[0], k)
			w.put(p, k)
		}
	}
	c := w.net.Members[0]
	w.wait("every stream", func() bool { return w.olderRevision(c) > 0 })
	w.restore(c, time.Hour)
	before := c.Rev()
	w.wait("the refusal", func() bool {
		refused := 0
		for _, p := range w.proxies {
			for _, s := range p.core.Observe().Shards {
				if s.Cluster == c.ID && s.Refused != "" {
					refused++
				}
			}
		}
		return refused == 2
	})
	for m, k := range keys {
		begun := w.net.now
		_, put := w.call(p, shard.OpPut, &pb.PutRequest{Key: []byte(k), Value: []byte("w")})
		_, get := w.call(w.proxies[0], shard.OpRange, &pb.RangeRequest{Key: []byte(k)})
		// What the ring shows is exact whatever has become of the member.
		if m != c && (put.Code != codec.OK || get.Code != codec.OK) || m == c && (put.Code != codec.Unavailable || !strings.Contains(put.Msg, "refused")) {
			t.Errorf("%s of %v: %v, %v", k, m, put, get)
		}
		if d := time.Duration(w.net.now - begun); d > 100*time.Millisecond {
			t.Errorf("%s of %v took %v", k, m, d)
		}
	}
	if c.Rev() != before {
		t.Errorf("somebody wrote to the older state: L%d, was L%d", c.Rev(), before)
	}
	w.unrestore(c)
	w.wait("the newest state", func() bool {
		for _, p := range w.proxies {
			for _, s := range p.core.Observe().Shards {
				if s.Refused != "" || !s.Streaming {
					return false
				}
			}
		}
		return true
	})
	w.put(p, keys[c])
}
