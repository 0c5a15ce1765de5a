package shard

import (
	"fmt"

	"spindle/codec"
	"spindle/revclock"
)

// This file is the road of a read that lies on one shard and asks for the present: concurrent ones
// travel as one flat read-only Txn, which also reads the clock record, beside a linearizable `now`.

// A read Txn costs a member, and the now beside it the coordinator, much more than one of the reads in it. So reads
// that arrive while a large Txn is under way wait for its answer, and travel together; while there are few, and waiting
// would spare nothing, a second Txn goes at once.
const (
	// maxReadsInFlight bounds the read Txns under way to one shard.
	maxReadsInFlight = 2
	// fewReads is how many reads under way keep the next ones from waiting.
	fewReads = 32
)

// maxBatchedKeys is the largest limit of a list that travels with other reads. One that may be larger, or has none,
// is read in pages: its answer may be of any size, and everything else would wait for it.
const maxBatchedKeys = 1000

// readItem is one request in a read Txn: a client's read, or a look that a write needs first.
type readItem struct {
	op       *Op    // a client's read, or
	w        *write // the write that needs to know its keys
	ops      int    // how many of the Txn's ranges are its own
	deadline int64
}

func (r *readItem) fail(s *shardState, st codec.Status) {
	if r.w != nil {
		s.answer(r.w, st)
		return
	}
	s.c.finish(r.op, st)
}

// readBatch is one read Txn under way. It is the Completion of its call.
type readBatch struct {
	s       *shardState
	items   []readItem
	sent    int  // how many of them there were when it was sent
	large   bool // the answer may be
	ticket  bool // asked for a now
	haveNow bool
	got     bool
	n, a    int64
	epoch   revclock.ID // of now
	resp    []byte      // copy of the reply, when it came before now
	known   int64       // what the shard's clock has been at when it was sent
	rev     int64       // of the shard, 0 for the newest: a second look at a fixed state
	h       int64       // what a second look answers with
	body    []byte
}

// submitRange routes a client's Range.
func (c *Core) submitRange(op *Op) {
	p := &op.core.plan
	if p.Revision() > 0 {
		c.submitHistoryRange(op)
		return
	}
	if p.Empty() {
		c.emptyRange(op)
		return
	}
	if p.Serializable() {
		c.submitSerializable(op)
		return
	}
	if c.submitRecent(op) {
		return
	}
	shard, one := c.shardOf(p)
	if !one {
		c.submitList(op)
		return
	}
	if limit := p.ranges[0].limit; p.paged() && (limit <= 0 || limit > maxBatchedKeys) {
		c.newPagedRead(op, nil).begin()
		return
	}
	c.shards[shard].read(readItem{op: op, deadline: c.deadline()})
}

// submitReadTxn routes a Txn that writes nothing.
func (c *Core) submitReadTxn(op *Op) {
	p := &op.core.plan
	if p.Empty() { // no shard has a part in it
		c.emptyTxn(op)
		return
	}
	shard, one := c.shardOf(p)
	if !one {
		c.finish(op, errCrossShard)
		return
	}
	c.shards[shard].read(readItem{op: op, deadline: c.deadlineOf(op)})
}

func (c *Core) deadline() int64 { return c.cfg.Now() + int64(c.cfg.ShardTimeout) }

// deadlineOf is the deadline of a read for op: if op may write, and waits since before, counted from then.
func (c *Core) deadlineOf(op *Op) int64 {
	if op.core.since != 0 {
		return op.core.since + int64(c.cfg.ShardTimeout)
	}
	return c.deadline()
}

// emptyRange answers a range that holds no key that a client can see, at now.
func (c *Core) emptyRange(op *Op) {
	c.Now(func(rev int64, st codec.Status) {
		if st.Code != codec.OK {
			c.finish(op, st)
			return
		}
		hdr := c.hdr
		hdr.Revision = rev
		op.Resp = op.core.plan.AnswerRange(op.Resp[:0], nil, hdr, nil)
		c.finish(op, codec.Status{})
	})
}

// emptyTxn answers a Txn that touches no key that a client can see, at now.
func (c *Core) emptyTxn(op *Op) {
	c.Now(func(rev int64, st codec.Status) {
		if st.Code != codec.OK {
			c.finish(op, st)
			return
		}
		hdr := c.hdr
		hdr.Revision = rev
		c.answerTxn(op, NewSnapshot(nil), hdr)
	})
}

func (s *shardState) read(it readItem) {
	if st := s.c.state; st == stateFailed || st == stateClosed {
		it.fail(s, codec.ErrStopped)
		return
	}
	s.reads = append(s.reads, it)
	s.armExpiry()
	s.touch()
}

// lookup reads what w needs to know before it can be written: create revisions, or, on the slow road,
// everything that its decision depends on.
func (s *shardState) lookup(w *write) {
	s.read(readItem{w: w, deadline: s.c.deadline()})
}

// flushReads sends the reads that wait, as many as one Txn takes.
func (s *shardState) flushReads() {
	c := s.c
	if s.failRefused() {
		return
	}
	for len(s.reads) > 0 && s.readsMayGo() {
		b := c.acquireRead(s)
		ops, needNow := 0, false
		body := b.body[:0]
		k := 0
		for ; k < len(s.reads); k++ {
			it := &s.reads[k]
			if it.op != nil && it.op.canceled {
				c.finish(it.op, statusCanceled)
				continue
			}
			before := len(body)
			body, it.ops = s.appendRead(body, it, 0)
			if ops > 0 && (ops+it.ops+1 > c.cfg.MemberMaxTxnOps || len(body) > c.cfg.MemberMaxRequestBytes-batchOverhead) {
				body = body[:before]
				break
			}
			ops += it.ops
			needNow = needNow || it.op != nil
			b.large = b.large || it.plan().readsMuch()
			b.items = append(b.items, *it)
		}
		n := copy(s.reads, s.reads[k:])
		clear(s.reads[n:])
		s.reads = s.reads[:n]
		if len(b.items) == 0 {
			c.releaseRead(b)
			continue
		}
		b.body = appendGet(body, txnSuccess, KeyClock, 0)
		if needNow {
			b.ticket = true
			c.awaitNow(b)
		}
		s.readsInFlight++
		b.sent, b.known = len(b.items), s.floor()
		s.readItems += b.sent
		c.stats.ReadBatches++
		c.stats.BatchedReads += uint64(len(b.items))
		s.attempt(codec.MethodTxn, b.body, 0, b, b.large)
	}
}

// readsMayGo says whether another read Txn may be sent now.
func (s *shardState) readsMayGo() bool {
	switch {
	case s.readsInFlight == 0:
		return true
	case s.readsInFlight >= maxReadsInFlight:
		return false
	}
	return s.readItems < fewReads || len(s.reads) >= s.c.cfg.MemberMaxTxnOps // a full one gains nothing by waiting
}

// appendRead appends the ranges that it needs, each a member of the Txn's success branch.
func (s *shardState) appendRead(dst []byte, it *readItem, rev int64) ([]byte, int) {
	if it.op != nil && it.op.Kind == OpRange {
		dst, m := codec.BeginMessage(dst, txnSuccess)
		dst = it.op.core.plan.AppendReadOp(dst, rev)
		return codec.EndMessage(dst, m), 1
	}
	p := it.plan()
	return p.AppendSnapshotOps(dst, rev)
}

func (it *readItem) plan() *Plan {
	if it.w != nil {
		return it.w.plan
	}
	return &it.op.core.plan
}

func (c *Core) acquireRead(s *shardState) *readBatch {
	if n := len(c.freeReads); n > 0 {
		b := c.freeReads[n-1]
		c.freeReads = c.freeReads[:n-1]
		b.s = s
		return b
	}
	return &readBatch{s: s}
}

// releaseRead takes b back. Giants are left to the garbage collector.
func (c *Core) releaseRead(b *readBatch) {
	clear(b.items)
	body, items, resp := b.body[:0], b.items[:0], b.resp[:0]
	if cap(resp) > 1<<20 {
		resp = nil
	}
	if cap(body) > 1<<20 {
		body = nil
	}
	*b = readBatch{body: body, items: items, resp: resp}
	if len(c.freeReads) < 64 {
		c.freeReads = append(c.freeReads, b)
	}
}

// nowDone takes the now that belongs to b.
func (b *readBatch) nowDone(n int64, a []int64) {
	b.n, b.a, b.haveNow = n, a[b.s.idx], true
	b.epoch = b.s.c.m.Epoch
	if b.got {
		b.s.evaluate(b, b.resp)
	}
}

// abandon ends b while it waits for now.
func (b *readBatch) abandon(st codec.Status) {
	items := b.items
	b.items, b.got = nil, false
	for i := range items {
		items[i].fail(b.s, st)
	}
}

func (b *readBatch) Complete(resp []byte, st codec.Status, sent bool) {
	s := b.s
	c := s.c
	if b.rev == 0 {
		s.readsInFlight--
		s.readItems -= b.sent
		s.touch()
	}
	if c.state != stateReady {
		for i := range b.items {
			b.items[i].fail(s, codec.ErrStopped)
		}
		return
	}
	if st.Code != codec.OK {
		s.readFailed(b, st)
		return
	}
	if b.rev > 0 {
		s.answerReads(b, resp)
		return
	}
	if b.ticket && !b.haveNow {
		b.got = true
		b.resp = append(b.resp[:0], resp...)
		return
	}
	s.evaluate(b, resp)
}

// readFailed asks again, or answers the error: reads may be repeated freely.
func (s *shardState) readFailed(b *readBatch, st codec.Status) {
	c := s.c
	final := definite(st) && st != codec.ErrCompacted && st != codec.ErrFutureRev
	for _, it := range b.items {
		if final {
			it.fail(s, st)
		} else {
			s.readAgain(it)
		}
	}
	if b.ticket && !b.haveNow {
		// now still points at b: it stays alive until then, and does nothing.
		b.items, b.got = nil, false
		return
	}
	c.releaseRead(b)
}

// evaluate decides what a read may answer. resp is the reply, now is known (or not needed).
func (s *shardState) evaluate(b *readBatch, resp []byte) {
	c := s.c
	if len(b.items) == 0 {
		return
	}
	t, ok := parseTxnReply(resp, c.resps)
	c.resps = t.resps[:0]
	clock, found := codec.KV{}, false
	if ok && len(t.resps) > 0 {
		clock, found = firstKV(t.resps[len(t.resps)-1])
	}
	rec, rok := ParseRecord(clock.Value)
	if !ok || !found || !rok {
		c.fail(fmt.Errorf("member cluster %s does not show a clock record that this version can read", s.name))
		for i := range b.items {
			b.items[i].fail(s, codec.ErrStopped)
		}
		return
	}
	read := point{rec.First, rec.Last, clock.ModRevision}
	if rec.Last < b.known {
		s.wentBack(rec.Last, b.known)
		for _, it := range b.items {
			s.readAgain(it)
		}
		c.releaseRead(b)
		return
	}
	s.saw(read)
	if !s.sameEpoch(&rec, clock.ModRevision) || b.ticket && b.epoch != c.m.Epoch {
		for _, it := range b.items {
			s.readAgain(it)
		}
		c.releaseRead(b)
		return
	}
	// Events after the record and before this read have no revision yet: the answer must not show them.
	settled := t.rev == read.local || s.pos >= t.rev && s.lastUnrecorded <= read.local
	h := max(b.n, read.last)
	k := 0
	hdr := c.hdr
	var again *readBatch
	againAt := int64(0)
	for i := range b.items {
		it := &b.items[i]
		parts := t.resps[k : k+it.ops]
		k += it.ops
		if it.w != nil {
			s.lookedUp(it.w, parts, t.rev)
			continue
		}
		behind := read.last < b.a
		switch {
		case settled && !behind:
			hdr.Revision = h
			s.answerRead(it, parts, hdr)
		case settled && !s.mayHaveChanged(it.plan().Reads, read.last, b.a) && !anyLease(parts):
			hdr.Revision = h
			s.answerRead(it, parts, hdr)
		default:
			if again == nil {
				again = c.acquireRead(s)
			}
			again.items = append(again.items, *it)
			if behind {
				againAt = b.a
			}
		}
	}
	n := b.n
	c.releaseRead(b)
	if again == nil {
		return
	}
	c.stats.Rereads += uint64(len(again.items))
	if againAt == 0 {
		again.h = h
		s.readAt(again, read.local)
		return
	}
	s.awaitClock(againAt, again.items[0].deadline, func(p point, st codec.Status) {
		if st.Code != codec.OK {
			for i := range again.items {
				again.items[i].fail(s, st)
			}
			return
		}
		again.h = max(n, p.last)
		s.readAt(again, p.local)
	})
}

func anyLease(parts [][]byte) bool {
	for _, p := range parts {
		if carriesLease(p) {
			return true
		}
	}
	return false
}

// mayHaveChanged reports whether a revision in (from, upTo] of this shard may write one of ivs: the ring
// tells for what the stream has shown, the filters of open ranges for the rest.
func (s *shardState) mayHaveChanged(ivs []Interval, from, upTo int64) bool {
	c := s.c
	seen := min(s.rec.last, upTo)
	if seen-from > 1024 || c.connecting != nil { // the log has forgotten ranges of the epoch that is over
		return true
	}
	for r := from + 1; r <= seen; r++ {
		e, lapped := c.ring.Load(r)
		if lapped {
			return true
		}
		if e == nil || e.Shard != s.idx {
			continue
		}
		for i := range e.Events {
			for _, iv := range ivs {
				if iv.Contains(e.Events[i].Key) {
					return true
				}
			}
		}
	}
	open := c.clock.Log().Open(s.idx)
	for i := range open {
		r := &open[i]
		if r.Last <= from || r.First > upTo || c.cfg.Sabotage.AheadUnread && s.next != nil && r.First == s.next.first {
			continue
		}
		for _, iv := range ivs {
			if filterMeets(r.Filter, iv) {
				return true
			}
		}
	}
	return false
}

// awaitClock calls f with the shard's record once it covers rev.
func (s *shardState) awaitClock(rev, deadline int64, f func(point, codec.Status)) {
	c := s.c
	call := func(p point, st codec.Status) {
		if g := f; g != nil {
			f = nil // the timer must not hold what was answered
			g(p, st)
		}
	}
	c.awaitFrontier(s.idx, rev, deadline, func() { call(s.rec, codec.Status{}) })
	if f != nil {
		c.at(deadline, func() { call(point{}, codec.ErrTimeout) })
	}
}

// readAt looks a second time, at the shard's local revision.
func (s *shardState) readAt(b *readBatch, local int64) {
	b.rev = local
	body := b.body[:0]
	for i := range b.items {
		body, b.items[i].ops = s.appendRead(body, &b.items[i], local)
		b.large = b.large || b.items[i].plan().readsMuch()
	}
	b.body = body
	s.attempt(codec.MethodTxn, b.body, 0, b, b.large)
}

// answerReads answers a second look.
func (s *shardState) answerReads(b *readBatch, resp []byte) {
	c := s.c
	t, ok := parseTxnReply(resp, c.resps)
	c.resps = t.resps[:0]
	hdr := c.hdr
	hdr.Revision = b.h
	k := 0
	for i := range b.items {
		it := &b.items[i]
		if !ok || k+it.ops > len(t.resps) {
			it.fail(s, codec.ErrTimeout)
			continue
		}
		s.answerRead(it, t.resps[k:k+it.ops], hdr)
		k += it.ops
	}
	c.releaseRead(b)
}

// answerRead answers one client's read from the member's ranges.
func (s *shardState) answerRead(it *readItem, parts [][]byte, hdr codec.Header) {
	c := s.c
	op := it.op
	p := &op.core.plan
	if op.Kind == OpRange {
		op.Resp = p.AnswerRange(op.Resp[:0], parts, hdr, c.creates)
		if p.merge.foreign() {
			s.answerClean(*it, parts, hdr)
			return
		}
		c.finish(op, codec.Status{})
		return
	}
	if p.NeedsHistory() {
		parts = ownParts(parts)
	}
	snap := NewSnapshot(parts)
	if snap.foreign {
		s.answerClean(*it, parts, hdr)
		return
	}
	if p.holdsAfterAll(snap) {
		if !c.cfg.Sabotage.DoomedUnchecked {
			c.writeAfterAll(op)
			return
		}
		p.cmps[p.txns[0].cmps.from].x = -1
	}
	c.answerTxn(op, snap, hdr)
}

// answerClean is answerRead when the member has shown values that somebody else wrote.
func (s *shardState) answerClean(it readItem, parts [][]byte, hdr codec.Header) {
	if op := it.op; op.Kind == OpRange && op.core.plan.ranges[0].limit > 0 {
		s.c.submitList(op) // keys that are taken out are made up for by others
		return
	}
	s.cleanse(parts, it.deadline, func(parts [][]byte, st codec.Status) {
		if st.Code != codec.OK {
			it.fail(s, st)
			return
		}
		s.answerRead(&it, parts, hdr)
	})
}

// lookedUp goes on with a write whose keys were read at the shard's local revision.
func (s *shardState) lookedUp(w *write, parts [][]byte, local int64) {
	if w.op.canceled {
		s.answer(w, statusCanceled)
		return
	}
	snap := NewSnapshot(parts)
	if snap.foreign {
		s.awaitRewrite(w, parts)
		return
	}
	if w.plan.Slow() {
		st := w.plan.Decide(snap, local)
		if ops := w.plan.pastOf(snap); len(ops) > 0 {
			s.decidedPast(w, ops, st)
			return
		}
		if st.Code != codec.OK {
			s.answer(w, st)
			return
		}
		s.enqueue(w)
		return
	}
	w.plan.LearnCreates(snap)
	s.enqueue(w)
}

// filterMeets reports whether a batch with this filter may write a key of iv.
func filterMeets(filter []byte, iv Interval) bool {
	if iv.End != nil {
		return len(filter) > 0
	}
	return revclock.FilterMayContain(filter, iv.Key)
}
