package revclock

import (
	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// The requests to the coordinator, and what its answers say. Field numbers are those of
// go.etcd.io/etcd/api/v3/etcdserverpb/rpc.proto.

const (
	txnCompare, txnSuccess, txnFailure   = 1, 2, 3
	opRange, opPut, opTxn                = 1, 2, 4
	compareTarget, compareKey            = 2, 3
	compareCreate                        = 5
	compareMod, compareValue             = 6, 7
	targetCreate, targetMod, targetValue = 1, 2, 3
	rangeKey, rangeKeysOnly              = 1, 8
	watchCreate, watchKey, watchEnd      = 1, 1, 2
	watchStart                           = 3
	replyHeader, replyOK, replyResponses = 1, 2, 3
)

func appendCompareMod(dst []byte, key string, rev int64) []byte {
	dst, m := codec.BeginMessage(dst, txnCompare)
	dst = codec.AppendInt(dst, compareTarget, targetMod)
	dst = codec.AppendString(dst, compareKey, key)
	// A member of a oneof is there even when it is 0.
	dst = protowire.AppendTag(dst, compareMod, protowire.VarintType)
	dst = protowire.AppendVarint(dst, uint64(rev))
	return codec.EndMessage(dst, m)
}

func appendCompareValue(dst []byte, key string, value []byte) []byte {
	dst, m := codec.BeginMessage(dst, txnCompare)
	dst = codec.AppendInt(dst, compareTarget, targetValue)
	dst = codec.AppendString(dst, compareKey, key)
	dst = codec.AppendBytes(dst, compareValue, value)
	return codec.EndMessage(dst, m)
}

// appendPut appends a put to a branch of a Txn.
func appendPut(dst []byte, branch protowire.Number, key string, value []byte) []byte {
	dst, m := codec.BeginMessage(dst, branch)
	dst, m2 := codec.BeginMessage(dst, opPut)
	dst = codec.AppendString(dst, 1, key)
	dst = codec.AppendBytes(dst, 2, value)
	dst = codec.EndMessage(dst, m2)
	return codec.EndMessage(dst, m)
}

// appendGet appends a linearizable read of one key to a branch of a Txn.
func appendGet(dst []byte, branch protowire.Number, key string, keysOnly bool) []byte {
	dst, m := codec.BeginMessage(dst, branch)
	dst, m2 := codec.BeginMessage(dst, opRange)
	dst = codec.AppendString(dst, rangeKey, key)
	dst = codec.AppendBool(dst, rangeKeysOnly, keysOnly)
	dst = codec.EndMessage(dst, m2)
	return codec.EndMessage(dst, m)
}

// appendTickTxn appends the Txn of a tick: guarded by the epoch, and inside, with a compare that only
// tells whether lastTick was the newest tick, the put.
func appendTickTxn(dst, epoch, tick []byte, lastTick int64) []byte {
	dst = appendCompareValue(dst, KeyEpoch, epoch)
	dst, m := codec.BeginMessage(dst, txnSuccess)
	dst, m2 := codec.BeginMessage(dst, opTxn)
	dst = appendCompareMod(dst, keyTick, lastTick)
	dst = appendPut(dst, txnSuccess, keyTick, tick)
	dst = appendPut(dst, txnFailure, keyTick, tick)
	dst = codec.EndMessage(dst, m2)
	dst = codec.EndMessage(dst, m)
	return appendGet(dst, txnFailure, KeyEpoch, false)
}

// appendStartTxn appends the read of everything, appendNowTxn that of `now`.
func appendStartTxn(dst []byte) []byte {
	dst = appendGet(dst, txnSuccess, KeyEpoch, false)
	dst = appendGet(dst, txnSuccess, keySnapshot, false)
	return appendGet(dst, txnSuccess, keyTick, true)
}

func appendNowTxn(dst []byte) []byte {
	dst = appendGet(dst, txnSuccess, KeyEpoch, false)
	return appendGet(dst, txnSuccess, keyTick, true)
}

// appendSnapshotTxn appends the Txn that replaces the snapshot that was written at revision mod.
func appendSnapshotTxn(dst, epoch, snapshot []byte, mod int64) []byte {
	dst = appendCompareValue(dst, KeyEpoch, epoch)
	dst = appendCompareMod(dst, keySnapshot, mod)
	return appendPut(dst, txnSuccess, keySnapshot, snapshot)
}

// appendWatch appends the WatchRequest for everything on the coordinator from revision start on.
func appendWatch(dst []byte, start int64) []byte {
	dst, m := codec.BeginMessage(dst, watchCreate)
	dst = codec.AppendString(dst, watchKey, "\x00")
	dst = codec.AppendString(dst, watchEnd, "\x00")
	dst = codec.AppendInt(dst, watchStart, start)
	return codec.EndMessage(dst, m)
}

// appendCompact appends a CompactionRequest.
func appendCompact(dst []byte, rev int64) []byte { return codec.AppendInt(dst, 1, rev) }

// reply is a TxnResponse; its bytes are views.
type reply struct {
	cluster   uint64
	rev       int64
	succeeded bool
	ops       [3]replyOp
}

// replyOp is one ResponseOp: the first key of a range, or the outcome of a nested Txn.
type replyOp struct {
	kv        codec.KV
	found     bool
	succeeded bool
}

// parseReply reads a TxnResponse with at least n responses.
func parseReply(msg []byte, n int) (r reply, ok bool) {
	it := codec.Fields{Msg: msg}
	k := 0
	for it.Next() {
		switch it.Field.Num {
		case replyHeader:
			h, ok := codec.ParseHeader(it.Field.Bytes)
			if !ok {
				return r, false
			}
			r.cluster, r.rev = h.ClusterID, h.Revision
		case replyOK:
			r.succeeded = it.Field.Val != 0
		case replyResponses:
			if k < len(r.ops) && !r.ops[k].parse(it.Field.Bytes) {
				return r, false
			}
			k++
		}
	}
	return r, !it.Bad && r.rev > 0 && k >= n
}

func (o *replyOp) parse(msg []byte) bool {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		num := it.Field.Num
		in := codec.Fields{Msg: it.Field.Bytes}
		for in.Next() {
			switch {
			case num == opRange && in.Field.Num == 2 && !o.found:
				if o.kv, o.found = codec.ParseKV(in.Field.Bytes); !o.found {
					return false
				}
			case num == opTxn && in.Field.Num == replyOK:
				o.succeeded = in.Field.Val != 0
			}
		}
		if in.Bad {
			return false
		}
	}
	return !it.Bad
}

// parseEvent reads an mvccpb.Event.
func parseEvent(msg []byte) (kv codec.KV, del, ok bool) {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		switch it.Field.Num {
		case 1:
			del = it.Field.Val == 1
		case 2:
			if kv, ok = codec.ParseKV(it.Field.Bytes); !ok {
				return kv, del, false
			}
		}
	}
	return kv, del, ok && !it.Bad
}
