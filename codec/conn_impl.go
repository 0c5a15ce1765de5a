package codec

import "time"

// Placeholder bodies until the connection is written; only the signatures count.

type streamState struct{}

func (s *streamState) queuedBytes() int { panic("codec: not built") }

// Conn is one gRPC-over-HTTP/2 connection, without its socket: bytes go in by Feed, events come out as
// calls, bytes to send collect in Output. It belongs to one goroutine (its event loop).
type Conn struct{}

// NewServerConn makes the server's side of a connection; its SETTINGS are in Output at once.
func NewServerConn(cfg ConnConfig, ev ServerEvents) *Conn { panic("codec: not built") }

// NewClientConn makes the client's side; preface and SETTINGS are in Output at once.
func NewClientConn(cfg ConnConfig, authority string, ev ClientEvents) *Conn { panic("codec: not built") }

// Feed takes all of p (and copies what it must keep). An error ends the connection: GOAWAY is in
// Output, the owner writes it and closes the socket, then calls Close.
func (c *Conn) Feed(p []byte) error { panic("codec: not built") }

// Output returns the bytes to be written now, owned by the Conn, valid until the next call of a method.
func (c *Conn) Output() []byte { panic("codec: not built") }

// Flushed says that all bytes of Output were taken (written or copied).
func (c *Conn) Flushed() { panic("codec: not built") }

// SetBlocked stops (true) or resumes (false) the emission of DATA into Output, because the socket's own
// buffer is over its high-water mark. Control frames still pass.
func (c *Conn) SetBlocked(blocked bool) { panic("codec: not built") }

// Send queues one gRPC message on s; msg is copied (or framed into Output) before return.
func (c *Conn) Send(s *Stream, msg []byte) { panic("codec: not built") }

// Finish ends s with trailers (server role), after what is queued. s must not be used afterwards.
func (c *Conn) Finish(s *Stream, st Status) { panic("codec: not built") }

// Open starts an RPC (client role). It returns nil when the peer's stream limit is reached or the
// connection is going away.
func (c *Conn) Open(path string, hasLeader bool, timeout time.Duration) *Stream {
	panic("codec: not built")
}

// CloseSend half-closes s (client role), after what is queued.
func (c *Conn) CloseSend(s *Stream) { panic("codec: not built") }

// Reset abandons s with RST_STREAM CANCEL; no further event comes for it.
func (c *Conn) Reset(s *Stream) { panic("codec: not built") }

// Hold withholds (true) or gives back (false) receive window of s.
func (c *Conn) Hold(s *Stream, hold bool) { panic("codec: not built") }

// Ping sends a PING; OnPong reports the answer (client role).
func (c *Conn) Ping() { panic("codec: not built") }

// GoAway tells the peer to open no further streams (graceful; NO_ERROR).
func (c *Conn) GoAway() { panic("codec: not built") }

// Streams returns the number of open streams, Queued the bytes of messages waiting on all of them.
func (c *Conn) Streams() int { panic("codec: not built") }

// Queued returns the bytes of messages that wait on all streams.
func (c *Conn) Queued() int { panic("codec: not built") }

// Close says that the socket is gone: every open stream gets its OnCancel or OnEnd.
func (c *Conn) Close() { panic("codec: not built") }
