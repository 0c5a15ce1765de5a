package shard

import (
	"bytes"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// This file executes requests in the proxy, on what was read from a shard: Txns that only read, and
// requests of a batch that committed while its reply was lost. It follows etcd's txn package: all
// compares, nested ones too, then the checks of the chosen path, then its operations in order, each
// seeing what earlier ones wrote.

// Snapshot is what a request may touch, at one local revision of a shard. It holds views into the
// responses it was made of.
type Snapshot struct {
	kvs    []snapKV   // in order of keys, each once
	leases []codec.KV // keys of leases, as the shard has them
	// foreign says that there are values which somebody else wrote; their keys are left out.
	foreign bool
}

// NewSnapshot makes a Snapshot of the RangeResponses (in member form) that answer AppendSnapshotOps. It
// reads malformed ones as far as they go.
func NewSnapshot(parts [][]byte) *Snapshot {
	s := &Snapshot{}
	for _, part := range parts {
		if kv, found := firstKV(part); found && isReserved(kv.Key) {
			s.leases = append(s.leases, kv)
			continue
		}
		it := partIter{it: codec.Fields{Msg: part}}
		for it.next() {
			s.kvs = append(s.kvs, it.kv)
		}
		s.foreign = s.foreign || it.skipped > 0
	}
	slices.SortStableFunc(s.kvs, func(a, b snapKV) int { return bytes.Compare(a.Key, b.Key) })
	s.kvs = slices.CompactFunc(s.kvs, func(a, b snapKV) bool { return bytes.Equal(a.Key, b.Key) })
	return s
}

// keysIn returns the place of iv's keys in kvs, which are in order.
func keysIn(kvs []snapKV, iv Interval) (from, to int) {
	from, found := slices.BinarySearchFunc(kvs, iv.Key, byKey)
	switch {
	case len(iv.End) == 0:
		if found {
			return from, from + 1
		}
		return from, from
	case isInfinity(iv.End):
		return from, len(kvs)
	}
	to, _ = slices.BinarySearchFunc(kvs, iv.End, byKey)
	return from, max(from, to)
}

func byKey(kv snapKV, key []byte) int { return bytes.Compare(kv.Key, key) }

func (s *Snapshot) of(iv Interval) []snapKV {
	from, to := keysIn(s.kvs, iv)
	return s.kvs[from:to]
}

// get returns a key, nil if it is absent.
func (s *Snapshot) get(key []byte) *snapKV {
	if kvs := s.of(Interval{Key: key}); len(kvs) > 0 {
		return &kvs[0]
	}
	return nil
}

// AppendSnapshotOps appends operations of a TxnRequest's success branch that read everything the request
// may touch, and the keys of the leases that it names, at a local revision (0: the present), without limits. n is their number; their answers make
// a Snapshot. Intervals that meet are read once.
func (p *Plan) AppendSnapshotOps(dst []byte, localRev int64) (out []byte, n int) {
	var few [fewTouched]Interval
	ivs := append(append(few[:0], p.Writes...), p.Reads...)
	if len(ivs) > 1 {
		slices.SortFunc(ivs, func(a, b Interval) int { return bytes.Compare(a.Key, b.Key) })
	}
	for i := 0; i < len(ivs); n++ {
		iv := ivs[i]
		for i++; i < len(ivs) && iv.Overlaps(ivs[i]); i++ {
			iv = iv.join(ivs[i])
		}
		dst = appendPlainRangeOp(dst, 2, iv, localRev)
	}
	return p.appendLeaseSnapshot(dst, localRev), n + len(p.leases)
}

// join returns the range of two that overlap, o beginning no earlier than iv.
func (iv Interval) join(o Interval) Interval {
	switch {
	case isInfinity(iv.End), len(o.End) == 0 && len(iv.End) > 0:
		return iv
	case isInfinity(o.End), len(iv.End) == 0: // a single key meets only what begins with it
		iv.End = o.End
	case bytes.Compare(iv.End, o.End) < 0:
		iv.End = o.End
	}
	return iv
}

// LearnCreates fills in PutSlots from a Snapshot; each gets a guard, for the state may have changed since.
func (p *Plan) LearnCreates(snap *Snapshot) {
	for i := range p.PutSlots {
		s := &p.PutSlots[i]
		s.Create, s.Known, s.Guard = Create{}, true, s.Proven != 0
		if kv := snap.get(s.Key); kv != nil {
			s.Create = Create{kv.local, kv.CreateRevision}
			// The request proves the incarnation when it names a revision of its life.
			s.Guard = s.Guard && (s.Proven < kv.CreateRevision || s.Proven > kv.ModRevision)
		}
	}
}

// GuardsHold says whether the guards that AppendRequestOp wrote hold on the state that the batch saw.
// If not, the shard did not execute the request.
func (p *Plan) GuardsHold(snap *Snapshot) bool {
	if p.decided {
		for i := range p.guards {
			if !p.guards[i].holds(snap) {
				return false
			}
		}
	}
	for i := range p.PutSlots {
		if !p.guardsSlot(i) {
			continue
		}
		local := int64(0)
		if kv := snap.get(p.PutSlots[i].Key); kv != nil {
			local = kv.local
		}
		if local != p.PutSlots[i].Create.Local {
			return false
		}
	}
	return p.leaseGuardsHold(snap)
}

// Evaluate appends the client's response as it is if the request is executed on snap with revision
// hdr.Revision. It works for every kind of request. wrote says that it changed something. On a Status
// other than OK nothing was executed, and dst comes back as it was.
func (p *Plan) Evaluate(dst []byte, snap *Snapshot, hdr codec.Header) (out []byte, wrote bool, st codec.Status) {
	e := evaluation{p: p, rev: hdr.Revision, begin: hdr.Revision, kvs: snap.kvs}
	e.branches = make([]planBranch, len(p.txns))
	root := p.root
	if p.Kind == OpTxn {
		e.choose(0, snap)
		root = e.chosen(0)
	}
	if st := e.check(root, snap); st.Code != codec.OK {
		return dst, false, st
	}
	wrote = e.writes(root, snap)
	if wrote {
		e.begin--
	}
	if p.Kind == OpTxn {
		return e.appendTxn(dst, 0, &hdr), wrote, st
	}
	return e.appendOp(dst, &p.ops[0], &hdr), wrote, st
}

// evaluation is the state of one Evaluate.
type evaluation struct {
	p        *Plan
	branches []planBranch // by Txn, open where a Txn is not on the path
	kvs      []snapKV     // the state; shared with the Snapshot until changed
	rev      int64
	begin    int64 // the revision of headers before the first change
	changed  bool
}

// choose decides the compares of Txn t and of those on the path below.
func (e *evaluation) choose(t int, snap *Snapshot) {
	tx := &e.p.txns[t]
	e.branches[t] = branchThen
	for i := tx.cmps.from; i < tx.cmps.to; i++ {
		c := &e.p.cmps[i]
		if ok, _ := c.holds(snap.of(c.interval())); !ok {
			e.branches[t] = branchElse
			break
		}
	}
	span := e.chosen(t)
	for i := span.from; i < span.to; i++ {
		if o := &e.p.ops[i]; o.kind == planNested {
			e.choose(int(o.idx), snap)
		}
	}
}

func (e *evaluation) chosen(t int) planSpan {
	if e.branches[t] == branchElse {
		return e.p.txns[t].els
	}
	return e.p.txns[t].then
}

// check refuses puts that need a key which is not there, or a lease that is gone.
func (e *evaluation) check(span planSpan, snap *Snapshot) codec.Status {
	for i := span.from; i < span.to; i++ {
		switch o := &e.p.ops[i]; o.kind {
		case planPut:
			if s := &e.p.PutSlots[o.idx]; s.lease > 0 && e.p.leases[s.lease-1].state == leaseGone {
				return codec.ErrLeaseNotFound
			}
			if o.ignores() && snap.get(o.key) == nil {
				return codec.ErrKeyNotFound
			}
		case planNested:
			if st := e.check(e.chosen(int(o.idx)), snap); st.Code != codec.OK {
				return st
			}
		}
	}
	return codec.Status{}
}

// writes says whether the chosen operations change anything.
func (e *evaluation) writes(span planSpan, snap *Snapshot) bool {
	for i := span.from; i < span.to; i++ {
		switch o := &e.p.ops[i]; o.kind {
		case planPut:
			return true
		case planDelete:
			if len(snap.of(o.interval())) > 0 {
				return true
			}
		case planNested:
			if e.writes(e.chosen(int(o.idx)), snap) {
				return true
			}
		}
	}
	return false
}

func (e *evaluation) appendHeader(dst []byte, full *codec.Header) []byte {
	switch {
	case full != nil:
		return codec.AppendHeaderField(dst, full)
	case e.changed:
		return appendRevHeader(dst, e.rev)
	}
	return appendRevHeader(dst, e.begin)
}

func (e *evaluation) appendTxn(dst []byte, t int, full *codec.Header) []byte {
	if full == nil {
		full = &codec.Header{}
	}
	dst = codec.AppendHeaderField(dst, full)
	dst = codec.AppendBool(dst, 2, e.branches[t] == branchThen)
	span := e.chosen(t)
	for i := span.from; i < span.to; i++ {
		o := &e.p.ops[i]
		var m, m2 int
		dst, m = codec.BeginMessage(dst, 3)
		dst, m2 = codec.BeginMessage(dst, protowire.Number(o.kind))
		dst = e.appendOp(dst, o, nil)
		dst = codec.EndMessage(dst, m2)
		dst = codec.EndMessage(dst, m)
	}
	return dst
}

func (e *evaluation) appendOp(dst []byte, o *planOp, full *codec.Header) []byte {
	switch o.kind {
	case planRange:
		dst = e.appendHeader(dst, full)
		if past, ok := e.p.pastBody(o.idx); ok {
			return append(dst, past...)
		}
		from, to := keysIn(e.kvs, o.interval())
		return e.p.ranges[o.idx].appendSnapshot(dst, e.kvs[from:to])
	case planPut:
		return e.put(dst, o, full)
	case planDelete:
		from, to := keysIn(e.kvs, o.interval())
		gone := e.kvs[from:to]
		if len(gone) > 0 {
			e.kvs = append(e.kvs[:from:from], e.kvs[to:]...)
			e.changed = true
		}
		dst = e.appendHeader(dst, full)
		dst = codec.AppendInt(dst, 2, int64(len(gone)))
		for i := range gone {
			if o.prevKV {
				dst = appendKVField(dst, 3, &gone[i].KV)
			}
		}
	case planNested:
		return e.appendTxn(dst, int(o.idx), nil)
	}
	return dst
}

// put writes a key into a copy of the state.
func (e *evaluation) put(dst []byte, o *planOp, full *codec.Header) []byte {
	e.changed = true
	dst = e.appendHeader(dst, full)
	from, to := keysIn(e.kvs, Interval{Key: o.key})
	kv := snapKV{KV: codec.KV{Key: o.key, CreateRevision: e.rev, ModRevision: e.rev, Version: 1, Value: o.value, Lease: o.lease}}
	if from < to {
		prev := &e.kvs[from]
		if o.prevKV {
			dst = appendKVField(dst, 2, &prev.KV)
		}
		kv.CreateRevision, kv.Version = prev.CreateRevision, prev.Version+1
		if o.ignoreValue {
			kv.Value = prev.Value
		}
		if o.ignoreLease {
			kv.Lease = prev.Lease
		}
	}
	rest := e.kvs[to:]
	e.kvs = append(append(make([]snapKV, 0, from+1+len(rest)), e.kvs[:from]...), kv)
	e.kvs = append(e.kvs, rest...)
	return dst
}
