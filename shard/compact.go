package shard

import (
	"spindle/codec"
	"spindle/watchring"
)

// compaction is a Compact request on its way: recorded in the reserved keys of every shard first, then
// done on every member at the last batch that ends at or below its revision.
type compaction struct {
	c        *Core
	op       *Op
	rev      int64
	now      int64
	physical bool
	waiting  int
	over     bool
	retried  bool // a reply was lost: what is found recorded may be our own
	deadline int64
}

// submitCompact takes a CompactionRequest.
func (c *Core) submitCompact(op *Op) {
	k := &compaction{c: c, op: op, deadline: c.deadline()}
	it := codec.Fields{Msg: op.Msg}
	for it.Next() {
		switch it.Field.Num {
		case 1:
			k.rev = int64(it.Field.Val)
		case 2:
			k.physical = it.Field.Val != 0
		}
	}
	if it.Bad {
		c.finish(op, errUnmarshal)
		return
	}
	c.Now(func(n int64, st codec.Status) {
		switch {
		case st.Code != codec.OK:
			c.finish(op, st)
		case k.rev <= c.compacted:
			c.finish(op, codec.ErrCompacted)
		case k.rev > n:
			c.finish(op, codec.ErrFutureRev)
		default:
			k.now = n
			c.at(k.deadline, func() { k.end(codec.ErrTimeout) })
			c.awaitFrontier(watchring.All, k.rev, k.deadline, k.decide)
		}
	})
}

func (k *compaction) end(st codec.Status) {
	if k.over {
		return
	}
	k.over = true
	if st.Code == codec.OK {
		hdr := k.c.hdr
		hdr.Revision = k.now
		k.op.Resp = codec.AppendHeaderField(k.op.Resp[:0], &hdr)
	}
	k.c.finish(k.op, st)
}

// decide writes the record on the first shard. It is there that two compactions meet: the one that
// finds a revision as high as its own is told that it was compacted already.
func (k *compaction) decide() {
	if k.over {
		return
	}
	s := k.c.shards[0]
	k.c.tr.Call(s.cluster, codec.MethodTxn, k.recordTxn(), k.c.cfg.ShardTimeout, completion(func(resp []byte, st codec.Status, sent bool) {
		if k.over {
			return
		}
		switch {
		case st.Code == codec.OK:
			if t, ok := parseTxnReply(resp, nil); ok && t.succeeded && !k.retried {
				k.end(codec.ErrCompacted)
				return
			}
		case definite(st):
			k.end(st)
			return
		case st.Code == codec.ResourceExhausted:
			// A full member must be able to free space: go on without the record.
		default:
			k.retried = k.retried || sent
			k.c.after(k.c.jitter(retryDelay), k.decide)
			return
		}
		k.spread()
	}))
}

// recordTxn puts the record unless one as high is there (success).
func (k *compaction) recordTxn() []byte {
	body := appendCompareValue(nil, KeyCompact, resultGreater, AppendCompaction(nil, k.rev-1))
	if k.rev == 0 {
		body = nil
		body = appendCompareInt(body, KeyCompact, "", resultGreater, targetMod, cmpMod, 0)
	}
	body = appendGet(body, txnSuccess, KeyCompact, 0)
	return appendPutOp(body, txnFailure, KeyCompact, AppendCompaction(nil, k.rev))
}

// spread records the compaction on the other shards, and compacts each.
func (k *compaction) spread() {
	c := k.c
	c.noteCompaction(k.rev)
	k.waiting = len(c.shards)
	for i, s := range c.shards {
		if i == 0 {
			k.compact(s)
			continue
		}
		k.record(s)
	}
}

func (k *compaction) record(s *shardState) {
	if k.over {
		return
	}
	k.c.tr.Call(s.cluster, codec.MethodTxn, k.recordTxn(), k.c.cfg.ShardTimeout, completion(func(_ []byte, st codec.Status, _ bool) {
		if st.Code != codec.OK && st.Code != codec.ResourceExhausted {
			k.c.after(k.c.jitter(retryDelay), func() { k.record(s) })
			return
		}
		k.compact(s)
	}))
}

// compact compacts one shard at the last record at or below the revision: what clients may still read is
// kept, also when the revision lies inside a batch.
func (k *compaction) compact(s *shardState) {
	if k.over {
		return
	}
	s.locate(k.rev, func(at located, st codec.Status) {
		if st == codec.ErrCompacted {
			k.done()
			return
		}
		if st.Code != codec.OK {
			k.end(st)
			return
		}
		body := codec.AppendInt(nil, 1, at.base.local)
		body = codec.AppendBool(body, 2, k.physical)
		k.c.tr.Call(s.cluster, codec.MethodCompact, body, k.c.cfg.ShardTimeout, completion(func(_ []byte, st codec.Status, _ bool) {
			if st.Code != codec.OK && st != codec.ErrCompacted {
				k.c.after(k.c.jitter(retryDelay), func() { k.compact(s) })
				return
			}
			k.done()
		}))
	})
}

func (k *compaction) done() {
	if k.waiting--; k.waiting == 0 {
		k.end(codec.Status{})
	}
}

// noteCompaction raises the revision below which nothing is answered any more.
func (c *Core) noteCompaction(rev int64) {
	if rev <= c.compacted {
		return
	}
	c.compacted = rev
	if c.frontier != nil {
		c.frontier.SetCompacted(rev)
		c.frontierRose = true
	}
}

// restartStreamAt continues a shard's stream where its member was compacted at a local revision, without
// what lies before: watchers that needed it are canceled.
func (c *Core) restartStreamAt(s *shardState, local int64) {
	if s.handle != nil {
		s.handle.Close()
		s.handle = nil
	}
	s.gen++
	gen := s.gen
	body := codec.AppendString(nil, rangeKey, KeyClock)
	body = codec.AppendInt(body, rangeRevision, local)
	c.tr.Call(s.cluster, codec.MethodRange, body, c.cfg.ShardTimeout, completion(func(resp []byte, st codec.Status, _ bool) {
		if gen != s.gen || c.state != stateReady && c.state != stateStarting {
			return
		}
		kv, found := firstKV(resp)
		rec, ok := ParseRecord(kv.Value)
		if st.Code != codec.OK || !found || !ok {
			if s.rec.local+1 < local && st.Code == codec.OK {
				c.log.Error("no readable clock record at the member's compacted revision", "shard", s.name)
			}
			c.after(c.jitter(20*retryDelay), func() {
				if gen == s.gen {
					s.openStream()
				}
			})
			return
		}
		if rec.Last > s.rec.last {
			s.rec = point{rec.First, rec.Last, kv.ModRevision}
			s.points = append(s.points[:0], s.rec)
			c.ring.RaiseTail(rec.Last)
			c.noteCompaction(rec.Last)
			c.clock.Log().SetClock(s.idx, rec.Last)
			c.stale = true
			if b := s.cur; b != nil {
				// Its record may be among those that were skipped.
				b.blind = true
				if b.state == batchSettling {
					s.settle(b)
				}
			}
		}
		if local > s.rec.local {
			// The state at the last record cannot be read any more: an empty batch makes another one.
			s.wantFence = true
			s.touch()
		}
		if local > s.rec.local+1 {
			s.from = local
			if s.furthest < local-1 || s.lastUnrecorded > s.rec.local {
				// Something changed, or may have, and waits for the next record.
				s.torn = true
				s.lastUnrecorded = max(s.lastUnrecorded, local-1)
			}
		}
		s.openStream()
		if c.boot != nil {
			c.boot.streamMoved(s)
		}
	}))
}
