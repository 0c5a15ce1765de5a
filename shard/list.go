package shard

import (
	"fmt"

	"spindle/codec"
	"spindle/revclock"
	"spindle/watchring"
)

// This file is the road of reads that need a fixed state of one or more shards: lists over all shards,
// serializable reads, reads at a revision.

// fixedRead reads the same range of several shards and answers them as one. It is the nowWaiter of its
// now, and part i is the Completion of shard i's call.
type fixedRead struct {
	c        *Core
	op       *Op
	shards   []*shardState
	parts    []part
	waiting  int // calls under way
	haveNow  bool
	n        int64
	a        []int64
	epoch    revclock.ID // of now
	h        int64       // header revision of the answer, once it is fixed
	fixed    bool        // the second look: every shard at its local revision
	latest   bool        // no revision was named: ErrCompacted means "ask again"
	over     bool
	deadline int64
}

// part is one shard's share of a fixedRead.
type part struct {
	r     *fixedRead
	s     *shardState
	local int64 // 0: the newest
	known int64 // what the shard's clock has been at when it was asked
	whole bool  // the range is read without its limit
	resp  []byte
	reply txnReply
	err   codec.Status
}

// submitList reads a range over all shards: first beside now; if no batch was in flight anywhere that
// is the answer, else each shard is read again at the state that belongs to now.
func (c *Core) submitList(op *Op) {
	if op.core.plan.paged() {
		c.newPagedRead(op, nil).begin()
		return
	}
	r := c.newFixedRead(op, c.readSet(op))
	r.latest = true
	r.begin()
}

func (c *Core) newFixedRead(op *Op, shards []*shardState) *fixedRead {
	r := &fixedRead{c: c, op: op, shards: shards, parts: make([]part, len(shards)), deadline: c.deadline()}
	for i, s := range shards {
		r.parts[i] = part{r: r, s: s}
	}
	c.at(r.deadline, func() { r.end(codec.ErrTimeout) })
	return r
}

// end answers with an error, once.
func (r *fixedRead) end(st codec.Status) {
	if r.over {
		return
	}
	op := r.op
	r.drop()
	r.c.finish(op, st)
}

// drop lets go of everything: a timer and perhaps a waiter still point at r for a while.
func (r *fixedRead) drop() {
	r.over, r.op, r.a = true, nil, nil
	for i := range r.parts {
		r.parts[i] = part{r: r} // calls under way still complete it
	}
}

func (r *fixedRead) abandon(st codec.Status) { r.end(st) }

func (r *fixedRead) begin() {
	r.fixed, r.haveNow, r.waiting = false, false, len(r.parts)
	r.c.awaitNow(r)
	for i := range r.parts {
		r.parts[i].local = 0
		r.parts[i].send()
	}
}

func (p *part) send() {
	c := p.r.c
	body := c.scratch[:0]
	if p.whole {
		body = appendPlainRangeOp(body, txnSuccess, p.r.op.core.plan.Reads[0], p.local)
	} else {
		var m int
		body, m = codec.BeginMessage(body, txnSuccess)
		body = p.r.op.core.plan.AppendReadOp(body, p.local)
		body = codec.EndMessage(body, m)
	}
	p.known = p.s.floor()
	body = appendGet(body, txnSuccess, KeyClock, p.local)
	if !p.r.latest {
		// Another proxy may have compacted it meanwhile, and this one's stream may not have shown that yet.
		body = appendGet(body, txnSuccess, KeyCompact, 0)
	}
	c.scratch = body
	p.s.callLarge(codec.MethodTxn, body, 0, p)
}

func (p *part) Complete(resp []byte, st codec.Status, sent bool) {
	r := p.r
	c := r.c
	if r.over {
		return
	}
	if r.op.canceled {
		r.end(statusCanceled)
		return
	}
	if st.Code != codec.OK {
		switch {
		case st == codec.ErrCompacted && r.latest:
			p.err = st // the state that belonged to now is gone: a new now
			if p.local == p.s.rec.local {
				// Somebody compacted the member up to its newest record: only another record helps.
				p.s.wantFence = true
				p.s.touch()
			}
		case st == codec.ErrCompacted:
			r.end(st)
			return
		case definite(st) && st != codec.ErrFutureRev:
			r.end(st)
			return
		case c.cfg.Now() >= r.deadline:
			r.end(codec.ErrTimeout)
			return
		default:
			c.after(c.jitter(retryDelay), func() {
				if !r.over {
					p.send()
				}
			})
			return
		}
	} else {
		p.err = codec.Status{}
		p.resp = append(p.resp[:0], resp...)
		var ok bool
		if p.reply, ok = parseTxnReply(p.resp, p.reply.resps); !ok || len(p.reply.resps) < 2 {
			r.end(codec.Status{Code: codec.Internal, Msg: "spindle: unreadable answer of member cluster " + p.s.name})
			return
		}
		if anyForeign(p.reply.resps[0]) {
			if !p.whole && r.op.core.plan.ranges[0].limit > 0 {
				p.whole = true // keys that are taken out are made up for by others
				p.send()
				return
			}
			p.s.cleanTxn(&p.reply, r.deadline, func(resp []byte, st codec.Status) {
				if st.Code != codec.OK {
					r.end(st)
					return
				}
				p.Complete(resp, st, true)
			})
			return
		}
		if !r.latest && p.s.compactedIn(p.reply.resps, r.op.core.plan.Revision()) {
			r.end(codec.ErrCompacted)
			return
		}
	}
	r.waiting--
	r.decide()
}

func (r *fixedRead) nowDone(n int64, a []int64) {
	if r.over {
		return
	}
	r.n, r.a, r.haveNow, r.epoch = n, append(r.a[:0], a...), true, r.c.m.Epoch
	r.decide()
}

// decide answers when everything is there, or looks a second time.
func (r *fixedRead) decide() {
	if r.waiting > 0 || !r.fixed && !r.haveNow {
		return
	}
	for i := range r.parts {
		if r.parts[i].err.Code != codec.OK {
			r.begin()
			return
		}
	}
	if r.fixed {
		r.answer()
		return
	}
	exact := true
	for i := range r.parts {
		p := &r.parts[i]
		clock, _ := firstKV(p.reply.resps[1])
		rec, ok := ParseRecord(clock.Value)
		if !ok {
			r.end(codec.Status{Code: codec.Internal, Msg: fmt.Sprintf("spindle: member cluster %s shows no clock record", p.s.name)})
			return
		}
		s := p.s
		if rec.Last < p.known {
			s.wentBack(rec.Last, p.known)
			exact = false
			break
		}
		s.saw(point{rec.First, rec.Last, clock.ModRevision})
		settled := p.reply.rev == clock.ModRevision || s.pos >= p.reply.rev && s.lastUnrecorded <= clock.ModRevision
		if !settled || rec.Last < r.a[s.idx] || rec.Last > r.n || !s.sameEpoch(&rec, clock.ModRevision) || r.epoch != r.c.m.Epoch {
			exact = false
			break
		}
	}
	if exact {
		r.h = r.n
		r.answer()
		return
	}
	r.c.stats.Rereads++
	n := r.n
	r.c.awaitFrontiers(r.shards, n, r.deadline, func() { r.lookAt(n, n) })
}

// awaitFrontiers calls f once the frontier of each of the shards is at rev, never after the deadline. The
// other shards do not matter: one of them may be down.
func (c *Core) awaitFrontiers(shards []*shardState, rev, deadline int64, f func()) {
	if len(shards) == len(c.shards) {
		c.awaitFrontier(watchring.All, rev, deadline, f)
		return
	}
	for i, s := range shards {
		if c.frontier.Get(s.idx) < rev {
			c.awaitFrontier(s.idx, rev, deadline, func() { c.awaitFrontiers(shards[i+1:], rev, deadline, f) })
			return
		}
	}
	f()
}

// frontierOf returns up to where everything was seen on the shards.
func (c *Core) frontierOf(shards []*shardState) int64 {
	if len(shards) == len(c.shards) {
		return c.frontier.Get(watchring.All)
	}
	f := c.frontier.Get(shards[0].idx)
	for _, s := range shards[1:] {
		f = min(f, c.frontier.Get(s.idx))
	}
	return f
}

// lookAt reads every shard at the state that belongs to revision rev, and answers with header h. The
// frontier must be at rev.
func (r *fixedRead) lookAt(rev, h int64) {
	if r.over {
		return
	}
	r.fixed, r.h, r.waiting = true, h, len(r.parts)
	for i := range r.parts {
		p := &r.parts[i]
		p.s.locate(rev, func(at located, st codec.Status) {
			if r.over {
				return
			}
			if st.Code != codec.OK {
				if st == codec.ErrCompacted && r.latest {
					p.err = st
					r.waiting--
					r.decide()
					return
				}
				r.end(st)
				return
			}
			if at.inside {
				p.readInside(rev, at)
				return
			}
			p.local = at.base.local
			p.send()
		})
	}
}

func (r *fixedRead) answer() {
	c := r.c
	hdr := c.hdr
	hdr.Revision = r.h
	parts := make([][]byte, len(r.parts))
	for i := range r.parts {
		parts[i] = r.parts[i].reply.resps[0]
	}
	op := r.op
	op.Resp = op.core.plan.AnswerRange(op.Resp[:0], parts, hdr, nil)
	r.drop()
	c.finish(op, codec.Status{})
}

// readSet returns the shards on which op's range lies.
func (c *Core) readSet(op *Op) []*shardState {
	if shard, one := c.shardOf(&op.core.plan); one {
		return c.shards[shard : shard+1]
	}
	iv := op.core.plan.Reads[0]
	c.setScratch = c.part.AppendShards(c.setScratch[:0], iv.Key, iv.End)
	if len(c.setScratch) == len(c.shards) {
		return c.shards
	}
	set := make([]*shardState, len(c.setScratch))
	for i, idx := range c.setScratch {
		set[i] = c.shards[idx]
	}
	return set
}

// submitSerializable answers from this proxy's frontier, without the coordinator.
func (c *Core) submitSerializable(op *Op) {
	if op.core.plan.paged() {
		r := c.newPagedRead(op, nil)
		r.latest = true
		f := c.frontierOf(r.shards)
		r.lookAt(f, f)
		return
	}
	r := c.newFixedRead(op, c.readSet(op))
	r.latest = true
	r.serializable(c.frontierOf(r.shards))
}

func (r *fixedRead) serializable(f int64) { r.lookAt(f, f) }

// submitHistoryRange answers a Range at a revision: its contents, with the present in the header.
func (c *Core) submitHistoryRange(op *Op) {
	rev := op.core.plan.Revision()
	c.presentOf(op, func(n int64, st codec.Status) {
		switch {
		case op.canceled:
			c.finish(op, statusCanceled)
		case st.Code != codec.OK:
			c.finish(op, st)
		case rev > n:
			c.finish(op, codec.ErrFutureRev)
		case rev < c.compacted:
			c.finish(op, codec.ErrCompacted)
		default:
			if op.core.plan.Empty() {
				c.lookCompacted(rev, func(st codec.Status) {
					if op.canceled {
						st = statusCanceled
					}
					if st.Code == codec.OK {
						hdr := c.hdr
						hdr.Revision = n
						op.Resp = op.core.plan.AnswerRange(op.Resp[:0], nil, hdr, nil)
					}
					c.finish(op, st)
				})
				return
			}
			if op.core.plan.paged() {
				r := c.newPagedRead(op, nil)
				c.awaitFrontiers(r.shards, rev, r.deadline, func() { r.lookAt(rev, n) })
				return
			}
			r := c.newFixedRead(op, c.readSet(op))
			c.awaitFrontiers(r.shards, rev, r.deadline, func() { r.lookAt(rev, n) })
		}
	})
}

// presentOf calls f with the present that a read at a revision shows in its header: now, or if it is serializable and
// this proxy has seen its revision, the frontier of its shards, for which nobody has to be asked.
func (c *Core) presentOf(op *Op, f func(n int64, st codec.Status)) {
	if p := &op.core.plan; p.Serializable() && !p.Empty() {
		if n := c.frontierOf(c.readSet(op)); p.Revision() <= n {
			f(n, codec.Status{})
			return
		}
	}
	c.Now(f)
}

// readInside reads the state at a revision inside a batch: what was before the batch, and the batch's
// own events up to there.
func (p *part) readInside(rev int64, at located) {
	in := &insideRead{p: p, rev: rev, at: at, waiting: 2}
	for k := range in.looks {
		in.looks[k] = insideLook{in: in, local: at.next.local - int64(1-k)}
		in.looks[k].send()
	}
}

// insideRead holds the two looks of readInside: before the batch, and after it.
type insideRead struct {
	p       *part
	rev     int64
	at      located
	waiting int
	looks   [2]insideLook
}

type insideLook struct {
	in    *insideRead
	local int64
	resp  []byte
	reply txnReply
}

func (l *insideLook) send() {
	p := l.in.p
	c := p.r.c
	body := appendPlainRangeOp(c.scratch[:0], txnSuccess, p.r.op.core.plan.Reads[0], l.local)
	body = appendGet(body, txnSuccess, KeyClock, l.local)
	if !p.r.latest {
		body = appendGet(body, txnSuccess, KeyCompact, 0)
	}
	c.scratch = body
	p.s.callLarge(codec.MethodTxn, body, 0, l)
}

func (l *insideLook) Complete(resp []byte, st codec.Status, sent bool) {
	in := l.in
	p := in.p
	r := p.r
	c := r.c
	if r.over || in.waiting <= 0 {
		return // the other look has ended this part already
	}
	if st.Code != codec.OK {
		switch {
		case st == codec.ErrCompacted && r.latest:
			in.waiting = -1
			p.err = st
			r.waiting--
			r.decide()
		case definite(st) && st != codec.ErrFutureRev:
			r.end(st)
		default:
			c.after(c.jitter(retryDelay), func() {
				if !r.over && in.waiting > 0 {
					l.send()
				}
			})
		}
		return
	}
	l.resp = append(l.resp[:0], resp...)
	var ok bool
	if l.reply, ok = parseTxnReply(l.resp, nil); !ok || len(l.reply.resps) < 2 {
		r.end(codec.Status{Code: codec.Internal, Msg: "spindle: unreadable answer of member cluster " + p.s.name})
		return
	}
	if anyForeign(l.reply.resps[0]) {
		p.s.cleanTxn(&l.reply, r.deadline, func(resp []byte, st codec.Status) {
			if st.Code != codec.OK {
				r.end(st)
				return
			}
			l.Complete(resp, st, true)
		})
		return
	}
	if !r.latest && p.s.compactedIn(l.reply.resps, in.rev) {
		r.end(codec.ErrCompacted)
		return
	}
	if in.waiting--; in.waiting > 0 {
		return
	}
	before, after := in.looks[0].reply.resps[0], in.looks[1].reply.resps[0]
	clock, _ := firstKV(in.looks[1].reply.resps[1])
	rec, ok := ParseRecord(clock.Value)
	if !ok {
		r.end(codec.Status{Code: codec.Internal, Msg: "spindle: unreadable clock record on member cluster " + p.s.name})
		return
	}
	merged, ok := MergeAtRevision(nil, after, before, in.rev, &rec)
	if !ok {
		r.end(codec.Status{Code: codec.Internal, Msg: "spindle: the history of a batch on member cluster " + p.s.name + " does not fit its record"})
		return
	}
	p.err = codec.Status{}
	p.reply.resps = append(p.reply.resps[:0], merged, nil)
	r.waiting--
	r.decide()
}
