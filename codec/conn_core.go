package codec

import "errors"

// Conn is one gRPC-over-HTTP/2 connection, without its socket: bytes go in by Feed, events come out as
// calls, bytes to send collect in Output. It belongs to one goroutine (its event loop).
//
// The owner's turn: Feed what the socket brought, or call Send and the like; then
//
//	for out := c.Output(); len(out) > 0; out = c.Output() {
//		write out; c.Flushed(); c.SetBlocked(the socket's buffer is over its high-water mark)
//	}
//
// One Output holds about outputTarget bytes of DATA at most, so that a large answer neither fills the memory
// nor delays the other streams: hence the loop. About once a second the owner calls Tick.
type Conn struct {
	// Immutable.
	cfg    ConnConfig
	client bool
	srv    ServerEvents // nil for a client
	cli    ClientEvents // nil for a server

	// Ends of the connection.
	err      error // what Feed returned; GOAWAY is in out
	closed   bool  // Close was called
	goneAway bool  // client: no further Open; server: GoAway was called
	peerGone bool  // client: OnGoAway was reported
	lastPeer uint32
	goneID   uint32 // server: streams above it are refused, once the graceful GOAWAY is final
	work     int    // AddWork

	// Events and re-entrancy.
	depth   int        // > 0 while events may be delivered: ended streams are not recycled
	zombies []*Stream  // ended while depth > 0
	notes   []noteItem // streams with a pending OnDrained, or an end to report

	// Reading (conn_feed.go).
	preface     int     // bytes of the client's preface that are still to come
	sawSettings bool    // the peer's first frame was here
	part        *buffer // start of a frame that is not whole yet, nil if none
	partNeed    int     // length of that frame with its header, 0 while the header is not whole
	dataID      uint32  // stream of the DATA frame that is being read
	dataLeft    int     // payload of it that is still to come
	dataPad     int     // padding of it that is still to come
	dataEnd     bool    // it has END_STREAM
	inData      bool
	cont        contState
	hd          headerDecoder

	// Windows (conn_flow.go).
	recvWin     int64 // what the peer may still send
	recvUnacked int64 // consumed and not granted again yet
	recvSlack   int64 // by how much a stream may overdraw until the peer has seen our SETTINGS
	sendWin     int64
	peerInit    int64 // SETTINGS_INITIAL_WINDOW_SIZE of the peer
	peerStreams uint32
	whole       *buffer // of the message that is being delivered, if it may be kept
	assembling  int     // capacity of the buffers of messages received in part
	reserved    int     // of these, what streams with Reserved have

	// Writing (conn_send.go).
	out     []byte
	outBuf  *buffer // owner of out's memory
	outHint int     // about how much the last Outputs held
	epoch   uint32  // counts Flushed
	blocked bool
	ready   ring // streams with messages and stream window
	enders  ring // streams whose end waits for the socket
	queued  int
	// queueMem is the memory that queued messages take: an answer of which the peer leaves one byte untaken is all there.
	queueMem int
	req      requestEncoder
	pingSeq  uint64
	pinging  bool
	// The server's measurement of the bandwidth (conn_ping.go, client): bytes of DATA written, how many there were when its
	// last PING was answered, and whether one is not answered yet.
	sentData int64
	heldAt   int64
	pingHeld bool

	// Budgets (limits.go).
	control int // replies since the socket took all
	resets  int
	idle    int
	ticks   uint32
	// inflateLeft is how many bytes gzip may still give until the next Tick.
	inflateLeft int
	// PINGs of a client (ConnConfig.PingMinTime): when the last one came, how many came too early, and whether
	// something was sent since.
	lastPing    int64
	pingStrikes int
	pingExcused bool

	// Streams (conn_stream.go).
	streams   streamTable
	free      []*Stream
	nextID    uint32 // client; above maxStreamID: no further Open
	writtenID uint32 // client: HEADERS of streams below it were taken by the socket
	closedIDs closedRing
}

var (
	errConnClosed   = errors.New("http2: connection is closed")
	statusClosing   = Status{Unavailable, "transport is closing"}
	statusDraining  = Status{Unavailable, "the connection is draining"}
	statusQueueFull = Status{ResourceExhausted, "too many bytes wait on this connection"}
)

func newConn(cfg ConnConfig) *Conn {
	c := &Conn{
		cfg:         cfg.withDefaults(),
		recvWin:     initialWindow,
		sendWin:     initialWindow,
		peerInit:    initialWindow,
		peerStreams: clientStreamsBeforeSettings,
		goneID:      maxStreamID,
		resets:      resetBurst,
		idle:        idleFrameBurst,
		inflateLeft: maxInflateBytes,
	}
	c.recvSlack = max(0, initialWindow-int64(c.cfg.StreamWindow))
	c.hd.maxBytes, c.hd.maxFields = c.cfg.MaxHeaderBytes, c.cfg.MaxHeaderFields
	return c
}

// NewServerConn makes the server's side of a connection; its SETTINGS are in Output at once.
func NewServerConn(cfg ConnConfig, ev ServerEvents) *Conn {
	c := newConn(cfg)
	c.srv = ev
	c.preface = len(clientPreface)
	out := appendFrameHeader(c.o(), 3*6, frameSettings, 0, 0)
	out = appendSetting(out, settingMaxConcurrentStreams, c.cfg.MaxConcurrentStreams)
	out = appendSetting(out, settingInitialWindowSize, c.cfg.StreamWindow)
	c.out = appendSetting(out, settingMaxHeaderListSize, uint32(c.cfg.MaxHeaderBytes))
	c.openConnWindow()
	return c
}

// NewClientConn makes the client's side; preface and SETTINGS are in Output at once.
func NewClientConn(cfg ConnConfig, authority string, ev ClientEvents) *Conn {
	c := newConn(cfg)
	c.client, c.cli = true, ev
	c.nextID = c.cfg.FirstStreamID | 1
	c.req.authority, c.req.secure, c.req.token = authority, cfg.Secure, cfg.Token
	out := append(c.o(), clientPreface...)
	out = appendFrameHeader(out, 3*6, frameSettings, 0, 0)
	out = appendSetting(out, settingEnablePush, 0)
	out = appendSetting(out, settingInitialWindowSize, c.cfg.StreamWindow)
	c.out = appendSetting(out, settingMaxHeaderListSize, uint32(c.cfg.MaxHeaderBytes))
	c.openConnWindow()
	return c
}

// Feed takes all of p (and copies what it must keep). An error ends the connection: GOAWAY is in
// Output, the owner writes it and closes the socket, then calls Close.
func (c *Conn) Feed(p []byte) error {
	if c.err != nil {
		return c.err
	}
	if c.closed {
		return errConnClosed
	}
	c.depth++
	if err := c.feed(p); err != nil {
		c.fail(err)
	}
	c.pump()
	c.deliver()
	c.leave()
	if c.closed && c.err == nil {
		return errConnClosed
	}
	return c.err
}

// fail ends the connection with GOAWAY.
func (c *Conn) fail(err error) {
	if c.err != nil || c.closed {
		return
	}
	c.err = err
	code, debug := h2Internal, err.Error()
	if e, ok := err.(*ConnError); ok {
		code = h2Code(e.Code)
		c.hit(e.Limit)
		if e.Limit == LimitPings {
			debug = e.Reason // clients of gRPC look for this text, and ping less often from then on
		}
	}
	c.out = appendGoAway(c.o(), c.lastPeer, code, debug)
}

// Output returns the bytes to be written now, owned by the Conn, valid until the next call of a method.
// See Conn for why it is called in a loop.
func (c *Conn) Output() []byte {
	if c.depth == 0 && c.usable() {
		c.depth++
		for {
			c.pump()
			c.answerHeld(false)
			if len(c.notes) == 0 || !c.usable() {
				break
			}
			c.deliver()
		}
		c.leave()
	}
	return c.out
}

// Flushed says that all bytes of Output were taken (written or copied).
func (c *Conn) Flushed() {
	c.epoch++
	c.writtenID = c.nextID
	if !c.blocked {
		c.control = 0
	}
	if b := c.outBuf; b != nil {
		c.outHint = min(max(len(c.out), c.outHint-c.outHint/8), maxOutHint)
		b.b = c.out[:0]
		c.out, c.outBuf = nil, nil
		putBuffer(b)
	}
}

// o returns the output, with room for a small frame.
func (c *Conn) o() []byte { return c.room(smallFrame) }

// room returns the output, with room for n bytes. It grows from the pools, so that busy connections leave
// no garbage; an append that needs more than n still works.
func (c *Conn) room(n int) []byte {
	if cap(c.out)-len(c.out) >= n {
		return c.out
	}
	size := max(minOutput, 2*len(c.out), len(c.out)+n)
	if size > minOutput {
		size = max(size, c.outHint) // once it is more than a little, it is mostly as much as it was before
	}
	b := getBuffer(size)
	b.b = append(b.b, c.out...)
	if old := c.outBuf; old != nil {
		old.b = c.out[:0]
		putBuffer(old)
	}
	c.out, c.outBuf = b.b, b
	return c.out
}

// SetBlocked stops (true) or resumes (false) the emission of DATA into Output, because the socket's own
// buffer is over its high-water mark. Control frames still pass; trailers wait like DATA. While it is
// blocked, the replies that the peer's frames cause are counted: too many end the connection.
func (c *Conn) SetBlocked(blocked bool) {
	c.blocked = blocked
	if !blocked {
		c.pump()
	}
}

// Ping sends a PING; OnPong reports the answer (client role). One PING is under way at a time: a further
// call waits for the same answer.
func (c *Conn) Ping() {
	if c.pinging || !c.usable() {
		return
	}
	c.pinging = true
	c.pingSeq++
	c.out = appendPing(c.o(), false, c.pingData())
}

func (c *Conn) pingData() (d [8]byte) {
	for i := range d {
		d[i] = byte(c.pingSeq >> (8 * i))
	}
	return d
}

// drainPing marks the PING whose answer makes a graceful GOAWAY final; Ping never counts this far.
var drainPing = [8]byte{'d', 'r', 'a', 'i', 'n', 0, 0, 0xff}

// GoAway tells the peer to open no further streams (graceful; NO_ERROR). A server first announces it and
// still takes the requests that are under way: those until the answer to a PING. Streams tells when the last
// one is done.
func (c *Conn) GoAway() {
	if c.goneAway || !c.usable() {
		return
	}
	c.goneAway = true
	if c.client {
		c.out = appendGoAway(c.o(), 0, h2NoError, "")
		return
	}
	c.out = appendGoAway(c.o(), maxStreamID, h2NoError, "")
	c.out = appendPing(c.out, false, drainPing)
}

// AddWork adds n (or takes away, n < 0) pieces of work that go on for streams that are no more: while they
// do, they take places of MaxConcurrentStreams. So a client that opens and resets streams in a row gets no
// more work done at a time than one that waits (CVE-2023-44487). Server role.
func (c *Conn) AddWork(n int) { c.work = max(0, c.work+n) }

// Tick tells that about a second has passed: budgets are given back, and memory that only a busy connection
// needs is let go. Everything else works without it.
func (c *Conn) Tick() {
	c.ticks++
	c.resets = min(resetBurst, c.resets+resetRefill)
	c.idle = idleFrameBurst
	c.inflateLeft = maxInflateBytes
	c.answerHeld(true)
	if c.streams.n == 0 {
		c.streams.shrink()
	}
	if c.streams.n <= tickFreeStreams && len(c.free) > tickFreeStreams {
		c.free = append([]*Stream(nil), c.free[:tickFreeStreams]...)
	}
}

// Streams returns the number of open streams, Queued the bytes of messages waiting on all of them.
func (c *Conn) Streams() int { return c.streams.n }

// Queued returns the bytes of messages that wait on all streams.
func (c *Conn) Queued() int { return c.queued }

// QueueMemory returns the memory that those messages take, with what was sent of them but is freed only with the rest.
func (c *Conn) QueueMemory() int { return c.queueMem }

// SentData returns how many bytes of DATA were put into Output so far.
func (c *Conn) SentData() int64 { return c.sentData }

// Close says that the socket is gone: every open stream gets its OnCancel or OnEnd.
func (c *Conn) Close() {
	if c.closed {
		return
	}
	c.closed = true
	c.depth++
	c.deliver()
	// In order of age, one by one: a handler may end others.
	for _, s := range c.streams.sorted() {
		if s.stream.phase == phaseLive {
			c.end(s, statusClosing, c.client && s.ID >= c.writtenID)
		} else {
			c.release(s)
		}
	}
	putBuffer(c.part)
	putBuffer(c.cont.block)
	c.part, c.cont.block = nil, nil
	c.leave()
	c.free = nil
}

// Partial returns the bytes that messages received in part take, without those for which room was Reserved.
func (c *Conn) Partial() int { return c.assembling - c.reserved }

// GoneAway says that GoAway was called, or the peer's GOAWAY was here.
func (c *Conn) GoneAway() bool { return c.goneAway }

// Drained says that a server's GOAWAY is final and its last stream has ended: the owner may close the socket.
func (c *Conn) Drained() bool { return c.goneAway && c.goneID != maxStreamID && c.streams.n == 0 }

// Greeted says that the peer's SETTINGS were here: it speaks HTTP/2.
func (c *Conn) Greeted() bool { return c.sawSettings }

// usable says that frames may still be sent.
func (c *Conn) usable() bool { return c.err == nil && !c.closed }

// leave ends a section in which events are delivered; the outermost one recycles ended streams.
func (c *Conn) leave() {
	c.depth--
	if c.depth > 0 {
		return
	}
	for i, s := range c.zombies {
		c.recycle(s)
		c.zombies[i] = nil
	}
	c.zombies = c.zombies[:0]
}
