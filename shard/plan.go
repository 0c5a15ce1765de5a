package shard

import (
	"bytes"

	"spindle/codec"
)

// A Plan is one client KV request, understood: what it touches, how it is written to a shard, and how
// the shard's answer becomes the client's. It does no I/O and knows no time.
//
// Words: the client form is what clients send and get (meta revisions, plain values); the member form is
// what a shard gets and stores (values carry a stamp, revisions are the shard's own).
//
// The road of a write is Parse; if Slow then Decide on a Snapshot, else PutSlots filled in by the Core;
// AppendRequestOp into a batch; Answer on the batch's reply. When the reply was lost, GuardsHold and
// Evaluate compute the answer from the state that the batch saw. The road of a read is Parse,
// AppendReadOp (a Range) or AppendSnapshotOps (a Txn), then AnswerRange or Evaluate.
//
// A Plan belongs to one goroutine and is meant to be reused. It holds views into the message given to
// Parse, which must stay unchanged until Reset; what Decide learns from a Snapshot is copied.
type Plan struct {
	Kind OpKind

	// Writes are the keys that some branch may put or delete, Reads what compares, ranges and reads of
	// previous values may see, both without what is empty or reserved. A write also reads its keys:
	// what a write covers exactly is not repeated in Reads. Valid after Parse.
	Writes, Reads []Interval
	// Deletes are the deletes among Writes.
	Deletes []Interval
	// PutSlots has one entry for every put in any branch, in the order of the request.
	PutSlots []PutSlot

	leases []planLease // that puts name, each once
	ops    []planOp
	cmps   []planCompare
	ranges []rangeSpec
	txns   []planTxn // 0 is the client's own Txn
	root   planSpan  // of ops: the one operation of a request that is not a Txn

	slow, history bool
	elseOnly      bool        // expectElse has made it a Txn that only reads
	proved        bool        // what was expected so was wrong: it is written
	past          []pastRange // by range; what readPast learned
	budget        int         // operations that Parse may still store

	decided bool
	guards  []planGuard // of a decided plan
	own     []byte      // bytes that guards and values of a decided plan point to

	merge rangeMerge // scratch of AnswerRange and Answer
}

// Limits bound what a client may send; etcd's --max-txn-ops and --max-request-bytes.
type Limits struct{ MaxTxnOps, MaxRequestBytes int }

// etcd's defaults, which hold where Limits says 0.
const (
	DefaultMaxTxnOps       = 128
	DefaultMaxRequestBytes = 1536 << 10
)

// Bounds on one request, besides Limits.
const (
	// maxPlanOps bounds the operations and compares of one Txn over all branches. etcd bounds each
	// nesting level only, so that a message of many small nested Txns could cost a hundred times its
	// size in memory, and quadratic time in the checks.
	maxPlanOps = 4096
	// maxPlanDepth bounds the nesting of messages; Go's protobuf gives up at the same depth.
	maxPlanDepth = 10000
	// keepPlanCap is how much a Plan keeps when it is reused, in entries of each kind.
	keepPlanCap = 256
	// keepPlanBytes is the same for bytes that a Plan owns.
	keepPlanBytes = 64 << 10
)

// Interval is a key (End nil) or a range of keys as etcd's requests have it: [Key, End), where the End
// "\x00" stands for infinity.
type Interval struct{ Key, End []byte }

// Contains says whether key lies in iv.
func (iv Interval) Contains(key []byte) bool {
	if len(iv.End) == 0 {
		return bytes.Equal(iv.Key, key)
	}
	return bytes.Compare(iv.Key, key) <= 0 && iv.endsAfter(key)
}

// Overlaps says whether a key can lie in both.
func (iv Interval) Overlaps(o Interval) bool {
	return iv.endsAfter(o.Key) && o.endsAfter(iv.Key) && !iv.Empty() && !o.Empty()
}

// Empty says that no key lies in iv: its end is not after its beginning.
func (iv Interval) Empty() bool { return !iv.endsAfter(iv.Key) }

// endsAfter says whether key is below the end of iv.
func (iv Interval) endsAfter(key []byte) bool {
	switch {
	case len(iv.End) == 0:
		return bytes.Compare(key, iv.Key) <= 0
	case isInfinity(iv.End):
		return true
	}
	return bytes.Compare(key, iv.End) < 0
}

func (iv Interval) equal(o Interval) bool {
	return bytes.Equal(iv.Key, o.Key) && bytes.Equal(iv.End, o.End)
}

func isInfinity(end []byte) bool { return len(end) == 1 && end[0] == 0 }

// Create is when the present incarnation of a key was created: Local on its shard, Meta for clients.
// Both are 0 when the key is absent.
type Create struct{ Local, Meta int64 }

// PutSlot is one put. The Core fills in Create, Known and Guard (of a decided plan, Decide does).
type PutSlot struct {
	Key []byte
	// Lease is the ID of the lease that the client names, 0 for none.
	Lease int64
	// Proven is what the request itself proves about the key at the moment of this put: 0, it is absent
	// (a compare that guards the branch); X > 0, its mod revision is X; -1,
	// nothing.
	Proven int64
	// Create is what the Core believes of the key, if Known. Where Proven is 0 it is not looked at.
	Create Create
	Known  bool
	// Guard asks for a compare on the shard that Create.Local is right. It may be left out only if
	// Create follows from Proven: the key's incarnation at mod revision Proven is known.
	Guard bool

	fresh bool // decided: the put creates the key
	runs  bool // decided: the put is on the chosen path

	lease  int32 // place in Plan.leases, plus 1; 0 for none
	member int64 // decided: the ID on the shard of the lease that ignore_lease keeps
}

// Ready says that everything that AppendRequestOp needs is there.
func (p *Plan) Ready() bool {
	if p.slow {
		return p.decided
	}
	for i := range p.PutSlots {
		if s := &p.PutSlots[i]; s.Proven != 0 && !s.Known {
			return false
		}
	}
	return true
}

// planSpan is a part of a slice of the Plan.
type planSpan struct{ from, to int32 }

func (s planSpan) len() int { return int(s.to - s.from) }

type planOpKind uint8

const (
	planNone planOpKind = iota // a RequestOp without a request
	planRange
	planPut
	planDelete
	planNested
)

// planOp is one operation. key and end are in client form until the checks are through, then clamped to
// what clients may see.
type planOp struct {
	kind                             planOpKind
	prevKV, ignoreValue, ignoreLease bool
	idx                              int32 // in ranges, PutSlots or txns
	key, end, value                  []byte
	lease                            int64
}

func (o *planOp) interval() Interval { return Interval{o.key, o.end} }

// ignores says that the put needs its key to exist.
func (o *planOp) ignores() bool { return o.ignoreValue || o.ignoreLease }

// planCompare is one compare. x is the number of its union if that belongs to the target, else 0; value
// likewise.
type planCompare struct {
	target, result int32
	form           compareForm
	key, end       []byte
	x              int64
	value          []byte
}

func (c *planCompare) interval() Interval { return Interval{c.key, c.end} }

// planTxn is one Txn: spans of cmps and ops.
type planTxn struct {
	cmps      planSpan
	then, els planSpan
	branch    planBranch // decided
	tooMany   bool       // more operations than allowed: nothing of it is stored
}

type planBranch uint8

const (
	branchOpen planBranch = iota
	branchThen
	branchElse
)

// chosen returns the operations of the branch that was decided.
func (t *planTxn) chosen() planSpan {
	if t.branch == branchElse {
		return t.els
	}
	return t.then
}

// planGuard is a compare of a decided plan: MOD(key) == rev, or MOD(range) < rev.
type planGuard struct {
	iv   Interval
	less bool
	rev  int64
}

// Reset forgets the request. Memory of ordinary size is kept.
func (p *Plan) Reset() {
	*p = Plan{
		Writes: reuse(p.Writes), Reads: reuse(p.Reads), Deletes: reuse(p.Deletes), PutSlots: reuse(p.PutSlots),
		leases: reuse(p.leases), ops: reuse(p.ops), cmps: reuse(p.cmps), ranges: reuse(p.ranges), txns: reuse(p.txns),
		guards: reuse(p.guards), own: reuseBytes(p.own), merge: p.merge.reset(),
	}
}

// reuse empties s, so that nothing of an earlier request is held or seen. Giants are dropped.
func reuse[T any](s []T) []T {
	if cap(s) > keepPlanCap {
		return nil
	}
	clear(s)
	return s[:0]
}

func reuseBytes(b []byte) []byte {
	if cap(b) > keepPlanBytes {
		return nil
	}
	return b[:0]
}

// ReadOnly says that no branch writes any key that a client may see.
func (p *Plan) ReadOnly() bool { return len(p.Writes) == 0 }

// Slow says that a write must be decided in the proxy first (Decide): a compare that a shard cannot make
// on stamped values, or a put with ignore_value or ignore_lease. It stays true when it has been decided.
func (p *Plan) Slow() bool { return p.slow }

// NeedsHistory says that a range inside a Txn names a revision.
func (p *Plan) NeedsHistory() bool { return p.history }

// HasLease says that some put names a lease.
func (p *Plan) HasLease() bool { return len(p.leases) > 0 }

// Empty says that the request touches no key that a client may see.
func (p *Plan) Empty() bool { return len(p.Writes) == 0 && len(p.Reads) == 0 }

// Revision is the revision that a Range asks for, 0 for the present.
func (p *Plan) Revision() int64 {
	if p.Kind == OpRange && len(p.ranges) > 0 {
		return max(p.ranges[0].rev, 0)
	}
	return 0
}

// Serializable says that the client is content with the state as this proxy knows it. As in etcd a Txn
// is serializable if it has nothing but serializable ranges.
func (p *Plan) Serializable() bool {
	for i := range p.ops {
		if o := &p.ops[i]; o.kind != planRange || !p.ranges[o.idx].serializable {
			return false
		}
	}
	return true
}

// RecordDeletes calls visit for every delete of any branch, for the clock record.
func (p *Plan) RecordDeletes(visit func(key, end []byte)) {
	for _, iv := range p.Deletes {
		visit(iv.Key, iv.End)
	}
}

// Learner takes facts on create revisions that were seen in passing: at meta revision mod, key existed
// and had been created at meta revision meta, revision local of its shard; local and meta 0: it did not
// exist. key is valid during the call only. CreateCache is one.
type Learner interface {
	Learn(key []byte, local, meta, mod int64)
}

// Outcome says what became of a request in a batch that committed.
type Outcome uint8

const (
	// Answered: the request was executed (or failed as Status says), the answer is final.
	Answered Outcome = iota
	// WrongCreate: a guard on a create revision, or on a lease, failed, nothing was executed. PutSlots now
	// have the truth; the request goes into another batch, once its leases were looked for again.
	WrongCreate
	// GuardFailed: a guard of a decided plan failed, nothing was executed. It must be decided anew.
	GuardFailed
)

// errReserved refuses keys that only Spindle may write.
var errReserved = codec.Status{Code: codec.InvalidArgument, Msg: "spindle: keys that begin with a zero byte are reserved"}

// errMemberReply is for an answer of a member that does not fit the request.
var errMemberReply = codec.Status{Code: codec.Internal, Msg: "spindle: a member cluster's answer does not fit the request"}
