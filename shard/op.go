package shard

import (
	"sync"

	"spindle/codec"
)

// OpKind says which client RPC an Op is.
type OpKind uint8

// The unary RPCs that a Core answers.
const (
	OpRange OpKind = iota
	OpPut
	OpDeleteRange
	OpTxn
	OpCompact
	OpStatus
	OpAlarm
	OpMemberList
	OpAuthStatus
	// The lease RPCs. OpLeaseKeepAlive is one message of a LeaseKeepAlive stream: Msg a LeaseKeepAliveRequest,
	// Resp a LeaseKeepAliveResponse (TTL 0 for a lease that is gone). Answers may come in any order.
	OpLeaseGrant
	OpLeaseRevoke
	OpLeaseKeepAlive
	OpLeaseTimeToLive
	OpLeaseLeases
	opKinds
)

// Op is one unary client request on its way through a Core. Ops are pooled by the server: AcquireOp, fill
// Kind, Msg and Done, hand to Core.Submit, and ReleaseOp after Done has been called and Resp was copied.
//
// Ownership: from Submit until Done the Op and its bytes belong to the Core. Msg must stay unchanged for
// that time (the server copies the message out of the connection's buffer into Op.Msg, whose capacity
// is reused with the Op).
type Op struct {
	Kind OpKind
	// Msg is the client's protobuf message.
	Msg []byte
	// Deadline is the client's deadline in the Core's nanoseconds, 0 for none. (The server also cancels
	// an Op whose deadline passed, so this only saves work.)
	Deadline int64

	// Resp is the encoded response message, appended to by the Core, valid when Status is OK.
	Resp []byte
	// Lists says that whoever has asked takes the answer to a long Range as a List, which is in place of Resp then.
	Lists bool
	List  *List
	// Status is how it ended.
	Status codec.Status
	// Done is called exactly once, on the goroutine that owns the Core, also after Cancel. It may be
	// called from within Submit.
	Done func(*Op)
	// Client is whose request it is; nil: nobody's.
	Client *Client
	// User is the server's (the stream that waits for the answer).
	User any

	canceled bool
	part     bool   // a range of somebody's Txn, which has its own time
	admitted bool   // its answer got room in Memory before it was put together
	core     coreOp // what the Core keeps with a request
}

// Admitted says that the answer waited for room in Memory before it was put together, if it is a large one: it is
// not refused for want of memory any more.
func (op *Op) Admitted() bool { return op.admitted }

// maxPooledOp is the size up to which a pooled Op keeps its buffers, in bytes each.
const maxPooledOp = 64 << 10

var opPool = sync.Pool{New: func() any { return new(Op) }}

// AcquireOp returns an empty Op from the pool. It may be called on any goroutine.
func AcquireOp() *Op { return opPool.Get().(*Op) }

// ReleaseOp gives op back. Nothing may refer to op any more, neither the Core nor a pending Cancel.
func ReleaseOp(op *Op) {
	if op.List != nil {
		op.List.Drop()
	}
	msg, resp := op.Msg[:0], op.Resp[:0]
	if cap(msg) > maxPooledOp {
		msg = nil
	}
	if cap(resp) > maxPooledOp {
		resp = nil
	}
	op.core.reset()
	*op = Op{Msg: msg, Resp: resp, core: op.core}
	opPool.Put(op)
}
