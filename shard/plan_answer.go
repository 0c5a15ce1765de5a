package shard

import (
	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// This file turns a member's answer to AppendRequestOp into the client's.
//
// Headers: the outer one is the caller's. etcd puts a revision, and nothing else, into the headers of
// the operations of a Txn: the revision before the Txn as long as nothing was changed, its own after
// that; a nested Txn has an empty header. Here the revision before is the Txn's own minus 1, which shows
// the same state; when nothing is changed at all every header has the Txn's.

// memberTxn is a view of a member's TxnResponse.
type memberTxn struct {
	succeeded bool
	ops       codec.Fields
	// kind and only stand for the one operation of a request that had no Txn of its own; planNone else.
	kind planOpKind
	only []byte
}

func readMemberTxn(msg []byte) (t memberTxn, ok bool) {
	t.ops.Msg = msg
	it := codec.Fields{Msg: msg}
	for it.Next() {
		if it.Field.Num == 2 {
			t.succeeded = it.Field.Val != 0
		}
		if it.Field.Num == 3 {
			break // etcd writes fields in order
		}
	}
	return t, !it.Bad
}

// next returns the body of the next ResponseOp's member, whose number is a planOpKind.
func (t *memberTxn) next() (kind planOpKind, body []byte, ok bool) {
	if t.kind != planNone {
		kind, t.kind = t.kind, planNone
		return kind, t.only, true
	}
	for t.ops.Next() {
		if t.ops.Field.Num != 3 {
			continue
		}
		in := codec.Fields{Msg: t.ops.Field.Bytes}
		for in.Next() {
			kind, body = planOpKind(in.Field.Num), in.Field.Bytes
		}
		return kind, body, !in.Bad
	}
	return planNone, nil, false
}

// answering is the state of one Answer.
type answering struct {
	p     *Plan
	hdr   codec.Header
	learn Learner
	// begin is the revision of headers before the first change, changed says that it is over.
	begin   int64
	changed bool
}

func (a *answering) rev() int64 {
	if a.changed {
		return a.hdr.Revision
	}
	return a.begin
}

// Answer appends the client's whole response (PutResponse, DeleteRangeResponse or TxnResponse) to dst.
// responseTxn is the payload of the ResponseOp.response_txn that answers AppendRequestOp's operation,
// hdr.Revision the meta revision that was given to it. learn may be nil.
//
// On an Outcome other than Answered nothing was executed and dst comes back as it was. Status is set only
// with Answered.
func (p *Plan) Answer(dst, responseTxn []byte, hdr codec.Header, learn Learner) (out []byte, oc Outcome, st codec.Status) {
	outer, ok := readMemberTxn(responseTxn)
	if !ok {
		return dst, Answered, errMemberReply
	}
	guarded := p.createGuards()+p.leaseGuards() > 0 || p.decided && len(p.guards) > 0
	if guarded && !outer.succeeded {
		oc = GuardFailed
		if !p.decided {
			oc = WrongCreate
			if !p.learnGuarded(&outer, hdr.Revision, learn) {
				return dst, Answered, errMemberReply
			}
		}
		if !p.learnLeases(&outer) {
			return dst, Answered, errMemberReply
		}
		return dst, oc, st
	}
	if p.nests() {
		kind, body, ok := outer.next()
		if ok && kind == planNested {
			outer, ok = readMemberTxn(body)
		}
		if !ok || kind != planNested {
			return dst, Answered, errMemberReply
		}
	}
	return p.answer(dst, outer, hdr, learn)
}

// answer is the rest of Answer: outer is the client's own Txn, or a level with the one operation of another request.
func (p *Plan) answer(dst []byte, outer memberTxn, hdr codec.Header, learn Learner) (out []byte, oc Outcome, st codec.Status) {
	ok := true
	a := answering{p: p, hdr: hdr, learn: learn, begin: hdr.Revision}
	if p.Kind != OpTxn {
		kind, body, ok := outer.next()
		if !ok || kind != p.ops[0].kind {
			return dst, Answered, errMemberReply
		}
		if out, ok = a.appendOp(dst, &p.ops[0], body, &hdr); !ok {
			return dst, Answered, errMemberReply
		}
		return out, Answered, st
	}
	if p.changes(&p.txns[0], outer) {
		a.begin--
	}
	if out, ok = a.appendTxn(dst, &p.txns[0], outer, &hdr); !ok {
		return dst, Answered, errMemberReply
	}
	return out, Answered, st
}

// learnGuarded takes the truth on the guarded slots from the failure branch of a batch at revision rev.
// What is not in question, the shape of the request, stays as it is.
func (p *Plan) learnGuarded(t *memberTxn, rev int64, learn Learner) bool {
	for i := range p.PutSlots {
		if !p.guardsSlot(i) {
			continue
		}
		kind, body, ok := t.next()
		if !ok || kind != planRange {
			return false
		}
		c, mod := Create{}, rev
		it := partIter{it: codec.Fields{Msg: body}}
		if it.next() {
			c, mod = Create{it.kv.local, it.kv.CreateRevision}, it.kv.ModRevision
		}
		if it.it.Bad {
			return false
		}
		s := &p.PutSlots[i]
		s.Create = c
		if it.skipped > 0 {
			s.Known = false // somebody else wrote it: it must be taken over first
			continue
		}
		if learn != nil {
			learn.Learn(s.Key, c.Local, c.Meta, mod)
		}
	}
	return true
}

// branchOf returns the operations that were executed.
func (p *Plan) branchOf(t *planTxn, r *memberTxn) (span planSpan, succeeded bool) {
	succeeded = r.succeeded
	if p.decided {
		succeeded = t.branch == branchThen
	}
	if succeeded {
		return t.then, true
	}
	return t.els, false
}

// changes says whether the Txn put anything or deleted any key.
func (p *Plan) changes(t *planTxn, r memberTxn) bool {
	span, _ := p.branchOf(t, &r)
	for i := span.from; i < span.to; i++ {
		o := &p.ops[i]
		_, body, ok := r.next()
		if !ok {
			return false
		}
		switch o.kind {
		case planPut:
			return true
		case planDelete:
			if deletedCount(body) > 0 {
				return true
			}
		case planNested:
			if in, ok := readMemberTxn(body); ok && p.changes(&p.txns[o.idx], in) {
				return true
			}
		}
	}
	return false
}

func deletedCount(msg []byte) (n int64) {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		if it.Field.Num == 2 {
			return int64(it.Field.Val)
		}
	}
	return 0
}

// appendHeader appends the header of an operation: full when it is the whole request, else the revision.
func (a *answering) appendHeader(dst []byte, full *codec.Header) []byte {
	if full != nil {
		return codec.AppendHeaderField(dst, full)
	}
	return appendRevHeader(dst, a.rev())
}

func appendRevHeader(dst []byte, rev int64) []byte {
	return codec.AppendHeaderField(dst, &codec.Header{Revision: rev})
}

// appendTxn appends the fields of a TxnResponse. full is the header of the outermost one.
func (a *answering) appendTxn(dst []byte, t *planTxn, r memberTxn, full *codec.Header) ([]byte, bool) {
	if full == nil {
		full = &codec.Header{}
	}
	dst = codec.AppendHeaderField(dst, full)
	span, succeeded := a.p.branchOf(t, &r)
	dst = codec.AppendBool(dst, 2, succeeded)
	for i := span.from; i < span.to; i++ {
		o := &a.p.ops[i]
		kind, body, ok := r.next()
		if !ok || kind != o.kind {
			return dst, false
		}
		var m, m2 int
		dst, m = codec.BeginMessage(dst, 3)
		dst, m2 = codec.BeginMessage(dst, protowire.Number(kind))
		if dst, ok = a.appendOp(dst, o, body, nil); !ok {
			return dst, false
		}
		dst = codec.EndMessage(dst, m2)
		dst = codec.EndMessage(dst, m)
	}
	return dst, true
}

// appendOp appends the fields of the response to one operation.
func (a *answering) appendOp(dst []byte, o *planOp, body []byte, full *codec.Header) ([]byte, bool) {
	switch o.kind {
	case planRange:
		dst = a.appendHeader(dst, full)
		if past, ok := a.p.pastBody(o.idx); ok {
			return append(dst, past...), true
		}
		one := [1][]byte{body}
		return a.p.merge.appendRange(dst, &a.p.ranges[o.idx], one[:], a.learn)
	case planPut:
		a.changed = true
		return a.appendPut(a.appendHeader(dst, full), o, body)
	case planDelete:
		return a.appendDelete(dst, o, body, full)
	case planNested:
		r, ok := readMemberTxn(body)
		if !ok {
			return dst, false
		}
		return a.appendTxn(dst, &a.p.txns[o.idx], r, nil)
	}
	return dst, false
}

func (a *answering) appendPut(dst []byte, o *planOp, body []byte) ([]byte, bool) {
	local := int64(0)
	it := codec.Fields{Msg: body}
	for it.Next() {
		switch it.Field.Num {
		case 1:
			if h, ok := codec.ParseHeader(it.Field.Bytes); ok {
				local = h.Revision
			}
		case 2:
			var kv snapKV
			stamped, ok := parseStored(it.Field.Bytes, &kv)
			if !ok {
				return dst, false
			}
			if stamped {
				dst = appendKVField(dst, 2, &kv.KV)
			}
		}
	}
	if s := &a.p.PutSlots[o.idx]; a.learn != nil {
		if a.p.creates(s) {
			a.learn.Learn(o.key, local, a.hdr.Revision, a.hdr.Revision)
		} else {
			a.learn.Learn(o.key, s.Create.Local, s.Create.Meta, a.hdr.Revision)
		}
	}
	return dst, !it.Bad
}

func (a *answering) appendDelete(dst []byte, o *planOp, body []byte, full *codec.Header) ([]byte, bool) {
	n := deletedCount(body)
	a.changed = a.changed || n > 0
	dst = a.appendHeader(dst, full)
	dst = codec.AppendInt(dst, 2, n)
	if a.learn != nil && o.end == nil {
		a.learn.Learn(o.key, 0, 0, a.hdr.Revision)
	}
	it := codec.Fields{Msg: body}
	for it.Next() {
		if it.Field.Num != 3 {
			continue
		}
		var kv snapKV
		stamped, ok := parseStored(it.Field.Bytes, &kv)
		if !ok {
			return dst, false
		}
		if stamped {
			dst = appendKVField(dst, 3, &kv.KV)
		}
		if a.learn != nil {
			a.learn.Learn(kv.Key, 0, 0, a.hdr.Revision)
		}
	}
	return dst, !it.Bad
}
