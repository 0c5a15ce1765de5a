package shard

import (
	"slices"
	"time"

	"spindle/codec"
)

// The files lease*.go are the protocol of docs/leases.md: one meaning of a lease on all shards, and one shard,
// its home, that judges whether it is alive. Words: X is the ID that clients know, M the one on the members, c
// the create revision of the lease's key (marker or copy) on a shard.

// Bounds and times of leases.
const (
	// maxKnownLeases bounds the table. When it is full the lease that was not used for longest is forgotten, which
	// costs its next user one read (at home) or one attach (on another shard).
	maxKnownLeases = 1 << 17
	// maxQueuedRevokes bounds the copies of one shard that wait to be revoked. What does not fit is found by the
	// next reconciliation.
	maxQueuedRevokes = 1 << 17
	// maxRevokesInFlight bounds the revokes of copies under way to one shard, so that leases that end by the
	// thousand do not flood it: each is a proposal of its own, and a client's batch stands behind all of them.
	// (8,000 leases at once: 64 under way 2.9 s and 332 ms for p99 of a write meanwhile, 8 take 2.7 s and 51 ms.)
	maxRevokesInFlight = 8
	// copyTTL is the TTL of a copy, in seconds: it never matters, only home judges. etcd's maximum is 9·10^9.
	copyTTL = 8_000_000_000
	// vanishJitter is the mean time after which a proxy revokes the copies of a lease that ended, so that of several
	// proxies mostly one does.
	vanishJitter = 100 * time.Millisecond
	// awayRevokes is how often it is looked whether a shard with such copies is back.
	awayRevokes = time.Second
	// reconcileFirst and reconcileEvery are when copies are reconciled after the start, and how often.
	reconcileFirst = time.Second
	reconcileEvery = time.Minute
	// reconcileRetry is the mean time until the next one where something may have been missed.
	reconcileRetry = 5 * time.Second
	// reconcilePage is the number of markers read at once.
	reconcilePage = 4096
	// aliasBit is set in the member's ID of a lease whose ID a client chose, and never in an ID that Spindle chose.
	aliasBit = 1 << 62
	// maxHomeDraws bounds the draws of an ID whose home has a connection; the last one is taken then.
	maxHomeDraws = 64
)

// leases is what a Core knows of leases and does about them.
type leases struct {
	c        *Core
	table    leaseTable
	attaches map[attachKey]*attach
	revoking map[int64][]*leaseRevoke // by M: they wait for the marker's end on the stream
	keeping  map[int64]*keepAlive     // by X
	kept     []*keepAlive             // the same, oldest first, and some that have ended
	sweeping bool

	reconciling bool
	again       bool // another reconciliation was asked for meanwhile
	soon        bool // a reconciliation is due before the minute
}

// leaseShard is the part of leases that belongs to one shard.
type leaseShard struct {
	covers []coverWait
	// missed says that it did not answer the last reconciliation.
	missed bool

	// Copies to be revoked: M in order, and as a set (what is not in the set any more was revoked by somebody).
	queue    []int64
	queued   map[int64]struct{}
	ready    int // of queue: their random moment has come
	armed    bool
	inFlight int

	keeper keeper
}

func newLeases(c *Core) leases {
	return leases{c: c, table: newLeaseTable(maxKnownLeases), attaches: make(map[attachKey]*attach),
		revoking: make(map[int64][]*leaseRevoke), keeping: make(map[int64]*keepAlive)}
}

// submitLease takes a request of the lease service.
func (c *Core) submitLease(op *Op) {
	var r leaseRequest
	if !r.parse(op.Kind, op.Msg) {
		c.finish(op, errUnmarshal)
		return
	}
	switch op.Kind {
	case OpLeaseGrant:
		c.submitLeaseGrant(op, &r)
	case OpLeaseRevoke:
		c.submitLeaseRevoke(op, &r)
	case OpLeaseKeepAlive:
		c.submitLeaseKeepAlive(op, &r)
	case OpLeaseTimeToLive:
		c.submitLeaseTimeToLive(op, &r)
	default:
		c.submitLeases(op, &r)
	}
}

// home returns the shard that judges lease id.
func (c *Core) home(id int64) *shardState { return c.shards[c.part.HomeOf(id)] }

// leaseDeadline is until when op is worked at.
func (c *Core) leaseDeadline(op *Op) int64 {
	d := c.deadline()
	if op.Deadline > 0 {
		d = min(d, op.Deadline)
	}
	return d
}

// ask sends one request about leases to a member until there is an answer or deadline (ns) has passed, which
// is ErrTimeout. All of them may be repeated. done gets unknown if an earlier copy may have been applied: then
// "not found" and "already exists" may be its own doing. resp is valid during done only.
func (s *shardState) ask(m codec.Method, req []byte, deadline int64, done func(resp []byte, st codec.Status, unknown bool)) {
	(&memberCall{s: s, m: m, req: req, deadline: deadline, done: done}).send()
}

// askOnce is ask for what must not be sent a second time unless no server has seen the first one. With unknown set
// its outcome was not learned.
func (s *shardState) askOnce(m codec.Method, req []byte, deadline int64, done func(resp []byte, st codec.Status, unknown bool)) {
	(&memberCall{s: s, m: m, req: req, deadline: deadline, once: true, done: done}).send()
}

type memberCall struct {
	s        *shardState
	once     bool
	m        codec.Method
	req      []byte
	deadline int64
	tries    int
	unknown  bool
	done     func(resp []byte, st codec.Status, unknown bool)
}

func (q *memberCall) send() {
	c := q.s.c
	left := q.deadline - c.cfg.Now()
	switch {
	case c.state != stateReady:
		q.done(nil, codec.ErrStopped, q.unknown)
	case left <= 0:
		q.done(nil, codec.ErrTimeout, q.unknown)
	default:
		// Half of the time at most, so that a node that has become mute costs a turn and not the request.
		span := c.cfg.ShardTimeout / attemptShare
		if !q.once {
			span = q.s.patience.get(c.cfg.Now(), span)
		}
		c.tr.Call(q.s.cluster, q.m, q.req, min(time.Duration(left), span), q)
	}
}

// Complete implements codec.Completion.
func (q *memberCall) Complete(resp []byte, st codec.Status, sent bool) {
	c := q.s.c
	switch {
	case c.state != stateReady:
		q.done(nil, codec.ErrStopped, q.unknown)
		return
	case leaseFinal(st):
		q.done(resp, st, q.unknown)
		return
	}
	if st.Code == codec.DeadlineExceeded && !q.once {
		q.s.patience.ranOut(c.cfg.Now(), c.cfg.ShardTimeout/attemptShare)
	}
	q.unknown = q.unknown || sent && st != codec.ErrTooManyRequests
	if q.once && q.unknown {
		q.done(nil, codec.ErrTimeout, true)
		return
	}
	d := min(retryDelay<<min(q.tries, 4), maxRetryDelay)
	q.tries++
	c.after(c.jitter(d), q.send)
}

// leaseFinal says that a member's answer will not be another one if it is asked again.
func leaseFinal(st codec.Status) bool {
	switch st.Code {
	case codec.Unavailable, codec.DeadlineExceeded, codec.Canceled, codec.Unknown, codec.Aborted, codec.Internal:
		return false
	case codec.ResourceExhausted:
		return st == codec.ErrNoSpace
	}
	return true
}

// readMarker reads X's marker at home, linearizably. found is false when there is none. kv is valid during done only.
func (c *Core) readMarker(x, deadline int64, done func(kv codec.KV, mk LeaseMarker, found bool, st codec.Status)) {
	home := c.home(x)
	home.ask(codec.MethodRange, codec.AppendBytes(nil, rangeKey, AppendLeaseKey(nil, x)), deadline,
		func(resp []byte, st codec.Status, _ bool) {
			if st.Code != codec.OK {
				done(codec.KV{}, LeaseMarker{}, false, st)
				return
			}
			kv, found := firstKV(resp)
			var mk LeaseMarker
			if found && !ParseLeaseMarker(&mk, kv.Value) {
				st = codec.Status{Code: codec.Internal, Msg: "spindle: the marker of a lease on member cluster " + home.name + " cannot be read by this version"}
			}
			done(kv, mk, found, st)
		})
}

// keyGone is told by a shard's stream that X's key there, a marker or a copy, was deleted at a local revision.
func (l *leases) keyGone(s *shardState, x, local int64, prev codec.KV) {
	c := l.c
	var mk LeaseMarker
	ok := prev.Key != nil && ParseLeaseMarker(&mk, prev.Value)
	l.table.gone(x, s.idx, local)
	if c.part.HomeOf(x) != s.idx {
		if ok {
			delete(s.lease.queued, mk.Member)
		}
		return
	}
	if !ok { // its last value was compacted away
		l.table.forget(x)
		l.reconcileSoon()
		return
	}
	l.table.ended(x, mk.Member)
	if rs := l.revoking[mk.Member]; rs != nil {
		for _, r := range slices.Clone(rs) {
			r.markerGone(mk.Shards)
		}
		return
	}
	if c.state != stateReady {
		return // most of this was long ago; the reconciliation at the start sees to the rest
	}
	for _, i := range mk.Shards {
		if i < len(c.shards) && i != s.idx {
			l.revokeLater(c.shards[i], mk.Member)
		}
	}
}

// stop ends everything that waits for something else than a member's answer.
func (l *leases) stop(st codec.Status) {
	for _, s := range l.c.shards {
		covers := s.lease.covers
		s.lease.covers = nil
		for _, w := range covers {
			w.f(st)
		}
		s.lease.keeper.close()
	}
	kept := l.kept
	l.kept = nil
	for _, k := range kept {
		k.end(0, st)
	}
}

// coverWait waits until a record covers everything up to a local revision of a shard.
type coverWait struct {
	local, deadline int64
	f               func(codec.Status)
}

// cover calls f once the stream has shown everything up to a local revision, and a record has given all of it a
// revision. If there is nothing else to write, an empty batch does.
func (s *shardState) cover(local, deadline int64, f func(codec.Status)) {
	c := s.c
	if s.covered(local) {
		f(codec.Status{})
		return
	}
	s.lease.covers = append(s.lease.covers, coverWait{local, deadline, f})
	s.expectOnStream(local)
	s.fenceCovers()
	c.at(deadline, func() {
		var late []coverWait
		s.lease.covers = slices.DeleteFunc(s.lease.covers, func(w coverWait) bool {
			if w.deadline > c.cfg.Now() {
				return false
			}
			late = append(late, w)
			return true
		})
		for _, w := range late {
			w.f(codec.ErrTimeout)
		}
	})
}

func (s *shardState) covered(local int64) bool {
	return s.pos >= local && (len(s.pending) == 0 || s.pending[0].local > local)
}

// fenceCovers sends an empty batch at once for events that a request waits for.
func (s *shardState) fenceCovers() {
	for _, w := range s.lease.covers {
		if s.pos >= w.local && s.cur == nil && !s.wantFence {
			s.wantFence = true
			s.touch()
			return
		}
	}
}

// streamMoved is told that a shard's stream has shown another local revision.
func (l *leases) streamMoved(s *shardState) {
	if len(s.lease.covers) == 0 {
		return
	}
	if slices.ContainsFunc(s.lease.covers, func(w coverWait) bool { return s.covered(w.local) }) {
		all := s.lease.covers
		s.lease.covers = nil
		for _, w := range all {
			if s.covered(w.local) {
				w.f(codec.Status{})
			} else {
				s.lease.covers = append(s.lease.covers, w)
			}
		}
	}
	s.fenceCovers()
}
