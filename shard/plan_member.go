package shard

import (
	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// This file writes the member form of a request: one RequestOp that holds one nested Txn.
//
//	not guarded:   Txn{ client's compares; then; else }
//	guarded:       Txn{ guards; success: [ Txn{ client's compares; then; else } ]; failure: [ Range ... ] }
//	flat guarded:  Txn{ guards; success: then; failure: [ Range ... ] }      no compare is left to make
//	decided:       Txn{ guards; success: the chosen operations }             nested Txns likewise
//
// The guards have a level of their own, so that a guess of the proxy that was wrong is not taken for the
// client's else. The ranges of the failure branch read the keys whose create revision was wrong, in the
// order of the guards. Guards on leases (plan_lease.go) stand behind those on the puts' keys; a decided
// plan has a failure branch for them alone.

// guardsSlot says whether AppendRequestOp writes a guard on the create revision of PutSlots[i].
func (p *Plan) guardsSlot(i int) bool {
	s := &p.PutSlots[i]
	if p.decided {
		return s.runs && s.Guard
	}
	return s.Proven != 0 && s.Guard
}

// createGuards counts the guards on create revisions.
func (p *Plan) createGuards() int {
	n := 0
	for i := range p.PutSlots {
		if p.guardsSlot(i) {
			n++
		}
	}
	return n
}

// clientCompares counts the compares that are left of the client's outermost ones.
func (p *Plan) clientCompares(t *planTxn) int {
	if p.decided {
		return 0
	}
	n := 0
	for i := t.cmps.from; i < t.cmps.to; i++ {
		n += p.cmps[i].form.compares()
	}
	return n
}

// nests says that the client's Txn stands in a level below the guards.
func (p *Plan) nests() bool {
	return p.Kind == OpTxn && !p.decided && p.createGuards()+p.leaseGuards() > 0 && p.clientCompares(&p.txns[0]) > 0
}

// success returns the operations of the request if it needs no Txn of its own.
func (p *Plan) success() planSpan {
	switch {
	case p.Kind != OpTxn:
		return p.root
	case p.decided:
		return p.txns[0].chosen()
	}
	return p.txns[0].then
}

// AppendRequestOp appends the fields of one RequestOp, the request in member form with meta revision rev,
// to be embedded by the caller as an operation of the batch. Everything that Ready asks for must be
// there. The same Plan gives the same bytes until PutSlots or the decision change.
func (p *Plan) AppendRequestOp(dst []byte, rev int64) []byte {
	dst, op := codec.BeginMessage(dst, 4)
	guards := p.createGuards() + p.leaseGuards()
	if p.decided {
		for i := range p.guards {
			dst = p.guards[i].appendCompare(dst)
		}
	}
	for i := range p.PutSlots {
		if s := &p.PutSlots[i]; p.guardsSlot(i) {
			dst = appendNumberCompare(dst, s.Key, nil, targetOfCreate, resultIsEqual, s.Create.Local)
		}
	}
	dst = p.appendLeaseGuards(dst)
	switch {
	case p.Kind == OpTxn && !p.decided && guards == 0:
		dst = p.appendTxn(dst, &p.txns[0], rev)
	case p.nests():
		var m, m2 int
		dst, m = codec.BeginMessage(dst, 2)
		dst, m2 = codec.BeginMessage(dst, 4)
		dst = p.appendTxn(dst, &p.txns[0], rev)
		dst = codec.EndMessage(dst, m2)
		dst = codec.EndMessage(dst, m)
	default:
		dst = p.appendOps(dst, 2, p.success(), rev)
	}
	if guards > 0 && !p.decided {
		for i := range p.PutSlots {
			if p.guardsSlot(i) {
				dst = appendPlainRangeOp(dst, 3, Interval{Key: p.PutSlots[i].Key}, 0)
			}
		}
	}
	dst = p.appendLeaseReads(dst)
	return codec.EndMessage(dst, op)
}

func (g *planGuard) appendCompare(dst []byte) []byte {
	result := int32(resultIsEqual)
	if g.less {
		result = resultIsLess
	}
	return appendNumberCompare(dst, g.iv.Key, g.iv.End, targetOfMod, result, g.rev)
}

// appendTxn appends the fields of a TxnRequest.
func (p *Plan) appendTxn(dst []byte, t *planTxn, rev int64) []byte {
	if p.decided {
		return p.appendOps(dst, 2, t.chosen(), rev)
	}
	for i := t.cmps.from; i < t.cmps.to; i++ {
		dst = p.cmps[i].appendCompares(dst)
	}
	dst = p.appendOps(dst, 2, t.then, rev)
	return p.appendOps(dst, 3, t.els, rev)
}

// appendOps appends operations as field num of a TxnRequest.
func (p *Plan) appendOps(dst []byte, num protowire.Number, span planSpan, rev int64) []byte {
	for i := span.from; i < span.to; i++ {
		o := &p.ops[i]
		var m, m2 int
		dst, m = codec.BeginMessage(dst, num)
		dst, m2 = codec.BeginMessage(dst, protowire.Number(o.kind))
		switch o.kind {
		case planRange:
			r := p.ranges[o.idx]
			if _, past := p.pastBody(o.idx); past {
				r = rangeSpec{countOnly: true} // only its place in the answer counts
			}
			dst = r.appendMember(dst, o.interval(), 0)
		case planPut:
			dst = p.appendPut(dst, o, rev)
		case planDelete:
			dst = codec.AppendBytes(dst, 1, o.key)
			dst = codec.AppendBytes(dst, 2, o.end)
			dst = codec.AppendBool(dst, 3, o.prevKV)
		case planNested:
			dst = p.appendTxn(dst, &p.txns[o.idx], rev)
		}
		dst = codec.EndMessage(dst, m2)
		dst = codec.EndMessage(dst, m)
	}
	return dst
}

func (p *Plan) appendPut(dst []byte, o *planOp, rev int64) []byte {
	create := rev
	if s := &p.PutSlots[o.idx]; !p.creates(s) {
		create = s.Create.Meta
	}
	var buf [MaxStamp]byte
	stamp, lease := buf[:0], int64(0)
	if o.lease == 0 {
		stamp = AppendStamp(stamp, rev, create)
	} else {
		stamp, lease = p.appendLeaseStamp(stamp, o, rev, create)
	}
	dst = codec.AppendBytes(dst, 1, o.key)
	dst = protowire.AppendTag(dst, 2, protowire.BytesType)
	dst = protowire.AppendVarint(dst, uint64(len(stamp)+len(o.value)))
	dst = append(append(dst, stamp...), o.value...)
	dst = codec.AppendInt(dst, 3, lease)
	return codec.AppendBool(dst, 4, o.prevKV)
}

// creates says whether the put of s creates its key, as far as is known.
func (p *Plan) creates(s *PutSlot) bool {
	if p.decided {
		return s.fresh
	}
	return s.Proven == 0 || s.Create.Meta == 0
}

// appendPlainRangeOp appends a RequestOp as field num of a TxnRequest that reads all of iv at a local
// revision, 0 for the present.
func appendPlainRangeOp(dst []byte, num protowire.Number, iv Interval, rev int64) []byte {
	dst, m := codec.BeginMessage(dst, num)
	dst, m2 := codec.BeginMessage(dst, 1)
	dst = codec.AppendBytes(dst, 1, iv.Key)
	dst = codec.AppendBytes(dst, 2, iv.End)
	dst = codec.AppendInt(dst, 4, rev)
	dst = codec.EndMessage(dst, m2)
	return codec.EndMessage(dst, m)
}

// AppendReadOp appends the fields of one RequestOp that reads on a shard what a client's Range asks for,
// at a local revision (0: the present). A limit goes along when the shard can apply it.
func (p *Plan) AppendReadOp(dst []byte, localRev int64) []byte {
	if p.Kind != OpRange {
		return dst
	}
	dst, m := codec.BeginMessage(dst, 1)
	dst = p.ranges[0].appendMember(dst, p.ops[0].interval(), localRev)
	return codec.EndMessage(dst, m)
}

// AppendRangeRequest is AppendReadOp for a plain Range call: the fields of a RangeRequest.
func (p *Plan) AppendRangeRequest(dst []byte, localRev int64) []byte {
	if p.Kind != OpRange {
		return dst
	}
	return p.ranges[0].appendMember(dst, p.ops[0].interval(), localRev)
}

// OpCost is what the request takes of a member's --max-txn-ops, as etcd counts it: the widest list of
// each nesting level, summed along the deepest path, from the Txn that AppendRequestOp writes downwards.
// The level that this Txn itself stands in is the caller's.
func (p *Plan) OpCost() int {
	guards := p.createGuards() + p.leaseGuards()
	switch {
	case p.Kind == OpTxn && !p.decided && guards == 0:
		return p.txnCost(&p.txns[0])
	case p.nests():
		return max(guards, 1) + p.txnCost(&p.txns[0])
	}
	if p.decided {
		guards += len(p.guards)
	}
	span := p.success()
	return max(guards, span.len()) + p.deepest(span)
}

func (p *Plan) txnCost(t *planTxn) int {
	if p.decided {
		return t.chosen().len() + p.deepest(t.chosen())
	}
	return max(p.clientCompares(t), t.then.len(), t.els.len()) + max(p.deepest(t.then), p.deepest(t.els))
}

func (p *Plan) deepest(span planSpan) int {
	n := 0
	for i := span.from; i < span.to; i++ {
		if o := &p.ops[i]; o.kind == planNested {
			n = max(n, p.txnCost(&p.txns[o.idx]))
		}
	}
	return n
}

// Bounds on the bytes around keys and values.
const (
	// levelBytes is two tags and two lengths: a message in a oneof in a repeated field.
	levelBytes = 2 + 2*5
	// numberBytes is a tag and a 64-bit number.
	numberBytes = 2 + 10
)

// Size is an upper bound of the bytes that the request takes in a batch: what AppendRequestOp appends, the caller's tag and
// length around it included, and its deletes in the record.
func (p *Plan) Size() int {
	n := 2*levelBytes + 2*levelBytes
	for i := range p.ops {
		o := &p.ops[i]
		n += levelBytes + len(o.key) + len(o.end) + len(o.value) + 2*numberBytes
		if o.kind == planPut {
			n += MaxStamp + numberBytes
		}
	}
	for i := range p.cmps {
		c := &p.cmps[i]
		n += 2 * (levelBytes + len(c.key) + len(c.end) + 3*numberBytes)
	}
	for i := range p.PutSlots {
		n += 2*(levelBytes+len(p.PutSlots[i].Key)) + 3*numberBytes
	}
	n += len(p.leases) * (2*(levelBytes+leaseKeySize) + 3*numberBytes)
	for _, d := range p.Deletes {
		n += len(d.Key) + len(d.End) + 3*numberBytes
	}
	for i := range p.guards {
		g := &p.guards[i]
		n += levelBytes + len(g.iv.Key) + len(g.iv.End) + 3*numberBytes
	}
	return n
}
