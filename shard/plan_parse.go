package shard

import (
	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// This file reads the protobuf messages of etcd's KV service as Go's protobuf does: unknown fields and
// fields of another wire type are skipped, the last value of a field wins, the last member of a oneof
// wins, and a message given twice is merged. The whole message must be well-formed before any of etcd's
// checks speak.

// errUnmarshal is what grpc-go answers for a message that is not protobuf.
var errUnmarshal = codec.Status{Code: codec.Internal,
	Msg: "grpc: error unmarshalling request: proto: cannot parse invalid wire-format data"}

// Parse reads one request (OpRange, OpPut, OpDeleteRange or OpTxn) and checks it as etcd does, in etcd's
// order. lim nil, or 0 in it, means etcd's defaults. On any other Status than OK the Plan is of no use.
func (p *Plan) Parse(kind OpKind, msg []byte, lim *Limits) codec.Status {
	p.Reset()
	p.Kind = kind
	l := Limits{}
	if lim != nil {
		l = *lim
	}
	if l.MaxTxnOps <= 0 {
		l.MaxTxnOps = DefaultMaxTxnOps
	}
	if l.MaxRequestBytes <= 0 {
		l.MaxRequestBytes = DefaultMaxRequestBytes
	}
	p.budget = maxPlanOps
	ok := false
	switch kind {
	case OpRange:
		ok = p.parseSingle(planRange, msg)
	case OpPut:
		ok = p.parseSingle(planPut, msg)
	case OpDeleteRange:
		ok = p.parseSingle(planDelete, msg)
	case OpTxn:
		p.txns = append(p.txns, planTxn{})
		ok = p.parseTxn(0, msg, l.MaxTxnOps, maxPlanDepth)
	default:
		return codec.Status{Code: codec.Internal, Msg: "spindle: not a KV request"}
	}
	if !ok {
		return errUnmarshal
	}
	return p.check(msg, &l)
}

func (p *Plan) parseSingle(kind planOpKind, msg []byte) bool {
	p.ops = append(p.ops, planOp{})
	p.root = planSpan{0, 1}
	return p.parseOp(0, kind, msg)
}

// parseOp reads the body of a range, put or delete into ops[i].
func (p *Plan) parseOp(i int, kind planOpKind, msg []byte) bool {
	o := planOp{kind: kind}
	ok := false
	switch kind {
	case planRange:
		o.idx = int32(len(p.ranges))
		p.ranges = append(p.ranges, rangeSpec{})
		ok = parseRangeRequest(&o, &p.ranges[o.idx], msg)
	case planPut:
		o.idx = int32(len(p.PutSlots))
		ok = parsePutRequest(&o, msg)
		p.PutSlots = append(p.PutSlots, PutSlot{Key: o.key, Lease: o.lease, Proven: -1})
	case planDelete:
		ok = parseDeleteRequest(&o, msg)
	}
	p.ops[i] = o
	return ok
}

func parseRangeRequest(o *planOp, r *rangeSpec, msg []byte) bool {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		f := &it.Field
		switch f.Type {
		case protowire.BytesType:
			switch f.Num {
			case 1:
				o.key = f.Bytes
			case 2:
				o.end = f.Bytes
			}
		case protowire.VarintType:
			switch f.Num {
			case 3:
				r.limit = int64(f.Val)
			case 4:
				r.rev = int64(f.Val)
			case 5:
				r.order = int32(f.Val)
			case 6:
				r.target = int32(f.Val)
			case 7:
				r.serializable = f.Val != 0
			case 8:
				r.keysOnly = f.Val != 0
			case 9:
				r.countOnly = f.Val != 0
			case 10:
				r.minMod = int64(f.Val)
			case 11:
				r.maxMod = int64(f.Val)
			case 12:
				r.minCreate = int64(f.Val)
			case 13:
				r.maxCreate = int64(f.Val)
			}
		}
	}
	return !it.Bad
}

func parsePutRequest(o *planOp, msg []byte) bool {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		f := &it.Field
		switch f.Type {
		case protowire.BytesType:
			switch f.Num {
			case 1:
				o.key = f.Bytes
			case 2:
				o.value = f.Bytes
			}
		case protowire.VarintType:
			switch f.Num {
			case 3:
				o.lease = int64(f.Val)
			case 4:
				o.prevKV = f.Val != 0
			case 5:
				o.ignoreValue = f.Val != 0
			case 6:
				o.ignoreLease = f.Val != 0
			}
		}
	}
	return !it.Bad
}

func parseDeleteRequest(o *planOp, msg []byte) bool {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		f := &it.Field
		switch {
		case f.Num == 1 && f.Type == protowire.BytesType:
			o.key = f.Bytes
		case f.Num == 2 && f.Type == protowire.BytesType:
			o.end = f.Bytes
		case f.Num == 3 && f.Type == protowire.VarintType:
			o.prevKV = f.Val != 0
		}
	}
	return !it.Bad
}

func parseCompare(c *planCompare, msg []byte) bool {
	it := codec.Fields{Msg: msg}
	union := protowire.Number(0)
	for it.Next() {
		f := &it.Field
		switch f.Type {
		case protowire.BytesType:
			switch f.Num {
			case 3:
				c.key = f.Bytes
			case 7:
				union, c.value = f.Num, f.Bytes
			case 64:
				c.end = f.Bytes
			}
		case protowire.VarintType:
			switch f.Num {
			case 1:
				c.result = int32(f.Val)
			case 2:
				c.target = int32(f.Val)
			case 4, 5, 6, 8:
				union, c.x = f.Num, int64(f.Val)
			}
		}
	}
	// etcd takes the union's value only if it is the target's own member.
	if want, ok := unionOf(c.target); !ok || union != want {
		c.x, c.value = 0, nil
	} else if c.target == targetOfValue {
		c.x = 0
	} else {
		c.value = nil
	}
	return !it.Bad
}

// parseTxn reads a TxnRequest into txns[t]. ops is how many operations this level and those below may
// have (etcd's checkTxnRequest); a level with more is only checked for being well-formed. depth is what
// is left of maxPlanDepth.
func (p *Plan) parseTxn(t int, msg []byte, ops, depth int) bool {
	if depth <= 0 {
		return false
	}
	var n [4]int
	it := codec.Fields{Msg: msg}
	for it.Next() {
		if f := &it.Field; f.Type == protowire.BytesType && f.Num >= 1 && f.Num <= 3 {
			n[f.Num]++
		}
	}
	if it.Bad {
		return false
	}
	widest, all := max(n[1], n[2], n[3]), n[1]+n[2]+n[3]
	if widest > ops || all > p.budget {
		p.txns[t].tooMany = true
		return wellFormedTxn(msg, depth)
	}
	p.budget -= all
	tx := planTxn{}
	tx.cmps.from = int32(len(p.cmps))
	for it = (codec.Fields{Msg: msg}); it.Next(); {
		if f := &it.Field; f.Num == 1 && f.Type == protowire.BytesType {
			p.cmps = append(p.cmps, planCompare{})
			if !parseCompare(&p.cmps[len(p.cmps)-1], f.Bytes) {
				return false
			}
		}
	}
	tx.cmps.to = int32(len(p.cmps))
	var ok bool
	if tx.then, ok = p.parseBranch(2, n[2], msg, ops-widest, depth); !ok {
		return false
	}
	if tx.els, ok = p.parseBranch(3, n[3], msg, ops-widest, depth); !ok {
		return false
	}
	p.txns[t] = tx
	return true
}

// parseBranch reads the n operations in field num of a TxnRequest. They stand together in p.ops, so
// that those of nested Txns come after them.
func (p *Plan) parseBranch(num protowire.Number, n int, msg []byte, ops, depth int) (planSpan, bool) {
	i := len(p.ops)
	span := planSpan{int32(i), int32(i + n)}
	for range n {
		p.ops = append(p.ops, planOp{})
	}
	it := codec.Fields{Msg: msg}
	for it.Next() {
		f := &it.Field
		if f.Num != num || f.Type != protowire.BytesType {
			continue
		}
		kind, body, ok := requestOf(f.Bytes, depth-1)
		if !ok {
			return span, false
		}
		switch kind {
		case planNone:
		case planNested:
			t := len(p.txns)
			p.txns = append(p.txns, planTxn{})
			p.ops[i] = planOp{kind: planNested, idx: int32(t)}
			ok = p.parseTxn(t, body, ops, depth-2)
		default:
			ok = p.parseOp(i, kind, body)
		}
		if !ok {
			return span, false
		}
		i++
	}
	return span, true
}

// requestOf returns the member of a RequestOp's oneof. The kinds have the numbers of the fields. A
// member given twice is merged, which in protobuf is the same as the concatenation.
func requestOf(msg []byte, depth int) (kind planOpKind, body []byte, ok bool) {
	owned := false
	it := codec.Fields{Msg: msg}
	for it.Next() {
		f := &it.Field
		if f.Type != protowire.BytesType || f.Num < 1 || f.Num > 4 {
			continue
		}
		k := planOpKind(f.Num)
		if kind == planNone {
			kind, body = k, f.Bytes
			continue
		}
		// Rare enough to be slow: what came before is checked, for it will not be read by itself.
		if !wellFormed(kind, body, depth) || !wellFormed(k, f.Bytes, depth) {
			return kind, nil, false
		}
		switch {
		case kind != k:
			kind, body, owned = k, f.Bytes, false
		case !owned:
			body, owned = append(append(make([]byte, 0, 2*len(body)+len(f.Bytes)), body...), f.Bytes...), true
		default:
			body = append(body, f.Bytes...)
		}
	}
	return kind, body, !it.Bad
}

// wellFormed checks the body of a request without keeping anything of it.
func wellFormed(kind planOpKind, msg []byte, depth int) bool {
	if kind == planNested {
		return wellFormedTxn(msg, depth-1)
	}
	it := codec.Fields{Msg: msg}
	for it.Next() {
	}
	return !it.Bad && depth > 0
}

func wellFormedTxn(msg []byte, depth int) bool {
	if depth <= 0 {
		return false
	}
	it := codec.Fields{Msg: msg}
	for it.Next() {
		f := &it.Field
		if f.Type != protowire.BytesType || f.Num < 1 || f.Num > 3 {
			continue
		}
		op := codec.Fields{Msg: f.Bytes}
		for op.Next() {
			g := &op.Field
			if f.Num != 1 && g.Type == protowire.BytesType && g.Num >= 1 && g.Num <= 4 &&
				!wellFormed(planOpKind(g.Num), g.Bytes, depth-1) {
				return false
			}
		}
		if op.Bad {
			return false
		}
	}
	return !it.Bad
}
