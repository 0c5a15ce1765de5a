package shard

import (
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
	"spindle/watchring"
)

// physicalTimeout is how long a Compact with physical set may wait for the members to have rewritten their
// files; etcd itself waits as long as the client does.
const physicalTimeout = time.Minute

// compaction is a Compact on its way: recorded in the reserved keys of every shard first, then done on
// every member at the last batch that ends below its revision. Between the record on the first
// shard and the last member's compaction it may be cut short at any moment: every part may be done
// again by anybody, and what is missing is completed (see compactionLags).
type compaction struct {
	c        *Core
	rev      int64
	now      int64
	physical bool
	timeout  time.Duration
	done     func(now int64, st codec.Status) // once
	waiting  int
	over     bool
	retried  bool // a reply was lost: what is found recorded may be our own
	deadline int64
}

// submitCompact takes a CompactionRequest.
func (c *Core) submitCompact(op *Op) {
	rev, physical := int64(0), false
	it := codec.Fields{Msg: op.Msg}
	for it.Next() {
		switch f := &it.Field; {
		case f.Type != protowire.VarintType:
		case f.Num == 1:
			rev = int64(f.Val)
		case f.Num == 2:
			physical = f.Val != 0
		}
	}
	if it.Bad {
		c.finish(op, errUnmarshal)
		return
	}
	c.compact(rev, physical, func(now int64, st codec.Status) {
		if st.Code == codec.OK {
			hdr := c.hdr
			hdr.Revision = now
			op.Resp = codec.AppendHeaderField(op.Resp[:0], &hdr)
		}
		c.finish(op, st)
	})
}

// compact compacts everything up to rev, and calls done with now once that is done, or with etcd's error.
func (c *Core) compact(rev int64, physical bool, done func(now int64, st codec.Status)) {
	k := &compaction{c: c, rev: rev, physical: physical, timeout: c.cfg.ShardTimeout, done: done}
	if physical {
		k.timeout = max(k.timeout, physicalTimeout)
	}
	k.deadline = c.cfg.Now() + int64(k.timeout)
	c.Now(func(n int64, st codec.Status) {
		switch {
		case st.Code != codec.OK:
			k.end(st)
		case k.rev <= c.compacted:
			k.end(codec.ErrCompacted)
		case k.rev > n:
			k.end(codec.ErrFutureRev)
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
	k.done(k.now, st)
}

// decide writes the record on the first shard. It is there that two compactions meet: the one that
// finds a revision as high as its own is told that it was compacted already.
func (k *compaction) decide() {
	if k.over {
		return
	}
	c := k.c
	s := c.shards[0]
	s.call(codec.MethodTxn, k.recordTxn(), completion(func(resp []byte, st codec.Status, sent bool) {
		found := st.Code == codec.OK && s.compactRecorded(k.rev, resp)
		if k.over {
			return
		}
		switch {
		case st.Code == codec.OK:
			if found && !k.retried {
				k.end(codec.ErrCompacted)
				return
			}
		case definite(st):
			k.end(st)
			return
		case st == codec.ErrNoSpace:
			// A full member must be able to free space: go on without the record.
		default:
			k.retried = k.retried || sent
			c.after(c.jitter(retryDelay), k.decide)
			return
		}
		c.noteCompaction(k.rev)
		k.spread(c.shards)
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

// compactRecorded takes the answer to a recordTxn for rev, and reports whether a record as high was there.
func (s *shardState) compactRecorded(rev int64, resp []byte) (found bool) {
	t, ok := parseTxnReply(resp, nil)
	if ok && t.succeeded && len(t.resps) > 0 {
		found = true
		if kv, there := firstKV(t.resps[0]); there {
			if is, ok := ParseCompaction(kv.Value); ok {
				rev = is
			}
		}
	}
	s.sawCompaction(rev)
	return found
}

// spread records the compaction on the shards that lack it, and compacts each.
func (k *compaction) spread(shards []*shardState) {
	k.waiting = len(shards)
	for _, s := range shards {
		if s.compactRec >= k.rev {
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
	c := k.c
	s.call(codec.MethodTxn, k.recordTxn(), completion(func(resp []byte, st codec.Status, _ bool) {
		switch {
		case st.Code == codec.OK:
			s.compactRecorded(k.rev, resp)
		case st == codec.ErrNoSpace:
		default: // "too many requests", too: without its record the compaction does not hold on other proxies
			c.after(c.jitter(retryDelay), func() { k.record(s) })
			return
		}
		k.compact(s)
	}))
}

// compact compacts one shard at the last record below the revision. What clients may still read is kept,
// also when the revision lies inside a batch, and so is what a watch from the revision itself must bring,
// after a restart too.
func (k *compaction) compact(s *shardState) {
	if k.over {
		return
	}
	c := k.c
	s.locate(k.rev-1, func(at located, st codec.Status) {
		if st == codec.ErrCompacted {
			k.part()
			return
		}
		if st.Code != codec.OK {
			k.end(st)
			return
		}
		body := codec.AppendInt(nil, 1, at.base.local)
		body = codec.AppendBool(body, 2, k.physical)
		c.tr.Call(s.cluster, codec.MethodCompact, body, k.timeout, completion(func(_ []byte, st codec.Status, _ bool) {
			if st.Code != codec.OK && st != codec.ErrCompacted {
				c.after(c.jitter(retryDelay), func() { k.compact(s) })
				return
			}
			k.part()
		}))
	})
}

func (k *compaction) part() {
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
	for _, s := range c.shards {
		s.quota.compacted()
	}
	c.publishCompaction()
}

// noteTorn says that somebody else's compaction took events of revision rev, or of one below, before they were seen
// here. What clients see at rev can still be read, but no watch may begin there: those that need it are canceled.
func (c *Core) noteTorn(rev int64) {
	c.ring.RaiseTail(rev)
	c.watchFrom = max(c.watchFrom, rev+1)
	c.noteCompaction(rev)
	c.publishCompaction()
}

// publishCompaction tells the watches, once everything up to the compacted revision has been seen here:
// another proxy may be ahead, and a watch that has all that there is to have must not be canceled.
func (c *Core) publishCompaction() {
	if c.frontier == nil {
		return
	}
	all, rev := c.frontier.Get(watchring.All), int64(0)
	if c.compacted <= all {
		rev = c.compacted
	}
	if c.watchFrom <= all+1 {
		rev = max(rev, c.watchFrom)
	}
	if rev > c.frontier.Compacted() {
		c.frontier.SetCompacted(rev)
		c.frontierRose = true
	}
}

// sawCompaction notes the compaction record of a shard. The largest one counts for all.
func (s *shardState) sawCompaction(rev int64) {
	c := s.c
	s.compactRec = max(s.compactRec, rev)
	c.compactRec = max(c.compactRec, rev)
	c.noteCompaction(rev)
	c.armCompactionLags()
}

// compactedIn looks at the compaction record behind a read's other answers, and reports whether revision
// rev lies below it. A compaction is answered after its record is on every shard, so whoever reads
// later finds it, through any proxy.
func (s *shardState) compactedIn(resps [][]byte, rev int64) bool {
	if len(resps) < 3 {
		return false
	}
	return s.compactedBy(resps[2], rev)
}

// compactedBy reads the shard's compaction record, and says whether rev is below it.
func (s *shardState) compactedBy(reply []byte, rev int64) bool {
	if s.c.cfg.Sabotage.CompactionUnread {
		return false
	}
	kv, found := firstKV(reply)
	is, ok := ParseCompaction(kv.Value)
	if !found || !ok {
		return false
	}
	s.sawCompaction(is)
	return rev < is
}

// lookCompacted calls f with ErrCompacted if rev lies below a compaction, for a read that asks no shard: this
// proxy's streams may not have shown the record yet. Any shard tells; one that does not answer is left for the next.
func (c *Core) lookCompacted(rev int64, f func(codec.Status)) {
	deadline, turn := c.deadline(), 0
	var look func()
	look = func() {
		s := c.shards[turn%len(c.shards)]
		turn++
		body := codec.AppendString(nil, rangeKey, KeyCompact)
		s.call(codec.MethodRange, body, completion(func(resp []byte, st codec.Status, _ bool) {
			switch {
			case c.state != stateReady:
				f(codec.ErrStopped)
			case st.Code == codec.OK && s.compactedBy(resp, rev):
				f(codec.ErrCompacted)
			case st.Code == codec.OK:
				f(codec.Status{})
			case c.cfg.Now() >= deadline:
				f(codec.ErrTimeout)
			default:
				c.after(c.jitter(retryDelay), look)
			}
		}))
	}
	look()
}

// compactionLags returns the shards that lack the newest compaction record: whoever compacted was
// stopped in the middle, or is still at it.
func (c *Core) compactionLags() (lag []*shardState) {
	for _, s := range c.shards {
		if s.compactRec < c.compactRec {
			lag = append(lag, s)
		}
	}
	return lag
}

// armCompactionLags completes a compaction that lacks shards, after a time in which whoever began it
// has finished or failed.
func (c *Core) armCompactionLags() {
	if c.completing || c.state != stateReady || len(c.compactionLags()) == 0 {
		return
	}
	c.completing = true
	c.after(c.jitter(2*c.cfg.ShardTimeout), func() {
		c.completing = false
		if c.state == stateReady {
			c.completeCompaction(c.compactionLags())
		}
	})
}

// completeCompaction brings the newest compaction record to shards, and compacts each. One that is away keeps none of the
// others from it, and what is done is not done again: only those that still lack the record are tried later.
func (c *Core) completeCompaction(shards []*shardState) {
	open := len(shards)
	if open == 0 {
		return
	}
	c.completing = true
	for _, s := range shards {
		k := &compaction{c: c, rev: c.compactRec, timeout: c.cfg.ShardTimeout, deadline: c.deadline()}
		k.done = func(int64, codec.Status) {
			if open--; open == 0 {
				c.completing = false
				c.armCompactionLags()
			}
		}
		c.at(k.deadline, func() { k.end(codec.ErrTimeout) })
		c.awaitFrontier(s.idx, k.rev, k.deadline, func() {
			if !k.over {
				k.spread([]*shardState{s})
			}
		})
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
	c.stale = true // nobody waits for it
	gen := s.gen
	body := codec.AppendString(nil, rangeKey, KeyClock)
	body = codec.AppendInt(body, rangeRevision, local)
	s.call(codec.MethodRange, body, completion(func(resp []byte, st codec.Status, _ bool) {
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
			s.saw(s.rec)
			s.points = append(s.points[:0], s.rec)
			c.noteTorn(rec.Last)
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
			if s.furthest < local || s.lastUnrecorded > s.rec.local {
				// Something changed, or may have, and waits for the next record. At the compacted revision itself an
				// etcd before 3.5.19 has the puts only.
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
