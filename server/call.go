package server

import (
	"sync/atomic"

	"spindle/codec"
	"spindle/shard"
)

// Answers of the server's own; the texts are grpc-go's.
var (
	statusNoMessage = codec.Status{Code: codec.Unknown, Msg: "EOF"}
	statusCanceled  = codec.Status{Code: codec.Canceled, Msg: "context canceled"}
	statusDeadline  = codec.Status{Code: codec.DeadlineExceeded, Msg: "context deadline exceeded"}
)

// call is one RPC of a client, from OnRequest until it was answered and the core has let go of its op.
// The stream may end long before the core is done: then stream is nil, and what the core says is
// thrown away. Unary calls are used again once nothing refers to them any more.
//
// A call belongs to the loop of its connection. The exceptions are op, which belongs to the core's loop
// from Submit until Done, and coreDone.
type call struct {
	loop   *Loop
	conn   *clientConn
	stream *codec.Stream // nil once the RPC has ended
	route  *route

	handler   StreamHandler // of a streaming RPC
	op        *shard.Op     // of a unary RPC, from its message until the core's last word
	opSize    int
	refs      int         // answers of the core's loop that are on their way: of the op, of a cancel
	carried   int64       // bytes of the answer in Memory, from Done until answered
	abandoned bool        // the stream is gone, the core was told to cancel
	gone      atomic.Bool // abandoned, for the core to see
	coreDone  bool        // the core's loop only: Done was called
	hasLeader bool

	start    int64 // in Loop.now
	deadline int64 // 0 for none

	// The wheel's:
	next, prev *call
	slot       int32
	armed      bool
}

// newCall takes a unary call from the loop's free list.
func (l *Loop) newCall() *call {
	if n := len(l.freeCalls); n > 0 {
		k := l.freeCalls[n-1]
		l.freeCalls = l.freeCalls[:n-1]
		return k
	}
	return new(call)
}

// maxFreeCalls bounds a loop's free list.
const maxFreeCalls = 4096

func (l *Loop) freeCall(k *call) {
	*k = call{}
	if len(l.freeCalls) < maxFreeCalls {
		l.freeCalls = append(l.freeCalls, k)
	}
}

// open ties the call to its stream.
func (k *call) open(c *clientConn, s *codec.Stream, r *route) {
	k.loop, k.conn, k.stream, k.route = c.loop, c, s, r
	k.hasLeader = s.HasLeader
	k.start = c.loop.now()
	s.User = k
	if s.Timeout > 0 {
		k.deadline = k.start + int64(s.Timeout)
		if k.deadline < k.start { // overflow: some clients say "never" with a huge number
			k.deadline = 0
			return
		}
		k.loop.timers.add(k, k.start)
	}
}

// submit hands the request to the core.
func (c *clientConn) submit(k *call, msg []byte) {
	if l, full := c.full(len(msg)); full {
		metricRefused.Inc()
		hitLimit(l)
		c.finish(k, codec.ErrTooManyRequests)
		return
	}
	op := shard.AcquireOp()
	op.Kind = k.route.op
	op.Msg = append(op.Msg, msg...)
	op.Deadline = k.deadline
	op.Done = opDone
	op.User, op.Client, op.Lists = k, &c.client, true
	k.op, k.opSize = op, len(msg)
	k.refs++
	c.ops++
	c.loop.working.Add(1)
	c.opsBytes += len(msg)
	if home := c.eng.loops[0]; home == c.loop {
		c.loop.submit(op)
	} else {
		home.post(letter{kind: letterSubmit, call: k})
	}
}

// opDone is the Done of every op; it runs on the core's loop.
func opDone(op *shard.Op) {
	k := op.User.(*call)
	k.coreDone = true
	// What is on its way to another loop counts too; its connection counts it from then on.
	if len(op.Resp) >= chargeStep && op.Kind == shard.OpRange && !op.Admitted() && k.loop.eng.cfg.Memory.Over() {
		hitLimit(limitMemory)
		op.Status, op.Resp = codec.ErrTooManyRequests, nil // nothing was changed by it
	}
	k.carried = int64(len(op.Resp))
	if op.List != nil { // always admitted
		k.carried = int64(op.List.Mem())
	}
	if k.carried < chargeStep {
		k.carried = 0
	}
	k.loop.eng.cfg.Memory.Add(k.carried)
	if l := k.loop; l.index == 0 {
		k.answered()
	} else {
		l.post(letter{kind: letterDone, call: k})
	}
}

// answered brings the core's answer to the client, if it is still there.
func (k *call) answered() {
	c := k.conn
	c.ops--
	c.loop.working.Add(-1)
	c.opsBytes -= k.opSize
	c.opsDone += k.opSize
	k.refs--
	if k.abandoned {
		c.h2.AddWork(-1)
	}
	c.eng.cfg.Memory.Add(-k.carried)
	k.carried = 0
	if k.stream != nil {
		switch {
		case k.op.Status.Code != codec.OK:
		case k.op.List != nil:
			c.h2.SendFrom(k.stream, k.op.List)
			k.op.List = nil
		case len(k.op.Resp) >= ownedAnswer:
			c.h2.SendOwned(k.stream, k.op.Resp)
			k.op.Resp = nil
		default:
			c.h2.Send(k.stream, k.op.Resp)
		}
		c.finish(k, k.op.Status)
	} else {
		k.release()
	}
	c.charge()
	c.pumpKeepAlives(false)
}

// abandon ends what the core does for a call whose stream is gone. The op and the call stay until the
// core's loop has answered both the op and the cancel, so that neither can hit another request.
func (k *call) abandon() {
	if k.refs == 0 {
		k.release()
		return
	}
	k.refs++
	k.abandoned = true
	k.gone.Store(true)
	k.conn.h2.AddWork(1) // it goes on taking one of the connection's places until the core lets go
	if home := k.loop.eng.loops[0]; home == k.loop {
		k.cancelAtCore(home)
	} else {
		home.post(letter{kind: letterCancel, call: k})
	}
}

// cancelAtCore runs on the core's loop.
func (k *call) cancelAtCore(home *Loop) {
	if !k.coreDone {
		home.cancel(k.op)
	}
	if k.loop == home {
		k.acknowledged()
	} else {
		k.loop.post(letter{kind: letterAck, call: k})
	}
}

// acknowledged says that the cancel has been delivered.
func (k *call) acknowledged() {
	k.refs--
	k.release()
}

// finish answers the RPC with st, after what is queued, and ends the call.
func (c *clientConn) finish(k *call, st codec.Status) {
	c.answer(k, st)
	k.release()
}

func (c *clientConn) answer(k *call, st codec.Status) {
	s := k.stream
	k.ended(st)
	c.h2.Finish(s, st)
	c.touch()
}

// vanish ends the call without an answer: the stream is gone.
func (k *call) vanish() {
	k.ended(statusCanceled)
	if k.handler != nil {
		k.handler.Cancel()
	}
	k.abandon()
}

// expired ends the call because its deadline has passed. The wheel has let go of it.
func (k *call) expired() {
	// The answer first: what the core says to the cancel is thrown away.
	k.conn.answer(k, statusDeadline)
	if k.handler != nil {
		k.handler.Cancel()
	}
	k.abandon()
}

// ended is the common part of every end: from here on the stream is not the call's any more.
func (k *call) ended(st codec.Status) {
	k.loop.timers.remove(k)
	k.stream.User = nil
	k.stream = nil
	streamsOpen.Add(-1)
	if k.route.kind == routeUnary {
		k.loop.inflight.Add(-1)
	}
	if k.handler != nil {
		delete(k.conn.streaming, k)
	}
	k.route.count(st.Code, k.loop.now()-k.start)
}

// release gives call and op back when nothing refers to them any more.
func (k *call) release() {
	if k.stream != nil || k.refs > 0 {
		return
	}
	if k.op != nil {
		shard.ReleaseOp(k.op)
		k.op = nil
	}
	if k.handler == nil {
		k.loop.freeCall(k)
	}
}
