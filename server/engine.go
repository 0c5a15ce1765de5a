package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/panjf2000/gnet/v2"
	"golang.org/x/sys/unix"

	"spindle/codec"
	"spindle/codec/tlsconn"
	"spindle/shard"
)

// Limits and times of an Engine where Config leaves them 0.
const (
	// defaultStallTimeout is how long a client may leave a full socket buffer, or answers that wait for
	// window, untouched.
	defaultStallTimeout = 30 * time.Second
	// defaultGreetTimeout is how long a client may take until its preface and SETTINGS are here.
	defaultGreetTimeout = 20 * time.Second
	// defaultDrainTimeout bounds how long Stop waits for requests that are under way, and for clients to take note
	// of the GOAWAY.
	defaultDrainTimeout = 5 * time.Second
	// drainLastWords bounds the wait for answers that BeforeClose had.
	drainLastWords = time.Second
	// drainTouch is how often Stop looks at every connection that has not ended yet.
	drainTouch = 50 * time.Millisecond
	// defaultMaxOutbound is how many bytes may wait for one client's socket before its answers are held
	// back. gnet's own buffer has no bound.
	defaultMaxOutbound = 1 << 20
	// maxConnsShare is the part of the process's file descriptors that clients may use, in percent. The rest is for
	// connections to members, for operators' and for files.
	maxConnsShare = 60
	// drainPoll is how often Stop looks whether the requests under way were answered.
	drainPoll = 2 * time.Millisecond
	// keepAlive is the TCP keep-alive time, and how many probes follow in as much again: a client host that vanished is
	// noticed after about twice this.
	keepAlive       = 30 * time.Second
	keepAliveProbes = 5
)

// Core is what the server needs of a *shard.Core. Both methods are called on loop 0 only.
type Core interface {
	// Submit takes an op; its Done is called on loop 0, exactly once, perhaps from within Submit.
	Submit(*shard.Op)
	// Cancel ends an op that is not done yet; Done is called, perhaps from within Cancel.
	Cancel(*shard.Op)
}

// Config is what an Engine is started with. Zero fields take the defaults named above.
type Config struct {
	// ListenURLs are where clients connect: http://host:port or unix:///path; https and unixs with TLS.
	ListenURLs []string
	// TLS is for the URLs with https or unixs; nil if there is none.
	TLS *tlsconn.ServerFiles
	// Loops is the number of event loops; 0 means 1 below 4 cores, else half the cores.
	Loops int
	// BusyPoll is how long a loop with few requests under way looks for its next event before it sleeps; 0: not at all.
	BusyPoll time.Duration
	// Codec bounds a client's connection.
	Codec codec.ConnConfig
	// Now is the clock of deadlines, in nanoseconds, never backwards: the Core's.
	Now func() int64
	Log *slog.Logger

	// Memory counts what clients make the process hold; nil: no limit.
	Memory *shard.Memory
	// KeepaliveInterval is how long a client may be silent before it is sent a PING, KeepaliveTimeout how long
	// it may go on being silent then, before it is dropped. One of them 0: no PINGs.
	KeepaliveInterval time.Duration
	KeepaliveTimeout  time.Duration

	MaxConns     int // 0: maxConnsShare of the descriptors that the process may have at the time
	MaxOutbound  int // bytes
	GreetTimeout time.Duration
	StallTimeout time.Duration
	DrainTimeout time.Duration
	// KeepAlivePatience is how long a lease's keep-alive may wait for its answer.
	KeepAlivePatience time.Duration
	// BeforeClose is called by Stop, on its goroutine, once the requests under way were answered and before
	// any socket is closed: those who have enrolled sockets of their own close them here.
	BeforeClose func()
	// OnPanic hears of panics, which are logged and survived. fatal says that what all clients share may be
	// left half-changed (the core, connections to members, hooks), so that the caller should stop; else
	// it was one client's connection, which is closed. It may be called on any loop.
	OnPanic func(err error, fatal bool)
}

// Engine is the server's side towards clients: listeners, event loops, connections.
//
// Life: Start, then SetCore and HandleStream, then SetReady(true), at last Stop. Clients that connect
// while the engine is not ready are closed at once.
type Engine struct {
	cfg   Config
	log   *slog.Logger
	now   func() int64
	addrs []net.Addr
	urls  []string // like addrs
	loops []*Loop
	byEL  map[gnet.EventLoop]*Loop // complete before the first client is accepted

	// Fixed before the first client.
	doors    []*door
	h2TLS    *tls.Config // nil without TLS
	gate     *tlsconn.Gate
	refusals refusals
	shortage shortage

	core   Core
	routes routes

	started  atomic.Bool // loops is complete
	ready    atomic.Bool
	draining atomic.Bool
	conns    atomic.Int64 // client connections, from when they are accepted to OnClose
	ticks    int64        // OnTick's
	pace     pace         // OnTick's

	gnet    *gnet.Client
	ended   sync.Once     // guards end
	done    chan struct{} // closed when gnet's loops have ended
	err     error         // why, valid after done
	stopped sync.Once
}

// Start opens the listeners and starts the loops. The error of a port in use names its URL.
func Start(cfg Config) (*Engine, error) {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		base := time.Now()
		cfg.Now = func() int64 { return int64(time.Since(base)) + 1 }
	}
	if cfg.Loops <= 0 {
		cfg.Loops = 1
		if n := runtime.GOMAXPROCS(0); n >= 4 {
			cfg.Loops = n / 2
		}
	}
	cfg.MaxOutbound = orDefault(cfg.MaxOutbound, defaultMaxOutbound)
	cfg.GreetTimeout = orDefault(cfg.GreetTimeout, defaultGreetTimeout)
	cfg.StallTimeout = orDefault(cfg.StallTimeout, defaultStallTimeout)
	cfg.DrainTimeout = orDefault(cfg.DrainTimeout, defaultDrainTimeout)
	cfg.KeepAlivePatience = orDefault(cfg.KeepAlivePatience, defaultKeepAlivePatience)

	listens, err := parseListens(cfg.ListenURLs)
	if err != nil {
		return nil, err
	}
	if err := needTLS(listens, cfg.TLS); err != nil {
		return nil, err
	}
	e := newEngine(cfg)
	// Nothing is accepted before the loops are there.
	for i := range listens {
		d, err := openDoor(&listens[i])
		if err != nil {
			e.closeDoors()
			return nil, err
		}
		e.doors = append(e.doors, d)
		e.addrs = append(e.addrs, d.l.Addr())
		e.urls = append(e.urls, d.ln.urlOf(d.l.Addr()))
	}
	if err := e.startLoops(); err != nil {
		e.closeDoors()
		return nil, fmt.Errorf("spindle: cannot start the event loops: %w", err)
	}
	e.started.Store(true)
	for _, d := range e.doors {
		go e.accept(d)
	}
	return e, nil
}

// startLoops starts gnet's loops. They are a client's, as gnet has it, because gnet's servers accept clients themselves: an
// accept that fails for want of descriptors ends them.
func (e *Engine) startLoops() error {
	if err := e.startGnet(e.cfg.Loops); err != nil {
		return err
	}
	err := e.findLoops()
	if err != nil {
		e.abandonLoops()
	}
	return err
}

func (e *Engine) startGnet(loops int) (err error) {
	e.gnet, err = gnet.NewClient((*handler)(e),
		gnet.WithNumEventLoop(loops),
		gnet.WithTicker(true),
		gnet.WithLogger(gnetLog{e.log}))
	if err != nil {
		return err
	}
	return e.gnet.Start()
}

// abandonLoops ends what startLoops has begun.
func (e *Engine) abandonLoops() {
	e.draining.Store(true)
	for _, l := range e.loops { // as OnShutdown does once all are known
		l.stop()
	}
	e.end(nil)
	<-e.done
}

// end has the loops end, once. done tells when they have.
func (e *Engine) end(why error) {
	e.ended.Do(func() {
		e.err = why
		go func() {
			e.closeDoors()
			if err := e.gnet.Stop(); err != nil && e.err == nil {
				e.err = err
			}
			e.pace.set(0)
			close(e.done)
		}()
	})
}

func newEngine(cfg Config) *Engine {
	e := &Engine{
		cfg:      cfg,
		log:      cfg.Log,
		now:      cfg.Now,
		byEL:     make(map[gnet.EventLoop]*Loop),
		gate:     tlsconn.NewGate(),
		refusals: refusals{log: cfg.Log},
		shortage: shortage{log: cfg.Log},
		pace:     pace{mem: cfg.Memory},
		routes:   newRoutes(),
		done:     make(chan struct{}),
	}
	if cfg.TLS != nil {
		e.h2TLS = cfg.TLS.H2()
	}
	serveHealth(e)
	e.HandleStream(leaseKeepAlivePath, newKeepAliveStream)
	return e
}

func orDefault[T int | time.Duration](v, def T) T {
	if v <= 0 {
		return def
	}
	return v
}

func defaultMaxConns() int {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil || lim.Cur > 1<<24 {
		return 1 << 20
	}
	return max(1, int(lim.Cur)*maxConnsShare/100)
}

// findLoops learns gnet's loops, which gnet shows only through connections: it enrolls one end of a socket pair after
// the other. gnet gives each to the loop with the fewest connections, and nobody else is there yet, so they come to lie on
// different loops.
func (e *Engine) findLoops() error {
	for len(e.loops) < e.cfg.Loops {
		near, far, err := socketPair()
		if err != nil {
			return fmt.Errorf("socket pair: %w", err)
		}
		// The context travels to OnOpen as the connection's; an anchor's loop is not known yet.
		bell := &anchor{}
		c, err := e.gnet.EnrollContext(near, bell)
		if err != nil {
			_ = unix.Close(far)
			return fmt.Errorf("enroll an anchor: %w", err)
		}
		el := c.EventLoop()
		if e.byEL[el] != nil {
			_ = unix.Close(far)
			return errors.New("gnet gave two anchors to one loop")
		}
		l := newLoop(e, len(e.loops), el)
		l.poll.open(el, e.cfg.BusyPoll)
		e.byEL[el] = l
		e.loops = append(e.loops, l)
		l.bell = far
		bell.loop.Store(l)
	}
	return nil
}

func socketPair() (near net.Conn, far int, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, -1, err
	}
	f := os.NewFile(uintptr(fds[0]), "anchor")
	defer f.Close()
	far = fds[1]
	near, err = net.FileConn(f) // a duplicate of f
	if err != nil {
		_ = unix.Close(far)
		return nil, -1, err
	}
	return near, far, nil
}

// Loops returns the event loops; the first is the core's.
func (e *Engine) Loops() []*Loop { return e.loops }

// Addrs returns the addresses listened on, in the order of Config.ListenURLs.
func (e *Engine) Addrs() []net.Addr { return e.addrs }

// URLs returns the same as Addrs, as URLs with the schemes of Config.ListenURLs.
func (e *Engine) URLs() []string { return e.urls }

// SetCore says who answers unary requests. To be called before SetReady(true).
func (e *Engine) SetCore(c Core) { e.core = c }

// HandleStream says who serves the streaming method path ("/etcdserverpb.Watch/Watch"). To be called
// before SetReady(true).
func (e *Engine) HandleStream(path string, f NewStream) { e.routes.stream(path, f) }

// SetReady lets clients in (true) or closes new connections at once (false).
func (e *Engine) SetReady(ready bool) { e.ready.Store(ready && e.core != nil) }

// Done is closed when the engine has stopped, by Stop or because gnet gave up; Err then says why.
func (e *Engine) Done() <-chan struct{} { return e.done }

// Err returns why the engine stopped on its own, nil after Stop. Valid after Done.
func (e *Engine) Err() error {
	if e.draining.Load() {
		return nil
	}
	if e.err != nil {
		return e.err
	}
	return errors.New("spindle: the event loops stopped, see the log")
}

// Stop ends the engine: no new connections, GOAWAY to all clients (RFC 9113 6.8: first announced, then final when
// the client has seen it). Requests under way are answered, watches are told to move (Unavailable), and each
// connection is closed when it has no stream left. What is open after Config.DrainTimeout is closed all
// the same. It returns ctx's error when even that takes too long. Further calls wait for the first.
func (e *Engine) Stop(ctx context.Context) error {
	e.stopped.Do(func() {
		e.ready.Store(false)
		e.draining.Store(true)
		for _, l := range e.loops {
			l.Post(l.goAway)
		}
		e.awaitIdle(ctx)
		if e.cfg.BeforeClose != nil {
			e.cfg.BeforeClose()
			late, cancel := context.WithTimeout(context.Background(), drainLastWords)
			e.passMail(late) // answers that it had for clients of other loops
			cancel()
		}
		e.end(nil)
	})
	select {
	case <-e.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// awaitIdle returns when all clients have gone, or it took too long.
func (e *Engine) awaitIdle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, e.cfg.DrainTimeout)
	defer cancel()
	// Requests that were read before the GOAWAY count only once their loop has run.
	if !e.passMail(ctx) {
		return
	}
	poll := time.NewTicker(drainPoll)
	defer poll.Stop()
	look := time.NewTicker(drainTouch)
	defer look.Stop()
	for e.conns.Load() > 0 {
		select {
		case <-poll.C:
		case <-look.C:
			for _, l := range e.loops {
				l.Post(l.touchAll)
			}
		case <-ctx.Done():
			var n int64
			for _, l := range e.loops {
				n += l.inflight.Load()
			}
			e.log.Warn("stopping with clients that did not leave", "connections", e.conns.Load(), "requests", n)
			return
		case <-e.done:
			return
		}
	}
}

// passMail returns when each loop has seen to what was posted to it before; false: it took too long.
func (e *Engine) passMail(ctx context.Context) bool {
	for _, l := range e.loops {
		passed := make(chan struct{})
		l.Post(func() { close(passed) })
		select {
		case <-passed:
		case <-ctx.Done():
			return false
		case <-e.done:
			return false
		}
	}
	return true
}
