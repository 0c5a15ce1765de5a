package shard

import (
	"crypto/tls"
	"errors"
	"io"
	"slices"

	"spindle/codec"
	"spindle/codec/tlsconn"

	"github.com/panjf2000/gnet/v2"
)

// Why a link ends, other than by the socket.
var (
	errNoSettings  = errors.New("connected, but no HTTP/2 settings came")
	errHungUp      = errors.New("closed by the other side before it said anything: is it to be https:// ?")
	errPingTimeout = errors.New("no answer to a ping")
	errNotEnrolled = errors.New("the event loop did not take the socket")
	errGoAway      = errors.New("closed gracefully by the other side")
	errRemoved     = errors.New("removed from the configuration")
	errDeaf        = errors.New("it keeps asking (PING, SETTINGS) and does not read the answers")
)

// poolLink is one HTTP/2 connection, from Enroll to the end of the socket. Owned by the loop.
//
// Its life: enrolled (gc is nil); open; with TLS, the handshake; greeted, once the server's first bytes were good HTTP/2;
// ready, once the owner of the cluster is content with where it leads (pool_check.go); possibly
// renewing, when it has used half of its stream identifiers: it goes on, while its slot dials for a successor; possibly
// suspected, which is similar (pool_second.go);
// draining, after the server's GOAWAY or when the successor is ready, while its streams finish;
// dead. A dead link touches neither its gnet.Conn nor its codec.Conn.
type poolLink struct {
	pool *Pool
	ep   *poolEndpoint
	slot *poolSlot
	gc   gnet.Conn
	conn *codec.Conn

	secure *tls.Config   // nil: plain text
	tls    *tlsconn.Conn // between gc and conn, from OnOpen on
	heard  bool          // the codec has taken something

	greeted  bool
	ready    bool
	check    linkCheck
	renewing bool
	draining bool
	dead     bool
	lost     codec.Status // what streams get when it dies

	silent bool // a request was not answered, and nothing else came meanwhile

	dirty   bool // in Pool.dirty
	blocked bool // in Pool.blocked
	feeding bool // within conn.Feed or conn.Output: what ends the link waits in ending
	writing bool // within gc.Write: so does what OnClose says
	ending  error

	watches   []*poolWatch // whose streams are on it
	charged   int          // bytes of it in Memory
	born      int64        // when it became ready
	lastRecv  int64        // when bytes came last
	pinged    int64        // when the ping that waits for bytes was sent, 0 for none
	lastPing  int64        // when the last one was sent
	sincePing int          // bytes that came since
	early     bool         // one was sent sooner than the member likes, and nothing but pongs came since
	timer     poolTimer
	deaf      poolTimer // see pool_deaf.go; in the heap while that question waits
}

var (
	_ LoopConn           = (*poolLink)(nil)
	_ codec.ClientEvents = (*poolLink)(nil)
)

func newPoolLink(s *poolSlot, secure *tls.Config) *poolLink {
	l := &poolLink{pool: s.ep.pool, ep: s.ep, slot: s, secure: secure}
	l.timer.owner = l
	l.check.init(l)
	return l
}

// OnOpen implements LoopConn.
func (l *poolLink) OnOpen(gc gnet.Conn) {
	if l.dead { // given up while it was enrolled
		_ = gc.Close()
		return
	}
	l.gc = gc
	l.conn = codec.NewClientConn(codec.ConnConfig{
		StreamWindow:    memberStreamWindow,
		ConnWindow:      memberConnWindow,
		MaxMessageBytes: maxMemberMessageBytes,
		MaxQueuedBytes:  maxMemberQueuedBytes,
		FirstStreamID:   l.pool.cfg.firstStreamID,
		Secure:          l.secure != nil,
		MaxPartialBytes: maxMemberPartialBytes,
		Full:            l.pool.cfg.Memory.Pressed,
		FullBytes:       pressedReply,
		OnLimit:         l.ep.cluster.metrics.hit,
	}, l.ep.addr.authority, l)
	if l.secure != nil {
		l.tls = tlsconn.Client(l.secure, l)
	}
	l.touch()
}

// OnTraffic implements LoopConn.
func (l *poolLink) OnTraffic(gc gnet.Conn) {
	if l.dead {
		_, _ = gc.Discard(-1)
		return
	}
	in, _ := gc.Peek(-1)
	if len(in) == 0 {
		return
	}
	l.lastRecv, l.pinged, l.silent = l.pool.timers.now(), 0, false
	l.sincePing += len(in)
	l.ep.cluster.metrics.received.Add(len(in))
	var err error
	if l.tls == nil {
		err = l.feed(in)
	} else {
		err = l.tls.Receive(in)
	}
	_, _ = gc.Discard(-1)
	l.fed(err)
}

func (l *poolLink) feed(in []byte) error {
	l.feeding = true
	defer func() { l.feeding = false }() // also when a handler panics: the loop survives that, and closes l
	l.heard = true
	return l.conn.Feed(in)
}

// fed goes on after bytes were taken.
func (l *poolLink) fed(err error) {
	if err == nil {
		err = l.ending
	}
	if err != nil {
		l.shutdown(err)
		return
	}
	l.charge()
	if l.heard && !l.greeted && !l.draining {
		l.greeted = true
		l.pool.timers.cancel(&l.timer)
		l.check.begin()
	}
	l.touch()
}

// OnClose implements LoopConn.
func (l *poolLink) OnClose(gc gnet.Conn, err error) {
	if l.dead {
		return
	}
	switch {
	case err == nil && gc == nil:
		err = errNotEnrolled
	case err == nil && l.draining:
		err = errGoAway
	case err == nil:
		err = errPoolClosed
	case errors.Is(err, io.EOF) && !l.heard && l.tls == nil:
		err = errHungUp
	}
	l.gc = nil
	if l.feeding || l.writing {
		l.ending = err
		return
	}
	if l.tls != nil && l.tls.Shaking() {
		l.hungUp(err)
		return
	}
	l.die(err)
}

func (l *poolLink) becomeReady(now int64) {
	l.ready = true
	l.born = now
	l.ep.up()
	l.ep.cluster.linkReady(l.pool, l)
	if l.slot.link == l {
		l.slot.settle()
	}
}

// touch puts l on the list of those that Flush looks at.
func (l *poolLink) touch() {
	if !l.dirty && !l.dead {
		l.dirty = true
		l.pool.dirty = append(l.pool.dirty, l)
	}
}

// opened follows a new stream, s. Pings run only while there are streams: etcd takes others for an attack. The first
// stream after a silence has a ping follow at once, since the peer may be gone unnoticed.
func (l *poolLink) opened(s *codec.Stream) {
	if l.conn.Streams() == 1 && l.pinged == 0 {
		l.pool.timers.set(&l.timer, max(l.lastRecv+int64(l.pool.cfg.PingInterval), l.pool.timers.now()))
	}
	if s.ID >= renewStreamID && !l.renewing {
		l.renew()
	}
}

// renew has the slot dial for a successor. Until that is ready l takes streams as before, so no call notices.
func (l *poolLink) renew() {
	if l.slot.old != nil && l.slot.old != l {
		return // l is a second connection, and the first is undecided yet: the next stream asks again
	}
	if l.renewing = true; l.ep.gone {
		return
	}
	if l.slot.old == l { // there is a second connection, or it is dialed
		l.slot.settle()
		return
	}
	l.slot.old = l
	l.vacate(true)
	l.slot.dial()
}

// vacate takes l from its slot, which dials anew: with the shortest wait, if l was of use for a while.
func (l *poolLink) vacate(wasReady bool) {
	l.slot.link = nil
	if wasReady && l.pool.timers.now()-l.born >= int64(backoffResetAge) {
		l.slot.attempts = 0
	}
}

// drain ends the opening of streams on l. Flush closes it when the last one is done.
func (l *poolLink) drain() {
	l.draining = true
	if l.slot.old == l {
		l.slot.old = nil
	}
	l.retire()
	l.ep.cluster.linkGone(l.pool, l)
	l.touch()
}

// reset abandons a stream.
func (l *poolLink) reset(s *codec.Stream) {
	if l.dead {
		return
	}
	l.conn.Reset(s)
	l.touch() // Flush closes a draining link whose last stream this was
}

// due is the timer: the server's SETTINGS did not come, or it is time to ping, or a ping was not answered.
func (l *poolLink) due(now int64) {
	interval, timeout := int64(l.pool.cfg.PingInterval), int64(l.pool.cfg.PingTimeout)
	switch {
	case !l.greeted && !l.draining:
		l.shutdown(errNoSettings)
	case l.pinged != 0 && now >= l.pinged+timeout && now-l.timer.at > timeout/2:
		// The loop stalled, and has not looked at its sockets since: the answer may be there.
		l.pool.timers.set(&l.timer, now+timeout/2)
	case l.pinged != 0 && now >= l.pinged+timeout:
		l.ep.cluster.metrics.deadConns.Inc()
		l.shutdown(errPingTimeout)
	case l.pinged != 0:
		l.silent = true
		l.challenge(now)
		l.pool.timers.set(&l.timer, l.pinged+timeout)
	case l.silent:
		l.ping(now)
	case l.conn.Streams() == 0:
		// The next stream sets the timer.
	case now < l.lastRecv+interval:
		l.pool.timers.set(&l.timer, l.lastRecv+interval)
	default:
		l.ping(now)
	}
}

// suspect is told that a request had no answer, nor anything else, for all of its time: until l says something, others
// come first, and a second connection is dialed. l is asked for a sign of life at once, or as soon as the member takes another ping.
func (l *poolLink) suspect(now int64) {
	l.silent = true
	l.unanswered(now)
	if !l.dead && l.pinged == 0 {
		l.pool.timers.set(&l.timer, max(now, l.lastPing+int64(l.pool.cfg.PingInterval)))
	}
}

// mayPing says whether the member takes a ping now. grpc-go forgives two early ones behind whatever it has sent last, and
// ends the connection at the next (its keepalive.EnforcementPolicy): one of them is used, for a connection that is suspected again.
func (l *poolLink) mayPing(now int64) bool {
	if l.lastPing == 0 || now >= l.lastPing+int64(l.pool.cfg.PingInterval) {
		return true
	}
	early := !l.early
	l.early = true
	return early
}

func (l *poolLink) ping(now int64) {
	l.conn.Ping()
	l.pinged, l.lastPing, l.sincePing = now, now, 0
	l.pool.timers.set(&l.timer, now+min(int64(l.pool.cfg.PingInterval), int64(l.pool.cfg.PingTimeout), int64(firstPatience)))
	l.touch()
}

// flush writes what the codec has to send. That is one write, unless it is more than the codec gives at a time.
// Beyond the high-water mark of gnet's buffer (which has no bound of its own) the codec holds back DATA;
// Pool.blockTimer looks when to go on.
func (l *poolLink) flush() {
	if l.dead || l.gc == nil || l.feeding || l.writing {
		return // within a handler, OnTraffic puts l on the list again
	}
	for {
		out := l.output()
		if l.ending != nil {
			l.shutdown(l.ending)
			return
		}
		if len(out) == 0 {
			break
		}
		if err := l.write(out); err != nil {
			l.shutdown(err)
			return
		}
		waiting := l.gc.OutboundBuffered()
		if waiting > outboundHighWater+maxBlockedBytes {
			l.ep.cluster.metrics.hit(codec.LimitControl)
			l.shutdown(errDeaf)
			return
		}
		if waiting > outboundHighWater && !l.blocked {
			l.blocked = true
			l.conn.SetBlocked(true)
			p := l.pool
			if p.blocked = append(p.blocked, l); len(p.blocked) == 1 {
				p.timers.set(&p.blockTimer, p.timers.now()+int64(blockedTick))
			}
		}
	}
	if l.draining && l.conn.Streams() == 0 {
		l.shutdown(errGoAway)
	}
}

// output asks the codec for what is to be written; handlers may run within.
func (l *poolLink) output() []byte {
	l.feeding = true
	defer func() { l.feeding = false }()
	if l.tls != nil {
		return l.sealed()
	}
	return l.conn.Output()
}

// write writes out. When it fails, OnClose was called from within; what the socket took is unknown then, so none
// of it counts as unsent.
func (l *poolLink) write(out []byte) error {
	l.ep.cluster.metrics.sent.Add(len(out))
	l.writing = true
	_, err := l.gc.Write(out)
	l.writing = false
	if l.tls != nil {
		l.tls.Written()
	} else {
		l.conn.Flushed()
	}
	if l.ending != nil {
		return l.ending
	}
	return err
}

// shutdown ends l from this side (the socket may be gone already): what the codec still has to say is written, the
// socket closed, every stream ended. Within a handler of the codec it waits for the handler's end.
func (l *poolLink) shutdown(err error) {
	if l.dead {
		return
	}
	if l.feeding || l.writing {
		l.ending = err
		return
	}
	if l.gc != nil {
		if err == errPoolClosed || err == errGoAway || err == errRemoved || err == errNotNeeded {
			l.conn.GoAway()
		}
		if out := l.output(); len(out) > 0 {
			_ = l.write(out) // the link ends in any case
		}
		l.farewell()
		if l.gc != nil { // OnClose, from within Write, takes it away
			_ = l.gc.Close()
		}
	}
	l.die(err)
}

// die takes l out of everything and ends its streams.
func (l *poolLink) die(err error) {
	p := l.pool
	l.dead = true
	l.gc = nil
	p.timers.cancel(&l.timer)
	p.timers.cancel(&l.deaf)
	l.check.end()
	if i := slices.Index(p.links, l); i >= 0 {
		p.links = slices.Delete(p.links, i, i+1)
	}
	l.lost = codec.Status{Code: codec.Unavailable, Msg: l.ep.cluster.label + ": connection to " + l.ep.url + " lost: " + briefError(err)}
	wasReady := l.ready
	l.retire()
	if l.slot.old == l {
		l.slot.old = nil
	}
	if l.slot.link == l {
		l.vacate(wasReady)
		l.slot.retry(err)
	}
	if !l.draining {
		l.ep.cluster.linkGone(p, l)
	}
	if l.tls != nil {
		l.tls.Close()
	}
	if l.conn != nil {
		l.conn.Close()
		l.charge()
	}
}

// charge brings up to date what Memory counts of l: replies that are received in part, if they are large.
func (l *poolLink) charge() {
	n := l.conn.Partial()
	if n < largeAnswer {
		n = 0
	}
	l.pool.cfg.Memory.Add(int64(n - l.charged))
	l.charged = n
}

// retire takes l from the links that may take streams, if it was among them.
func (l *poolLink) retire() {
	if l.ready {
		l.ready = false
		l.ep.left()
	}
}

// OnMessage implements codec.ClientEvents.
func (l *poolLink) OnMessage(s *codec.Stream, msg []byte) {
	l.early = false
	switch u := s.User.(type) {
	case *poolCall:
		u.onMessage(msg)
	case *poolWatch:
		u.onMessage(msg)
	}
}

// OnEnd implements codec.ClientEvents.
func (l *poolLink) OnEnd(s *codec.Stream, st codec.Status, unprocessed bool) {
	if l.dead {
		st = l.lost
	}
	switch u := s.User.(type) {
	case *poolCall:
		// A call that its timeout took off this (dead) link may have been reused since.
		if u.stream == s && u.link == l {
			u.onEnd(st, !unprocessed)
		}
	case *poolWatch:
		if u.stream == s && u.link == l {
			u.onEnd(st)
		}
	}
}

// OnGoAway implements codec.ClientEvents: l takes no new streams, its slot dials at once for another link.
func (l *poolLink) OnGoAway() {
	if l.dead || l.draining {
		return
	}
	wasReady := l.ready
	l.drain()
	if l.slot.link == l {
		l.vacate(wasReady)
		l.slot.retry(nil)
	}
}

// OnPong implements codec.ClientEvents. Any bytes are a sign of life, but only answers show that the other side hears.
func (l *poolLink) OnPong() { l.answered() }

// tickTimer is the Pool as owner of tickTimer.
type tickTimer Pool

// due gives the codec its second.
func (t *tickTimer) due(now int64) {
	p := (*Pool)(t)
	for _, l := range p.links {
		if l.conn != nil {
			l.conn.Tick()
			l.touch() // it may have had something to say
		}
	}
	if len(p.links) > 0 {
		p.timers.set(&p.tick, now+int64(codecTick))
	}
}

// blockedTimer is the Pool as owner of blockTimer.
type blockedTimer Pool

// due resumes the links whose socket has taken enough.
func (t *blockedTimer) due(now int64) {
	p := (*Pool)(t)
	p.blocked = slices.DeleteFunc(p.blocked, func(l *poolLink) bool {
		if l.dead {
			return true
		}
		if l.gc == nil || l.gc.OutboundBuffered() > outboundLowWater {
			return false
		}
		l.blocked = false
		l.conn.SetBlocked(false)
		l.touch()
		return true
	})
	if len(p.blocked) > 0 {
		p.timers.set(&p.blockTimer, now+int64(blockedTick))
	}
}
