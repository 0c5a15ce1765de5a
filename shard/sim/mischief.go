package sim

import (
	"fmt"
	"sort"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/codec"
)

// mischief does one of the larger things that can go wrong, and comes back.
func (r *Run) mischief() {
	if !r.chaos {
		return
	}
	w := r.net
	p := r.proxies[w.Rand.IntN(len(r.proxies))]
	id := codec.ClusterID(w.Rand.IntN(r.Shards+1) - 1)
	ev := &r.Events
	long := w.Between(0, 300*time.Millisecond)
	if w.Chance(0.1) {
		long = w.Between(0, 7*time.Second)
	}
	kinds := []struct {
		on bool
		f  func()
	}{
		{ev.Reset && p.up, func() { p.host.Link(id).Reset() }},
		{ev.Down && p.up, func() {
			l := p.host.Link(id)
			w.tracef("%s-%s: down for %v", p.host.Name, l.cluster, long)
			l.Reset()
			l.Down = true
			w.After(long, func() { l.Down = false; l.up() })
		}},
		{ev.Hole && p.up, func() {
			l := p.host.Link(id)
			w.tracef("%s-%s: a hole for %v", p.host.Name, l.cluster, long)
			l.Hole = true
			w.After(long, func() {
				w.tracef("%s-%s: the hole ends in a reset", p.host.Name, l.cluster)
				l.Resume()
				l.Reset()
			})
		}},
		{ev.Pause, func() {
			c := w.cluster(id)
			if c.paused {
				return
			}
			w.tracef("%s: paused for %v", c, long)
			c.Pause()
			w.After(long, func() {
				w.tracef("%s: goes on", c)
				c.Resume()
			})
		}},
		{ev.Lag && p.up, func() {
			l := p.host.Link(id)
			lag := w.Between(0, 300*time.Millisecond)
			w.tracef("%s-%s: streams lag by %v for %v", p.host.Name, l.cluster, lag, long)
			l.StreamLag = lag
			w.After(long, func() { l.StreamLag = 0 })
		}},
		{ev.StreamHole && p.up, func() {
			l := p.host.Link(id)
			d := min(long, 2*time.Second)
			w.tracef("%s-%s: streams stand still for %v", p.host.Name, l.cluster, d)
			l.StreamHole = true
			w.After(d, func() { l.Resume() })
		}},
		{ev.Crash && p.ready && r.stats.Crashes < maxCrashes, func() {
			r.stats.Crashes++
			p.crash()
			p.boot(long)
		}},
		{ev.Expire && id >= 0, func() {
			c := w.cluster(id)
			if c.paused || c.newest != nil {
				return
			}
			var keys []string
			for range 1 + w.Rand.IntN(3) {
				if k := r.key(); leaseOf([]byte(k)) != 0 {
					keys = append(keys, k)
				}
			}
			before := c.Rev()
			c.Expire(keys...)
			if c.Rev() != before {
				w.tracef("%s: %v expire at L%d", c, keys, c.Rev())
				r.expired[expiry{int(id), c.Rev()}] = true
			}
		}},
		{ev.Foreign && r.part != nil, r.foreign},
		{ev.Wipe && r.stats.Wipes < maxWipes, func() { r.wipeCoordinator(min(long, time.Second)) }},
		{ev.Stall && r.stats.Stalls < maxStalls, func() { r.stall(p, min(long, 3*time.Second)) }},
		{ev.Cut && p.up, func() { r.cut(p) }},
		{ev.Die && r.stats.Deaths < maxDeaths, func() { r.die(w.cluster(id), w.Between(100*time.Millisecond, 12*time.Second)) }},
		{ev.Full && id >= 0, func() { r.fill(w.cluster(id), max(long, 50*time.Millisecond)) }},
		{ev.Restore && id >= 0 && r.stats.Restores < maxRestores && r.loss == nil, func() { r.restore(w.cluster(id), long) }},
		{ev.Mistake && p.ready && r.stats.Mistakes < maxMistakes && !r.losing(), func() { r.mistake(p, long) }},
	}
	if ev.Compact && id >= 0 && w.Chance(0.3) {
		r.forceCompact(w.Members[id])
	}
	for range 20 {
		if k := kinds[w.Rand.IntN(len(kinds))]; k.on {
			k.f()
			break
		}
	}
	w.After(w.Between(0, 2*r.Chaos), r.mischief)
}

// foreign writes to a member as somebody with etcdctl does.
func (r *Run) foreign() {
	w := r.net
	c := r.memberOf(r.key())
	if c.paused || c.newest != nil {
		return
	}
	t := &pb.TxnRequest{}
	var values []string
	used := map[string]bool{}
	for range 1 + w.Rand.IntN(3) {
		k := r.key()
		if used[k] || r.memberOf(k) != c {
			continue
		}
		used[k] = true
		if w.Chance(0.3) {
			t.Success = append(t.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(k)}}})
			continue
		}
		v := fmt.Sprintf("foreign.%d", len(r.foreigns)+len(values))
		if w.Chance(0.3) {
			v = fmt.Sprintf("f%d", len(r.foreigns)+len(values)) // shorter than any stamp
		}
		values = append(values, v)
		t.Success = append(t.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(k), Value: []byte(v)}}})
	}
	before := c.Rev()
	if _, st := c.Txn(t); st.Code != codec.OK || c.Rev() == before {
		return
	}
	for _, v := range values {
		r.foreigns[v] = true
	}
	w.tracef("%s: somebody writes %v at L%d", c, t.Success, c.Rev())
	r.expired[expiry{int(c.ID), c.Rev()}] = true
}

// memberOf returns the cluster on which key lies.
func (r *Run) memberOf(key string) *Cluster { return r.inMap()[r.part.ShardOf([]byte(key))] }

// inMap returns the members in the order of the partition map.
func (r *Run) inMap() []*Cluster {
	ms := append([]*Cluster(nil), r.net.Members...)
	sort.Slice(ms, func(i, j int) bool { return string(mapIdentity(ms[i])) < string(mapIdentity(ms[j])) })
	return ms
}

// forceCompact compacts a member behind the proxies' backs.
func (r *Run) forceCompact(c *Cluster) {
	at := c.Rev() - int64(r.net.Rand.IntN(10))
	clock := c.at([]byte(keyClock), c.Rev())
	if c.paused || c.newest != nil || clock == nil || at <= c.Compacted() {
		return
	}
	c.compact = at
	r.forces = append(r.forces, force{int(c.ID), at})
	if rec, err := parseRecord(clock.KV.Value); err == nil {
		// What has no record yet will have one of the next revisions.
		r.forced = max(r.forced, rec.last+maxBatch)
	}
	r.stats.Compactions++
	r.net.tracef("%s: somebody compacts it at L%d", c, at)
}

// forcedRevision returns up to where such compactions reach: to the next record, which may lie far ahead if the
// coordinator was rebuilt between.
func (r *Run) forcedRevision() int64 {
	rev := r.forced
	for _, f := range r.forces {
		for _, ch := range r.net.Members[f.shard].Log() {
			if ch.Main <= f.at || string(ch.KV.Key) != keyClock || ch.Delete {
				continue
			}
			if rec, err := parseRecord(ch.KV.Value); err == nil {
				rev = max(rev, rec.last)
			}
			break
		}
	}
	return rev
}

// maxBatch is more than the revisions between two records of a run.
const maxBatch = 200

// calm ends all faults. Those that end by themselves have their time.
func (r *Run) calm() {
	r.chaos = false
	r.net.Faults = Faults{}
	for _, c := range append([]*Cluster{r.net.Coord}, r.net.Members...) {
		c.full = false
		r.unrestore(c)
		if c.paused {
			c.Resume()
		}
	}
	for _, p := range r.proxies {
		if p.host == nil {
			continue
		}
		p.host.wake()
		for _, id := range p.host.ids() {
			l := p.host.Link(id)
			l.Down, l.StreamLag = false, 0
			l.heal()
			if l.Hole {
				l.Resume()
				l.Reset()
			}
			l.Resume()
			if l.mistaken != nil {
				l.mistaken()
			}
		}
	}
}
