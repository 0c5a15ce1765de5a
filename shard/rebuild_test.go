package shard

import (
	"testing"

	"spindle/revclock"
)

// TestRebuildsShareNoRevision: two proxies rebuild the coordinator, which is lost again in the middle of each, and each fences one shard. One
// of them has seen a few ticks more. Their fences had one revision on two shards (seed 22000776 of TestFaults).
func TestRebuildsShareNoRevision(t *testing.T) {
	for shards := 1; shards <= 5; shards++ {
		owner := map[int64]int{} // of a revision
		last := int64(0)
		for known := int64(0); known < 40; known++ {
			r := newStreamRig(t, shards)
			c := r.c
			c.knownN = known
			k := &connecting{c: c, looks: make([]look, shards)}
			for i := range k.looks {
				m := *c.m
				m.Epoch[0] = 1
				k.looks[i] = look{k: k, s: c.shards[i], m: &m, rec: Record{First: 3, Last: 3}}
			}
			snap, fresh, err := k.successor(&revclock.Found{})
			if err != nil || fresh {
				t.Fatal(fresh, err)
			}
			if snap.N < max(known, 3)+revclock.Margin || snap.N < last {
				t.Errorf("%d shards: %d is handed out behind %d", shards, snap.N, known)
			}
			last = snap.N
			for i, s := range snap.Shards {
				if was, ok := owner[s.A]; ok && was != i || s.A <= max(known, 3) || s.A > snap.N {
					t.Errorf("%d shards, %d known: the fence of shard %d at %d, which shard %d has too; N is %d", shards, known, i, s.A, was, snap.N)
				}
				owner[s.A] = i
			}
		}
	}
}
