package shard

import (
	"slices"
	"time"

	"spindle/codec"
)

// This file is the KeepAlive streams to one home.
//
// A member answers a stream's requests in order, and etcd answers for a lease whose time is over only once it has
// been revoked, which can take long when many leases end at once. So when a stream stands still, it is given up, and
// home is asked for each of its leases how long it has to live, which etcd answers at once: those that live go to a new
// stream, those whose time is over are not asked for. For a while every lease is asked about first.

const (
	// keeperLook is how often it is looked whether something stands still.
	keeperLook = keeperStall / 2
	// keeperStall is how long a stream may leave its oldest request without an answer.
	keeperStall = 250 * time.Millisecond
	// keeperCareful is for how long leases are probed before they are asked for, after one was over.
	keeperCareful = 5 * time.Second
	// maxProbes bounds the probes under way to one home; further leases wait for an answer to one.
	maxProbes = 64
	// probeTimeout is what a probe may take: a node that is mute costs it a turn.
	probeTimeout = time.Second
	// maxEdgeStreams bounds the streams for leases in the last second of their life, or the first one behind it: etcd
	// does not tell these apart. With more of them they share streams, and are probed again when one stands still.
	maxEdgeStreams = 16
)

// keeper is what keeps the leases of one home alive.
type keeper struct {
	cur     *keeperStream // nil while there is none
	edges   []*keeperStream
	unsent  []*keepAlive // wait for a stream
	reopens int          // in a row, without a message
	opening bool         // between two streams

	careful int64        // until when leases are probed first
	probes  []*keepAlive // wait to be probed
	probing int

	waiting int        // keep-alives under way
	heard   int64      // when home answered anything
	mute    bool       // it has not, for long
	oldest  *keepAlive // during a sweep
}

// keeperStream is one stream. It is the sink of its messages.
type keeperStream struct {
	s      *shardState
	handle codec.WatchHandle
	sent   []*keepAlive // without an answer, in order
	closed bool
}

func (q *keeper) hears(now int64) { q.heard, q.mute = now, false }

// keep asks home to keep a lease alive, if need be after a look whether it lives.
func (s *shardState) keep(k *keepAlive) {
	if s.lease.keeper.careful > s.c.cfg.Now() {
		s.probe(k)
		return
	}
	s.renew(k)
}

// renew asks home to keep a lease alive.
func (s *shardState) renew(k *keepAlive) {
	q := &s.lease.keeper
	if q.cur == nil {
		q.unsent = append(q.unsent, k)
		s.openKeeper()
		return
	}
	q.cur.send(k)
}

// probe asks home whether a lease lives.
func (s *shardState) probe(k *keepAlive) {
	s.lease.keeper.probes = append(s.lease.keeper.probes, k)
	s.sendProbes()
}

func (s *shardState) sendProbes() {
	c, q := s.c, &s.lease.keeper
	for q.probing < maxProbes && len(q.probes) > 0 {
		k := q.probes[0]
		q.probes[0] = nil
		q.probes = q.probes[1:]
		if k.over {
			continue
		}
		q.probing++
		c.tr.Call(s.cluster, codec.MethodLeaseTimeToLive, timeToLiveRequest(k.m, false), probeTimeout, completion(func(resp []byte, st codec.Status, _ bool) {
			if c.state != stateReady {
				return
			}
			q.probing--
			s.probed(k, resp, st)
			s.sendProbes()
		}))
	}
}

func (s *shardState) probed(k *keepAlive, resp []byte, st codec.Status) {
	c, q := s.c, &s.lease.keeper
	if st.Code != codec.OK {
		c.after(c.jitter(keeperLook), func() {
			if !k.over {
				s.probe(k)
			}
		})
		return
	}
	q.hears(c.cfg.Now())
	r := parseLeaseReply(resp)
	switch {
	case k.over:
	case r.ttl > 0:
		s.renew(k)
	case r.ttl < 0 && r.granted <= 0:
		k.gone()
	case r.ttl < 0:
		// Its time is over. It is gone when it has been revoked (a new leader may yet give it its time again).
		q.careful = c.cfg.Now() + int64(keeperCareful)
		k.end(0, codec.ErrTimeout)
	default:
		s.renewAtTheEdge(k)
	}
}

// renewAtTheEdge asks home on a stream of its own, as far as there are enough.
func (s *shardState) renewAtTheEdge(k *keepAlive) {
	q := &s.lease.keeper
	if len(q.edges) < maxEdgeStreams {
		st := &keeperStream{s: s}
		q.edges = append(q.edges, st)
		st.handle = s.c.tr.KeepAlive(s.cluster, st)
		st.send(k)
		return
	}
	slices.MinFunc(q.edges, func(a, b *keeperStream) int { return len(a.sent) - len(b.sent) }).send(k)
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

// relieveKeeper gives up streams that stand still, and probes what was asked for on them.
func (s *shardState) relieveKeeper(now int64) {
	q := &s.lease.keeper
	for _, st := range append(slices.Clone(q.edges), q.cur) {
		if st == nil || len(st.sent) == 0 || now-st.sent[0].at < int64(keeperStall) {
			continue
		}
		st.leave()
		q.careful = now + int64(keeperCareful)
		for _, k := range st.sent {
			if !k.over {
				s.probe(k)
			}
		}
	}
}

func (q *keeper) close() {
	for _, st := range append(q.edges, q.cur) {
		if st != nil {
			st.close()
		}
	}
	*q = keeper{waiting: q.waiting}
}

func (st *keeperStream) send(k *keepAlive) {
	k.served = len(k.asked)
	c := st.s.c
	k.at = c.cfg.Now()
	st.sent = append(st.sent, k)
	c.scratch = codec.AppendInt(c.scratch[:0], 1, k.m)
	st.handle.Send(c.scratch)
}

// leave closes st and forgets it.
func (st *keeperStream) leave() {
	q := &st.s.lease.keeper
	st.close()
	if st == q.cur {
		q.cur = nil
	}
	q.edges = slices.DeleteFunc(q.edges, func(o *keeperStream) bool { return o == st })
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
	q := &st.s.lease.keeper
	q.reopens = 0
	q.hears(st.s.c.cfg.Now())
	r := parseLeaseReply(msg)
	i := slices.IndexFunc(st.sent, func(k *keepAlive) bool { return k.m == r.id })
	if i < 0 {
		return
	}
	k := st.sent[i]
	if i == 0 { // nearly always: answers come in order
		st.sent[0] = nil
		st.sent = st.sent[1:]
	} else {
		st.sent = slices.Delete(st.sent, i, i+1)
	}
	if st != q.cur && len(st.sent) == 0 {
		st.leave()
	}
	switch {
	case k.over:
	case r.ttl <= 0:
		k.gone()
	default:
		k.end(r.ttl, codec.Status{})
	}
}

// OnEnd implements codec.WatchSink.
func (st *keeperStream) OnEnd(codec.Status) {
	if st.closed {
		return
	}
	s := st.s
	q := &s.lease.keeper
	st.closed = true
	st.leave()
	q.unsent = append(q.unsent, st.sent...)
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
				s.keep(k)
			}
		}
	})
}
