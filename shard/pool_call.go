package shard

import (
	"slices"
	"strings"

	"spindle/codec"
)

// Statuses that the pool itself gives.
var (
	// statusDeadline has the text of Go's context, as clients know it from grpc-go.
	statusDeadline       = codec.Status{Code: codec.DeadlineExceeded, Msg: "context deadline exceeded"}
	statusMute           = codec.Status{Code: codec.Unavailable, Msg: "spindle: a node of the member cluster says nothing, while others do"}
	statusTooManyStreams = codec.Status{Code: codec.ResourceExhausted, Msg: "spindle: too many requests wait for the member cluster's stream limit"}
	statusNoMessage      = codec.Status{Code: codec.Internal, Msg: "spindle: member cluster answered OK without a message"}
	statusTwoMessages    = codec.Status{Code: codec.Internal, Msg: "spindle: member cluster answered a unary call with several messages"}
)

// poolCall is one unary call under way: waiting for a free stream (link is nil) or on a stream. Calls are
// reused; the loop owns them.
type poolCall struct {
	pool    *Pool
	cluster *poolCluster
	method  codec.Method
	done    codec.Completion
	timer   poolTimer

	link     *poolLink
	stream   *codec.Stream
	begun    int64 // when the request was sent
	span     int64 // the time that it has, in ns, and has again while its reply comes, see replyProgress
	received int   // of the reply, when the time was over last
	messages int
	resp     []byte // copy of the reply: its status comes after it
	req      []byte // copy of the request, while it waits in pendingCalls
}

// failedCall is the end of a call or Watch stream that is reported from the loop's mailbox.
type failedCall struct {
	cluster *poolCluster
	done    codec.Completion // or
	watch   *poolWatch
	st      codec.Status
	sent    bool
}

func (p *Pool) acquireCall() *poolCall {
	if n := len(p.freeCalls); n > 0 {
		c := p.freeCalls[n-1]
		p.freeCalls[n-1] = nil
		p.freeCalls = p.freeCalls[:n-1]
		return c
	}
	c := &poolCall{pool: p}
	c.timer.owner = c
	return c
}

func (p *Pool) releaseCall(c *poolCall) {
	p.timers.cancel(&c.timer)
	if len(p.freeCalls) >= maxFreeCalls {
		return
	}
	c.cluster, c.done, c.link, c.stream = nil, nil, nil, nil
	c.messages, c.received = 0, 0
	if c.resp = c.resp[:0]; cap(c.resp) > maxFreeCallBytes {
		c.resp = nil
	}
	c.req = nil
	p.freeCalls = append(p.freeCalls, c)
}

// open puts c on a stream; false if no connection takes one.
func (p *Pool) open(c *poolCall, req []byte, now int64) bool {
	l, s := c.cluster.openStream(c.method, needsLeader(c.method), now)
	if s == nil {
		return false
	}
	c.link, c.stream, c.begun = l, s, now
	s.User = c
	if r, ok := c.done.(codec.Receiving); ok {
		s.Rewriter, s.Reserved = r.Rewriter(), r.Reserved()
	}
	l.opened(s)
	l.conn.Send(s, req) // an end that this causes is reported from the codec's Output
	l.conn.CloseSend(s)
	l.touch()
	return true
}

// onMessage takes the reply.
func (c *poolCall) onMessage(msg []byte) {
	c.messages++
	c.link.answered()
	if c.messages == 1 {
		if len(msg) > codec.KeptReply {
			if c.link.conn.KeepMessage() {
				c.resp = msg
				return
			}
			c.resp = codec.Borrow(len(msg))
		}
		c.resp = append(c.resp[:0], msg...)
	}
}

// onEnd is the end of c's stream.
func (c *poolCall) onEnd(st codec.Status, sent bool) {
	ep := c.link.ep
	c.link, c.stream = nil, nil
	if st.Code == codec.OK {
		switch c.messages {
		case 0:
			st = statusNoMessage
		case 1:
		default:
			st = statusTwoMessages
		}
	}
	ep.judge(st)
	c.complete(st, sent)
}

// A large reply that is on its way is not asked for once more, which would make a slow member slower. For a call to go on,
// there have to come in its time replyProgress bytes, and a replyShares-th of the reply. So none takes longer than
// replyShares+1 times its time, whatever the member does.
const (
	replyProgress = 64 << 10
	replyShares   = 16
)

// due is the timeout.
func (c *poolCall) due(now int64) {
	if c.link != nil {
		if n := c.stream.Received(); n >= c.received+max(replyProgress, c.stream.Incoming()/replyShares) {
			c.received = n
			c.pool.timers.set(&c.timer, now+c.span)
			return
		}
	}
	if c.link == nil {
		c.cluster.pending.remove(c)
		c.complete(statusDeadline, false)
		return
	}
	l, s := c.link, c.stream
	c.link, c.stream = nil, nil
	l.reset(s)
	st := statusDeadline
	if l.lastRecv < c.begun {
		l.suspect(now)
		if c.cluster.heardBut(l, c.begun) {
			st = statusMute // which says nothing about how fast the cluster is
		}
	}
	l.unanswered(now)
	l.ep.judge(statusDeadline)
	c.complete(st, true)
}

// complete reports the end and reuses c.
func (c *poolCall) complete(st codec.Status, sent bool) {
	p := c.pool
	p.timers.cancel(&c.timer)
	c.cluster.metrics.inFlight.Dec()
	c.cluster.metrics.ended(st.Code)
	var resp []byte
	if st.Code == codec.OK {
		resp = c.resp
	}
	c.done.Complete(resp, st, sent)
	p.releaseCall(c)
}

// failCall ends c from the mailbox.
func (p *Pool) failCall(c *poolCall, st codec.Status, sent bool) {
	c.cluster.metrics.inFlight.Dec()
	p.later(failedCall{cluster: c.cluster, done: c.done, st: st, sent: sent})
	p.releaseCall(c)
}

// fail reports a call that never began.
func (p *Pool) fail(cl *poolCluster, done codec.Completion, st codec.Status) {
	p.later(failedCall{cluster: cl, done: done, st: st})
}

func (p *Pool) later(f failedCall) {
	p.failed = append(p.failed, f)
	if !p.drainPosted {
		p.drainPosted = true
		p.loop.Post(p.drainFn)
	}
}

// drainFailed reports what is in failed now; what is added meanwhile waits for the next drain, so callers that
// try again at once do not keep the loop to themselves.
func (p *Pool) drainFailed() {
	p.drainPosted = false
	list := p.failed
	p.failed = p.failedSpare[:0]
	p.failedSpare = nil // a drain within a drain (Close) gets a list of its own
	for i := range list {
		f := list[i]
		list[i] = failedCall{}
		if f.watch != nil {
			f.watch.end(f.st)
			continue
		}
		if f.cluster != nil {
			f.cluster.metrics.ended(f.st.Code)
		}
		f.done.Complete(nil, f.st, f.sent)
	}
	p.failedSpare = list[:0]
}

// openPending puts calls that waited for a free stream on one.
func (p *Pool) openPending(cl *poolCluster) {
	for !cl.pending.empty() {
		c := cl.pending.first()
		if !p.open(c, c.req, p.timers.now()) {
			return
		}
		cl.pending.remove(c)
	}
}

// pendingCalls is the queue of calls that wait for a free stream, oldest first.
type pendingCalls struct {
	list  []*poolCall
	bytes int
}

func (q *pendingCalls) empty() bool      { return len(q.list) == 0 }
func (q *pendingCalls) first() *poolCall { return q.list[0] }

// push appends c with a copy of req; false if the bounds are reached.
func (q *pendingCalls) push(c *poolCall, req []byte) bool {
	if len(q.list) >= maxPendingCalls || q.bytes+len(req) > maxPendingBytes {
		return false
	}
	c.req = append(c.req[:0], req...)
	q.list = append(q.list, c)
	q.bytes += len(req)
	return true
}

// remove takes c out.
func (q *pendingCalls) remove(c *poolCall) {
	switch i := slices.Index(q.list, c); i {
	case -1:
		return
	case 0:
		q.list[0] = nil
		q.list = q.list[1:]
	default:
		q.list = slices.Delete(q.list, i, i+1)
	}
	q.bytes -= len(c.req)
}

// needsLeader says whether a node without a leader is to refuse a method at once, which it does before it looks at the
// request. It could only keep the request until there is a leader, or until a timeout of seconds if it is cut off.
func needsLeader(m codec.Method) bool {
	switch m {
	case codec.MethodStatus, codec.MethodAlarm, codec.MethodMemberList:
		return false
	}
	return true
}

// cutOff says whether st is what a node without a quorum answers.
func cutOff(st codec.Status) bool {
	switch st.Code {
	case codec.DeadlineExceeded:
		return true
	case codec.Unavailable:
		// "etcdserver: request timed out" also comes with a reason behind it.
		return st.Msg == codec.ErrNoLeader.Msg || strings.HasPrefix(st.Msg, codec.ErrTimeout.Msg)
	}
	return false
}
