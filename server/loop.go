package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/panjf2000/gnet/v2"
	"golang.org/x/sys/unix"

	"spindle/codec"
	"spindle/shard"
)

// pushTarget is how many bytes of events may come together on a loop before they are written. They were just copied, so they
// are in the processor's cache still; megabytes would not be.
const pushTarget = 256 << 10

// maxTurnRounds bounds how often the end of one turn is repeated because its own work made more work
// (a write that failed closed a connection, whose requests ended, ...). What is left waits for the tick.
const maxTurnRounds = 16

var (
	errNotEnrolled = errors.New("spindle: the event loop could not register the socket")
	errLoopStopped = errors.New("spindle: the event loop has stopped")
)

// Loop is one event loop of gnet with what gnet lacks: a mailbox in order (gnet's own Execute reorders
// under load, so it serves as the doorbell only), hooks at the end of a turn, and a coarse tick.
//
// A turn is one event of one socket or one emptying of the mailbox. At its end the hooks run in order,
// then every client connection with output writes once; a hook that has much for clients lets go of it piece by piece
// (pushed). Unless noted otherwise, fields belong to the
// loop's goroutine.
type Loop struct {
	index int
	eng   *Engine
	log   *slog.Logger
	el    gnet.EventLoop // set before the loop is handed out

	mu      sync.Mutex // guards the next four, and the replacement of hooks
	letters []letter
	spare   []letter // memory for letters
	rung    bool     // the doorbell was pressed and the mailbox not yet emptied
	stopped bool
	// bell is the far end of a socket pair whose other end the loop reads, or -1. gnet's own Execute runs tasks
	// until there are none, so two loops that write to each other would keep both from their sockets.
	bell  int
	hooks atomic.Pointer[[]func()] // copied on write

	poll   busyPoll // opened before the loop is handed out
	inTurn bool
	nested bool  // an event came while the end of the turn was running
	inCore bool  // within a method of the core, called for a client
	clock  int64 // Engine.now of this turn, 0 when not asked yet

	conns    map[*clientConn]struct{} // open client connections
	dirty    []*clientConn            // have output to write at the end of the turn
	unsent   int                      // bytes pushed to them since flush ran last
	flushing []*clientConn            // the other half of dirty
	blocked  []*clientConn            // wait for a client that does not read
	timers   wheel                    // deadlines of RPCs
	wantTick atomic.Bool              // something waits for time to pass; read by the ticker
	ticking  atomic.Bool              // a tick is in the mailbox
	seconds  atomic.Bool              // a second is in the mailbox
	looked   int64                    // when second ran last
	tickFn   func()                   // l.tick, bound once
	secondFn func()                   // l.second
	nowFn    func() int64             // l.now

	inflate   codec.InflateBudget // of its clients
	freeCalls []*call             // unary calls to be used again
	clients   atomic.Int64        // len(conns), and those that are on their way; any goroutine's
	working   atomic.Int64        // ops of its clients that the core has, canceled ones included; written by the loop
	inflight  atomic.Int64        // unary RPCs not yet answered; written by the loop, read by Stop
	turns     *metrics.Counter
}

var _ shard.Loop = (*Loop)(nil)

// letter is one entry of a mailbox. The common ones carry a call instead of a closure, so that crossing
// from loop to loop allocates nothing.
type letter struct {
	kind letterKind
	f    func()
	call *call
}

type letterKind uint8

const (
	letterFunc   letterKind = iota
	letterSubmit            // to the core's loop: hand the call's op to the core
	letterCancel            // to the core's loop: cancel the call's op
	letterDone              // to the call's loop: the core is done with the op
	letterAck               // to the call's loop: the cancel was delivered
)

func newLoop(e *Engine, index int, el gnet.EventLoop) *Loop {
	l := &Loop{
		index: index,
		eng:   e,
		log:   e.log,
		el:    el,
		bell:  -1,
		conns: make(map[*clientConn]struct{}),
		turns: loopTurns(index),
	}
	l.tickFn, l.secondFn, l.nowFn = l.tick, l.second, l.now
	l.hooks.Store(new([]func()))
	l.inflate.Refill()
	return l
}

// Index is the loop's place in Engine.Loops; 0 is the core's.
func (l *Loop) Index() int { return l.index }

// Post implements shard.Loop. A function that posts itself again keeps the loop from its sockets.
func (l *Loop) Post(f func()) { l.post(letter{kind: letterFunc, f: f}) }

func (l *Loop) post(m letter) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped {
		return
	}
	l.letters = append(l.letters, m)
	if !l.rung {
		l.rung = true
		// Under the lock, because of stop. An error means that the engine has stopped.
		if l.bell < 0 {
			_ = l.el.Execute(context.Background(), (*doorbell)(l))
			return
		}
		for {
			if _, err := unix.Write(l.bell, ding[:]); err != unix.EINTR {
				break
			}
		}
	}
}

var ding [1]byte

// stop makes the loop deaf to letters, before gnet closes the descriptor that serves as the doorbell:
// gnet would ring it all the same, whatever the number stands for by then.
func (l *Loop) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bell >= 0 && !l.stopped {
		_ = unix.Close(l.bell)
	}
	l.stopped = true
	l.letters = nil
}

// doorbell makes a Loop a gnet.Runnable without showing Run to everyone.
type doorbell Loop

// Run empties the mailbox: one turn.
func (d *doorbell) Run(context.Context) error {
	l := (*Loop)(d)
	outer := l.begin()
	l.mu.Lock()
	letters := l.letters
	l.letters, l.spare = l.spare[:0], nil
	l.rung = false
	l.mu.Unlock()
	for i := range letters {
		l.deliver(&letters[i])
	}
	l.end(outer)
	clear(letters)
	if cap(letters) <= maxKeptLetters {
		l.mu.Lock()
		l.spare = letters[:0]
		l.mu.Unlock()
	}
	return nil
}

// maxKeptLetters is the capacity up to which a mailbox's memory is kept for the next turns.
const maxKeptLetters = 1 << 14

func (l *Loop) deliver(m *letter) {
	defer l.recovered("mailbox")
	switch m.kind {
	case letterFunc:
		m.f()
	case letterSubmit:
		if k := m.call; k.gone.Load() { // canceled while it was on its way: it costs nothing more
			k.op.Status = statusCanceled
			opDone(k.op)
		} else {
			l.submit(k.op)
		}
	case letterCancel:
		m.call.cancelAtCore(l)
	case letterDone:
		m.call.answered()
	case letterAck:
		m.call.acknowledged()
	}
}

// submit hands op to the core. On the core's loop.
func (l *Loop) submit(op *shard.Op) {
	outer := l.inCore
	l.inCore = true
	l.eng.core.Submit(op)
	l.inCore = outer
}

// cancel ends op at the core. On the core's loop.
func (l *Loop) cancel(op *shard.Op) {
	outer := l.inCore
	l.inCore = true
	l.eng.core.Cancel(op)
	l.inCore = outer
}

// OnTurnEnd implements shard.Loop.
func (l *Loop) OnTurnEnd(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	old := *l.hooks.Load()
	hooks := append(old[:len(old):len(old)], f)
	l.hooks.Store(&hooks)
}

// Enroll implements shard.Loop.
func (l *Loop) Enroll(nc net.Conn, h shard.LoopConn) error {
	x, err := l.register(nc, h)
	if err == nil {
		go x.wait()
	}
	return err
}

// enrollment is a socket on its way into a loop.
type enrollment struct {
	loop *Loop
	nc   net.Conn
	att  *attachment
	res  <-chan gnet.RegisteredResult
}

// register begins an enrollment; wait is to be called.
func (l *Loop) register(nc net.Conn, h shard.LoopConn) (*enrollment, error) {
	switch nc := nc.(type) {
	case *net.TCPConn:
		unpace(nc)
	case *net.UnixConn:
	default:
		_ = nc.Close()
		return nil, fmt.Errorf("spindle: cannot enroll a %T in an event loop", nc)
	}
	l.mu.Lock()
	stopped := l.stopped
	l.mu.Unlock()
	if stopped {
		_ = nc.Close()
		return nil, errLoopStopped
	}
	a := &attachment{loop: l, h: h}
	res, err := l.el.Enroll(gnet.NewContext(context.Background(), a), nc)
	if err != nil {
		_ = nc.Close()
		return nil, fmt.Errorf("spindle: enroll %v: %w", nc.RemoteAddr(), err)
	}
	return &enrollment{l, nc, a, res}, nil
}

// wait returns when OnOpen was called, or OnClose is to be.
func (x *enrollment) wait() {
	select {
	case r := <-x.res:
		err := r.Err
		if err == nil && !x.att.opened.Load() {
			// gnet reports success here even when its poller refused the socket.
			err = errNotEnrolled
		}
		if err != nil {
			_ = x.nc.Close()
			if noDescriptors(err) {
				x.loop.eng.short(x.att.client())
			}
			x.loop.Post(func() { x.att.h.OnClose(nil, err) })
		}
	case <-x.loop.eng.done:
		_ = x.nc.Close()
	}
}

// now is the engine's clock as of this turn.
func (l *Loop) now() int64 {
	if l.clock == 0 {
		l.clock = l.eng.now()
	}
	return l.clock
}

// begin starts a turn. It returns false when one is running already: gnet calls OnClose from within a
// Write that failed.
func (l *Loop) begin() (outer bool) {
	if l.inTurn {
		l.nested = true
		return false
	}
	l.inTurn, l.clock = true, 0
	l.turns.Inc()
	return true
}

// end finishes a turn: hooks, then output, again while that made new work.
func (l *Loop) end(outer bool) {
	if !outer {
		return
	}
	for round := 0; ; round++ {
		l.nested = false
		for _, f := range *l.hooks.Load() {
			l.guard("hook", f)
		}
		l.flush()
		if !l.nested && len(l.dirty) == 0 || round == maxTurnRounds {
			break
		}
	}
	l.inTurn = false
	if want := l.timers.count > 0 || len(l.blocked) > 0 || len(l.dirty) > 0 || l.nested; want != l.wantTick.Load() {
		l.wantTick.Store(want)
	}
}

// pushed counts what a hook has for clients, and lets it be written when it is enough. So a fan-out of many megabytes goes
// out piece by piece, and nothing else that waits to be written waits for all of it.
func (l *Loop) pushed(n int) {
	if l.unsent += n; l.unsent >= pushTarget {
		l.flush()
	}
}

// flush writes the output of every connection that has some.
func (l *Loop) flush() {
	l.unsent = 0
	l.flushing, l.dirty = l.dirty, l.flushing[:0]
	for i, c := range l.flushing {
		l.flushing[i] = nil
		l.flushOne(c)
	}
	l.flushing = l.flushing[:0]
}

func (l *Loop) flushOne(c *clientConn) {
	defer func() {
		if r := recover(); r != nil {
			l.panicked("flush", r, true)
			c.kill()
		}
	}()
	c.flush()
}

// ring is called by the engine's ticker every tickEvery, on its own goroutine.
func (l *Loop) ring(second bool) {
	if second && l.seconds.CompareAndSwap(false, true) {
		l.Post(l.secondFn)
	}
	if l.wantTick.Load() && l.ticking.CompareAndSwap(false, true) {
		l.Post(l.tickFn)
	}
}

// tick sees to what waits for time to pass.
func (l *Loop) tick() {
	l.ticking.Store(false)
	now := l.now()
	l.timers.advance(now, (*call).expired)
	for i := 0; i < len(l.blocked); {
		c := l.blocked[i]
		c.retry(now)
		if i < len(l.blocked) && l.blocked[i] == c {
			i++ // still blocked; else another one has taken its place
		}
	}
}

// second is posted about once a second while there are clients. Behind a stall of the loop the next one comes too soon to
// tell what clients took since, and is left out.
func (l *Loop) second() {
	l.seconds.Store(false)
	now := l.now()
	if now-l.looked < int64(time.Second)/2 {
		return
	}
	l.looked = now
	l.inflate.Refill()
	var slow []*clientConn
	for c := range l.conns {
		c.second(now)
		if !c.closed && c.look() {
			slow = append(slow, c)
		}
	}
	l.relieve(slow)
}

// guard runs f and turns a panic into an error in the log.
func (l *Loop) guard(where string, f func()) {
	defer l.recovered(where)
	f()
}

// recovered is to be deferred.
func (l *Loop) recovered(where string) {
	if r := recover(); r != nil {
		l.panicked(where, r, false)
	}
}

// panicked tells of a panic; oneClient says that it happened while a single client's connection was served.
func (l *Loop) panicked(where string, r any, oneClient bool) {
	metricPanics.Inc()
	l.log.Error("panic on an event loop", "where", where, "loop", l.index, "panic", r, "stack", string(debug.Stack()))
	fatal := l.inCore || !oneClient
	l.inCore = false
	if l.eng.cfg.OnPanic != nil {
		l.eng.cfg.OnPanic(fmt.Errorf("spindle: panic in %s: %v", where, r), fatal)
	}
}

// attachment is the context of every gnet connection: who handles its events, on which loop.
type attachment struct {
	loop   *Loop
	h      shard.LoopConn
	opened atomic.Bool // OnOpen was called; read by Enroll's goroutine
	closed bool
}

// event calls one method of the handler as a turn of its own, and reports whether the connection is
// still open. A panic closes the connection.
func (a *attachment) event(c gnet.Conn, f func(*attachment, gnet.Conn)) (open bool) {
	outer := a.loop.begin()
	a.handle(c, f)
	a.loop.end(outer)
	return !a.closed
}

func (a *attachment) handle(c gnet.Conn, f func(*attachment, gnet.Conn)) {
	defer func() {
		if r := recover(); r != nil {
			a.loop.panicked(fmt.Sprintf("%T", a.h), r, a.client())
			if !a.closed {
				_ = a.loop.el.Close(c)
			}
		}
	}()
	f(a, c)
}

// client says that the connection is a client's, not one to a member.
func (a *attachment) client() bool {
	_, ok := a.h.(*clientConn)
	return ok
}

func attachmentOpen(a *attachment, c gnet.Conn) {
	a.opened.Store(true)
	a.h.OnOpen(c)
}

func attachmentTraffic(a *attachment, c gnet.Conn) { a.h.OnTraffic(c) }

// close reports the end of the connection to the handler.
func (a *attachment) close(c gnet.Conn, err error) {
	outer := a.loop.begin()
	a.closed = true
	func() {
		defer func() {
			if r := recover(); r != nil {
				a.loop.panicked("close", r, a.client())
			}
		}()
		a.h.OnClose(c, err)
	}()
	a.loop.end(outer)
}
