package server

import (
	"errors"
	"log/slog"
	"net"
	"time"

	"github.com/panjf2000/gnet/v2"
	"golang.org/x/sys/unix"

	"spindle/codec"
	"spindle/codec/tlsconn"
	"spindle/shard"
)

// Limits of one client's connection.
const (
	// maxOpsPerConn is how many unary requests of one connection may be with the core. Those that the
	// client has canceled count until the core lets go of them, so opening and resetting streams as fast
	// as possible gains nothing. Beyond: ResourceExhausted "etcdserver: too many requests".
	maxOpsPerConn = 4096
	// Of all connections together the core has maxOps at most (and one of each). A connection may take half of the places
	// that are free, or opsWhenBusy, if that is more. The same answer.
	maxOps      = 32768
	opsWhenBusy = 128
	// maxOpBytesPerConn bounds the bytes of those requests' messages together; the same answer beyond.
	maxOpBytesPerConn = 64 << 20
	// maxWaitingReplies bounds the bytes of answers that wait for a client which does not take them, maxReplyMemory
	// the memory that they take, which is freed only when all of an answer is sent; the same answer to its
	// further requests.
	maxWaitingReplies = 64 << 20
	maxReplyMemory    = 256 << 20
	// maxBlockedControl is how many bytes of frames other than DATA may be added to a blocked
	// connection's buffer: answers to a flood of PING, SETTINGS or the like. It is dropped beyond.
	maxBlockedControl = 1 << 20
	// maxStalledReplies is how much memory answers may take that wait for HTTP/2 window for longer than
	// Config.StallTimeout while none of them is taken, nor minTaken of others; the connection is dropped beyond. A stream (a Watch)
	// that its client reads late is no such answer: it is held back on its own, and up to maxStalledStream
	// of it do not count.
	maxStalledReplies = 1 << 20
	maxStalledStream  = watchHoldBytes
	// lingerTime is how long a connection that has nothing more to say waits for its client to close it. Closed at
	// once, with the client still sending, it would be reset, and what the kernel has not sent yet be lost.
	lingerTime = time.Second
)

var (
	errNotGreeted  = errors.New("no HTTP/2 preface came")
	errNoHandshake = errors.New("the TLS handshake was not done in time")
)

// clientConn is one client's connection: gnet's socket on one side, the codec on the other. What the
// codec wants to send collects during a turn and is written once, at the turn's end (or in Loop.pushed). It belongs to its
// loop.
type clientConn struct {
	loop *Loop
	eng  *Engine
	log  *slog.Logger
	sock gnet.Conn
	h2   *codec.Conn
	tls  *tlsconn.Conn // between the two; nil: plain text

	// closed is set in OnClose, which may be called from within any Write. sock must not be touched
	// afterwards: its descriptor may be another client's.
	closed bool
	// ending is set once Feed failed: what is in Output (a GOAWAY) is written, then the socket closed.
	ending error
	// lingers is since when all is said: the socket was shut for writing, what comes is not looked at. 0: not.
	lingers int64
	dirty   bool // on the loop's dirty list
	heard   bool // TLS only: the client has said something, or the log has said why not

	remote   net.Addr // TLS only: sock's, which forgets it when it is closed
	plainErr error    // TLS only: what HTTP/2 said of what was decrypted

	blocked  bool  // on the loop's blocked list: the socket takes less than we have
	buffered int   // least OutboundBuffered since it was blocked
	stalled  int64 // when that was seen, in Loop.now
	added    int   // bytes written since it was blocked

	opened    int64              // in Loop.now
	received  int64              // when bytes came last
	pinged    int64              // when a PING was sent that nothing has come after, 0 for none
	charged   int                // bytes of this connection in Engine's Memory
	client    shard.Client       // what the core is told of it
	slow      int                // seconds in a row in which look found it slow
	wrote     int                // bytes given to the socket
	opsDone   int                // bytes of requests that the core is done with
	lastHeld  int                // charged when look looked last
	lastDone  int                // what had gone through then
	streaming map[*call]struct{} // open streaming RPCs; nil until there is one
	waiting   int                // bytes of answers that waited for window when second looked, sent parts not counted
	waitSent  int64              // what had been sent of answers then
	waitSince int64              // when second last saw that they were few, fewer than before, or being taken; at first, opened

	ops      int // unary requests and keep-alives with the core, canceled ones included
	opsBytes int // the size of their messages

	keepAlives int // messages of LeaseKeepAlive streams that wait to be handed to the core, and leases that are put aside
}

var (
	_ shard.LoopConn     = (*clientConn)(nil)
	_ codec.ServerEvents = (*clientConn)(nil)
)

func newClientConn(l *Loop) *clientConn {
	return &clientConn{loop: l, eng: l.eng, log: l.log}
}

// OnOpen implements shard.LoopConn.
func (c *clientConn) OnOpen(sock gnet.Conn) {
	c.sock = sock
	if c.tls != nil {
		c.remote = sock.RemoteAddr()
	}
	c.opened = c.loop.now()
	c.received, c.waitSince = c.opened, c.opened
	c.loop.conns[c] = struct{}{}
	connsOpen.Add(1)
	metricConns.Inc()
	cfg := c.eng.cfg.Codec
	cfg.Now, cfg.OnLimit, cfg.Full = c.loop.nowFn, countLimit, c.eng.cfg.Memory.Pressed
	cfg.Inflate = &c.loop.inflate
	c.h2 = codec.NewServerConn(cfg, c)
	if c.eng.draining.Load() { // goAway may have been here before
		c.h2.GoAway()
	}
	c.touch()
}

// OnTraffic implements shard.LoopConn.
func (c *clientConn) OnTraffic(sock gnet.Conn) {
	p, err := sock.Peek(-1)
	if err != nil || len(p) == 0 {
		return
	}
	metricBytesIn.Add(len(p))
	if c.lingers != 0 {
		_, _ = sock.Discard(len(p))
		return
	}
	c.received, c.pinged = c.loop.now(), 0
	if c.ending == nil {
		// Nothing is written before the end of the turn, so the connection cannot go away inside Feed.
		c.ending = c.receive(p)
	}
	_, _ = sock.Discard(len(p))
	c.touch()
}

// OnClose implements shard.LoopConn.
func (c *clientConn) OnClose(sock gnet.Conn, err error) {
	if c.closed {
		return
	}
	c.closed = true
	c.count(-1)
	if c.sock == nil { // it was never open: the loop could not take it
		return
	}
	delete(c.loop.conns, c)
	connsOpen.Add(-1)
	c.unblock()
	if c.ending != nil {
		err = c.ending
	}
	if c.tls != nil {
		c.tls.Close()
	}
	if c.h2 == nil {
		return
	}
	c.log.Debug("client connection closed", "loop", c.loop.index, "streams", c.h2.Streams(), "reason", err)
	c.h2.Close()
	c.charge()
}

// touch puts the connection on the list of those that write at the end of the turn.
func (c *clientConn) touch() {
	if !c.dirty && !c.closed {
		c.dirty = true
		c.loop.dirty = append(c.loop.dirty, c)
	}
}

// flush writes what the codec has, piece by piece until the codec has no more or the socket's buffer is
// over its bound. Every Write may end the connection before it returns, and Output may report events.
func (c *clientConn) flush() {
	c.dirty = false
	if c.lingers != 0 {
		return
	}
	for !c.closed {
		out := c.output()
		n := len(out)
		if n == 0 {
			break
		}
		metricBytesOut.Add(n)
		_, err := c.sock.Write(out)
		if c.closed {
			return
		}
		if err != nil {
			c.end(err)
			return
		}
		c.written()
		c.wrote += n
		if c.blocked {
			if c.added += n; c.added > maxBlockedControl {
				c.drop(limitBlockedControl, "client does not read and keeps asking")
				return
			}
		} else if c.sock.OutboundBuffered() > c.eng.cfg.MaxOutbound {
			c.block()
		}
	}
	if c.closed {
		return
	}
	c.charge()
	switch sent := c.sock.OutboundBuffered() == 0; {
	case sent && (c.ending != nil || c.h2.Drained()):
		c.linger()
	case c.ending != nil:
		c.kill()
	}
}

// linger ends the connection from this side, once gnet holds nothing of it: the client reads all that was written, then
// the end, and closes; or second does, after lingerTime.
func (c *clientConn) linger() {
	c.lingers = c.loop.now()
	c.unblock()
	c.farewell()
	if c.closed {
		return
	}
	if c.sock.OutboundBuffered() > 0 || unix.Shutdown(c.sock.Fd(), unix.SHUT_WR) != nil {
		c.kill()
		return
	}
	c.h2.Close()
	c.charge()
	c.loop.nested = true // the hooks are to see the requests that ended here
}

// block holds answers back until the socket takes what it has.
func (c *clientConn) block() {
	c.blocked = true
	c.buffered, c.stalled, c.added = c.sock.OutboundBuffered(), c.loop.now(), 0
	c.loop.blocked = append(c.loop.blocked, c)
	connsBlocked.Add(1)
	c.h2.SetBlocked(true)
}

// unblock takes the connection off the loop's list; the last one takes its place there.
func (c *clientConn) unblock() {
	if !c.blocked {
		return
	}
	c.blocked = false
	connsBlocked.Add(-1)
	list := c.loop.blocked
	for i, other := range list {
		if other == c {
			list[i] = list[len(list)-1]
			list[len(list)-1] = nil
			c.loop.blocked = list[:len(list)-1]
			return
		}
	}
}

// retry looks, once a tick, whether a blocked client has read something.
func (c *clientConn) retry(now int64) {
	waiting := c.sock.OutboundBuffered()
	switch {
	case waiting <= c.eng.cfg.MaxOutbound/2:
		c.unblock()
		c.h2.SetBlocked(false)
		c.touch()
	case waiting < c.buffered:
		c.buffered, c.stalled = waiting, now
	case now-c.stalled >= int64(c.eng.cfg.StallTimeout):
		c.drop(limitStalled, "client does not read")
	}
}

// second looks, once a second, for a client that has said nothing yet or takes none of its answers. A blocked
// connection is retry's.
func (c *clientConn) second(now int64) {
	c.h2.Tick()
	c.charge() // the socket takes what gnet holds without an event
	if c.lingers != 0 {
		if now-c.lingers >= int64(lingerTime) {
			c.kill()
		}
		return
	}
	if c.tls != nil && !c.tls.Open() && now-c.opened >= int64(min(tlsconn.HandshakeTimeout, c.eng.cfg.GreetTimeout)) {
		c.end(c.tlsEnded(errNoHandshake))
		return
	}
	if !c.h2.Greeted() && now-c.opened >= int64(c.eng.cfg.GreetTimeout) {
		hitLimit(limitPreface)
		c.end(errNotGreeted)
		return
	}
	if !c.alive(now) {
		return
	}
	c.pumpKeepAlives(true)
	waiting, mem := c.h2.Queued(), c.h2.QueueMemory()
	if mem > maxStalledReplies {
		for k := range c.streaming {
			mem -= k.stream.QueueMemory() - max(0, k.stream.Queued()-maxStalledStream)
		}
	}
	// Who takes much may be given more than that, second after second.
	sent := c.h2.SentData()
	taken := sent-c.waitSent > int64(waiting/minTaken)
	if c.blocked || mem <= maxStalledReplies || waiting < c.waiting || taken {
		c.waitSince = now
	} else if now-c.waitSince >= int64(c.eng.cfg.StallTimeout) {
		c.drop(limitNoWindow, "client gives no window for its answers")
	}
	c.waiting, c.waitSent = waiting, sent
}

func (c *clientConn) drop(l limit, why string) {
	metricConnsDropped.Inc()
	hitLimit(l)
	c.log.Warn("connection dropped: "+why, "client", c.sock.RemoteAddr(), "buffered", c.sock.OutboundBuffered(), "queued", c.h2.Queued())
	c.kill()
}

// end closes the connection for err.
func (c *clientConn) end(err error) {
	if c.ending == nil {
		c.ending = err
	}
	c.kill()
}

// kill closes the socket now; OnClose has been called when it returns.
func (c *clientConn) kill() {
	if !c.closed && c.sock != nil && c.lingers == 0 {
		c.farewell()
	}
	if !c.closed && c.sock != nil { // its Write may have ended it
		_ = c.loop.el.Close(c.sock)
	}
}

// goAway tells all clients of the loop to open no further streams, and streams that would not end by themselves to
// move. Those are told at the end of the next turn: what this one's hooks have for them goes out before.
func (l *Loop) goAway() {
	for c := range l.conns {
		c.h2.GoAway()
		c.touch()
	}
	l.Post(func() {
		for c := range l.conns {
			c.drain()
		}
	})
}

// drain ends the streams that would not end by themselves.
func (c *clientConn) drain() {
	for k := range c.streaming {
		if d, ok := k.handler.(Drainer); ok {
			d.Drain()
		}
	}
	c.touch()
}

// touchAll makes every connection look whether it is done.
func (l *Loop) touchAll() {
	for c := range l.conns {
		if c.h2.GoneAway() {
			c.drain() // streams of requests that were under way at the GOAWAY
		}
		c.touch()
	}
}

// send queues one message on s.
func (c *clientConn) send(s *codec.Stream, msg []byte) {
	c.h2.Send(s, msg)
	c.touch()
}

// OnRequest implements codec.ServerEvents.
func (c *clientConn) OnRequest(s *codec.Stream) {
	r := c.eng.routes.find(s.Path)
	streamsOpen.Add(1)
	switch r.kind {
	case routeUnary:
		k := c.loop.newCall()
		k.open(c, s, r)
		c.loop.inflight.Add(1)
	case routeStream:
		k := new(RPC)
		k.open(c, s, r)
		k.handler = r.newStream(c.loop)
		if c.streaming == nil {
			c.streaming = make(map[*call]struct{})
		}
		c.streaming[&k.call] = struct{}{}
		k.handler.Open(k)
	default:
		k := c.loop.newCall()
		k.open(c, s, r)
		c.finish(k, c.eng.routes.refuse(r, s.Path))
	}
}

// OnMessage implements codec.ServerEvents.
func (c *clientConn) OnMessage(s *codec.Stream, msg []byte) {
	k, _ := s.User.(*call)
	switch {
	case k == nil: // finished
	case k.handler != nil:
		k.handler.Message(msg)
	case k.op == nil:
		c.submit(k, msg)
	}
}

// OnHalfClose implements codec.ServerEvents.
func (c *clientConn) OnHalfClose(s *codec.Stream) {
	k, _ := s.User.(*call)
	switch {
	case k == nil:
	case k.handler != nil:
		k.handler.HalfClose()
	case k.op == nil:
		c.finish(k, statusNoMessage)
	}
}

// OnCancel implements codec.ServerEvents.
func (c *clientConn) OnCancel(s *codec.Stream) {
	if k, _ := s.User.(*call); k != nil {
		k.vanish()
	}
}

// OnDrained implements codec.ServerEvents.
func (c *clientConn) OnDrained(s *codec.Stream) {
	if k, _ := s.User.(*call); k != nil && k.handler != nil {
		k.handler.Drained()
	}
}
