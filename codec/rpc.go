package codec

import (
	"time"
)

// ClusterID names a cluster that a proxy talks to: a member cluster by its place in the configuration
// (0, 1, ...), or the Coordinator.
type ClusterID int

// Coordinator is the ClusterID of the coordinator.
const Coordinator ClusterID = -1

// Method is one of the etcd RPCs that Spindle sends to member clusters and the coordinator.
type Method uint8

// The methods. MethodPath gives the gRPC path of each.
const (
	MethodRange Method = iota
	MethodTxn
	MethodCompact
	MethodStatus
	MethodAlarm
	MethodMemberList
	MethodWatch
	MethodLeaseGrant
	MethodLeaseRevoke
	MethodLeaseTimeToLive
	MethodLeaseLeases
	MethodLeaseKeepAlive
	methodCount
)

var methodPaths = [methodCount]string{
	MethodRange:      "/etcdserverpb.KV/Range",
	MethodTxn:        "/etcdserverpb.KV/Txn",
	MethodCompact:    "/etcdserverpb.KV/Compact",
	MethodStatus:     "/etcdserverpb.Maintenance/Status",
	MethodAlarm:      "/etcdserverpb.Maintenance/Alarm",
	MethodMemberList: "/etcdserverpb.Cluster/MemberList",
	MethodWatch:      "/etcdserverpb.Watch/Watch",

	MethodLeaseGrant:      "/etcdserverpb.Lease/LeaseGrant",
	MethodLeaseRevoke:     "/etcdserverpb.Lease/LeaseRevoke",
	MethodLeaseTimeToLive: "/etcdserverpb.Lease/LeaseTimeToLive",
	MethodLeaseLeases:     "/etcdserverpb.Lease/LeaseLeases",
	MethodLeaseKeepAlive:  "/etcdserverpb.Lease/LeaseKeepAlive",
}

// MethodPath returns the gRPC :path of m.
func MethodPath(m Method) string { return methodPaths[m] }

// Transport is how the core of a proxy reaches member clusters and the coordinator. The pool of HTTP/2 connections
// implements it on an event loop, the simulation over modelled clusters.
//
// All methods are called on the goroutine that owns the core, and everything they report is reported on
// that goroutine too, never from within the call itself.
type Transport interface {
	// Call sends one unary request. req is read before Call returns, and not kept. c.Complete is called
	// exactly once, also when no endpoint is connected or timeout has passed (DeadlineExceeded).
	Call(to ClusterID, m Method, req []byte, timeout time.Duration, c Completion)
	// Watch opens a Watch stream (metadata hasleader: true) and sends req, an encoded WatchRequest, as
	// its first message. req is read before Watch returns.
	Watch(to ClusterID, req []byte, sink WatchSink) WatchHandle
	// KeepAlive opens a LeaseKeepAlive stream (metadata hasleader: true). Each LeaseKeepAliveRequest that
	// goes by Send is answered by one LeaseKeepAliveResponse.
	KeepAlive(to ClusterID, sink WatchSink) WatchHandle
}

// KeptReply is the length beyond which a reply is its receiver's: lists are not copied because of how they came.
const KeptReply = 64 << 10

// Completion receives the outcome of a Call.
type Completion interface {
	// Complete reports the reply. resp is valid only during the call, unless it is longer than KeptReply: then it is
	// the receiver's, who may Recycle it. st is the gRPC status; sent is
	// false when it is certain that no byte of the request reached a server (the request then certainly
	// was not applied).
	Complete(resp []byte, st Status, sent bool)
}

// Receiving is a Completion that says how its reply is received.
type Receiving interface {
	Completion
	// Reserved is what was set aside for the reply, in bytes: a longer one ends the call with ResourceExhausted. 0: nothing was. A
	// Transport that counts no memory need not call it.
	Reserved() int
	// Rewriter is called before each sending of the request, and begins anew. nil: the reply is to stay as it is. A
	// Transport need not call it, and a short reply stays as it is anyway.
	Rewriter() Rewriter
}

// WatchSink receives what a Watch or KeepAlive stream brings.
type WatchSink interface {
	// OnMessage reports one response message; msg is valid only during the call.
	OnMessage(msg []byte)
	// OnEnd reports the end of the stream, exactly once, also when it could not be opened. It is not
	// called after Close.
	OnEnd(st Status)
}

// WatchHandle steers an open Watch or KeepAlive stream.
type WatchHandle interface {
	// Send sends a further encoded request message. req is read before return.
	Send(req []byte)
	// Hold stops (true) or resumes (false) the flow of messages by withholding HTTP/2 window; what is
	// already buffered on this side still arrives (at most one stream window).
	Hold(hold bool)
	// Close ends the stream; the sink is not called any more.
	Close()
}
