package shard

import (
	"slices"

	"spindle/codec"
)

// This file keeps leases alive: one stream for each home, and for each lease one request under way, which
// answers all who asked meanwhile.
//
// A member answers a stream's requests in order, and etcd answers for a lease whose time is over only once it has
// been revoked, which can take long when many leases end at once. So that such a lease holds nobody up, what stands
// behind it goes to a new stream.

// maxStalledKeepers bounds the streams to one home that wait for one such lease each. With one more the oldest is
// given up, and who asked for its lease gets a timeout.
const maxStalledKeepers = 16

// keeper is the KeepAlive streams to one home.
type keeper struct {
	cur     *keeperStream // nil while there is none
	stalled []*keeperStream
	unsent  []*keepAlive // wait for a stream
	reopens int          // in a row, without a message
	opening bool         // between two streams
}

// keeperStream is one stream. It is the sink of its messages.
type keeperStream struct {
	s      *shardState
	handle codec.WatchHandle
	sent   []*keepAlive // without an answer, in order
	closed bool
}

// keepAlive is one lease that is being kept alive.
type keepAlive struct {
	l        *leases
	x, m     int64
	home     *shardState
	asked    []*Op
	looked   int   // of asked: those who were there when the marker was last read
	served   int   // of asked: those who were there when home was asked
	rev      int64 // of the answer: what was known before home was asked
	deadline int64
	at       int64 // when home was asked
	cached   bool  // M is from the table, and may be an older lease than the one that X is now
	over     bool
}

func (c *Core) submitLeaseKeepAlive(op *Op, r *leaseRequest) {
	l := &c.leases
	if k := l.keeping[r.id]; k != nil {
		k.asked = append(k.asked, op)
		return
	}
	if home := c.home(r.id); !c.connected(home.idx) {
		// At once: a client's further keep-alives, of leases of other homes, may wait behind this one.
		c.finish(op, codec.Status{Code: codec.Unavailable, Msg: "spindle: no connection to member cluster " + home.name + ", which judges this lease"})
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
	k.looked = len(k.asked)
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
	if q.cur != nil {
		q.cur.send(k)
		return
	}
	q.unsent = append(q.unsent, k)
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
		for _, s := range l.c.shards {
			s.relieveKeeper(now)
		}
		l.armKept()
	})
}

// openKeeper opens a stream, and asks on it for everything that waits.
func (s *shardState) openKeeper() {
	q := &s.lease.keeper
	if q.opening || q.cur != nil {
		return
	}
	st := &keeperStream{s: s}
	q.cur = st
	st.handle = s.c.tr.KeepAlive(s.cluster, st)
	all := q.unsent
	q.unsent = nil
	for _, k := range all {
		if !k.over {
			st.send(k)
		}
	}
}

// relieveKeeper gives up stalled streams that nobody waits for any more, and begins a new one if the present one
// has not answered for a while.
func (s *shardState) relieveKeeper(now int64) {
	q := &s.lease.keeper
	q.stalled = slices.DeleteFunc(q.stalled, func(st *keeperStream) bool {
		if len(st.sent) > 0 && !st.sent[0].over {
			return false
		}
		st.close()
		return true
	})
	st := q.cur
	if st == nil || len(st.sent) == 0 || now-st.sent[0].at < int64(s.c.cfg.ShardTimeout/8) {
		return
	}
	q.cur, q.unsent = nil, append(q.unsent, st.sent[1:]...)
	st.sent = st.sent[:1:1]
	q.stalled = append(q.stalled, st)
	if len(q.stalled) > maxStalledKeepers {
		old := q.stalled[0]
		q.stalled = slices.Delete(q.stalled, 0, 1)
		old.close()
		old.sent[0].end(0, codec.ErrTimeout)
	}
	if len(q.unsent) > 0 {
		s.openKeeper()
	}
}

func (q *keeper) close() {
	for _, st := range q.stalled {
		st.close()
	}
	if q.cur != nil {
		q.cur.close()
	}
	*q = keeper{}
}

func (st *keeperStream) send(k *keepAlive) {
	k.served = len(k.asked)
	c := st.s.c
	k.at = c.cfg.Now()
	st.sent = append(st.sent, k)
	c.scratch = codec.AppendInt(c.scratch[:0], 1, k.m)
	st.handle.Send(c.scratch)
}

func (st *keeperStream) close() {
	if !st.closed {
		st.closed = true
		st.handle.Close()
	}
}

// OnMessage implements codec.WatchSink.
func (st *keeperStream) OnMessage(msg []byte) {
	if st.closed {
		return
	}
	st.s.lease.keeper.reopens = 0
	r := parseLeaseReply(msg)
	i := slices.IndexFunc(st.sent, func(k *keepAlive) bool { return k.m == r.id })
	if i < 0 {
		return // asked for on another stream since
	}
	k := st.sent[i]
	if i == 0 { // nearly always: answers come in order
		st.sent[0] = nil
		st.sent = st.sent[1:]
	} else {
		st.sent = slices.Delete(st.sent, i, i+1)
	}
	switch {
	case k.over:
	case r.ttl <= 0 && k.cached:
		k.l.table.ended(k.x, k.m)
		k.find()
	default:
		k.end(max(r.ttl, 0), codec.Status{})
	}
}

// OnEnd implements codec.WatchSink.
func (st *keeperStream) OnEnd(codec.Status) {
	if st.closed {
		return
	}
	st.closed = true
	s := st.s
	q := &s.lease.keeper
	q.unsent = append(q.unsent, st.sent...)
	if st != q.cur {
		q.stalled = slices.DeleteFunc(q.stalled, func(o *keeperStream) bool { return o == st })
	} else {
		q.cur = nil
	}
	if q.opening {
		return
	}
	q.opening = true
	d := min(retryDelay<<min(q.reopens, 10), maxReopenDelay)
	q.reopens++
	s.c.after(s.c.jitter(d), func() {
		q.opening = false
		all := q.unsent
		q.unsent = nil
		for _, k := range all {
			if !k.over && s.c.state == stateReady {
				k.send()
			}
		}
	})
}
