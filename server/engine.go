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
	"strings"
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
	// maxConnsShare is the part of the process's file descriptors that clients may use, in percent. gnet
	// shuts its whole engine down when accept fails for want of descriptors, so the rest is a reserve for
	// a burst of accepts, for connections to members and for files.
	maxConnsShare = 60
	// startTimeout bounds the search for gnet's loops.
	startTimeout = 10 * time.Second
	// drainPoll is how often Stop looks whether the requests under way were answered.
	drainPoll = 2 * time.Millisecond
	// keepAlive is the TCP keep-alive time: a client host that vanished is noticed after about twice this.
	keepAlive = 30 * time.Second
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

	MaxConns     int
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
	listens  map[string]*listen // by what gnet says a client's local address is
	h2TLS    *tls.Config        // nil without TLS
	gate     *tlsconn.Gate
	refusals refusals

	unixMu     sync.Mutex // guards the next two
	unix       []*net.UnixListener
	unixClosed bool

	core   Core
	routes routes

	started  atomic.Bool // loops is complete
	ready    atomic.Bool
	draining atomic.Bool
	conns    atomic.Int64 // open client connections
	ticks    int64        // OnTick's
	pace     pace         // OnTick's

	gnet    gnet.Engine // set before booted is closed
	booted  chan struct{}
	once    sync.Once     // closes booted
	done    chan struct{} // closed when gnet has returned
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
	cfg.MaxConns = orDefault(cfg.MaxConns, defaultMaxConns())
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
	for _, ln := range listens {
		if err := ln.probe(); err != nil {
			return nil, err
		}
	}
	for i := range listens {
		if ln := &listens[i]; ln.network == "tcp" && strings.HasSuffix(ln.address, ":0") {
			fd, err := ln.reserve()
			if err != nil {
				return nil, err
			}
			defer unix.Close(fd)
		}
	}
	e := newEngine(cfg)
	var gnetURLs []string
	for i, ln := range listens {
		if ln.network == "tcp" {
			gnetURLs = append(gnetURLs, ln.network+"://"+ln.address)
			e.listens[ln.local] = &listens[i]
		}
	}
	if gnetURLs == nil {
		// gnet does not go without a listener. listenUnix takes the path from it.
		gnetURLs = []string{"unix://" + listens[0].address}
	}
	go func() {
		err := gnet.Rotate((*handler)(e), gnetURLs,
			gnet.WithNumEventLoop(cfg.Loops),
			gnet.WithLoadBalancing(gnet.LeastConnections),
			gnet.WithReuseAddr(true),
			// Each loop accepts for itself, one connection at a time, and OnOpen counts it before the next. With one
			// acceptor for all loops, a flood of connections waits for them uncounted, until accept fails for want
			// of descriptors, which gnet does not survive.
			gnet.WithReusePort(true),
			gnet.WithTicker(true),
			gnet.WithTCPNoDelay(gnet.TCPNoDelay),
			gnet.WithTCPKeepAlive(keepAlive),
			gnet.WithLogger(gnetLog{cfg.Log}))
		e.err = err
		e.pace.set(0)
		e.closeUnix()
		close(e.done)
	}()
	if err := e.awaitBoot(); err != nil {
		return nil, fmt.Errorf("spindle: cannot listen on %v: %w", cfg.ListenURLs, err)
	}
	err = e.findLoops()
	if err == nil {
		err = e.findAddrs(listens)
	}
	if err == nil {
		err = e.listenUnix(listens)
	}
	if err != nil {
		_ = e.Stop(context.Background())
		return nil, err
	}
	e.started.Store(true)
	return e, nil
}

func newEngine(cfg Config) *Engine {
	e := &Engine{
		cfg:      cfg,
		log:      cfg.Log,
		now:      cfg.Now,
		byEL:     make(map[gnet.EventLoop]*Loop),
		listens:  make(map[string]*listen),
		gate:     tlsconn.NewGate(),
		refusals: refusals{log: cfg.Log},
		pace:     pace{mem: cfg.Memory},
		routes:   newRoutes(),
		booted:   make(chan struct{}),
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

func (e *Engine) awaitBoot() error {
	select {
	case <-e.booted:
		return nil
	case <-e.done:
		if e.err == nil {
			return errors.New("the engine stopped at once")
		}
		return e.err
	}
}

// findLoops learns gnet's loops, which gnet shows only through connections: it enrolls one end of
// a socket pair after the other. gnet gives each to the loop with the fewest connections, so
// they come to lie on different loops; clients that connect meanwhile may make it take a few more.
func (e *Engine) findLoops() error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	var peers []int
	defer func() {
		for _, fd := range peers {
			_ = unix.Close(fd) // the loop sees the end of the anchor and forgets it
		}
	}()
	for len(e.loops) < e.cfg.Loops {
		near, far, err := socketPair()
		if err != nil {
			return fmt.Errorf("spindle: socket pair: %w", err)
		}
		// The context travels to OnOpen as the connection's; an anchor's loop is not known yet.
		bell := &anchor{}
		res, err := e.gnet.Register(gnet.NewContext(gnet.NewNetConnContext(ctx, near), bell))
		if err != nil {
			_ = near.Close()
			_ = unix.Close(far)
			return fmt.Errorf("spindle: enroll an anchor: %w", err)
		}
		select {
		case r := <-res:
			if r.Err != nil {
				_ = unix.Close(far)
				return fmt.Errorf("spindle: enroll an anchor: %w", r.Err)
			}
			el := r.Conn.EventLoop()
			if e.byEL[el] == nil {
				l := newLoop(e, len(e.loops), el)
				e.byEL[el] = l
				e.loops = append(e.loops, l)
				l.bell = far // this one stays
				bell.loop.Store(l)
			} else {
				peers = append(peers, far)
			}
		case <-ctx.Done():
			return fmt.Errorf("spindle: event loops did not start: %w", ctx.Err())
		case <-e.done:
			return fmt.Errorf("spindle: event loops did not start: %w", e.err)
		}
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
		// Stop's own wait polls twice a second; done is exact.
		gone, cancel := context.WithCancel(context.Background())
		cancel()
		_ = e.gnet.Stop(gone)
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
