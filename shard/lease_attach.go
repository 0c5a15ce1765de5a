package shard

import (
	"slices"

	"spindle/codec"
)

// This file brings a lease to the shard that a put goes to: docs/leases.md, "First put on a holder". There is one
// attach under way for a lease and a shard; all puts that need it wait for it.

type attachKey struct {
	x     int64
	shard int
}

type attach struct {
	l        *leases
	key      attachKey
	s, home  *shardState
	deadline int64
	waiting  []*write
	asked    int // of waiting: those who were there when the marker was last asked for

	m     int64
	other int64 // the key on s was attached to this one when we came with m
}

// resolveLeases finds out what w's leases are on its shard, then prepares w.
func (c *Core) resolveLeases(s *shardState, w *write) {
	p := w.plan
	gone := false
	for i := range p.leases {
		pl := &p.leases[i]
		if pl.state == leaseUnknown {
			if e := c.leases.table.get(pl.id); e != nil {
				pl.member, pl.create = e.m, e.create(s.idx)
			}
			if pl.create == 0 {
				c.leases.attach(s, w, pl.id)
				return
			}
			pl.state = leaseKnown
		}
		gone = gone || pl.state == leaseGone
	}
	if gone {
		if st := p.errLeaseOf(); st.Code != codec.OK {
			s.answer(w, st)
			return
		}
	}
	c.prepare(s, w)
}

// resolveAgain is resolveLeases for a write whose guards failed.
func (c *Core) resolveAgain(s *shardState, w *write) {
	for i := range w.plan.leases {
		pl := &w.plan.leases[i]
		if pl.lost {
			c.leases.table.wrong(pl.id, s.idx, pl.create)
		}
		if pl.lost || pl.state == leaseGone {
			*pl = planLease{id: pl.id}
		}
	}
	c.resolveLeases(s, w)
}

// attach makes w wait until it is known what X is on s.
func (l *leases) attach(s *shardState, w *write, x int64) {
	key := attachKey{x, s.idx}
	a := l.attaches[key]
	if a == nil {
		a = &attach{l: l, key: key, s: s, home: l.c.home(x), deadline: l.c.deadline()}
		l.attaches[key] = a
		l.c.stats.LeaseAttaches++
		a.waiting = append(a.waiting, w)
		a.begin()
		return
	}
	a.waiting = append(a.waiting, w)
}

// begin is step 1: the marker names the shard as a holder.
func (a *attach) begin() {
	a.asked = len(a.waiting)
	a.l.c.readMarker(a.key.x, a.deadline, func(kv codec.KV, mk LeaseMarker, found bool, st codec.Status) {
		switch {
		case st.Code != codec.OK:
			a.failed(st)
		case !found:
			a.end(leaseGone, 0)
		case a.s == a.home:
			a.m = mk.Member
			a.end(leaseKnown, kv.CreateRevision)
		case a.other != 0 && a.other != mk.Member:
			// The key on s is attached to a lease that once stood for X: its marker was there before the key
			// was, and is not the one that is there now. So it has ended.
			m := a.other
			a.other = 0
			a.s.ask(codec.MethodLeaseRevoke, revokeRequest(m), a.deadline, func(_ []byte, st codec.Status, _ bool) {
				if st.Code != codec.OK && st != codec.ErrLeaseNotFound {
					a.failed(st)
					return
				}
				a.begin()
			})
		case slices.Contains(mk.Shards, a.s.idx):
			a.m, a.other = mk.Member, 0
			a.grant()
		default:
			a.m, a.other = mk.Member, 0
			a.hold(&mk, kv.ModRevision)
		}
	})
}

// hold writes the shard into the marker.
func (a *attach) hold(mk *LeaseMarker, mod int64) {
	mk.Shards = append(mk.Shards, a.s.idx)
	slices.Sort(mk.Shards)
	a.home.ask(codec.MethodTxn, changeLeaseKey(a.key.x, mk, mod), a.deadline, func(resp []byte, st codec.Status, _ bool) {
		t, ok := parseTxnReply(resp, nil)
		switch {
		case st.Code != codec.OK:
			a.failed(st)
		case ok && t.succeeded:
			a.grant()
		default: // changed, or an earlier copy of this did it
			a.begin()
		}
	})
}

// grant is step 2.
func (a *attach) grant() {
	a.s.ask(codec.MethodLeaseGrant, grantRequest(a.m, copyTTL), a.deadline, func(_ []byte, st codec.Status, _ bool) {
		if st.Code != codec.OK && st != codec.ErrLeaseExist {
			a.failed(st)
			return
		}
		a.put()
	})
}

// put is step 3: the copy's key.
func (a *attach) put() {
	a.s.ask(codec.MethodTxn, createLeaseKey(a.key.x, a.m), a.deadline, func(resp []byte, st codec.Status, _ bool) {
		if st == codec.ErrLeaseNotFound { // somebody found the marker gone
			a.begin()
			return
		}
		if st.Code != codec.OK {
			a.failed(st)
			return
		}
		t, ok := parseTxnReply(resp, nil)
		switch {
		case ok && t.succeeded:
			a.look(t.rev)
			return
		case ok && len(t.resps) == 1:
			kv, found := firstKV(t.resps[0])
			switch {
			case found && kv.Lease == a.m:
				a.look(kv.CreateRevision)
				return
			case found && kv.Lease != 0:
				a.other = kv.Lease
				a.begin()
				return
			}
		}
		a.failed(errMemberReply)
	})
}

// look is step 4: the marker is still there.
func (a *attach) look(create int64) {
	a.asked = len(a.waiting)
	a.l.c.readMarker(a.key.x, a.deadline, func(_ codec.KV, mk LeaseMarker, found bool, st codec.Status) {
		switch {
		case st.Code != codec.OK:
			a.failed(st)
		case !found:
			a.l.revokeLater(a.s, a.m)
			a.end(leaseGone, 0)
		case mk.Member != a.m:
			a.l.revokeLater(a.s, a.m)
			a.begin()
		default:
			a.end(leaseKnown, create)
		}
	})
}

// end tells everyone who waits.
func (a *attach) end(state planLeaseState, create int64) {
	c := a.l.c
	if state == leaseKnown {
		a.l.table.learn(a.key.x, a.m, a.s.idx, create)
	} else {
		a.l.table.forget(a.key.x)
	}
	delete(a.l.attaches, a.key)
	for i, w := range a.waiting {
		if w.op.canceled {
			a.s.answer(w, statusCanceled)
			continue
		}
		if state == leaseGone && i >= a.asked {
			a.l.attach(a.s, w, a.key.x) // it came later: the lease may have been granted meanwhile
			continue
		}
		for i := range w.plan.leases {
			if pl := &w.plan.leases[i]; pl.id == a.key.x {
				pl.state, pl.member, pl.create = state, a.m, create
			}
		}
		c.resolveLeases(a.s, w)
	}
}

// failed ends the attach without a result. Who has not waited for the whole time tries again.
func (a *attach) failed(st codec.Status) {
	c := a.l.c
	delete(a.l.attaches, a.key)
	for _, w := range a.waiting {
		switch {
		case w.op.canceled:
			a.s.answer(w, statusCanceled)
		case st == codec.ErrTimeout && c.cfg.Now()-w.since < int64(c.cfg.ShardTimeout):
			a.l.attach(a.s, w, a.key.x)
		default:
			a.s.answer(w, st)
		}
	}
}
