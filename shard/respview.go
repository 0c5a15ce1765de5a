package shard

import (
	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

func protoNum(n int) protowire.Number { return protowire.Number(n) }

// txnReply is a view of a member's TxnResponse.
type txnReply struct {
	rev       int64 // the shard's revision
	cluster   uint64
	succeeded bool
	resps     [][]byte // payload of each ResponseOp's oneof
}

// parseTxnReply reads a TxnResponse; resps is reused.
func parseTxnReply(msg []byte, resps [][]byte) (t txnReply, ok bool) {
	t.resps = resps[:0]
	it := codec.Fields{Msg: msg}
	for it.Next() {
		switch it.Field.Num {
		case 1:
			h, hok := codec.ParseHeader(it.Field.Bytes)
			if !hok {
				return t, false
			}
			t.rev, t.cluster = h.Revision, h.ClusterID
		case 2:
			t.succeeded = it.Field.Val != 0
		case 3:
			in := codec.Fields{Msg: it.Field.Bytes}
			var payload []byte
			for in.Next() {
				payload = in.Field.Bytes
			}
			if in.Bad {
				return t, false
			}
			t.resps = append(t.resps, payload)
		}
	}
	return t, !it.Bad
}

// firstKV returns the first key-value of a member's RangeResponse; found is false when it has none.
func firstKV(msg []byte) (kv codec.KV, found bool) {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		if it.Field.Num == 2 {
			kv, ok := codec.ParseKV(it.Field.Bytes)
			return kv, ok
		}
	}
	return codec.KV{}, false
}

// carriesLease reports whether a key that a member's RangeResponse stands for may be attached to a lease:
// one that is in it is, or not all of them are in it (a limit, count_only).
func carriesLease(msg []byte) bool {
	it := codec.Fields{Msg: msg}
	var n, count int64
	for it.Next() {
		switch it.Field.Num {
		case 2:
			n++
			if kv, ok := codec.ParseKV(it.Field.Bytes); !ok || kv.Lease != 0 {
				return true
			}
		case 4:
			count = int64(it.Field.Val)
		}
	}
	return it.Bad || n != count
}
