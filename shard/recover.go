package shard

import (
	"spindle/codec"
)

// This file settles batches whose reply was lost: did they commit, and if so, what were the answers?

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
	if b.blind && !s.c.cfg.Sabotage.BlindIsVoid {
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
// The batch itself is settled by its record: a copy that is still on its way can only be rejected, and nobody waits for it.
func (s *shardState) recover(b *batch) {
	s.c.stats.Settled++
	b.state = batchRecovering
	s.settledTo = b.last
	s.rejections = 0
	ws := b.writes
	b.writes = nil // each has one owner: its recovery
	s.dropBatch(b) // what is next need not wait for reads of history
	for _, w := range ws {
		if w != nil {
			(&recovery{b: b, w: w, deadline: s.c.cfg.Now() + int64(s.c.cfg.ShardTimeout)}).send()
		}
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
	s.attempt(codec.MethodTxn, body, 0, r, r.w.plan.readsMuch())
}

func (r *recovery) Complete(resp []byte, st codec.Status, sent bool) {
	b := r.b
	s := b.s
	c := s.c
	if c.state == stateFailed || c.state == stateClosed {
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
	if snap.foreign {
		s.answer(w, codec.ErrTimeout) // what the shard compared with was not what clients see
		return
	}
	if !w.plan.GuardsHold(snap) {
		s.again(w) // the shard refused it: it was not applied
		return
	}
	hdr := c.hdr
	hdr.Revision = w.rev
	out, _, st := w.plan.Evaluate(w.buffer(), snap, hdr)
	s.answerWith(w, out, st)
}
