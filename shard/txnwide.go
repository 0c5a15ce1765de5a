package shard

import (
	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// A Txn whose compares and writes lie on one shard, but not all its ranges (etcd's own mutex: a put, then the oldest
// key of a prefix), is written without those ranges. They are read afterwards, at the revision that it got: that is the
// state that the Txn itself left, so the answer is what one etcd would have given. A range that stands before a
// write of one of its keys would have to see another state; it is refused like any Txn over several shards, and so
// are nested ones.
type wideTxn struct {
	c     *Core
	op    *Op
	then  []bool // by operation of the success branch: it is read afterwards
	els   []bool
	inner *Op

	// Once it is written: the chosen path and its revision, what is to be read next, and the answers of the
	// ranges before that, without header, in order.
	span   planSpan
	wide   []bool
	rev    int64
	next   int32
	bodies [][]byte
	held   int64 // bytes of bodies in Memory
}

// submitWide serves op if it is such a Txn.
func (c *Core) submitWide(op *Op) bool {
	p := &op.core.plan
	if op.Kind != OpTxn || len(p.txns) != 1 || p.history {
		return false
	}
	shard := -1
	for _, iv := range p.Writes {
		if !c.onShard(iv, &shard) {
			return false
		}
	}
	for i := range p.cmps {
		if iv := p.cmps[i].interval(); !iv.Empty() && !c.onShard(iv, &shard) {
			return false
		}
	}
	t := &p.txns[0]
	w := &wideTxn{c: c, op: op}
	var ok bool
	if w.then, ok = c.wideOps(p, t.then, shard); !ok {
		return false
	}
	if w.els, ok = c.wideOps(p, t.els, shard); !ok {
		return false
	}
	w.inner = AcquireOp()
	w.inner.Kind, w.inner.Deadline = OpTxn, op.Deadline
	w.inner.Msg = w.appendInner(w.inner.Msg[:0], op.Msg)
	w.inner.Done = w.written
	c.Submit(w.inner)
	return true
}

// onShard says that all keys of iv lie on shard, which it sets if it is -1.
func (c *Core) onShard(iv Interval, shard *int) bool {
	i, all := c.part.ShardsOf(iv.Key, iv.End)
	if *shard < 0 && !all {
		*shard = i
	}
	return !all && i == *shard
}

// wideOps tells which operations of a branch are to be read afterwards; false if one of them cannot be.
func (c *Core) wideOps(p *Plan, span planSpan, shard int) (wide []bool, ok bool) {
	wide = make([]bool, span.len())
	for i := span.from; i < span.to; i++ {
		o := &p.ops[i]
		if o.kind != planRange || o.interval().Empty() || c.onShard(o.interval(), &shard) {
			continue
		}
		wide[i-span.from] = true
		for j := i + 1; j < span.to; j++ {
			if later := &p.ops[j]; later.kind != planRange && later.interval().Overlaps(o.interval()) {
				return nil, false
			}
		}
	}
	return wide, true
}

// appendInner appends the TxnRequest without what is read afterwards. It counts as parseTxn does: a field of a wrong
// wire type is none of the operations.
func (w *wideTxn) appendInner(dst, msg []byte) []byte {
	var n [2]int
	branches := [2][]bool{w.then, w.els}
	it := codec.Fields{Msg: msg}
	for it.Next() {
		if b := int(it.Field.Num) - 2; it.Field.Type == protowire.BytesType && (b == 0 || b == 1) {
			n[b]++
			if branches[b][n[b]-1] {
				continue
			}
		}
		dst = append(dst, it.Field.Raw...)
	}
	return dst
}

// written takes the answer of what was written, and asks for the rest.
func (w *wideTxn) written(in *Op) {
	if in.Status.Code != codec.OK {
		st := in.Status
		ReleaseOp(in)
		w.c.finish(w.op, st)
		return
	}
	w.span, w.wide, w.rev = w.chosen()
	w.next = w.span.from
	w.ask()
}

// ask reads the next range. One is read at a time, and what has been read is counted in Memory: a client may name
// the whole keyspace in each. What does not fit ends it.
func (w *wideTxn) ask() {
	for w.next < w.span.to && !w.wide[w.next-w.span.from] {
		w.next++
	}
	switch {
	case w.next == w.span.to:
		w.op.Resp = w.appendAnswer(w.op.Resp[:0])
		w.end(codec.Status{})
		return
	case w.op.canceled:
		w.end(statusCanceled)
		return
	case w.held > 0 && w.c.cfg.Memory.Over():
		// It is written, but what it shows is not known: the client cannot be told either.
		w.end(codec.ErrTimeout)
		return
	}
	p := &w.op.core.plan
	o := &p.ops[w.next]
	w.next++
	spec := p.ranges[o.idx]
	spec.rev, spec.serializable = w.rev, false
	if w.c.cfg.Sabotage.WideAtNow {
		spec.rev = 0
	}
	r := AcquireOp()
	r.Kind, r.part = OpRange, true
	r.Msg = spec.appendClient(r.Msg[:0], o.interval())
	r.Done = func(r *Op) {
		ok := r.Status.Code == codec.OK
		if ok {
			body := withoutHeader(r.Resp)
			w.bodies = append(w.bodies, body)
			w.held += int64(len(body))
			w.c.cfg.Memory.Add(int64(len(body)))
		}
		ReleaseOp(r)
		if !ok {
			w.end(codec.ErrTimeout) // as above
			return
		}
		w.ask()
	}
	w.c.Submit(r)
}

// end answers. What the answer holds is counted by the server from then on.
func (w *wideTxn) end(st codec.Status) {
	ReleaseOp(w.inner)
	w.c.finish(w.op, st)
	w.c.cfg.Memory.Add(-w.held)
}

// chosen tells from the inner answer which branch was executed, and at which revision.
func (w *wideTxn) chosen() (span planSpan, wide []bool, rev int64) {
	t := &w.op.core.plan.txns[0]
	span, wide = t.els, w.els
	it := codec.Fields{Msg: w.inner.Resp}
	for it.Next() {
		switch it.Field.Num {
		case 1:
			h, _ := codec.ParseHeader(it.Field.Bytes)
			rev = h.Revision
		case 2:
			if it.Field.Val != 0 {
				span, wide = t.then, w.then
			}
		}
	}
	return span, wide, rev
}

// appendAnswer puts the ranges' answers at their places. Headers inside a Txn are as in plan_answer.go.
func (w *wideTxn) appendAnswer(dst []byte) []byte {
	span, wide, rev := w.span, w.wide, w.rev
	changes := false
	ops := memberTxn{ops: codec.Fields{Msg: w.inner.Resp}}
	for kind, body, ok := ops.next(); ok; kind, body, ok = ops.next() {
		changes = changes || kind == planPut || kind == planDelete && deletedCount(body) > 0
	}
	before := rev // of headers before the first change
	if changes {
		before--
	}
	ops = memberTxn{ops: codec.Fields{Msg: w.inner.Resp}}
	for it := (codec.Fields{Msg: w.inner.Resp}); it.Next(); {
		if it.Field.Num != 3 {
			dst = append(dst, it.Field.Raw...)
		}
	}
	next := 0
	for i := 0; i < span.len(); i++ {
		var m, m2 int
		dst, m = codec.BeginMessage(dst, 3)
		if wide[i] {
			dst, m2 = codec.BeginMessage(dst, protowire.Number(planRange))
			dst = append(appendRevHeader(dst, before), w.bodies[next]...)
			next++
		} else {
			kind, body, _ := ops.next()
			if kind == planPut || kind == planDelete && deletedCount(body) > 0 {
				before = rev
			}
			dst, m2 = codec.BeginMessage(dst, protowire.Number(kind))
			dst = append(dst, body...)
		}
		dst = codec.EndMessage(codec.EndMessage(dst, m2), m)
	}
	return dst
}
