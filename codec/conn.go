package codec

import "time"

// This file is the contract of a gRPC-over-HTTP/2 connection; see Conn.

// ConnConfig bounds a Conn. Zero fields take the defaults of DefaultConnConfig.
type ConnConfig struct {
	MaxConcurrentStreams uint32 // server: advertised and enforced (REFUSED_STREAM beyond)
	StreamWindow         uint32 // receive window granted per stream, bytes
	ConnWindow           uint32 // receive window granted per connection, bytes
	MaxHeaderBytes       int    // decoded size of one header block incl. 32 bytes a field (RFC 7541 4.1)
	MaxHeaderFields      int    // fields in one header block
	MaxMessageBytes      int    // largest gRPC message accepted; beyond: ResourceExhausted with grpc-go's text
	// MaxQueuedBytes is how many bytes of messages should wait for windows on one connection. Send accepts
	// what comes all the same: the owner watches Queued and OnDrained. A stream that sends when
	// hardQueueFactor times as much waits is reset (ENHANCE_YOUR_CALM; ResourceExhausted to a client).
	MaxQueuedBytes int
	// FirstStreamID is the identifier of a client's first stream (0: 1). Tests of long-lived connections use
	// it: a client has 2^30 streams, and Open returns nil when they are used up.
	FirstStreamID uint32
	// Secure says that the client's connection is encrypted: its requests have :scheme https.
	Secure bool
	// Token is what etcd's Authenticate has answered; a client's requests carry it. "": none.
	Token string
	// MaxPartialBytes bounds what messages received in part may take on one connection (0: maxAssemblingMessages
	// times MaxMessageBytes, but at least ConnWindow).
	MaxPartialBytes int
	// PingMinTime is how long a client has to wait between its PINGs (server; 0: it need not). As with grpc-go,
	// three that come too early, with nothing sent to the client meanwhile, end the connection
	// (ENHANCE_YOUR_CALM "too_many_pings"). Without open streams the least is pingIdleTime. Needs Now.
	PingMinTime time.Duration
	// Now is the owner's clock in nanoseconds, called from within Feed.
	Now func() int64
	// Inflate is shared by connections of one goroutine. nil: each has a budget of its own only.
	Inflate *InflateBudget
	// OnLimit hears, from within any method, of each bound that the peer ran into. nil: nobody does.
	OnLimit func(Limit)
	// Full says that the process has no memory to spare: then no client may have more than FullBytes (0:
	// MaxMessageBytes) of messages received in part on its connection, and no answer of a server that comes in parts
	// may be larger. nil: it always has.
	Full      func() bool
	FullBytes int
}

// Stream is one RPC on a Conn. Fields are read-only for the owner of the Conn except User.
type Stream struct {
	ID uint32
	// Path is the request's :path (interned: no allocation for known etcd methods).
	Path string
	// Timeout is the request's grpc-timeout, 0 for none (server role).
	Timeout time.Duration
	// HasLeader says that the metadata had hasleader: true (server role).
	HasLeader bool
	// User is the owner's.
	User any
	// Rewriter takes the pieces of messages that come in several and are not compressed, while they are in the processor's
	// cache; what it leaves is the message. Received and Incoming count what came. The owner's, set after Open.
	Rewriter Rewriter
	// Spared says that a message on the stream is kept whatever Full and MaxPartialBytes say, up to MaxSparedBytes: for
	// streams that have to begin again, and ask for it all again, when a message is refused. The owner's, set after Open.
	Spared bool
	// Reserved is how many bytes the owner has set aside for the message that comes: Partial does not count it again, and it
	// comes also when Full. One that is longer ends the stream with ResourceExhausted, before any of it is kept. 0: nothing was set
	// aside. The owner's, set after Open.
	Reserved int

	stream streamState
}

// Rewriter makes another message of the one that comes in.
type Rewriter interface {
	// Rewrite appends to dst what it makes of p, the next piece of the message, and returns it. It must not append more
	// than fits into dst's capacity, which is at least what all pieces have together so far.
	Rewrite(dst, p []byte) []byte
}

// Queued returns the bytes of messages that wait on this stream for a window or for the socket.
func (s *Stream) Queued() int { return s.stream.q.n }

// QueueMemory returns the memory that these messages take; see Conn.QueueMemory.
func (s *Stream) QueueMemory() int { return s.stream.q.mem }

// Received returns how many bytes are here of the message that is coming in, 0 if none is.
func (s *Stream) Received() int {
	if s.stream.msg == nil {
		return 0
	}
	return s.stream.got
}

// Incoming returns how many bytes that message will have, as its sender says.
func (s *Stream) Incoming() int {
	if s.stream.msg == nil {
		return 0
	}
	return s.stream.msgLen
}

// ServerEvents is what happens on a server's Conn. All calls come on the goroutine that owns the Conn, from
// within Conn.Feed or Conn.Close; OnDrained, and OnCancel of a stream that Send had to give up, also from
// within Conn.Output. None comes from within Send, Finish, CloseSend, Reset, Hold or SetBlocked. Handlers may
// call any method of the Conn but Feed, Output and Flushed.
type ServerEvents interface {
	// OnRequest reports a new RPC. Requests that are not gRPC were already answered by the Conn.
	OnRequest(s *Stream)
	// OnMessage reports one complete message; msg is valid only during the call.
	OnMessage(s *Stream, msg []byte)
	// OnHalfClose reports that the client has sent all its messages.
	OnHalfClose(s *Stream)
	// OnCancel reports that the stream ended before Finish: reset by the client, answered by the Conn
	// itself (a message too large, say), or the connection is gone. The stream must not be used after
	// OnCancel has returned. Work that goes on for it is counted by Conn.AddWork.
	OnCancel(s *Stream)
	// OnDrained reports that the stream's Queued fell to 0 after a Send that had to queue.
	OnDrained(s *Stream)
}

// ClientEvents is what happens on a client's Conn, called as ServerEvents are. The calls come from within
// Conn.Feed or Conn.Close; OnEnd of a stream that Send had to give up also from within Conn.Output.
type ClientEvents interface {
	OnMessage(s *Stream, msg []byte)
	// OnEnd reports how the RPC ended, exactly once a stream, also when the connection dies (Unavailable).
	// unprocessed is true when the server said that it did not look at the request (REFUSED_STREAM, or
	// above GOAWAY's last stream), or it was never written.
	OnEnd(s *Stream, st Status, unprocessed bool)
	// OnGoAway reports that no further stream can be opened here; open ones finish.
	OnGoAway()
	// OnPong reports the answer to Ping.
	OnPong()
}
