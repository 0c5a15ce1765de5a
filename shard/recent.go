package shard

import (
	"bytes"

	"github.com/cespare/xxhash/v2"

	"spindle/codec"
)

// This file answers a Get of one key from the ring, if the key's latest change is still there: no member is asked.
//
// The state of a shard at its stream's record is exact (DESIGN section 5 asks no more of a member's answer): every
// event up to it was published, so the latest event of a key is the key. With a `now` that was read after the request
// arrived, and A_i of that moment at or below the record, the answer is exact at H = max(now, record). While a batch is
// on its way the member is asked: its record may be there already, and give the end of a lease, or what somebody
// deleted directly, a revision that another proxy's clients have seen.

// recentIndex tells at which revision a key was changed last, as far as it knows. Each key has one place, which
// belongs to whichever of its keys was changed last: so what it tells of a key is either that key's latest change
// or of another key. It belongs to one goroutine.
type recentIndex struct {
	slots []recentSlot
	mask  uint64
}

type recentSlot struct {
	hash uint64
	rev  int64
}

// newRecentIndex makes an index for a ring of so many revisions: 16 bytes for each, twice.
func newRecentIndex(ring int) *recentIndex {
	n := 2
	for n < 2*ring {
		n <<= 1
	}
	return &recentIndex{slots: make([]recentSlot, n), mask: uint64(n - 1)}
}

// changed notes that key was changed at rev. Changes of a key come in order.
func (x *recentIndex) changed(key []byte, rev int64) {
	h := xxhash.Sum64(key)
	x.slots[h&x.mask] = recentSlot{h, rev}
}

// last returns the revision at which key was changed last, if it is known. It may be another key's with the same hash.
func (x *recentIndex) last(key []byte) (rev int64, ok bool) {
	h := xxhash.Sum64(key)
	s := x.slots[h&x.mask]
	return s.rev, s.rev > 0 && s.hash == h
}

// recentEvent returns the latest event of key as the stream of its shard has shown it, an encoded mvccpb.Event;
// nil if the ring does not have it.
func (c *Core) recentEvent(key []byte) []byte {
	rev, ok := c.recent.last(key)
	if !ok {
		return nil
	}
	e, lapped := c.ring.Load(rev)
	if e == nil || lapped {
		return nil
	}
	// A key may have ended without a record, and been put again by the batch that has its revision: the last counts.
	for i := len(e.Events) - 1; i >= 0; i-- {
		if ev := &e.Events[i]; bytes.Equal(ev.Key, key) {
			return ev.Body[:ev.NoPrev]
		}
	}
	return nil
}

// recentBatch is the Gets of one turn that wait for the same now.
type recentBatch struct {
	c   *Core
	ops []*Op
}

// submitRecent takes a Get whose key's latest change is in the ring. It returns false for any other request.
func (c *Core) submitRecent(op *Op) bool {
	key, ok := op.core.plan.plainGet()
	if !ok || !c.settled(c.shards[c.part.ShardOf(key)]) || c.recentEvent(key) == nil {
		return false
	}
	if c.recentTurn == nil {
		if n := len(c.freeRecent); n > 0 {
			c.recentTurn, c.freeRecent = c.freeRecent[n-1], c.freeRecent[:n-1]
		} else {
			c.recentTurn = &recentBatch{c: c}
		}
		c.awaitNow(c.recentTurn)
	}
	c.recentTurn.ops = append(c.recentTurn.ops, op)
	return true
}

// settled says that the shard's stream has shown all that this proxy knows to have been handed out for it: else a
// later now will hardly find it so.
func (c *Core) settled(s *shardState) bool {
	a, _ := c.clock.Log().A(s.idx)
	return s.rec.last >= a || c.cfg.Sabotage.RecentIgnoresRanges
}

// nowDone implements nowWaiter.
func (b *recentBatch) nowDone(n int64, a []int64) {
	c := b.c
	for _, op := range b.ops {
		if op.canceled {
			c.finish(op, statusCanceled)
			continue
		}
		s := c.shards[c.part.ShardOf(op.core.plan.Reads[0].Key)]
		if !c.answerRecent(op, s, n, a[s.idx]) {
			s.read(readItem{op: op, deadline: c.deadline()})
		}
	}
	b.release()
}

// answerRecent answers op from the ring if that is exact; n and a are now and A_i.
func (c *Core) answerRecent(op *Op, s *shardState, n, a int64) bool {
	last := s.rec.last
	if last < a && !c.cfg.Sabotage.RecentIgnoresRanges {
		return false
	}
	ev := c.recentEvent(op.core.plan.Reads[0].Key)
	if ev == nil {
		return false // it has left the ring meanwhile
	}
	hdr := c.hdr
	hdr.Revision = max(n, last)
	op.Resp = codec.AppendHeaderField(op.Resp[:0], &hdr)
	var kv []byte
	del := false
	for it := (codec.Fields{Msg: ev}); it.Next(); {
		switch it.Field.Num {
		case 1:
			del = it.Field.Val == 1
		case 2:
			kv = it.Field.Bytes
		}
	}
	if !del {
		op.Resp = codec.AppendBytes(op.Resp, 2, kv)
		op.Resp = codec.AppendInt(op.Resp, 4, 1)
	}
	c.stats.RecentReads++
	c.finish(op, codec.Status{})
	return true
}

// abandon implements nowWaiter.
func (b *recentBatch) abandon(st codec.Status) {
	for _, op := range b.ops {
		b.c.finish(op, st)
	}
	b.release()
}

// release gives b back. Whoever still waits in it was answered.
func (b *recentBatch) release() {
	c := b.c
	if c.recentTurn == b {
		c.recentTurn = nil
	}
	clear(b.ops)
	if b.ops = b.ops[:0]; cap(b.ops) > keepPlanCap*16 {
		b.ops = nil
	}
	if len(c.freeRecent) < maxReadsInFlight*8 {
		c.freeRecent = append(c.freeRecent, b)
	}
}

// plainGet returns the key if the request is a Range of one key's present, and nothing else.
func (p *Plan) plainGet() (key []byte, ok bool) {
	if p.Kind != OpRange || len(p.Reads) != 1 || len(p.Reads[0].End) != 0 {
		return nil, false
	}
	r := &p.ranges[0]
	if r.rev > 0 || r.keysOnly || r.countOnly || r.filters() {
		return nil, false
	}
	return p.Reads[0].Key, true
}
