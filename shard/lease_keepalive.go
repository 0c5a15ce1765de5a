package shard

import (
	"slices"

	"spindle/codec"
)

// This file keeps leases alive: one stream for each home, and for each lease one request under way, which
// answers all who asked meanwhile.

// keeper is the KeepAlive stream to one home.
type keeper struct {
	handle  codec.WatchHandle
	gen     uint64 // of the stream: a sink of an older one is ignored
	reopens int    // in a row, without a message
	opening bool
	waiting map[int64]*keepAlive // by M
}

// keepAlive is one lease that is being kept alive.
type keepAlive struct {
	l        *leases
	x, m     int64
	home     *shardState
	asked    []*Op
	rev      int64 // of the answer: what was known before home was asked
	deadline int64
	cached   bool // M is from the table, and may be an older lease than the one that X is now
	over     bool
}

func (c *Core) submitLeaseKeepAlive(op *Op, r *leaseRequest) {
	l := &c.leases
	if k := l.keeping[r.id]; k != nil {
		k.asked = append(k.asked, op)
		return
	}
	k := &keepAlive{l: l, x: r.id, home: c.home(r.id), asked: []*Op{op}, rev: c.clock.Log().N(), deadline: c.deadline()}
	l.keeping[r.id] = k
	l.kept = append(l.kept, k)
	l.armKept()
	if e := l.table.get(r.id); e != nil {
		k.m, k.cached = e.m, true
		k.send()
		return
	}
	k.find()
}

// find reads the marker.
func (k *keepAlive) find() {
	k.l.c.readMarker(k.x, k.deadline, func(kv codec.KV, mk LeaseMarker, found bool, st codec.Status) {
		switch {
		case k.over:
		case st.Code != codec.OK:
			k.end(0, st)
		case !found:
			k.end(0, codec.Status{})
		default:
			k.m, k.cached = mk.Member, false
			k.l.table.learn(k.x, k.m, k.home.idx, kv.CreateRevision)
			k.send()
		}
	})
}

func (k *keepAlive) send() {
	q := &k.home.lease.keeper
	if q.waiting == nil {
		q.waiting = make(map[int64]*keepAlive)
	}
	q.waiting[k.m] = k
	if q.handle != nil {
		k.home.sendKeepAlive(k.m)
		return
	}
	k.home.openKeeper()
}

// end answers everyone who asked: with a TTL, 0 for a lease that is gone, or an error.
func (k *keepAlive) end(ttl int64, st codec.Status) {
	if k.over {
		return
	}
	k.over = true
	c := k.l.c
	delete(k.l.keeping, k.x)
	if q := &k.home.lease.keeper; q.waiting[k.m] == k {
		delete(q.waiting, k.m)
	}
	hdr := c.hdr
	hdr.Revision = k.rev
	for _, op := range k.asked {
		if st.Code == codec.OK {
			b := codec.AppendHeaderField(op.Resp[:0], &hdr)
			b = codec.AppendInt(b, 2, k.x)
			op.Resp = codec.AppendInt(b, 3, ttl)
		}
		c.finish(op, st)
	}
}

// armKept ends those that home does not answer in time.
func (l *leases) armKept() {
	if l.sweeping || len(l.kept) == 0 {
		return
	}
	l.sweeping = true
	l.c.after(l.c.cfg.ShardTimeout/8, func() {
		l.sweeping = false
		now := l.c.cfg.Now()
		for len(l.kept) > 0 && (l.kept[0].over || l.kept[0].deadline <= now) {
			k := l.kept[0]
			l.kept[0] = nil
			l.kept = l.kept[1:]
			k.end(0, codec.ErrTimeout)
		}
		l.armKept()
	})
}

func (s *shardState) sendKeepAlive(m int64) {
	c := s.c
	c.scratch = codec.AppendInt(c.scratch[:0], 1, m)
	s.lease.keeper.handle.Send(c.scratch)
}

// openKeeper opens the stream, and asks on it for everything that waits.
func (s *shardState) openKeeper() {
	q := &s.lease.keeper
	if q.opening {
		return
	}
	q.gen++
	q.handle = s.c.tr.KeepAlive(s.cluster, &keeperSink{s, q.gen})
	all := make([]int64, 0, len(q.waiting))
	for m := range q.waiting {
		all = append(all, m)
	}
	slices.Sort(all)
	for _, m := range all {
		s.sendKeepAlive(m)
	}
}

func (q *keeper) close() {
	q.gen++
	if q.handle != nil {
		q.handle.Close()
		q.handle = nil
	}
}

// keeperSink is one opening of a KeepAlive stream.
type keeperSink struct {
	s   *shardState
	gen uint64
}

// OnMessage implements codec.WatchSink.
func (k *keeperSink) OnMessage(msg []byte) {
	q := &k.s.lease.keeper
	if k.gen != q.gen {
		return
	}
	q.reopens = 0
	r := parseLeaseReply(msg)
	a := q.waiting[r.id]
	if a == nil {
		return
	}
	delete(q.waiting, r.id)
	if r.ttl <= 0 && a.cached {
		a.l.table.ended(a.x, a.m)
		a.find()
		return
	}
	a.end(max(r.ttl, 0), codec.Status{})
}

// OnEnd implements codec.WatchSink.
func (k *keeperSink) OnEnd(st codec.Status) {
	s := k.s
	q := &s.lease.keeper
	if k.gen != q.gen {
		return
	}
	q.handle, q.opening = nil, true
	d := min(retryDelay<<min(q.reopens, 10), maxReopenDelay)
	q.reopens++
	s.c.after(s.c.jitter(d), func() {
		q.opening = false
		if s.c.state == stateReady && q.handle == nil && len(q.waiting) > 0 {
			s.openKeeper()
		}
	})
}
