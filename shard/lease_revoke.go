package shard

import (
	"slices"
	"time"

	"spindle/codec"
)

// This file ends leases: a client's LeaseRevoke, and the copies of leases that ended otherwise.

// leaseRevoke is one LeaseRevoke under way.
type leaseRevoke struct {
	c        *Core
	op       *Op
	x, m     int64
	home     *shardState
	deadline int64
	rev      int64 // of the answer
	waiting  int   // for now, and for each shard that has the lease
	seen     bool  // the marker's end, and with it the holders
	done     bool
}

func (c *Core) submitLeaseRevoke(op *Op, req *leaseRequest) {
	r := &leaseRevoke{c: c, op: op, x: req.id, home: c.home(req.id), deadline: c.leaseDeadline(op), waiting: 2}
	c.Now(func(rev int64, st codec.Status) { r.part(rev, st) })
	c.readMarker(r.x, r.deadline, func(_ codec.KV, mk LeaseMarker, found bool, st codec.Status) {
		switch {
		case r.done:
		case st.Code != codec.OK:
			r.finish(st)
		case !found:
			r.finish(codec.ErrLeaseNotFound)
		default:
			r.m = mk.Member
			c.leases.revoking[r.m] = append(c.leases.revoking[r.m], r)
			r.revoke(r.home)
		}
	})
}

// part takes one of the things that the answer needs: now, or a shard without the lease, at a revision.
func (r *leaseRevoke) part(rev int64, st codec.Status) {
	r.rev = max(r.rev, rev)
	if r.waiting--; st.Code != codec.OK || r.waiting == 0 {
		r.finish(st)
	}
}

func (r *leaseRevoke) finish(st codec.Status) {
	if r.done {
		return
	}
	r.done = true
	l := &r.c.leases
	if rs := slices.DeleteFunc(l.revoking[r.m], func(o *leaseRevoke) bool { return o == r }); len(rs) > 0 {
		l.revoking[r.m] = rs
	} else {
		delete(l.revoking, r.m)
	}
	if st.Code == codec.OK {
		hdr := r.c.hdr
		hdr.Revision = r.rev
		r.op.Resp = codec.AppendHeaderField(r.op.Resp[:0], &hdr)
	}
	r.c.finish(r.op, st)
}

// revoke ends M on s, and waits until a record covers what went with it.
func (r *leaseRevoke) revoke(s *shardState) {
	s.ask(codec.MethodLeaseRevoke, revokeRequest(r.m), r.deadline, func(resp []byte, st codec.Status, unknown bool) {
		switch {
		case st.Code == codec.OK:
			r.cover(s, parseLeaseReply(resp).rev)
		case st == codec.ErrLeaseNotFound && s == r.home && !unknown:
			r.finish(st) // somebody was faster, or it expired
		case st == codec.ErrLeaseNotFound:
			// Its end lies before a read that begins now.
			s.ask(codec.MethodRange, codec.AppendBytes(nil, rangeKey, AppendLeaseKey(nil, r.x)), r.deadline, func(resp []byte, st codec.Status, _ bool) {
				if st.Code != codec.OK {
					r.failed(s, st)
					return
				}
				r.cover(s, parseLeaseReply(resp).rev)
			})
		default:
			r.failed(s, st)
		}
	})
}

// failed ends the request; a copy is revoked when its shard answers again.
func (r *leaseRevoke) failed(s *shardState, st codec.Status) {
	if s != r.home {
		r.c.leases.revokeLater(s, r.m)
	}
	r.finish(st)
}

func (r *leaseRevoke) cover(s *shardState, local int64) {
	if r.done {
		return
	}
	s.cover(local, r.deadline, func(st codec.Status) {
		if r.done {
			return
		}
		if st.Code == codec.OK && s == r.home && !r.seen {
			// The stream did not say who the holders were (its history was compacted): ask everybody.
			var all []int
			for i := range r.c.shards {
				all = append(all, i)
			}
			r.markerGone(all)
		}
		r.part(s.rec.last, st)
	})
}

// markerGone is told by the stream that the marker has ended, and who the holders are.
func (r *leaseRevoke) markerGone(holders []int) {
	if r.seen {
		return
	}
	r.seen = true
	if r.c.cfg.Sabotage.KeepCopies {
		return
	}
	for _, i := range holders {
		if i < len(r.c.shards) && i != r.home.idx {
			r.waiting++
			r.revoke(r.c.shards[i])
		}
	}
}

// revokeLater revokes M on s a random moment later, unless the stream shows meanwhile that somebody did.
func (l *leases) revokeLater(s *shardState, m int64) {
	q := &s.lease
	if _, twice := q.queued[m]; twice || l.c.state != stateReady || l.c.cfg.Sabotage.KeepCopies {
		return
	}
	if len(q.queue) >= maxQueuedRevokes {
		l.reconcileSoon()
		return
	}
	if q.queued == nil {
		q.queued = make(map[int64]struct{})
	}
	q.queued[m] = struct{}{}
	q.queue = append(q.queue, m)
	l.armRevokes(s)
}

func (l *leases) armRevokes(s *shardState) { l.armRevokesIn(s, vanishJitter) }

// pauseRevokes lets a shard's copies wait, because it is away.
func (l *leases) pauseRevokes(s *shardState) {
	s.lease.ready = 0
	l.armRevokesIn(s, awayRevokes)
}

func (l *leases) armRevokesIn(s *shardState, d time.Duration) {
	q := &s.lease
	if q.armed || len(q.queue) <= q.ready {
		return
	}
	q.armed = true
	l.c.after(l.c.jitter(d), func() {
		q.armed = false
		q.ready = len(q.queue)
		l.sendRevokes(s)
	})
}

// sendRevokes revokes copies whose moment has come. While the shard is away nothing is tried but once in awayRevokes:
// calls that fail at once would run through the whole queue, again and again.
func (l *leases) sendRevokes(s *shardState) {
	c := l.c
	q := &s.lease
	if q.ready > 0 && !c.connected(s.idx) {
		l.pauseRevokes(s)
		return
	}
	for q.ready > 0 && q.inFlight < maxRevokesInFlight && c.state == stateReady {
		m := q.queue[0]
		q.queue = q.queue[1:]
		q.ready--
		if _, wanted := q.queued[m]; !wanted {
			continue
		}
		q.inFlight++
		c.tr.Call(s.cluster, codec.MethodLeaseRevoke, revokeRequest(m), c.cfg.ShardTimeout, completion(func(_ []byte, st codec.Status, sent bool) {
			q.inFlight--
			_, wanted := q.queued[m]
			switch {
			case leaseFinal(st):
				if st.Code == codec.OK {
					c.stats.LeaseCopiesRevoked++
				}
				delete(q.queued, m)
			case wanted: // the shard is away: again, until it is back
				q.queue = append(q.queue, m)
				if !sent {
					l.pauseRevokes(s)
				}
			}
			l.sendRevokes(s)
		}))
	}
	l.armRevokes(s)
}
