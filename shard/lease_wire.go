package shard

import (
	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// This file reads and writes the messages of etcd's lease service, and the few Txns on keys of leases.

// leaseRequest is the fields of all requests of the lease service.
type leaseRequest struct {
	id, ttl int64
	keys    bool
}

// parse reads the message of kind; false if it is not well-formed.
func (r *leaseRequest) parse(kind OpKind, msg []byte) bool {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		f := &it.Field
		if f.Type != protowire.VarintType {
			continue
		}
		switch {
		case kind == OpLeaseGrant && f.Num == 1:
			r.ttl = int64(f.Val)
		case kind == OpLeaseGrant && f.Num == 2, kind != OpLeaseGrant && f.Num == 1:
			r.id = int64(f.Val)
		case kind == OpLeaseTimeToLive && f.Num == 2:
			r.keys = f.Val != 0
		}
	}
	return !it.Bad
}

// leaseReply is the fields of a member's replies: rev is the header's revision.
type leaseReply struct {
	rev, id, ttl, granted int64
	keys                  [][]byte
}

// parseLeaseReply reads a reply of any RPC of the lease service but LeaseLeases, and of the others the header.
func parseLeaseReply(msg []byte) (r leaseReply) {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		f := &it.Field
		switch {
		case f.Num == 1:
			h, _ := codec.ParseHeader(f.Bytes)
			r.rev = h.Revision
		case f.Num == 2:
			r.id = int64(f.Val)
		case f.Num == 3:
			r.ttl = int64(f.Val)
		case f.Num == 4:
			r.granted = int64(f.Val)
		case f.Num == 5 && !isReserved(f.Bytes):
			r.keys = append(r.keys, append([]byte(nil), f.Bytes...))
		}
	}
	return r
}

func grantRequest(m, ttl int64) []byte { return codec.AppendInt(codec.AppendInt(nil, 1, ttl), 2, m) }

func revokeRequest(m int64) []byte { return codec.AppendInt(nil, 1, m) }

func timeToLiveRequest(m int64, keys bool) []byte {
	return codec.AppendBool(codec.AppendInt(nil, 1, m), 2, keys)
}

// createLeaseKey is a Txn that puts X's key, attached to M, unless the key is there; then it shows the key.
func createLeaseKey(x, m int64) []byte {
	key := string(AppendLeaseKey(nil, x))
	b := appendCompareInt(nil, key, "", resultEqual, targetCreate, cmpCreate, 0)
	b = appendLeasePut(b, key, &LeaseMarker{Member: m})
	return appendGet(b, txnFailure, key, 0)
}

// changeLeaseKey is a Txn that puts X's marker anew if its local mod revision is mod.
func changeLeaseKey(x int64, mk *LeaseMarker, mod int64) []byte {
	key := string(AppendLeaseKey(nil, x))
	return appendLeasePut(appendCompareInt(nil, key, "", resultEqual, targetMod, cmpMod, mod), key, mk)
}

func appendLeasePut(dst []byte, key string, mk *LeaseMarker) []byte {
	dst, m := codec.BeginMessage(dst, txnSuccess)
	dst, m2 := codec.BeginMessage(dst, opPut)
	dst = codec.AppendString(dst, putKey, key)
	dst = codec.AppendBytes(dst, putValue, AppendLeaseMarker(nil, mk))
	dst = codec.AppendInt(dst, putLease, mk.Member)
	dst = codec.EndMessage(dst, m2)
	return codec.EndMessage(dst, m)
}
