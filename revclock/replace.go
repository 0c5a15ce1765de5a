package revclock

import (
	"bytes"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// This file has the two requests by which a lost coordinator is rebuilt (DESIGN section 3, "Lost coordinator"):
// the read of everything that it still has, and the compare-and-swap over all of it. It is compared by value: mod
// revisions repeat after a wipe, values never do.

// Margin is how far above all that is known of a lost coordinator its successor begins. Half of it is what a
// coordinator may be ahead of the member clusters (MaxLead): so no range of the lost one reaches the new ones.
const Margin = 1 << 20

// MaxLead is how far N may lie above the largest clock before revisions are handed out to fences alone.
const MaxLead = Margin / 2

// Found is what a coordinator holds, as one linearizable read has shown it.
type Found struct {
	Cluster uint64
	Rev     int64 // of the coordinator's etcd
	// Epoch, Snapshot and Tick are the values of e, s and t, nil where the key is missing.
	Epoch, Snapshot, Tick []byte
	// Believed says that there is a tick of this epoch. Ticks come from who has believed it, and so has seen it named by
	// every shard's map.
	Believed bool
}

// AppendFoundTxn appends the read.
func AppendFoundTxn(dst []byte) []byte {
	dst = appendGet(dst, txnSuccess, KeyEpoch, false)
	dst = appendGet(dst, txnSuccess, keySnapshot, false)
	return appendGet(dst, txnSuccess, keyTick, false)
}

// ParseFound reads its answer; nothing of Found points into resp.
func ParseFound(resp []byte) (f Found, ok bool) {
	r, ok := parseReply(resp, 3)
	if !ok {
		return f, false
	}
	value := func(o *replyOp) []byte {
		if !o.found {
			return nil
		}
		return append([]byte{}, o.kv.Value...)
	}
	return Found{Cluster: r.cluster, Rev: r.rev, Epoch: value(&r.ops[0]), Snapshot: value(&r.ops[1]), Tick: value(&r.ops[2]),
		Believed: r.ops[0].found && r.ops[2].found && r.ops[2].kv.ModRevision > r.ops[0].kv.ModRevision}, true
}

// Empty reports whether the coordinator holds nothing at all.
func (f *Found) Empty() bool { return f.Epoch == nil && f.Snapshot == nil && f.Tick == nil }

// SameEpoch reports whether two reads have shown the same epoch, or none.
func (f *Found) SameEpoch(o *Found) bool {
	return (f.Epoch == nil) == (o.Epoch == nil) && bytes.Equal(f.Epoch, o.Epoch)
}

// N returns the N of the snapshot that was found, 0 if there is none. What this version cannot read must not be
// replaced.
func (f *Found) N() (int64, error) {
	if f.Snapshot == nil {
		return 0, nil
	}
	var s Snapshot
	err := s.Parse(f.Snapshot)
	return s.N, err
}

// AppendReplaceTxn appends the Txn that puts a new epoch and its snapshot if the coordinator still holds exactly
// what was found. s.Rev is filled in. It must not be sent twice: between two sends the coordinator may have been
// wiped again.
func (f *Found) AppendReplaceTxn(dst []byte, epoch ID, s *Snapshot) []byte {
	s.Rev = f.Rev
	dst = appendCompareFound(dst, KeyEpoch, f.Epoch)
	dst = appendCompareFound(dst, keySnapshot, f.Snapshot)
	dst = appendCompareFound(dst, keyTick, f.Tick)
	dst = appendPut(dst, txnSuccess, KeyEpoch, AppendEpoch(nil, epoch))
	return appendPut(dst, txnSuccess, keySnapshot, AppendSnapshot(nil, s))
}

// appendCompareFound compares with a value, or with the absence of the key.
func appendCompareFound(dst []byte, key string, value []byte) []byte {
	if value != nil {
		return appendCompareValue(dst, key, value)
	}
	dst, m := codec.BeginMessage(dst, txnCompare)
	dst = codec.AppendInt(dst, compareTarget, targetCreate)
	dst = codec.AppendString(dst, compareKey, key)
	dst = protowire.AppendTag(dst, compareCreate, protowire.VarintType)
	dst = protowire.AppendVarint(dst, 0)
	return codec.EndMessage(dst, m)
}

// ParseReplaced reads the answer of AppendReplaceTxn.
func ParseReplaced(resp []byte) (replaced, ok bool) {
	r, ok := parseReply(resp, 0)
	return r.succeeded, ok
}
