package sim

import (
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/codec"
	"spindle/revclock"
)

// This file is what happens to the coordinator: it loses its data, a proxy comes to another system's, and proxies
// stop in the middle of a rebuild and go on later.

// wipeCoordinator takes the coordinator away with everything that it held. What was on its way to the old one
// arrives at the new one. It comes back after down; sometimes it is lost again at once.
func (r *Run) wipeCoordinator(down time.Duration) {
	w := r.net
	c := w.Coord
	if c.paused || r.losing() && !r.loss.marked() || r.restored() && r.starting() {
		return
	}
	r.wiped = w.now
	w.tracef("coord: loses its data, back in %v", down)
	r.stats.Wipes++
	if r.restored() && r.believed() {
		r.stats.Both++
	}
	c.Wipe(c.ClusterID)
	c.Pause()
	w.After(down, func() {
		w.tracef("coord: is back, empty")
		c.Resume()
	})
	if w.Chance(0.3) {
		w.After(down+w.Between(0, 60*time.Millisecond), func() {
			if r.chaos {
				r.wipeCoordinator(w.Between(0, 20*time.Millisecond))
			}
		})
	}
	if w.Chance(0.5) {
		// Somebody stops somewhere in the rebuild.
		p := r.proxies[w.Rand.IntN(len(r.proxies))]
		w.After(down+w.Between(0, 40*time.Millisecond), func() { r.stall(p, w.Between(0, 800*time.Millisecond)) })
	}
}

// stall stops a proxy's process and lets it go on later.
func (r *Run) stall(p *proxy, d time.Duration) {
	if !r.chaos || !p.up || p.host.stalled {
		return
	}
	h := p.host
	r.net.tracef("%s: stands still for %v", h.Name, d)
	h.stalled = true
	r.stats.Stalls++
	p.still += d
	r.net.After(d, h.wake)
}

// wake ends a stall: everything that would have happened to the process happens now.
func (h *Host) wake() {
	if !h.stalled {
		return
	}
	h.net.tracef("%s: goes on", h.Name)
	h.stalled = false
	q := h.waiting
	h.waiting = nil
	for _, f := range q {
		h.do(f)
	}
	if !h.dead {
		h.Turn()
	}
}

// do runs what reports to the process, once the process runs.
func (h *Host) do(f func()) {
	if h.stalled {
		h.waiting = append(h.waiting, f)
		return
	}
	f()
}

// mistake leads a proxy to another system's coordinator for a while. Its etcd has the same cluster ID now and then,
// as etcds with default flags have.
func (r *Run) mistake(p *proxy, d time.Duration) {
	w := r.net
	id := w.Coord.ClusterID
	if w.Chance(0.5) {
		id += 0x100
	}
	other := newCluster(w, codec.Coordinator, id)
	put := func(k string, v []byte) {
		other.Put(&pb.PutRequest{Key: []byte(k), Value: v})
	}
	epoch := revclock.ID{0xee, 1, 2, 3}
	put("e", revclock.AppendEpoch(nil, epoch))
	put("s", revclock.AppendSnapshot(nil, &revclock.Snapshot{Rev: 2, N: 1 << 30, Shards: make([]revclock.SnapshotShard, 1+w.Rand.IntN(4))}))
	l := p.host.Link(codec.Coordinator)
	if l.cluster != w.Coord {
		return
	}
	w.tracef("%s: comes to another coordinator for %v", p.host.Name, d)
	r.stats.Mistakes++
	before := other.Rev()
	l.Reset()
	l.cluster = other
	l.mistaken = func() {
		w.tracef("%s: comes to its own coordinator again", l.host.Name)
		if other.Rev() != before {
			r.fail("%s has written to another system's coordinator", l.host.Name)
		}
		l.Reset()
		l.cluster, l.mistaken = w.Coord, nil
	}
	w.After(d, func() {
		if l.cluster == other {
			l.mistaken()
		}
	})
}
