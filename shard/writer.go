package shard

import (
	"fmt"
	"slices"
	"time"

	"spindle/codec"
	"spindle/revclock"
)

// This file is the life of a batch on one shard:
//
//	queue -> closed (its tick is asked for) -> granted (it has its revisions and its bytes)
//	      -> sent, perhaps more than once -> committed | void | refused | unknown
//
// Exactly one batch per shard is between closed and its end. The bytes never change once they are made:
// whatever must change goes into a new batch with a new tick.

// retryDelay is the pause before a batch or a read is sent again, sendAgain how long a reply is waited
// for before the same bytes go out again.
const (
	retryDelay    = 10 * time.Millisecond
	maxRetryDelay = 500 * time.Millisecond // for a batch: the pause doubles
	// fenceJitter delays the empty batch that gives waiting unrecorded events a revision, so that of
	// several proxies mostly one sends it.
	fenceJitter = 10 * time.Millisecond
	// turnAfter is the number of rejections in a row after which a batch asks the others to wait.
	turnAfter = 2
)

type batchState uint8

const (
	batchTicking    batchState = iota // closed, waits for its range
	batchGranted                      // has its range, waits for its turn to be sent
	batchSent                         // a copy is under way
	batchWaiting                      // between two sends
	batchSettling                     // rejected after an unknown outcome: waits for the stream
	batchRecovering                   // committed, its answers are computed from history
)

// batch is one write batch of this proxy on one shard. It is the Completion of its own call.
type batch struct {
	s      *shardState
	id     uint64
	state  batchState
	tries  int // sends that told nothing
	writes []*write
	fence  bool
	filter []byte
	first  int64
	last   int64
	spare  bool
	record Record
	body   []byte
	// unknown says that an earlier copy's outcome was not learned: a rejection proves nothing then.
	unknown bool
	// blind says that the stream skipped records while this batch was on its way: not seeing its record
	// proves nothing.
	blind bool
	// seenAt is the shard's local revision at which the stream showed this batch's record, 0 before.
	seenAt int64
	// settleAt is the local revision through which the stream must come before a rejection counts.
	settleAt int64
	deadline int64
	slotAt   int64 // a timer is set for this moment to look again whether b may be sent
	pending  int   // history reads under way while recovering
}

// submitWrite routes a Put, DeleteRange or writing Txn.
func (c *Core) submitWrite(op *Op) {
	p := &op.core.plan
	if st := c.refuseLeases(p); st.Code != codec.OK {
		c.finish(op, st)
		return
	}
	shard, one := c.shardOf(p)
	if !one {
		if op.Kind == OpDeleteRange {
			c.submitDeleteAll(op)
			return
		}
		c.finish(op, errCrossShard)
		return
	}
	w := &op.core.w
	*w = write{op: op, plan: p, since: c.cfg.Now()}
	c.prepare(c.shards[shard], w)
}

// errCrossShard is the answer to a Txn whose keys lie on more than one shard.
var errCrossShard = codec.Status{Code: codec.InvalidArgument,
	Msg: "spindle: the keys of this txn lie on more than one shard, and a txn over several shards is not built yet: use keys of one shard, or several txns"}

// refuseLeases answers a put that names a lease: no lease can exist yet, so it is one that does not.
func (c *Core) refuseLeases(p *Plan) codec.Status {
	if p.HasLease() {
		return codec.ErrLeaseNotFound
	}
	return codec.Status{}
}

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

// flushWrites closes the next batch if none is under way.
func (s *shardState) flushWrites() {
	if s.cur != nil || len(s.queue) == 0 && !s.wantFence {
		return
	}
	c := s.c
	if l, ok := c.tr.(liveness); ok && !l.Connected(s.cluster) {
		// A range that nobody can fill would only hold the watches of all shards back.
		if !s.offline {
			s.offline = true
			c.after(c.jitter(2*retryDelay), func() { s.offline = false; s.touch() })
		}
		return
	}
	into := s.spareWrites
	s.spareWrites = nil
	var canceled []*write
	ws, rest := s.former.form(s.queue, batchLimits{c.cfg.MemberMaxTxnOps, c.cfg.MemberMaxRequestBytes},
		into, func(w *write) { canceled = append(canceled, w) })
	for i := len(rest); i < len(s.queue); i++ {
		s.queue[i] = nil
	}
	s.queue = rest
	for _, w := range canceled {
		s.answer(w, statusCanceled)
	}
	if len(ws) == 0 && !s.wantFence {
		return
	}
	s.wantFence = false
	s.batchID++
	b := &batch{s: s, id: s.batchID, writes: ws, fence: len(ws) == 0,
		deadline: c.cfg.Now() + int64(c.cfg.ShardTimeout)}
	b.spare = len(s.pending) > 0 && len(ws) > 0
	b.filter = batchFilter(nil, ws)
	s.cur = b
	n := len(ws)
	if b.spare || b.fence {
		n++
	}
	c.nextToken++
	s.token = c.nextToken
	if b.fence {
		c.stats.Fences++
	}
	if !c.clock.Request(revclock.Request{
		Shard: s.idx, Count: n, Committed: s.rec.last, Turn: s.rejections >= turnAfter,
		Filter: b.filter, Token: s.token,
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
	if b := s.cur; b != nil && now >= b.deadline && b.state != batchRecovering {
		late = append(late, b.writes...)
		b.writes = nil
		if b.state == batchTicking {
			b.fence = true // the range will come; nothing but a record is written under it
		} else {
			s.dropBatch(b) // its range stays open until another record passes it
			s.wantFence = true
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

// dropBatch ends b without a further look at its writes.
func (s *shardState) dropBatch(b *batch) {
	if s.cur == b {
		s.cur = nil
		s.touch()
	}
}

// granted takes the range of the closed batch.
func (s *shardState) granted(token uint64, r revclock.Range) {
	b := s.cur
	if b == nil || token != s.token || b.state != batchTicking {
		s.wantFence = true // a range that nobody uses must not stay open
		s.touch()
		return
	}
	b.first, b.last = r.First, r.Last
	next := b.first
	if b.spare {
		next++
	}
	b.record = Record{Last: b.last, First: b.first, Spare: b.spare, Kind: KindBatch, Epoch: s.c.m.Epoch,
		Proxy: s.c.cfg.Proxy, Batch: b.id}
	if b.fence {
		b.record.Kind = KindFence
	}
	live := 0
	var canceled []*write
	for i, w := range b.writes {
		rev := next
		next++
		if w.op.canceled { // while the tick was under way
			canceled = append(canceled, w)
			b.writes[i] = nil
			continue
		}
		w.rev = rev
		live++
		w.plan.RecordDeletes(func(key, end []byte) {
			b.record.Deletes = append(b.record.Deletes, RecordDelete{Rev: rev, Key: key, End: end})
		})
	}
	s.c.stats.Batches++
	s.c.stats.BatchedWrites += uint64(live)
	b.body = appendBatch(s.body[:0], &batchTxn{record: &b.record, mapMod: s.mapMod, noGuard: s.c.cfg.Sabotage.DropGuard}, b.writes)
	s.body = nil
	b.state = batchGranted
	for _, w := range canceled {
		s.answer(w, statusCanceled)
	}
	s.sendInOrder(b)
}

// sendInOrder sends b when it is its turn among the proxies.
func (s *shardState) sendInOrder(b *batch) {
	if s.cur != b || b.state != batchGranted {
		return
	}
	now := s.c.cfg.Now()
	if at := s.c.clock.Log().Earliest(s.idx, b.first, now); at > now {
		if at != b.slotAt {
			b.slotAt = at
			s.c.at(at, func() { s.sendInOrder(b) })
		}
		return
	}
	b.send()
}

func (b *batch) send() {
	b.state = batchSent
	b.s.c.tr.Call(b.s.cluster, codec.MethodTxn, b.body, b.s.c.cfg.ShardTimeout, b)
}

// Complete is what became of one copy of b.
func (b *batch) Complete(resp []byte, st codec.Status, sent bool) {
	s := b.s
	c := s.c
	if s.cur != b || b.state != batchSent {
		return // given up, or settled from the stream meanwhile
	}
	switch {
	case st.Code == codec.OK:
		t, ok := parseTxnReply(resp, c.resps)
		c.resps = t.resps[:0]
		if !ok {
			c.fail(fmt.Errorf("member cluster %s gave an answer that is not a TxnResponse", s.name))
			return
		}
		s.expectOnStream(t.rev)
		if t.succeeded {
			s.committed(b, t)
		} else {
			s.rejected(b, t)
		}
	case !sent, st == codec.ErrTooManyRequests && !b.unknown:
		s.retry(b)
	case definite(st) && !b.unknown:
		s.refused(b, st)
	default:
		b.unknown = true
		c.stats.LostReplies++
		if b.seenAt > 0 {
			s.recover(b)
			return
		}
		s.retry(b)
	}
}

// definite reports whether a member's error proves that the Txn was not applied. ErrNoSpace is not
// among them: etcd may have applied what it refuses with it.
func definite(st codec.Status) bool {
	switch st.Code {
	case codec.InvalidArgument, codec.NotFound, codec.OutOfRange, codec.PermissionDenied, codec.Unauthenticated:
		return true
	case codec.ResourceExhausted:
		return st.Msg == codec.ErrTooManyRequests.Msg
	}
	return false
}

func (s *shardState) retry(b *batch) {
	b.state = batchWaiting
	d := min(retryDelay<<min(b.tries, 7), maxRetryDelay)
	b.tries++
	s.c.after(s.c.jitter(d), func() {
		if s.cur == b && b.state == batchWaiting {
			b.send()
		}
	})
}

// committed answers everything in b from the member's reply.
func (s *shardState) committed(b *batch, t txnReply) {
	c := s.c
	s.rejections = 0
	s.settledTo = b.last
	s.body = b.body[:0]
	hdr := c.hdr
	var again []*write
	i := 0
	for at, w := range b.writes {
		if w == nil {
			continue
		}
		if i >= len(t.resps) {
			c.fail(fmt.Errorf("member cluster %s answered a batch with too few responses", s.name))
			return
		}
		payload := t.resps[i]
		i++
		hdr.Revision = w.rev
		b.writes[at] = nil // from here on somebody else may use it
		out, oc, st := w.plan.Answer(w.buffer(), payload, hdr, c.creates)
		if oc != Answered {
			again = append(again, w)
			continue
		}
		s.answerWith(w, out, st)
	}
	s.spareWrites = b.writes[:0]
	s.dropBatch(b)
	for _, w := range again {
		s.again(w)
	}
}

// again brings back a write whose guard failed: what the proxy believed of its keys was wrong. It was
// not applied.
func (s *shardState) again(w *write) {
	s.c.stats.WrongCreates++
	w.rev = 0
	if s.c.cfg.Now()-w.since > int64(s.c.cfg.ShardTimeout) {
		s.answer(w, codec.ErrTimeout)
		return
	}
	if w.plan.Slow() {
		s.lookup(w)
		return
	}
	s.enqueue(w)
}

// rejected is told that the guard failed. That proves b void if exactly one copy of it was ever sent;
// otherwise the stream must show whether its record is there.
func (s *shardState) rejected(b *batch, t txnReply) {
	c := s.c
	c.stats.Rejected++
	var clock, pmap codec.KV
	if len(t.resps) == 2 {
		clock, _ = firstKV(t.resps[0])
		pmap, _ = firstKV(t.resps[1])
	}
	if pmap.ModRevision != s.mapMod {
		c.fail(fmt.Errorf("the partition map on member cluster %s was changed by another proxy; restart to read it anew", s.name))
		return
	}
	rec, ok := ParseRecord(clock.Value)
	if !ok || rec.Last < b.first {
		c.fail(fmt.Errorf("the clock record on member cluster %s is missing or not readable by this version", s.name))
		return
	}
	if !b.unknown || c.cfg.Sabotage.RetickWithoutLooking {
		s.void(b)
		return
	}
	b.state, b.settleAt = batchSettling, clock.ModRevision
	s.settle(b)
}

// settle decides a batch that was rejected after an earlier copy's outcome was not learned, once the
// stream has come as far as the clock that rejected it.
func (s *shardState) settle(b *batch) {
	if b.seenAt > 0 {
		s.recover(b)
		return
	}
	if s.rec.local < b.settleAt {
		return
	}
	s.c.stats.Settled++
	if b.blind {
		s.unknowable(b)
		return
	}
	s.void(b)
}

// unknowable ends b when the history that tells whether it committed was compacted: nothing of it goes
// again.
func (s *shardState) unknowable(b *batch) {
	ws := b.writes
	b.writes = nil
	s.settledTo = b.last
	s.dropBatch(b)
	for _, w := range ws {
		if w != nil {
			s.answer(w, codec.ErrTimeout)
		}
	}
}

// void takes new revisions for everything in b, which certainly was not applied.
func (s *shardState) void(b *batch) {
	s.rejections++
	s.settledTo = b.last
	var ws []*write
	for _, w := range b.writes {
		if w != nil {
			ws = append(ws, w)
		}
	}
	s.dropBatch(b)
	s.requeue(ws)
}

// refused handles an error that proves b unapplied: one request in it is at fault. Alone it gets the
// error; among others each goes by itself.
func (s *shardState) refused(b *batch, st codec.Status) {
	// The range stays open: something must follow it at once, or soon if it is the fence that is refused.
	if b.fence {
		s.c.after(s.c.jitter(20*retryDelay), func() { s.wantFence = true; s.touch() })
	} else {
		s.wantFence = true
	}
	s.dropBatch(b)
	if len(b.writes) <= 1 {
		for _, w := range b.writes {
			if w != nil {
				s.answer(w, st)
			}
		}
		if b.fence {
			s.c.log.Warn("a fence was refused", "shard", s.name, "code", st.Code, "err", st.Msg)
		}
		return
	}
	var ws []*write
	for _, w := range b.writes {
		if w != nil {
			w.alone = true
			ws = append(ws, w)
		}
	}
	s.requeue(ws)
}

// sawOwnRecord is called by the stream when it meets a record of this process.
func (s *shardState) sawOwnRecord(id uint64, local int64) {
	b := s.cur
	if b == nil || b.id != id {
		return
	}
	b.seenAt = local
	if b.state == batchSettling || b.state == batchWaiting && b.unknown {
		s.recover(b)
	}
}

// recover answers the requests of a batch that committed while its reply was lost: every compare saw
// the state just before it, so the answers are computed again from there.
func (s *shardState) recover(b *batch) {
	s.c.stats.Settled++
	b.state = batchRecovering
	s.settledTo = b.last
	var ws []*write
	for _, w := range b.writes {
		if w != nil {
			ws = append(ws, w)
		}
	}
	b.pending = len(ws)
	if b.pending == 0 {
		s.rejections = 0
		s.dropBatch(b)
		return
	}
	b.writes = nil // each has one owner: its recovery
	for _, w := range ws {
		(&recovery{b: b, w: w, deadline: s.c.cfg.Now() + int64(s.c.cfg.ShardTimeout)}).send()
	}
}

// recovery computes one lost answer. It is the Completion of its history read.
type recovery struct {
	b        *batch
	w        *write
	deadline int64
}

func (r *recovery) send() {
	s := r.b.s
	body, _ := r.w.plan.AppendSnapshotOps(s.c.scratch[:0], r.b.seenAt-1)
	s.c.scratch = body
	s.c.tr.Call(s.cluster, codec.MethodTxn, body, s.c.cfg.ShardTimeout, r)
}

func (r *recovery) Complete(resp []byte, st codec.Status, sent bool) {
	b := r.b
	s := b.s
	c := s.c
	if s.cur != b { // the Core stops
		s.answer(r.w, codec.ErrStopped)
		return
	}
	switch {
	case st.Code == codec.OK:
		r.evaluate(resp)
	case st == codec.ErrCompacted || c.cfg.Now() > r.deadline:
		// It committed, but what it saw cannot be known any more.
		s.answer(r.w, codec.ErrTimeout)
	default:
		c.after(c.jitter(retryDelay), r.send)
		return
	}
	b.pending--
	if b.pending == 0 {
		s.rejections = 0
		s.dropBatch(b)
	}
}

func (r *recovery) evaluate(resp []byte) {
	s := r.b.s
	c := s.c
	w := r.w
	t, ok := parseTxnReply(resp, nil)
	if !ok {
		s.answer(w, codec.ErrTimeout)
		return
	}
	snap := NewSnapshot(t.resps)
	if !w.plan.GuardsHold(snap) {
		s.again(w) // the shard refused it: it was not applied
		return
	}
	hdr := c.hdr
	hdr.Revision = w.rev
	out, _, st := w.plan.Evaluate(w.buffer(), snap, hdr)
	s.answerWith(w, out, st)
}

var statusCanceled = codec.Status{Code: codec.Canceled, Msg: "context canceled"}
