package shard

import (
	"spindle/codec"
)

// This file decides writes that a shard cannot decide by itself: the branches are chosen on a Snapshot,
// and what the choice depended on is guarded when the request is written.

// Decide chooses the branches on snap, which is the state at local revision localRev, and sets the
// guards under which the choice stays right. From then on AppendRequestOp writes the chosen operations
// without the client's compares. An error is the client's answer: a put needs a key that is absent, or names
// a lease that is gone.
//
// Guards are few, whatever the size of a range: a compare that failed did so for one key, which is
// guarded by MOD == m; one that held for a range goes on to hold while no key in it is new or changed
// (MOD < localRev+1) and one key, guarded by MOD == m, remains; an empty range must stay empty. Of the
// compares of a branch that was not taken the first that failed is enough.
//
// Decide may be called again, on a later Snapshot. It copies what it keeps of snap.
func (p *Plan) Decide(snap *Snapshot, localRev int64) codec.Status {
	p.decided, p.guards, p.own = false, p.guards[:0], p.own[:0]
	for i := range p.txns {
		p.txns[i].branch = branchOpen
	}
	for i := range p.PutSlots {
		p.PutSlots[i].runs = false
	}
	for i := range p.leases {
		p.leases[i].runs = false
	}
	d := decision{p: p, snap: snap, rev: localRev}
	root := p.root
	if p.Kind == OpTxn {
		d.choose(0)
		root = p.txns[0].chosen()
	}
	if st := d.take(root); st.Code != codec.OK {
		return st
	}
	p.decided = true
	return codec.Status{}
}

// Decided says that Decide has chosen.
func (p *Plan) Decided() bool { return p.decided }

type decision struct {
	p       *Plan
	snap    *Snapshot
	rev     int64
	deletes []Interval // before the operation that is looked at
}

func (d *decision) choose(t int) {
	tx := &d.p.txns[t]
	tx.branch = branchThen
	from := len(d.p.guards)
	for i := tx.cmps.from; i < tx.cmps.to; i++ {
		c := &d.p.cmps[i]
		if c.form == compareTrue {
			continue
		}
		kvs := d.snap.of(c.interval())
		ok, at := c.holds(kvs)
		if !ok {
			// This one is enough: what the earlier ones said does not matter.
			d.p.guards = d.p.guards[:from]
			tx.branch = branchElse
		}
		switch {
		case c.form == compareFalse:
		case len(kvs) == 0:
			d.guard(planGuard{iv: c.interval()})
		case !ok:
			d.guard(planGuard{iv: Interval{Key: d.keep(kvs[at].Key)}, rev: kvs[at].localMod})
		case c.end == nil:
			d.guard(planGuard{iv: c.interval(), rev: kvs[0].localMod})
		default:
			d.guard(planGuard{iv: c.interval(), less: true, rev: d.rev + 1})
			d.guard(planGuard{iv: Interval{Key: d.keep(kvs[0].Key)}, rev: kvs[0].localMod})
		}
		if !ok {
			break
		}
	}
	span := tx.chosen()
	for i := span.from; i < span.to; i++ {
		if o := &d.p.ops[i]; o.kind == planNested {
			d.choose(int(o.idx))
		}
	}
}

// take walks the chosen operations in order and fills in what puts need.
func (d *decision) take(span planSpan) codec.Status {
	for i := span.from; i < span.to; i++ {
		switch o := &d.p.ops[i]; o.kind {
		case planDelete:
			d.deletes = append(d.deletes, o.interval())
		case planPut:
			if st := d.put(o); st.Code != codec.OK {
				return st
			}
		case planNested:
			if st := d.take(d.p.txns[o.idx].chosen()); st.Code != codec.OK {
				return st
			}
		}
	}
	return codec.Status{}
}

func (d *decision) put(o *planOp) codec.Status {
	kv := d.snap.get(o.key)
	s := &d.p.PutSlots[o.idx]
	if s.lease > 0 {
		l := &d.p.leases[s.lease-1]
		if l.state == leaseGone {
			return codec.ErrLeaseNotFound
		}
		l.runs = true
	}
	s.runs, s.fresh, s.Known, s.Guard, s.Create = true, kv == nil, true, true, Create{}
	if kv != nil {
		s.Create = Create{kv.local, kv.CreateRevision}
	}
	for _, iv := range d.deletes {
		if iv.Contains(o.key) {
			// The put creates the key whether it was there before or not.
			s.fresh, s.Guard = true, false
		}
	}
	if o.ignores() {
		if kv == nil {
			return codec.ErrKeyNotFound
		}
		// What was read is written, so that the member needs no flag: its panic on ignore_lease behind a
		// delete cannot be reached.
		if o.ignoreValue {
			o.value = d.keep(kv.Value)
		}
		if o.ignoreLease {
			// The guard on the key proves that its lease is the same, and lives on this shard.
			o.lease, s.member = kv.Lease, kv.member
		}
		d.guard(planGuard{iv: Interval{Key: o.key}, rev: kv.localMod})
	}
	for i := range d.p.guards {
		// A guard on the key's mod revision (0: absent) implies the one on its create revision.
		if g := &d.p.guards[i]; g.iv.End == nil && !g.less && g.iv.Contains(o.key) {
			s.Guard = false
		}
	}
	return codec.Status{}
}

// guard adds g unless it is there.
func (d *decision) guard(g planGuard) {
	if len(d.p.guards) <= fewTouched {
		for i := range d.p.guards {
			if h := &d.p.guards[i]; h.iv.equal(g.iv) && h.less == g.less && h.rev == g.rev {
				return
			}
		}
	}
	d.p.guards = append(d.p.guards, g)
}

// keep copies b, which belongs to the Snapshot. Growing leaves earlier copies where they are.
func (d *decision) keep(b []byte) []byte {
	if cap(d.p.own)-len(d.p.own) < len(b) {
		d.p.own = make([]byte, 0, max(2*cap(d.p.own), len(b), 256))
	}
	n := len(d.p.own)
	d.p.own = append(d.p.own, b...)
	return d.p.own[n:len(d.p.own):len(d.p.own)]
}

func (g *planGuard) holds(snap *Snapshot) bool {
	kvs := snap.of(g.iv)
	if len(kvs) == 0 {
		return g.less || g.rev == 0
	}
	for i := range kvs {
		if g.less && kvs[i].localMod >= g.rev || !g.less && kvs[i].localMod != g.rev {
			return false
		}
	}
	return true
}
