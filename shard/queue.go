package shard

import (
	"fmt"
	"slices"

	"spindle/codec"
	"spindle/revclock"
)

// This file is what happens to a write before it is in a batch: it is routed to its shard, what its bytes
// need is looked up, and it waits in the shard's queue for the next batch, for the shard timeout at most.

// submitWrite routes a Put, DeleteRange or writing Txn.
func (c *Core) submitWrite(op *Op) {
	p := &op.core.plan
	shard, one := c.shardOf(p)
	if !one {
		if op.Kind == OpDeleteRange {
			c.submitDeleteAll(op)
			return
		}
		if c.submitWide(op) {
			return
		}
		c.finish(op, errCrossShard)
		return
	}
	if c.shards[shard].noRoomFor(p) {
		c.finish(op, codec.ErrNoSpace)
		return
	}
	if op.core.since == 0 { // else it comes from the road of reads (doomed.go)
		op.core.since = c.cfg.Now()
	}
	if c.submitDoomed(op) {
		return
	}
	w := &op.core.w
	*w = write{op: op, plan: p, since: op.core.since}
	if p.HasLease() {
		c.resolveLeases(c.shards[shard], w)
		return
	}
	c.prepare(c.shards[shard], w)
}

// errCrossShard is the answer to a Txn whose keys lie on more than one shard.
var errCrossShard = codec.Status{Code: codec.InvalidArgument,
	Msg: "spindle: the keys of this txn lie on more than one shard, and a txn over several shards is not built yet: use keys of one shard, or several txns"}

// shardOf returns the shard on which everything that p may touch lies.
func (c *Core) shardOf(p *Plan) (shard int, one bool) {
	shard = -1
	for _, list := range [2][]Interval{p.Writes, p.Reads} {
		for _, iv := range list {
			i, all := c.part.ShardsOf(iv.Key, iv.End)
			if all {
				if len(c.shards) > 1 {
					return 0, false
				}
				i = 0
			}
			if shard >= 0 && i != shard {
				return 0, false
			}
			shard = i
		}
	}
	return max(shard, 0), true
}

// prepare brings w to the shard's queue: at once if everything that its bytes need is known, else after
// a read.
func (c *Core) prepare(s *shardState, w *write) {
	if w.plan.Slow() || !c.knowCreates(w.plan) {
		s.lookup(w)
		return
	}
	s.enqueue(w)
}

// knowCreates fills in the create revisions of the keys that p puts, from memory.
func (c *Core) knowCreates(p *Plan) bool {
	known := true
	for i := range p.PutSlots {
		slot := &p.PutSlots[i]
		if slot.Known {
			continue
		}
		if slot.Proven == 0 {
			slot.Create, slot.Known, slot.Guard = Create{}, true, false
			continue
		}
		local, meta, mod, ok := c.creates.Get(slot.Key)
		if !ok {
			known = false
			continue
		}
		slot.Create, slot.Known = Create{Local: local, Meta: meta}, true
		// The request's own compare proves the incarnation when it names a revision of its life.
		slot.Guard = !(slot.Proven > 0 && local > 0 && meta <= slot.Proven && slot.Proven <= mod)
	}
	return known
}

func (s *shardState) enqueue(w *write) {
	s.queue = append(s.queue, w)
	s.armExpiry()
	s.touch()
}

// requeue puts writes back in front, in order.
func (s *shardState) requeue(ws []*write) {
	for _, w := range ws {
		w.rev = 0
	}
	s.queue = append(append(make([]*write, 0, len(ws)+len(s.queue)), ws...), s.queue...)
	s.touch()
}

func (s *shardState) touch() { s.c.dirty = true }

// answer ends w with an error. Whoever waits may use the Op anew at once: w must not be looked at again.
func (s *shardState) answer(w *write, st codec.Status) {
	if w.finish != nil {
		w.finish(w, nil, st)
		return
	}
	s.c.finish(w.op, st)
}

// answerWith ends w with a complete response message.
func (s *shardState) answerWith(w *write, out []byte, st codec.Status) {
	if w.finish != nil {
		w.finish(w, out, st)
		return
	}
	w.op.Resp = out
	s.c.finish(w.op, st)
}

// liveness is what a Transport may tell besides: whether a cluster has a live connection.
type liveness interface{ Connected(codec.ClusterID) bool }

// flushWrites closes the next batch if none is under way, or if it is time to close one behind that.
func (s *shardState) flushWrites() {
	if s.cur != nil && !s.mayCloseAhead() {
		return
	}
	if s.cur == nil && (len(s.queue) == 0 && !s.wantFence || s.holdBack()) {
		return
	}
	c := s.c
	if s.failRefused() || c.connecting != nil {
		return
	}
	s.failNoSpace()
	if l, ok := c.tr.(liveness); ok && !l.Connected(s.cluster) {
		// A range that nobody can fill would only hold the watches of all shards back.
		if !s.offline {
			s.offline = true
			c.after(c.jitter(2*retryDelay), func() { s.offline = false; s.touch() })
		}
		return
	}
	if s.nearLead() {
		s.closeBatch(nil) // it brings the clock near before anything else may go
		return
	}
	s.divertDoomed()
	into := s.spareWrites
	s.spareWrites = nil
	var canceled []*write
	ws, rest := s.former.form(s.queue, batchLimits{c.cfg.MemberMaxTxnOps, c.cfg.MemberMaxRequestBytes}, s.cur != nil,
		into, func(w *write) { canceled = append(canceled, w) })
	for i := len(rest); i < len(s.queue); i++ {
		s.queue[i] = nil
	}
	s.queue = rest
	for _, w := range canceled {
		s.answer(w, statusCanceled)
	}
	if len(ws) > 0 || s.cur == nil && s.wantFence {
		s.closeBatch(ws)
		return
	}
	s.spareWrites = ws
	if s.cur != nil {
		s.cur.lastOne = true
	}
}

// closeBatch makes a batch of ws, of nothing if there are none, and asks for its revisions.
func (s *shardState) closeBatch(ws []*write) {
	c := s.c
	if s.cur == nil {
		s.wantFence = false
	}
	s.batchID++
	now := c.cfg.Now()
	b := &batch{s: s, id: s.batchID, writes: ws, fence: len(ws) == 0, closed: now, deadline: now + int64(c.cfg.ShardTimeout)}
	b.spare = len(s.pending) > 0 && len(ws) > 0
	b.filter = batchFilter(nil, ws)
	if s.cur == nil {
		s.cur = b
	} else {
		s.next = b
		c.stats.Ahead++
	}
	n := len(ws)
	if b.spare || b.fence {
		n++
	}
	if b.loss = b.fence && s.marked > 0; b.loss {
		n = lossFence
	}
	c.nextToken++
	b.token = c.nextToken
	if b.fence {
		c.stats.Fences++
	}
	if !c.clock.Request(revclock.Request{
		Shard: s.idx, Count: n, Committed: s.known.last, Turn: s.rejections >= turnAfter,
		Filter: b.filter, Token: b.token,
	}) {
		c.fail(fmt.Errorf("the clock refused a request for %d revisions of member cluster %s", n, s.name))
		return
	}
	s.armExpiry()
}

// armExpiry sees to it that what waits too long is answered; one timer serves a shard.
func (s *shardState) armExpiry() {
	if !s.expiring {
		s.expiring = true
		s.c.after(s.c.cfg.ShardTimeout/8, s.expire)
	}
}

// expire answers the clients of a batch, and of requests in the queue, that have waited for the shard
// timeout.
func (s *shardState) expire() {
	s.expiring = false
	now := s.c.cfg.Now()
	var late []*write
	if b := s.next; b != nil && now >= b.deadline {
		late = append(late, b.writes...)
		b.writes, b.fence = nil, true
	}
	if b := s.cur; b != nil && now >= b.deadline {
		late = append(late, b.writes...)
		b.writes = nil
		if b.state == batchTicking {
			b.fence = true // the range will come; nothing but a record is written under it
		} else {
			s.dropBatch(b) // its range stays open until another record passes it
			s.wantFence = s.wantFence || s.cur == nil
		}
	}
	limit := now - int64(s.c.cfg.ShardTimeout)
	keep := s.queue[:0]
	for _, w := range s.queue {
		if w.since <= limit {
			late = append(late, w)
		} else {
			keep = append(keep, w)
		}
	}
	s.queue = keep
	var lateReads []readItem
	s.reads = slices.DeleteFunc(s.reads, func(it readItem) bool {
		gone := it.deadline <= now || it.op != nil && it.op.canceled
		if gone {
			lateReads = append(lateReads, it)
		}
		return gone
	})
	if len(s.queue) > 0 || s.cur != nil || len(s.reads) > 0 {
		s.armExpiry()
	}
	for _, w := range late {
		if w != nil {
			s.answer(w, codec.ErrTimeout)
		}
	}
	for i := range lateReads {
		lateReads[i].fail(s, codec.ErrTimeout)
	}
}

var statusCanceled = codec.Status{Code: codec.Canceled, Msg: "context canceled"}
