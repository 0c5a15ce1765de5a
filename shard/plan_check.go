package shard

import (
	"bytes"
	"slices"

	"spindle/codec"
)

// This file holds the checks of a parsed request: etcd's own (server/etcdserver/api/v3rpc/key.go), in
// etcd's order and with etcd's results, then Spindle's: reserved keys, and what would bring a member
// down. The second part derives what the request touches and what it proves about its puts.

// check runs on the client form; at its end keys and ends are clamped to what clients may see.
func (p *Plan) check(msg []byte, lim *Limits) codec.Status {
	raft := p.Kind != OpRange
	if p.Kind == OpTxn {
		if st := p.checkTxn(0, lim.MaxTxnOps); st.Code != codec.OK {
			return st
		}
		if !p.intervalsOK() {
			return codec.ErrDuplicateKey
		}
		raft = !p.readOnlyToEtcd()
	} else if st := p.checkOp(0, 0); st.Code != codec.OK {
		return st
	}
	if raft && len(msg) > lim.MaxRequestBytes {
		return codec.ErrRequestTooLarge
	}
	if !p.clamp() {
		return errReserved
	}
	p.touches()
	p.slow = p.slow || p.history
	for i := range p.cmps {
		c := &p.cmps[i]
		c.form = formOf(c)
		p.slow = p.slow || c.form == compareSlow
	}
	if p.Kind == OpTxn && len(p.PutSlots) > 0 {
		p.prove(0, nil)
		if len(p.Deletes) > 0 && p.deletesFirst() {
			return codec.ErrDuplicateKey
		}
	}
	return codec.Status{}
}

func (p *Plan) checkOp(i, maxOps int) codec.Status {
	o := &p.ops[i]
	switch o.kind {
	case planRange:
		r := &p.ranges[o.idx]
		switch {
		case len(o.key) == 0:
			return codec.ErrEmptyKey
		case r.order < orderNone || r.order > orderDescend, r.target < sortKey || r.target > sortValue:
			return codec.ErrInvalidSort
		}
	case planPut:
		switch {
		case len(o.key) == 0:
			return codec.ErrEmptyKey
		case o.ignoreValue && len(o.value) != 0:
			return codec.ErrValueProvided
		case o.ignoreLease && o.lease != 0:
			return codec.ErrLeaseProvided
		}
	case planDelete:
		if len(o.key) == 0 {
			return codec.ErrEmptyKey
		}
	case planNested:
		return p.checkTxn(int(o.idx), maxOps)
	default:
		return codec.ErrKeyNotFound
	}
	return codec.Status{}
}

func (p *Plan) checkTxn(t, maxOps int) codec.Status {
	tx := &p.txns[t]
	widest := max(tx.cmps.len(), tx.then.len(), tx.els.len())
	if tx.tooMany || widest > maxOps {
		return codec.ErrTooManyOps
	}
	for i := tx.cmps.from; i < tx.cmps.to; i++ {
		if len(p.cmps[i].key) == 0 {
			return codec.ErrEmptyKey
		}
	}
	for _, span := range [2]planSpan{tx.then, tx.els} {
		for i := span.from; i < span.to; i++ {
			if st := p.checkOp(int(i), maxOps-widest); st.Code != codec.OK {
				return st
			}
		}
	}
	return codec.Status{}
}

// readOnlyToEtcd is etcd's own notion, which sends nested Txns through raft whatever they hold.
func (p *Plan) readOnlyToEtcd() bool {
	tx := &p.txns[0]
	for _, span := range [2]planSpan{tx.then, tx.els} {
		for i := span.from; i < span.to; i++ {
			if p.ops[i].kind != planRange {
				return false
			}
		}
	}
	return true
}

// firstKey is the smallest key that a client may see.
var firstKey = []byte{1}

// clamp takes reserved keys out of every operation; false means that one asks for such a key by name.
// What remains empty becomes [key, key), which is empty to etcd too and harmless in its interval trees.
func (p *Plan) clamp() bool {
	for i := range p.ops {
		if o := &p.ops[i]; o.kind == planRange || o.kind == planPut || o.kind == planDelete {
			if !clampKeys(&o.key, &o.end) {
				return false
			}
		}
	}
	for i := range p.cmps {
		if c := &p.cmps[i]; !clampKeys(&c.key, &c.end) {
			return false
		}
	}
	return true
}

func clampKeys(key, end *[]byte) bool {
	if len(*end) == 0 {
		*end = nil
		return (*key)[0] != 0
	}
	if (*key)[0] == 0 {
		*key = firstKey
	}
	if !isInfinity(*end) && bytes.Compare(*end, *key) <= 0 {
		*end = *key
	}
	return true
}

// touches fills Writes, Deletes and Reads.
func (p *Plan) touches() {
	for i := range p.ops {
		o := &p.ops[i]
		iv := o.interval()
		switch {
		case o.kind == planPut:
			p.Writes = append(p.Writes, iv)
			p.slow = p.slow || o.ignores()
			p.addLease(o)
		case o.kind == planDelete && !iv.Empty():
			p.Writes = append(p.Writes, iv)
			p.Deletes = append(p.Deletes, iv)
		case o.kind == planRange && p.Kind == OpTxn && p.ranges[o.idx].rev != 0:
			p.history = true
		}
	}
	for i := range p.cmps {
		p.addRead(p.cmps[i].interval())
	}
	for i := range p.ops {
		if p.ops[i].kind == planRange {
			p.addRead(p.ops[i].interval())
		}
	}
}

// fewTouched bounds the search for repeated intervals: kube's Txns name one key three times.
const fewTouched = 8

func (p *Plan) addRead(iv Interval) {
	if iv.Empty() {
		return
	}
	if len(p.Writes) <= fewTouched && len(p.Reads) <= fewTouched {
		for _, w := range p.Writes {
			if w.equal(iv) {
				return
			}
		}
		for _, r := range p.Reads {
			if r.equal(iv) {
				return
			}
		}
	}
	p.Reads = append(p.Reads, iv)
}

// provenBy is a chain of the Txns whose compares hold where a put runs, innermost first.
type provenBy struct {
	cmps  planSpan
	outer *provenBy
}

// prove sets Proven of the puts in Txn t and below from the compares that guard their branches. Every
// compare is decided on the state before the Txn, and no key is put twice on a path, so what a compare
// says still holds when the put runs (no delete of it stands before it, see deletesFirst).
func (p *Plan) prove(t int, outer *provenBy) {
	tx := &p.txns[t]
	inner := provenBy{tx.cmps, outer}
	p.proveBranch(tx.then, &inner)
	p.proveBranch(tx.els, outer)
}

func (p *Plan) proveBranch(span planSpan, by *provenBy) {
	for i := span.from; i < span.to; i++ {
		switch o := &p.ops[i]; o.kind {
		case planPut:
			s := &p.PutSlots[o.idx]
			for b := by; b != nil && s.Proven != 0; b = b.outer {
				for j := b.cmps.from; j < b.cmps.to && s.Proven != 0; j++ {
					if c := &p.cmps[j]; c.end == nil && bytes.Equal(c.key, o.key) {
						switch x, form := c.x, c.form; {
						case form == compareAbsent, c.target == targetOfVersion && (x == 0 && c.result == resultIsEqual || x == 1 && c.result == resultIsLess):
							s.Proven = 0
						case form == compareModIs:
							s.Proven = x
						}
					}
				}
			}
		case planNested:
			p.prove(int(o.idx), by)
		}
	}
}

// deletesFirst says that some put stands behind a delete of its key. etcd's own check lets that pass for
// deletes to infinity, and must not be given it: once such a revision is compacted, the next read of the key
// ends the etcd process, at each restart again (seen with 3.7.3); with ignore_lease it panics at once.
func (p *Plan) deletesFirst() bool {
	_, found := p.deletesFirstIn(0, nil)
	return found
}

// deletesFirstIn returns the deletes that may have run when Txn t is over, after those before it.
func (p *Plan) deletesFirstIn(t int, before []Interval) (after []Interval, found bool) {
	n := len(before)
	after, found = p.deletesFirstOf(p.txns[t].then, before)
	if found {
		return nil, true
	}
	then := slices.Clone(after[n:])
	after, found = p.deletesFirstOf(p.txns[t].els, after[:n])
	return append(after, then...), found
}

func (p *Plan) deletesFirstOf(span planSpan, before []Interval) (after []Interval, found bool) {
	for i := span.from; i < span.to; i++ {
		switch o := &p.ops[i]; o.kind {
		case planDelete:
			before = append(before, o.interval())
		case planPut:
			if slices.ContainsFunc(before, func(iv Interval) bool { return iv.Contains(o.key) }) {
				return nil, true
			}
		case planNested:
			if before, found = p.deletesFirstIn(int(o.idx), before); found {
				return nil, true
			}
		}
	}
	return before, false
}
