package server

import "spindle/codec"

// StreamHandler serves one streaming RPC (a Watch). All its methods are called on the goroutine of the
// loop that the client's connection lives on, never two at a time, and none may block.
//
// Open comes first. The RPC ends with Cancel, or with the handler's own call of RPC.Finish; after either
// no further method is called.
type StreamHandler interface {
	// Open reports the new RPC; the handler keeps rpc.
	Open(rpc *RPC)
	// Message reports one message of the client. msg is valid only during the call.
	Message(msg []byte)
	// HalfClose reports that the client will send no further message. The RPC stays open for answers
	// until Finish.
	HalfClose()
	// Cancel reports that the RPC is over without Finish: the client reset it, its deadline passed, or
	// the connection is gone. The handler must not use its RPC any more.
	Cancel()
	// Drained reports that Queued fell to 0 after messages had to wait.
	Drained()
}

// Drainer is a StreamHandler whose RPC does not end by itself (a Watch): Drain tells it that the server is going away, so
// that it says its last word and calls RPC.Finish with Unavailable, which makes clients open the stream again
// elsewhere. Other handlers are waited for, at most Config.DrainTimeout.
type Drainer interface{ Drain() }

// NewStream makes the handler of one RPC. It is called on loop l, which the RPC will live on.
type NewStream func(l *Loop) StreamHandler

// RPC is one gRPC call of a client. It belongs to its loop: all methods must be called there. After
// Finish, or after the handler's Cancel, every method does nothing.
type RPC struct {
	call
}

// Send queues one message to the client; msg is copied before return.
func (r *RPC) Send(msg []byte) {
	if r.stream == nil {
		return
	}
	r.conn.send(r.stream, msg)
}

// Push is Send of head and events as one message, for what many streams get in one turn. It must not be called from
// within a method of a StreamHandler: once enough has come together on the loop it is written, which may end any
// connection. shared says that others get events, too; kept that their bytes must not be changed any more
// (codec.Conn.SendParts).
func (r *RPC) Push(head, events []byte, shared bool) (kept bool) {
	if r.stream == nil {
		return false
	}
	kept = r.conn.h2.SendParts(r.stream, head, events, shared)
	r.conn.touch()
	r.loop.pushed(len(head) + len(events))
	return kept
}

// Finish ends the RPC with st, after what is queued. The handler gets no further call.
func (r *RPC) Finish(st codec.Status) {
	if r.stream == nil {
		return
	}
	r.conn.finish(&r.call, st)
}

// Queued returns the bytes of messages that wait for the client to take them.
func (r *RPC) Queued() int {
	if r.stream == nil {
		return 0
	}
	return r.stream.Queued()
}

// Hold withholds (true) or gives back (false) HTTP/2 window from the client: while held, at most one
// stream window of further messages arrives.
func (r *RPC) Hold(hold bool) {
	if r.stream == nil {
		return
	}
	r.conn.h2.Hold(r.stream, hold)
	r.conn.touch()
}

// Loop returns the loop that the RPC lives on.
func (r *RPC) Loop() *Loop { return r.loop }

// HasLeader says that the client asked, by the metadata hasleader, to be cut off when there is no leader.
func (r *RPC) HasLeader() bool { return r.hasLeader }

// Open says that the RPC has not ended.
func (r *RPC) Open() bool { return r.stream != nil }
