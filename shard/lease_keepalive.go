package shard

import (
	"slices"

	"spindle/codec"
)

// This file keeps leases alive: for each lease one request under way, which answers all who asked meanwhile. The
// streams to the homes are in lease_keeper.go.
//
// Whoever asks for many leases has a bounded number of places for questions, so none may wait long here: a lease whose
// time is over and a home that says nothing are answered with ErrTimeout soon, and may be asked for again.

const (
	// keeperMute is how long a home may answer nothing at all while it is asked. Then one keep-alive waits for it, until
	// its deadline, and all others are answered at once.
	keeperMute = 2 * keeperStall
	// maxKeptAtHome bounds the leases of one home under way. Further ones are answered like those of a mute home.
	maxKeptAtHome = 4096
)

// keepAlive is one lease that is being kept alive.
type keepAlive struct {
	l        *leases
	x, m     int64
	home     *shardState
	asked    []*Op
	looked   int   // of asked: those who were there when the marker was last read
	served   int   // of asked: those who were there when home was asked
	rev      int64 // of the answer: what was known before home was asked
	begun    int64
	deadline int64
	at       int64 // when home was asked on a stream
	cached   bool  // M is from the table, and may be an older lease than the one that X is now
	over     bool
}

func (c *Core) submitLeaseKeepAlive(op *Op, r *leaseRequest) {
	l := &c.leases
	if k := l.keeping[r.id]; k != nil {
		k.asked = append(k.asked, op)
		return
	}
	home := c.home(r.id)
	q := &home.lease.keeper
	switch {
	case !c.connected(home.idx):
		c.finish(op, codec.Status{Code: codec.Unavailable, Msg: "spindle: no connection to member cluster " + home.name + ", which judges this lease"})
		return
	case q.mute && q.waiting > 0, q.waiting >= maxKeptAtHome:
		c.finish(op, codec.ErrTimeout)
		return
	}
	k := &keepAlive{l: l, x: r.id, home: home, asked: []*Op{op}, rev: c.clock.Log().N(), begun: c.cfg.Now(), deadline: c.deadline()}
	q.waiting++
	l.keeping[r.id] = k
	l.kept = append(l.kept, k)
	l.armKept()
	if e := l.table.get(r.id); e != nil {
		k.m, k.cached = e.m, true
		home.keep(k)
		return
	}
	k.find()
}

// find reads the marker.
func (k *keepAlive) find() {
	k.looked = len(k.asked)
	k.l.c.readMarker(k.x, k.deadline, func(kv codec.KV, mk LeaseMarker, found bool, st codec.Status) {
		switch {
		case k.over:
		case st.Code != codec.OK:
			k.end(0, st)
		case !found:
			k.home.lease.keeper.hears(k.l.c.cfg.Now())
			k.end(0, codec.Status{})
		default:
			k.home.lease.keeper.hears(k.l.c.cfg.Now())
			k.m, k.cached = mk.Member, false
			k.l.table.learn(k.x, k.m, k.home.idx, kv.CreateRevision)
			k.home.keep(k)
		}
	})
}

// gone is for an M that home does not know.
func (k *keepAlive) gone() {
	if k.cached {
		k.l.table.ended(k.x, k.m)
		k.find()
		return
	}
	k.end(0, codec.Status{})
}

// end answers everyone who asked: with a TTL, 0 for a lease that is gone, or an error.
func (k *keepAlive) end(ttl int64, st codec.Status) {
	if k.over {
		return
	}
	k.over = true
	k.home.lease.keeper.waiting--
	c := k.l.c
	delete(k.l.keeping, k.x)
	hdr := c.hdr
	hdr.Revision = k.rev
	for i, op := range k.asked {
		if st.Code == codec.OK && (ttl <= 0 && i >= k.looked || ttl > 0 && i >= k.served) {
			c.Submit(op) // it came later: the lease may have been granted, or have ended, before it did
			continue
		}
		if st.Code == codec.OK {
			b := codec.AppendHeaderField(op.Resp[:0], &hdr)
			b = codec.AppendInt(b, 2, k.x)
			op.Resp = codec.AppendInt(b, 3, ttl)
		}
		c.finish(op, st)
	}
}

// armKept looks at what waits, as long as anything does.
func (l *leases) armKept() {
	if l.sweeping || len(l.kept) == 0 {
		return
	}
	l.sweeping = true
	l.c.after(keeperLook, func() {
		l.sweeping = false
		l.sweepKept()
		l.armKept()
	})
}

// sweepKept ends those that home does not answer in time, and sees to streams and homes that do not answer.
func (l *leases) sweepKept() {
	now := l.c.cfg.Now()
	kept := l.kept
	l.kept = nil
	for _, s := range l.c.shards {
		s.lease.keeper.oldest = nil
	}
	for _, k := range kept {
		if k.deadline <= now {
			k.end(0, codec.ErrTimeout)
		}
		if q := &k.home.lease.keeper; !k.over && q.oldest == nil {
			q.oldest = k
			q.mute = q.mute || min(now-k.begun, now-q.heard) >= int64(keeperMute)
		} else if !k.over && q.mute {
			k.end(0, codec.ErrTimeout)
		}
	}
	l.kept = append(slices.DeleteFunc(kept, func(k *keepAlive) bool { return k.over }), l.kept...)
	for _, s := range l.c.shards {
		s.lease.keeper.oldest = nil
		s.relieveKeeper(now)
	}
}
