package node

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"spindle/codec"
	"spindle/revclock"
	"spindle/server"
	"spindle/server/recipes"
	"spindle/shard"
	"spindle/watchring"
)

const (
	// stopTimeout bounds Close: requests under way get a part of it, sockets the rest.
	stopTimeout = 10 * time.Second
	// waitLogEvery is how often a proxy that is not ready says what it is waiting for.
	waitLogEvery = 5 * time.Second
	// connectGrace is how long the first connections to the members may take before the core asks anyway.
	connectGrace = time.Second
	// observeEvery is how old the numbers on /metrics may be.
	observeEvery = time.Second
)

// Node is a running proxy.
type Node struct {
	cfg     Config
	log     *slog.Logger
	engine  *server.Engine
	metrics *server.Metrics
	recipes *recipes.Service
	begun   time.Time

	status  atomic.Pointer[status]
	version atomic.Pointer[string] // of the oldest member, when last asked

	observation atomic.Pointer[shard.Observation] // for /metrics
	ready       chan struct{}                     // closed when requests are served for the first time
	failed      chan error                        // one error at most
	outdated    chan struct{}                     // closed when a Node is to be started in the place of this one
	quit        chan struct{}                     // closed by Close
	once        sync.Once

	// Everything following is owned by the first loop.

	pool      *shard.Pool
	core      *shard.Core
	stopDrive func()
	begunCore bool // core.Start was called
	wasReady  bool
	gaveUp    bool
	toldStale bool // outdated is closed
}

// status is what is known outside of the first loop.
type status struct {
	ready  bool
	reason string // why not; or which members are refused
}

// Start opens the listeners and begins to look for the members; Ready tells when clients are served. Its
// errors are one sentence: a port in use, an endpoint that is none.
func Start(cfg Config) (*Node, error) {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Name == "" {
		cfg.Name, _ = os.Hostname()
	}
	memory := shard.NewMemory(cfg.MaxClientMemory)
	pcfg := poolConfig(&cfg)
	pcfg.Memory = memory
	if err := pcfg.Validate(); err != nil {
		return nil, err
	}
	n := &Node{
		cfg: cfg, log: cfg.Log, begun: time.Now(),
		ready: make(chan struct{}), failed: make(chan error, 1), outdated: make(chan struct{}), quit: make(chan struct{}),
	}
	n.status.Store(&status{reason: "connecting to the members"})
	var err error
	n.metrics, err = server.StartMetrics(cfg.ListenMetricsURLs, cfg.TLS, (*health)(n), cfg.Version, cfg.EnablePprof, cfg.Log)
	if err != nil {
		return nil, err
	}
	n.engine, err = server.Start(server.Config{
		ListenURLs: cfg.ListenClientURLs,
		TLS:        cfg.TLS,
		Loops:      cfg.Loops,
		BusyPoll:   cfg.BusyPoll,
		Now:        n.now,
		Log:        cfg.Log,

		Codec:             codecConfig(&cfg),
		Memory:            memory,
		KeepaliveInterval: cfg.GRPCKeepaliveInterval,
		KeepaliveTimeout:  cfg.GRPCKeepaliveTimeout,

		BeforeClose: n.unwire,
		OnPanic:     n.panicked,
	})
	if err != nil {
		_ = n.metrics.Close()
		return nil, err
	}
	n.recipes = recipes.Serve(n.engine, cfg.Log)
	if len(n.cfg.AdvertiseClientURLs) == 0 {
		n.cfg.AdvertiseClientURLs = advertised(n.engine.Addrs(), n.engine.URLs())
	}
	// All in one turn of the loop: the core's hook must stand before the pool's, which the pool adds in
	// the turn after the one that it is made in.
	loop := n.engine.Loops()[0]
	loop.Post(func() { n.wire(loop, pcfg) })
	go n.attend()
	return n, nil
}

// grpcOverhead is what etcd adds to --max-request-bytes for the largest message that gRPC takes
// (server/config/config.go).
const grpcOverhead = 512 << 10

// defaultPingMinTime is grpc-go's, which holds in etcd when --grpc-keepalive-min-time is 0.
const defaultPingMinTime = 5 * time.Minute

// codecConfig bounds a client's connection.
func codecConfig(cfg *Config) codec.ConnConfig {
	c := codec.ConnConfig{PingMinTime: cfg.GRPCKeepaliveMinTime}
	if c.PingMinTime <= 0 {
		c.PingMinTime = defaultPingMinTime
	}
	if cfg.MaxConcurrentStreams > 0 {
		c.MaxConcurrentStreams = uint32(cfg.MaxConcurrentStreams)
	}
	if cfg.MaxRequestBytes > 0 {
		c.MaxMessageBytes = cfg.MaxRequestBytes + grpcOverhead
	}
	return c
}

func poolConfig(cfg *Config) shard.PoolConfig {
	p := shard.PoolConfig{
		Clusters: map[codec.ClusterID][]string{codec.Coordinator: cfg.Coordinator},
		Names:    map[codec.ClusterID]string{codec.Coordinator: "coordinator"},
		TLS:      cfg.MemberTLS,
		Log:      cfg.Log,
	}
	for i, s := range cfg.Shards {
		p.Clusters[codec.ClusterID(i)] = s.URLs
		p.Names[codec.ClusterID(i)] = s.Name
	}
	return p
}

// wire makes pool and core. On the first loop.
func (n *Node) wire(loop *server.Loop, pcfg shard.PoolConfig) {
	n.pool = shard.NewPool(pcfg, loop)
	names := make([]string, len(n.cfg.Shards))
	for i, s := range n.cfg.Shards {
		names[i] = s.Name
	}
	n.core = shard.NewCore(shard.CoreConfig{
		Proxy:                 randomID(),
		Names:                 names,
		Partition:             n.cfg.Partition,
		AutoCompact:           n.cfg.AutoCompact,
		Now:                   n.now,
		Rand:                  randomSource(),
		Log:                   n.log,
		RingSize:              n.cfg.RingSize,
		RingBytes:             n.cfg.RingBytes,
		ReorderWindow:         n.cfg.ReorderWindow,
		ShardTimeout:          n.cfg.ShardTimeout,
		Memory:                pcfg.Memory,
		Limits:                shard.Limits{MaxRequestBytes: n.cfg.MaxRequestBytes},
		MemberMaxTxnOps:       n.cfg.ShardMaxTxnOps,
		MemberMaxRequestBytes: n.cfg.ShardMaxRequestBytes,
		MemberQuotaBytes:      int64(n.cfg.ShardQuotaBackendBytes),
		MemberName:            n.cfg.Name,
		ClientURLs:            n.cfg.AdvertiseClientURLs,
		AcceptDataLoss:        n.cfg.AcceptDataLoss,
		ReplaceCoordinator:    n.cfg.ReplaceCoordinator,
	}, n.pool)
	n.engine.SetCore(n.core)
	n.stopDrive = loop.Drive(n.core)
	n.pool.OnConnected(n.core.Connected)
	loop.OnTurnEnd(n.turnEnd)
	n.awaitConnections()
}

// awaitConnections starts the core when every cluster has a connection, or after a moment: the core would
// ask at once, and complain about connections that are only just being made.
func (n *Node) awaitConnections() {
	start := func() {
		if !n.begunCore {
			n.begunCore = true
			n.core.Start()
		}
	}
	n.pool.OnConnected(whenAll(len(n.cfg.Shards)+1, start))
	loop := n.engine.Loops()[0]
	time.AfterFunc(connectGrace, func() { loop.Post(start) })
}

// whenAll returns a function that calls f once it was told of n clusters, each of them perhaps several times.
func whenAll(n int, f func()) func(codec.ClusterID) {
	seen := make(map[codec.ClusterID]bool, n)
	return func(id codec.ClusterID) {
		if seen[id] = true; len(seen) == n {
			f()
		}
	}
}

// panicked is server.Config.OnPanic: with what all clients share perhaps half-changed, this proxy must not go on. It
// has no data of its own, so the next one begins with what the members have. On any loop.
func (n *Node) panicked(err error, fatal bool) {
	if fatal {
		err = fmt.Errorf("%w; the log has the details, start Spindle again", err)
		n.engine.Loops()[0].Post(func() { n.giveUp(err) })
	}
}

// giveUp says that the proxy cannot go on. The first reason counts. On the first loop.
func (n *Node) giveUp(err error) {
	if n.gaveUp {
		return
	}
	n.gaveUp = true
	n.engine.SetReady(false)
	n.status.Store(&status{reason: err.Error()})
	select {
	case n.failed <- err:
	default: // the engine has stopped by itself
	}
}

// turnEnd looks whether the core has become ready, or has given up. On the first loop.
func (n *Node) turnEnd() {
	ok, why := n.core.Ready()
	if n.core.Outdated() != "" && !n.toldStale {
		n.toldStale = true
		close(n.outdated)
	}
	switch {
	case n.gaveUp || !n.begunCore:
	case ok && !n.wasReady:
		n.wasReady = true
		n.serveWatch()
		server.ServeRangeStream(n.engine, n.core)
		n.engine.SetReady(true)
		n.status.Store(&status{ready: true, reason: why})
		close(n.ready)
	case ok && (!n.status.Load().ready || n.status.Load().reason != why):
		n.status.Store(&status{ready: true, reason: why}) // the coordinator is believed again, or a member is refused
	case ok:
	case n.core.Failed() != "":
		n.giveUp(errors.New(why))
	case why != n.status.Load().reason:
		n.status.Store(&status{reason: why})
	}
}

// serveWatch begins to serve Watch: the core has its ring now. On the first loop.
func (n *Node) serveWatch() {
	part := n.core.Partition()
	svc := server.NewWatchService(n.engine, server.WatchConfig{
		Ring:     n.core.Ring(),
		Frontier: n.core.Frontier(),
		ShardsOf: func(key, end []byte) int {
			if shard, all := part.ShardsOf(key, end); !all {
				return shard
			}
			return watchring.All
		},
		Now:              n.core.Now,
		OpenHistory:      func(set int, from int64) server.History { return n.core.OpenHistory(set, from) },
		Header:           n.core.Header(),
		ProgressInterval: n.cfg.ProgressInterval,
	})
	n.core.OnFrontier(svc.FrontierRose)
}

// attend says now and then what a proxy that is not ready is waiting for, and hears of an engine that
// has stopped by itself.
func (n *Node) attend() {
	tick := time.NewTicker(waitLogEvery)
	defer tick.Stop()
	look := time.NewTicker(observeEvery)
	defer look.Stop()
	defer export(n.observation.Load)()
	home, ready := n.engine.Loops()[0], n.ready
	observe := func() {
		if n.core != nil {
			o := n.core.Observe()
			n.observation.Store(&o)
		}
	}
	for {
		select {
		case <-n.quit:
			return
		case <-n.engine.Done():
			select {
			case <-n.quit:
			case n.failed <- n.engine.Err():
			default:
			}
			return
		case <-ready:
			ready = nil
			tick.Stop()
		case <-look.C:
			home.Post(observe)
		case <-tick.C:
			if st := n.status.Load(); !st.ready {
				n.log.Warn("not ready yet", "why", st.reason)
			}
		}
	}
}

// now is the clock of everything in this proxy: nanoseconds since its start, never backwards, never 0.
func (n *Node) now() int64 { return int64(time.Since(n.begun)) + 1 }

// Ready is closed when clients are served.
func (n *Node) Ready() <-chan struct{} { return n.ready }

// Failed delivers at most one error: the proxy cannot go on and should be stopped.
func (n *Node) Failed() <-chan error { return n.failed }

// Outdated is closed when what the proxy knows of a member counts no more (shard.Core.Outdated): this Node is to be closed, and another one
// started in its place. It serves what it can until then.
func (n *Node) Outdated() <-chan struct{} { return n.outdated }

// Status says whether clients are served now, and if not, why; if they are, which member clusters are refused.
func (n *Node) Status() (ready bool, reason string) {
	st := n.status.Load()
	return st.ready, st.reason
}

// ClientURLs returns where the etcd API is served, with the ports that the kernel chose.
func (n *Node) ClientURLs() []string { return n.engine.URLs() }

// MetricsURLs returns where the metrics are served.
func (n *Node) MetricsURLs() []string { return n.metrics.URLs() }

// advertised returns URLs that other machines can use too: an address that means "all of this machine"
// is replaced by the machine's name.
func advertised(addrs []net.Addr, urls []string) []string {
	out := slices.Clone(urls)
	for i, a := range addrs {
		if t, ok := a.(*net.TCPAddr); ok && t.IP.IsUnspecified() {
			if name, err := os.Hostname(); err == nil {
				scheme, _, _ := strings.Cut(urls[i], "://")
				out[i] = scheme + "://" + net.JoinHostPort(name, strconv.Itoa(t.Port))
			}
		}
	}
	return out
}

// SetEndpoints changes where the nodes of member clusters and of the coordinator are looked for; shards are told by
// their names, and those that Start was not given are left out. See shard.Pool.SetEndpoints. Any goroutine.
func (n *Node) SetEndpoints(shards []Shard, coordinator []string) {
	n.engine.Loops()[0].Post(func() {
		if n.pool == nil {
			return
		}
		for _, s := range shards {
			if i := slices.IndexFunc(n.cfg.Shards, func(o Shard) bool { return o.Name == s.Name }); i >= 0 {
				n.pool.SetEndpoints(codec.ClusterID(i), s.URLs)
			}
		}
		n.pool.SetEndpoints(codec.Coordinator, coordinator)
	})
}

// Close stops the proxy. Requests under way get a moment to finish. It may be called more than once.
func (n *Node) Close() {
	n.once.Do(func() {
		close(n.quit)
		n.status.Store(&status{reason: "stopping"})
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		defer cancel()
		n.recipes.Close() // its clients are the engine's
		// The engine takes no further work and answers what it can, calls unwire, and ends its loops.
		if err := n.engine.Stop(ctx); err != nil {
			n.log.Error("the event loops did not stop in time", "err", err)
		}
		_ = n.metrics.Close()
	})
}

// unwire closes core and pool, on their loop, and waits for that.
func (n *Node) unwire() {
	done := make(chan struct{})
	loop := n.engine.Loops()[0]
	loop.Post(func() {
		if n.core == nil {
			close(done)
			return
		}
		n.core.Farewell(func() {
			loop.Post(func() {
				defer close(done)
				n.stopDrive()
				n.core.Close()
				n.pool.Close()
			})
		})
	})
	select {
	case <-done:
	case <-n.engine.Done():
	case <-time.After(stopTimeout):
	}
}

func randomID() (id revclock.ID) {
	rand.Read(id[:])
	return id
}

func randomSource() *mrand.Rand {
	var b [16]byte
	rand.Read(b[:])
	return mrand.New(mrand.NewPCG(binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint64(b[8:])))
}
