package sim

import (
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"spindle/codec"
	"spindle/shard"
)

// This file restores a member to an older state: its process is stopped, and another one with an older state takes its place.
// After a while the newest state comes back, and what was done to the older one is gone. So whatever a client
// was told by the older state contradicts the history that a run is checked with, and no rule of its own is needed.

// How a host looks at its connections again, see shard.Check.
const (
	lookLater   = 100 * time.Millisecond // mean pause after a look that told nothing
	lookRefused = 500 * time.Millisecond // after one that was refused: connected anew
	lookTimeout = 2 * time.Second
)

// CheckWith is the half of a Transport by which the core has new connections looked at.
func (h *Host) CheckWith(f func(codec.ClusterID) *shard.Check) { h.newCheck = f }

// Distrust has the connection to a cluster looked at again before it is used further.
func (h *Host) Distrust(id codec.ClusterID) { h.links[id].look() }

// look takes the connection out of use until the core is content with where it leads.
func (l *Link) look() {
	h := l.host
	if h.Connected(l.cluster.ID) {
		l.lost = l.net().now
	}
	l.conn++
	l.untrusted = false
	if h.newCheck == nil || l.cluster.ID == codec.Coordinator {
		return
	}
	l.untrusted = true
	conn := l.conn
	h.do(func() {
		if h.dead || conn != l.conn {
			return
		}
		k := h.newCheck(l.cluster.ID)
		if k == nil {
			l.untrusted = false
			l.up()
			return
		}
		l.ask(k)
	})
}

// ask sends the one request that may go over a connection which is not trusted.
func (l *Link) ask(k *shard.Check) {
	h, conn := l.host, l.conn
	h.send(l.cluster.ID, codec.MethodTxn, k.AppendRequest(nil), lookTimeout, looked(func(resp []byte, st codec.Status) {
		if conn != l.conn {
			return
		}
		again := func(mean time.Duration) {
			l.net().After(l.net().Between(mean/2, mean*3/2), func() {
				if conn == l.conn && !h.dead {
					l.look()
				}
			})
		}
		switch k.Judge(resp, st) {
		case shard.CheckPassed:
			l.untrusted = false
			l.up()
		case shard.CheckAgain:
			l.ask(k)
		case shard.CheckRefused:
			l.net().tracef("%s-%s: refused: %s", h.Name, l.cluster, k.Why())
			if len(l.streams) > 0 || len(l.calls) > 1 {
				l.Reset() // ends in another look
				return
			}
			again(lookRefused)
		default:
			again(lookLater)
		}
	}))
}

type looked func(resp []byte, st codec.Status)

func (f looked) Complete(resp []byte, st codec.Status, _ bool) { f(resp, st) }

var statusUntrusted = codec.Status{Code: codec.Unavailable, Msg: "simulated: the connection was not looked at yet"}

// restore puts an older state in the place of the newest one, for d.
func (r *Run) restore(c *Cluster, d time.Duration) {
	rev := r.olderRevision(c)
	if rev == 0 || c.newest != nil || r.starting() && !r.believed() {
		return
	}
	r.stats.Restores++
	if !r.restored() && !r.believed() {
		r.stats.Both++
	}
	r.net.tracef("%s: is restored to L%d for %v, was at L%d", c, rev, d, c.Rev())
	c.newest = c.Etcd
	c.replace(c.Etcd.rewound(rev))
	r.net.After(d, func() { r.unrestore(c) })
}

// starting reports whether a proxy starts and has not believed an epoch yet, or starts again by itself once answers are here that may be on their way. It has
// forgotten all that it knew then: if the coordinator is lost and a member in an older state before it has learned anything, it rebuilds the one from the other,
// and nobody tells it: documented.
func (r *Run) starting() bool {
	return slices.ContainsFunc(r.proxies, func(p *proxy) bool {
		if !p.up {
			return p.left
		}
		o := p.core.Observe()
		return !o.Believed || o.Leaving
	})
}

// forgotten reports whether a start could not know what a member lacks: the coordinator is lost and a member in an older state. Nobody starts
// a proxy then that has crashed.
func (r *Run) forgotten() bool { return r.restored() && !r.believed() }

// unrestore puts the newest state back.
func (r *Run) unrestore(c *Cluster) {
	if c.newest == nil {
		return
	}
	r.net.tracef("%s: has its newest state again, of L%d", c, c.newest.Rev())
	e := c.newest
	c.newest, r.healed = nil, r.net.now
	c.replace(e)
}

// olderRevision draws a revision to which a member may be restored, 0 for none. That is one whose loss every proxy can
// notice: what only a proxy that crashed has seen is lost, and what only one has seen another cannot miss.
func (r *Run) olderRevision(c *Cluster) int64 {
	idx := -1
	least, named := int64(0), int64(0)
	for i, p := range r.proxies {
		if !p.ready {
			return 0
		}
		o := p.core.Observe()
		if idx < 0 {
			for j, s := range o.Shards {
				if s.Cluster == c.ID {
					idx = j
				}
			}
		}
		s := o.Shards[idx]
		named = max(named, s.Committed)
		if known := max(s.Clock, s.Committed); i == 0 || known < least {
			least = known
		}
	}
	least = min(least, named)
	var revs []int64
	for _, ch := range c.log {
		if string(ch.KV.Key) != keyClock || ch.Delete {
			continue
		}
		rec, err := parseRecord(ch.KV.Value)
		if err != nil || rec.last >= least {
			break
		}
		if r.part != nil && ch.Main > c.mapped() {
			revs = append(revs, ch.Main)
		}
	}
	if len(revs) == 0 {
		return 0
	}
	n := len(revs)
	if r.net.Chance(0.5) { // the last one that does: everything but the newest is there
		return revs[n-1]
	}
	return revs[rand.New(rand.NewPCG(r.Seed, uint64(n))).IntN(n)]
}

// mapped returns where the first partition map was written, beyond any revision if none was.
func (e *Etcd) mapped() int64 {
	if h := e.hist["\x00map"]; len(h) > 0 {
		return h[0].Main
	}
	return 1 << 62
}

// rewound makes a copy of a cluster as it was at revision rev.
func (e *Etcd) rewound(rev int64) *Etcd {
	o := NewEtcd(e.ClusterID)
	o.MaxTxnOps, o.MaxRequestBytes, o.AutoLease, o.Now, o.Event, o.After = e.MaxTxnOps, e.MaxRequestBytes, e.AutoLease, e.Now, e.Event, e.After
	o.rev, o.nextLease = rev, e.nextLease
	if o.compact = e.compact; e.compact > rev {
		o.compact = -1
	}
	for _, c := range e.log {
		if c.Main > rev {
			break
		}
		key := string(c.KV.Key)
		o.log, o.hist[key] = append(o.log, c), append(o.hist[key], c)
	}
	for _, k := range e.keys {
		if len(o.hist[k]) > 0 {
			o.keys = append(o.keys, k)
		}
	}
	o.leases = maps.Clone(e.leases)
	for id, l := range e.leases {
		o.leases[id] = &lease{ttl: l.ttl}
		o.renew(id, o.leases[id])
	}
	return o
}

// replace stops the cluster's process and starts one with another state: connections end, and what was on its way to
// the old process never arrives.
func (c *Cluster) replace(e *Etcd) {
	c.Etcd = e
	e.OnChange = c.changed
	c.process++
	c.waiting = nil
	for _, l := range c.links {
		if !l.host.dead && l.cluster == c {
			l.Reset()
		}
	}
}

// restored reports whether a member has an older state now.
func (r *Run) restored() bool {
	for _, c := range r.net.Members {
		if c.newest != nil {
			return true
		}
	}
	return false
}
