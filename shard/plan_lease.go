package shard

import "spindle/codec"

// This file is the part of leases in a plan. A put that names a lease carries the ID that the lease has on
// the members, and a guard of its nested Txn: the lease's key on the shard (marker or copy, docs/leases.md) has
// the create revision that the proxy knows. Without a lease on that shard the guard is false, and etcd does not
// look at the put, whose error would refuse the whole batch.

// planLease is one lease that puts of the request name. The Core resolves it for the request's shard.
type planLease struct {
	id     int64 // the client's
	member int64 // on the members
	create int64 // local create revision of the lease's key on the shard
	state  planLeaseState
	runs   bool // decided: a put on the chosen path names it
	lost   bool // its guard failed
}

type planLeaseState uint8

const (
	leaseUnknown planLeaseState = iota
	leaseKnown
	leaseGone // when it was looked for it did not exist; the request is slow
)

// addLease notes the lease that a put names.
func (p *Plan) addLease(o *planOp) {
	if o.lease == 0 {
		return
	}
	s := &p.PutSlots[o.idx]
	for i := range p.leases {
		if p.leases[i].id == o.lease {
			s.lease = int32(i + 1)
			return
		}
	}
	p.leases = append(p.leases, planLease{id: o.lease})
	s.lease = int32(len(p.leases))
}

// guardsLease says whether AppendRequestOp writes a guard for leases[i].
func (p *Plan) guardsLease(i int) bool { return !p.decided || p.leases[i].runs }

// leaseGuards counts the guards on leases.
func (p *Plan) leaseGuards() int {
	n := 0
	for i := range p.leases {
		if p.guardsLease(i) {
			n++
		}
	}
	return n
}

func (p *Plan) appendLeaseGuards(dst []byte) []byte {
	var buf [leaseKeySize]byte
	for i := range p.leases {
		if p.guardsLease(i) {
			dst = appendNumberCompare(dst, AppendLeaseKey(buf[:0], p.leases[i].id), nil, targetOfCreate, resultIsEqual, p.leases[i].create)
		}
	}
	return dst
}

// appendLeaseReads appends reads of the keys that are guarded, for the failure branch.
func (p *Plan) appendLeaseReads(dst []byte) []byte {
	var buf [leaseKeySize]byte
	for i := range p.leases {
		if p.guardsLease(i) {
			dst = appendPlainRangeOp(dst, txnFailure, Interval{Key: AppendLeaseKey(buf[:0], p.leases[i].id)}, 0)
		}
	}
	return dst
}

// appendLeaseSnapshot appends reads of all leases' keys at a local revision to the success branch.
func (p *Plan) appendLeaseSnapshot(dst []byte, rev int64) []byte {
	var buf [leaseKeySize]byte
	for i := range p.leases {
		dst = appendPlainRangeOp(dst, txnSuccess, Interval{Key: AppendLeaseKey(buf[:0], p.leases[i].id)}, rev)
	}
	return dst
}

// appendLeaseStamp appends the stamp of a put with a lease, and returns the lease's ID on the shard.
func (p *Plan) appendLeaseStamp(dst []byte, o *planOp, rev, create int64) (out []byte, member int64) {
	s := &p.PutSlots[o.idx]
	member = s.member
	if s.lease > 0 {
		member = p.leases[s.lease-1].member
	}
	st := Stamp{Rev: rev, Create: create}
	if member != o.lease {
		st.Lease = o.lease
	}
	return st.Append(dst), member
}

// learnLeases takes from the failure branch which leases are not what they were believed to be.
func (p *Plan) learnLeases(t *memberTxn) bool {
	for i := range p.leases {
		if !p.guardsLease(i) {
			continue
		}
		kind, body, ok := t.next()
		if !ok || kind != planRange {
			return false
		}
		kv, _ := firstKV(body)
		p.leases[i].lost = kv.CreateRevision != p.leases[i].create
	}
	return true
}

// leaseGuardsHold is GuardsHold for leases; it marks those that are lost.
func (p *Plan) leaseGuardsHold(snap *Snapshot) bool {
	hold := true
	for i := range p.leases {
		l := &p.leases[i]
		if !p.guardsLease(i) {
			continue
		}
		create := int64(0)
		for _, kv := range snap.leases {
			if x, ok := ParseLeaseKey(kv.Key); ok && x == l.id {
				create = kv.CreateRevision
			}
		}
		l.lost = create != l.create
		hold = hold && !l.lost
	}
	return hold
}

// errLeaseOf returns what the request gets at once when one of its leases is gone. A Txn must be decided
// first: the put may not be on the path that is taken.
func (p *Plan) errLeaseOf() codec.Status {
	if p.Kind == OpPut {
		return codec.ErrLeaseNotFound
	}
	p.slow = true
	return codec.Status{}
}
