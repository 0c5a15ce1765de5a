package shard

import (
	"hash/maphash"

	"spindle/codec"
	"spindle/revclock"
)

// A batch is what one proxy sends to one shard as one Txn: many clients' requests, each with a revision
// of its own. This file decides what may travel together (DESIGN: "what may share a batch") and writes
// the Txn. It knows no time and no network.

// write is one request, or one shard's part of one, that waits for a place in a batch.
type write struct {
	op    *Op
	plan  *Plan
	rev   int64 // given by the batch that carries it, 0 before
	alone bool  // a batch with it was refused: it goes by itself, to find the culprit
	since int64 // when it arrived, ns
	once  bool  // it is not tried again when its guard fails
	flat  bool  // it has no Txn of its own in the batch that carries it (flat.go)

	// finish takes the answer (nil: the whole request is answered by op.Resp).
	finish func(w *write, resp []byte, st codec.Status)
}

// buffer returns where w's answer is to be written.
func (w *write) buffer() []byte {
	if w.finish != nil {
		return nil // one of several parts of the answer
	}
	return w.op.Resp[:0]
}

var claimSeed = maphash.MakeSeed()

// claims is a set of keys and ranges. Keys are kept by hash: a collision makes two requests look as if
// they met, which costs a batch, never an answer.
type claims struct {
	points map[uint64]struct{}
	ranges []Interval
	keys   []Interval // the points, for a range to be checked against
}

func (c *claims) reset() {
	clear(c.points)
	c.ranges, c.keys = c.ranges[:0], c.keys[:0]
}

func (c *claims) empty() bool { return len(c.keys) == 0 && len(c.ranges) == 0 }

func (c *claims) add(ivs []Interval) {
	for _, iv := range ivs {
		if iv.End != nil {
			c.ranges = append(c.ranges, iv)
			continue
		}
		if c.points == nil {
			c.points = make(map[uint64]struct{})
		}
		c.points[maphash.Bytes(claimSeed, iv.Key)] = struct{}{}
		c.keys = append(c.keys, iv)
	}
}

func (c *claims) meets(ivs []Interval) bool {
	if c.empty() {
		return false
	}
	for _, iv := range ivs {
		if iv.End == nil {
			if _, ok := c.points[maphash.Bytes(claimSeed, iv.Key)]; ok {
				return true
			}
		} else {
			for _, k := range c.keys {
				if iv.Overlaps(k) {
					return true
				}
			}
		}
		for _, r := range c.ranges {
			if iv.Overlaps(r) {
				return true
			}
		}
	}
	return false
}

// batchLimits bound one batch.
type batchLimits struct {
	ops   int // the member's --max-txn-ops
	bytes int // the member's --max-request-bytes
}

// batchOverhead is what guard and record add to a batch, in bytes and at most, without the deletes in the record
// (Plan.Size counts them).
const batchOverhead = 512

// former forms batches from a queue. Its sets are reused.
type former struct {
	written            claims // may-write of what is in the batch
	away               claims // and of what is in the one before it, if that is under way
	blockedW, blockedR claims // of what waits and must not be overtaken
}

// form takes from queue what may travel together, in order, and returns it with what must wait on. Canceled requests leave through drop.
// It takes at least one request of a queue that is not empty; but not behind the batch that it formed last: what meets that one's
// writes waits on.
func (f *former) form(queue []*write, lim batchLimits, behind bool, into []*write, drop func(*write)) (batch, rest []*write) {
	f.written, f.away = f.away, f.written
	if !behind {
		f.away.reset()
	}
	f.written.reset()
	f.blockedW.reset()
	f.blockedR.reset()
	batch, rest = into[:0], queue[:0]
	bytes, depth := batchOverhead, 0
	full := false
	for _, w := range queue {
		if w.op.canceled {
			drop(w)
			continue
		}
		if full {
			rest = append(rest, w)
			continue
		}
		p := w.plan
		size, cost := p.Size(), p.OpCost()
		// etcd adds up the widest level of each nesting depth: the batch's own requests and the record,
		// then the deepest request.
		over := len(batch) > 0 && (bytes+size > lim.bytes || len(batch)+2+max(depth, cost) > lim.ops)
		lonely := len(batch) > 0 && (w.alone || batch[0].alone)
		if over || lonely ||
			f.written.meets(p.Writes) || f.written.meets(p.Reads) || f.away.meets(p.Writes) || f.away.meets(p.Reads) ||
			f.blockedW.meets(p.Writes) || f.blockedW.meets(p.Reads) || f.blockedR.meets(p.Writes) {
			full = over || lonely
			f.blockedW.add(p.Writes)
			f.blockedR.add(p.Reads)
			rest = append(rest, w)
			continue
		}
		batch = append(batch, w)
		bytes += size
		depth = max(depth, cost)
		f.written.add(p.Writes)
	}
	return batch, rest
}

// batchFilter makes the filter that a tick carries: which keys the batch may write.
func batchFilter(dst []byte, batch []*write) []byte {
	n := 0
	for _, w := range batch {
		for _, iv := range w.plan.Writes {
			if iv.End != nil {
				return append(dst[:0], revclock.FilterAll...)
			}
			n++
		}
	}
	dst = revclock.NewFilter(dst, n)
	for _, w := range batch {
		for _, iv := range w.plan.Writes {
			revclock.FilterAdd(dst, iv.Key)
		}
	}
	return dst
}

// field numbers of etcdserverpb that are written here.
const (
	txnCompare, txnSuccess, txnFailure                  = 1, 2, 3
	opRange, opPut, opDelete, opTxn                     = 1, 2, 3, 4
	cmpResult, cmpTarget, cmpKey                        = 1, 2, 3
	cmpVersion, cmpCreate, cmpMod, cmpValue             = 4, 5, 6, 7
	cmpRangeEnd                                         = 64
	resultEqual, resultGreater, resultLess              = 0, 1, 2
	targetVersion, targetCreate, targetMod, targetValue = 0, 1, 2, 3
	putKey, putValue, putLease                          = 1, 2, 3
	rangeKey, rangeEnd, rangeLimit, rangeRevision       = 1, 2, 3, 4
	rangeKeysOnly                                       = 8
)

// appendCompare appends one compare to a TxnRequest; the target's value must be appended by value.
func appendCompareInt(dst []byte, key, end string, result, target int64, union int, v int64) []byte {
	dst, m := codec.BeginMessage(dst, txnCompare)
	dst = codec.AppendInt(dst, cmpResult, result)
	dst = codec.AppendInt(dst, cmpTarget, target)
	dst = codec.AppendString(dst, cmpKey, key)
	dst = appendOneofInt(dst, union, v)
	dst = codec.AppendString(dst, cmpRangeEnd, end)
	return codec.EndMessage(dst, m)
}

// appendOneofInt appends a varint member of a oneof, which is there even when it is 0.
func appendOneofInt(dst []byte, num int, v int64) []byte {
	if v != 0 {
		return codec.AppendInt(dst, protoNum(num), v)
	}
	return append(dst, byte(num<<3), 0)
}

func appendCompareValue(dst []byte, key string, result int64, value []byte) []byte {
	dst, m := codec.BeginMessage(dst, txnCompare)
	dst = codec.AppendInt(dst, cmpResult, result)
	dst = codec.AppendInt(dst, cmpTarget, targetValue)
	dst = codec.AppendString(dst, cmpKey, key)
	dst = codec.AppendBytes(dst, cmpValue, value)
	return codec.EndMessage(dst, m)
}

// appendGet appends a RequestOp that reads one key at revision rev (0: the newest) to the branch.
func appendGet(dst []byte, branch int, key string, rev int64) []byte {
	dst, m := codec.BeginMessage(dst, protoNum(branch))
	dst, m2 := codec.BeginMessage(dst, opRange)
	dst = codec.AppendString(dst, rangeKey, key)
	dst = codec.AppendInt(dst, rangeRevision, rev)
	dst = codec.EndMessage(dst, m2)
	return codec.EndMessage(dst, m)
}

// appendPutOp appends a RequestOp that puts one key to the branch.
func appendPutOp(dst []byte, branch int, key string, value []byte) []byte {
	dst, m := codec.BeginMessage(dst, protoNum(branch))
	dst, m2 := codec.BeginMessage(dst, opPut)
	dst = codec.AppendString(dst, putKey, key)
	dst = codec.AppendBytes(dst, putValue, value)
	dst = codec.EndMessage(dst, m2)
	return codec.EndMessage(dst, m)
}

// batchTxn is what a batch's bytes are made of besides its requests.
type batchTxn struct {
	record   *Record
	mapMod   int64 // the shard's revision of \0map that this proxy believes in
	floor    int64 // the clock that the shard has been at
	loss     bool  // it ends an accepted loss, see accept.go
	noGuard  bool  // planted bugs
	bareFlat bool
}

// appendBatch writes the whole Txn of a batch: guard (a record begins with its Last, and is longer: above be64(floor) means
// floor or more), what each request needs, the record; and, when the guard fails, the clock and the map's revision, to tell why.
func appendBatch(dst []byte, b *batchTxn, writes []*write) []byte {
	var bound [8]byte
	if !b.noGuard {
		dst = appendCompareValue(dst, KeyClock, resultLess, AppendRevBound(bound[:0], uint64(b.record.First)))
		dst = appendCompareValue(dst, KeyClock, resultGreater, AppendRevBound(bound[:0], uint64(b.floor)))
		dst = appendCompareInt(dst, KeyMap, "", resultEqual, targetMod, cmpMod, b.mapMod)
	}
	if b.loss {
		dst = appendCompareInt(dst, KeyLoss, "", resultGreater, targetMod, cmpMod, 0)
	}
	for _, w := range writes {
		if w != nil && w.flat && !b.bareFlat {
			dst = w.plan.appendFlatCompares(dst)
		}
	}
	for _, w := range writes {
		if w == nil {
			continue
		}
		if w.flat {
			dst = w.plan.appendFlatOp(dst, w.rev)
			continue
		}
		var m int
		dst, m = codec.BeginMessage(dst, txnSuccess)
		dst = w.plan.AppendRequestOp(dst, w.rev)
		dst = codec.EndMessage(dst, m)
	}
	dst, m := codec.BeginMessage(dst, txnSuccess)
	dst, m2 := codec.BeginMessage(dst, opPut)
	dst = codec.AppendString(dst, putKey, KeyClock)
	dst, m3 := codec.BeginMessage(dst, putValue)
	dst = AppendRecord(dst, b.record)
	dst = codec.EndMessage(dst, m3)
	dst = codec.EndMessage(dst, m2)
	dst = codec.EndMessage(dst, m)
	if b.loss {
		dst = appendLossEnd(dst, b.record.Last)
	}
	dst = appendGet(dst, txnFailure, KeyClock, 0)
	dst = appendGet(dst, txnFailure, KeyMap, 0)
	if b.loss {
		dst = appendGet(dst, txnFailure, KeyCompact, 0) // of the fence that was faster
	}
	return dst
}
