package shard

import (
	"math"

	"spindle/codec"
)

// This file is what a Txn does with ranges that name a revision: etcd reads them from history, whatever
// the Txn itself writes. They are answered beside it, by Ranges of their own, and put into the answer at their
// place. Only those on the chosen path count, for their errors too, so such a Txn is decided in the proxy.

// pastRange is the answer to one range with a revision: a client's RangeResponse without its header.
type pastRange struct {
	known bool
	body  []byte
}

// pastOf returns the operations that are ranges with a revision on the path that is chosen on snap, in
// order; those behind an operation that the Txn fails with are left out, as etcd does not look at them.
func (p *Plan) pastOf(snap *Snapshot) (ops []int32) {
	if !p.history {
		return nil
	}
	e := evaluation{p: p, kvs: snap.kvs, branches: make([]planBranch, len(p.txns))}
	e.choose(0, snap)
	e.pasts(e.chosen(0), snap, &ops)
	return ops
}

func (e *evaluation) pasts(span planSpan, snap *Snapshot, ops *[]int32) bool {
	for i := span.from; i < span.to; i++ {
		switch o := &e.p.ops[i]; o.kind {
		case planRange:
			if e.p.ranges[o.idx].rev != 0 {
				*ops = append(*ops, i)
			}
		case planPut:
			if o.ignores() && snap.get(o.key) == nil {
				return false
			}
		case planNested:
			if !e.pasts(e.chosen(int(o.idx)), snap, ops) {
				return false
			}
		}
	}
	return true
}

// pastBody returns what the range idx answers from history, if it does.
func (p *Plan) pastBody(idx int32) (body []byte, known bool) {
	if int(idx) >= len(p.past) {
		return nil, false
	}
	return p.past[idx].body, p.past[idx].known
}

// readPast answers p's operations ops, which are ranges with revisions, and calls f when all are known, or
// with the error of the first one that has one. upTo is the newest revision that is not in the future.
func (c *Core) readPast(p *Plan, ops []int32, upTo int64, f func(codec.Status)) {
	if len(p.past) != len(p.ranges) {
		p.past = make([]pastRange, len(p.ranges))
	}
	errs := make([]codec.Status, len(ops))
	waiting := 1 // this function
	done := func() {
		if waiting--; waiting > 0 {
			return
		}
		for _, st := range errs {
			if st.Code != codec.OK {
				f(st)
				return
			}
		}
		f(codec.Status{})
	}
	for k, i := range ops {
		o := &p.ops[i]
		r := &p.ranges[o.idx]
		switch {
		case r.rev > upTo:
			errs[k] = codec.ErrFutureRev
		case r.rev < c.compacted:
			errs[k] = codec.ErrCompacted
		case r.rev < 0 || p.past[o.idx].known:
			// Nothing was ever compacted, and -1 is not below that: etcd reads the present.
		default:
			waiting++
			in := AcquireOp()
			in.Kind, in.part = OpRange, true
			in.Msg = r.appendClient(in.Msg[:0], o.interval())
			in.Done = func(in *Op) {
				if errs[k] = in.Status; in.Status.Code == codec.OK {
					p.past[o.idx] = pastRange{true, withoutHeader(in.Resp)}
				}
				ReleaseOp(in)
				done()
			}
			c.Submit(in)
		}
	}
	done()
}

// appendClient appends the fields of a client's RangeRequest.
func (r *rangeSpec) appendClient(dst []byte, iv Interval) []byte {
	dst = codec.AppendBytes(dst, 1, iv.Key)
	dst = codec.AppendBytes(dst, 2, iv.End)
	dst = codec.AppendInt(dst, 3, r.limit)
	dst = codec.AppendInt(dst, 4, r.rev)
	dst = codec.AppendInt(dst, 5, int64(r.order))
	dst = codec.AppendInt(dst, 6, int64(r.target))
	dst = codec.AppendBool(dst, 8, r.keysOnly)
	dst = codec.AppendBool(dst, 9, r.countOnly)
	dst = codec.AppendInt(dst, 10, r.minMod)
	dst = codec.AppendInt(dst, 11, r.maxMod)
	dst = codec.AppendInt(dst, 12, r.minCreate)
	return codec.AppendInt(dst, 13, r.maxCreate)
}

// withoutHeader copies a response's fields behind the header.
func withoutHeader(resp []byte) []byte {
	it := codec.Fields{Msg: resp}
	for it.Next() {
		if it.Field.Num == 1 {
			return append([]byte(nil), it.Msg...)
		}
	}
	return append([]byte(nil), resp...)
}

// answerTxn answers a Txn that writes nothing from snap, which shows the state at hdr.Revision.
func (c *Core) answerTxn(op *Op, snap *Snapshot, hdr codec.Header) {
	p := &op.core.plan
	answer := func() {
		out, _, st := p.Evaluate(op.Resp[:0], snap, hdr)
		op.Resp = out
		if len(out) > largeAnswer && c.cfg.Memory.Over() {
			c.stats.LargeRefused++
			op.Resp, st = nil, codec.ErrTooManyRequests // nothing was changed by it
		}
		c.finish(op, st)
	}
	ops := p.pastOf(snap)
	if len(ops) == 0 {
		answer()
		return
	}
	c.leaveList(op) // those ranges pass their own gate
	c.readPast(p, ops, hdr.Revision, func(st codec.Status) {
		if st.Code != codec.OK {
			c.finish(op, st)
			return
		}
		answer()
	})
}

// ownParts copies what a member answered: a Txn with ranges from history is answered later.
func ownParts(parts [][]byte) [][]byte {
	own := make([][]byte, len(parts))
	for i, p := range parts {
		own[i] = append([]byte(nil), p...)
	}
	return own
}

// decidedPast goes on with a write that was decided with status st, once the ranges from history on its
// path, ops, are known.
func (s *shardState) decidedPast(w *write, ops []int32, st codec.Status) {
	s.c.readPast(w.plan, ops, math.MaxInt64, func(past codec.Status) {
		switch {
		case past.Code != codec.OK:
			s.answer(w, past)
		case st.Code != codec.OK:
			s.answer(w, st)
		case w.op.canceled:
			s.answer(w, statusCanceled)
		case s.c.state != stateReady:
			s.answer(w, codec.ErrStopped)
		default:
			s.enqueue(w)
		}
	})
}
