package shard

import (
	"slices"

	"spindle/codec"
)

// This file finds copies that nobody revoked: their proxy died, or history was compacted before it was read. The
// leases of all shards are listed first, the markers read second: a copy is made only after the marker names its
// shard, so one that is listed and not named has no lease any more.

// reconciliation is one turn.
type reconciliation struct {
	l       *leases
	waiting int
	failed  bool // a shard did not answer
	// copies are leases found away from their homes, by home.
	copies map[int][]foundCopy
}

type foundCopy struct {
	m     int64
	shard int
}

// startLeases begins to reconcile, when the Core has become ready.
func (c *Core) startLeases() {
	l := &c.leases
	c.after(c.jitter(reconcileFirst), l.reconcileNow)
	var minute func()
	minute = func() {
		if c.state != stateReady {
			return
		}
		l.reconcileNow()
		c.after(c.jitter(reconcileEvery), minute)
	}
	c.after(c.jitter(reconcileEvery), minute)
}

// reconcileSoon is for whoever knows that something may have been missed.
func (l *leases) reconcileSoon() {
	if l.soon {
		return
	}
	l.soon = true
	l.c.after(l.c.jitter(reconcileRetry), func() {
		l.soon = false
		l.reconcileNow()
	})
}

func (l *leases) reconcileNow() {
	c := l.c
	if c.state != stateReady {
		return
	}
	if l.reconciling {
		l.again = true // what is asked for may have come after that one had read it
		return
	}
	l.reconciling = true
	r := &reconciliation{l: l, copies: make(map[int][]foundCopy)}
	var missed, others []*shardState
	for _, s := range c.shards {
		if s.lease.missed {
			missed = append(missed, s)
		} else {
			others = append(others, s)
		}
	}
	if len(missed) == 0 {
		r.list(others, r.readMarkers)
		return
	}
	// One that stays away costs one request each time, and the others nothing.
	r.list(missed, func() {
		if r.failed {
			r.waiting = 1
			r.end()
			return
		}
		r.list(others, r.readMarkers)
	})
}

// list lists the leases of shards, and calls then when all have answered, or not.
func (r *reconciliation) list(shards []*shardState, then func()) {
	c := r.l.c
	if r.waiting = len(shards); r.waiting == 0 {
		then()
		return
	}
	for _, s := range shards {
		c.tr.Call(s.cluster, codec.MethodLeaseLeases, nil, c.cfg.ShardTimeout, completion(func(resp []byte, st codec.Status, _ bool) {
			if s.lease.missed = st.Code != codec.OK; s.lease.missed {
				r.failed = true
			}
			it := codec.Fields{Msg: resp}
			for st.Code == codec.OK && it.Next() {
				if it.Field.Num != 2 {
					continue
				}
				in := codec.Fields{Msg: it.Field.Bytes}
				for in.Next() {
					if in.Field.Num != 1 {
						continue
					}
					m := int64(in.Field.Val)
					if home := c.part.HomeOf(m); home != s.idx {
						r.copies[home] = append(r.copies[home], foundCopy{m, s.idx})
					}
				}
			}
			if r.waiting--; r.waiting == 0 {
				then()
			}
		}))
	}
}

// readMarkers reads the markers of the homes of what was found, page by page.
func (r *reconciliation) readMarkers() {
	r.waiting = 1
	for i, s := range r.l.c.shards {
		if len(r.copies[i]) > 0 {
			r.waiting++
			r.page(s, []byte(KeyLeases), make(map[foundCopy]struct{}))
		}
	}
	r.end()
}

func (r *reconciliation) end() {
	if r.waiting--; r.waiting > 0 {
		return
	}
	l := r.l
	l.reconciling = false
	l.c.stats.LeaseReconciliations++
	again := l.again
	l.again = false
	if !r.failed {
		l.c.stats.LeasesReconciled++
	}
	if r.failed || again { // what lies on a shard that did not answer may have outlived its lease already
		l.reconcileSoon()
	}
}

// back is told that a shard which had no connection has one again: what has outlived its lease there goes now.
func (l *leases) back(s *shardState) {
	if s.lease.missed {
		l.c.after(l.c.jitter(reconcileFirst), l.reconcileNow)
	}
}

func (r *reconciliation) page(s *shardState, from []byte, named map[foundCopy]struct{}) {
	c := r.l.c
	body := codec.AppendBytes(nil, rangeKey, from)
	body = codec.AppendString(body, rangeEnd, KeyLeaseEnd)
	body = codec.AppendInt(body, rangeLimit, reconcilePage)
	s.ask(codec.MethodRange, body, c.deadline(), func(resp []byte, st codec.Status, _ bool) {
		if st.Code != codec.OK {
			r.failed, s.lease.missed = true, true
			r.end()
			return
		}
		var next []byte
		var mk LeaseMarker
		more := false
		it := codec.Fields{Msg: resp}
		for it.Next() {
			switch it.Field.Num {
			case 2:
				kv, _ := codec.ParseKV(it.Field.Bytes)
				next = append(append(next[:0], kv.Key...), 0)
				x, ok := ParseLeaseKey(kv.Key)
				if !ok || c.part.HomeOf(x) != s.idx || !ParseLeaseMarker(&mk, kv.Value) {
					continue
				}
				for _, i := range mk.Shards {
					named[foundCopy{mk.Member, i}] = struct{}{}
				}
			case 3:
				more = it.Field.Val != 0
			}
		}
		if more && len(next) > 0 {
			r.page(s, slices.Clone(next), named)
			return
		}
		for _, f := range r.copies[s.idx] {
			if _, ok := named[f]; !ok {
				c.stats.LeaseOrphans++
				r.l.revokeLater(c.shards[f.shard], f.m)
			}
		}
		r.end()
	})
}
