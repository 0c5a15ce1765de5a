package shard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"time"

	"spindle/codec"
	"spindle/codec/tlsconn"

	"github.com/VictoriaMetrics/metrics"
)

// Bounds of a Pool. Those that an operator or a test may want otherwise are fields of PoolConfig.
const (
	// defaultDialTimeout bounds a dial, and after it the wait for the server's SETTINGS.
	defaultDialTimeout = 3 * time.Second
	// defaultPingInterval is how long a connection with open streams may be silent before it is asked
	// for a sign of life. etcd closes connections that ping more often than its
	// --grpc-keepalive-min-time (default 5 s), so the default stays above that.
	defaultPingInterval = 6 * time.Second
	// defaultPingTimeout is how long the sign of life may take.
	defaultPingTimeout = 3 * time.Second
	// defaultBackoffMin and defaultBackoffMax bound the wait before the next dial.
	defaultBackoffMin = 50 * time.Millisecond
	defaultBackoffMax = 500 * time.Millisecond
	// backoffResetAge is how long a connection must have lived for the next dial to wait
	// defaultBackoffMin again: a server that accepts and hangs up at once is not dialed in a tight loop.
	backoffResetAge = time.Second

	// maxMemberMessageBytes bounds one reply of a member: a list of a whole keyspace is one message.
	maxMemberMessageBytes = 512 << 20
	// maxMemberPartialBytes bounds the replies received in part on one connection; further ones end with
	// ResourceExhausted, which makes a list ask for smaller pages.
	maxMemberPartialBytes = 2 * maxMemberMessageBytes
	// pressedReply is how large a reply in parts may be while Memory is pressed. Smaller ones come through whatever
	// else is on its way, and so does what watch streams bring (codec.Stream.Spared): a stream that began again would have
	// the member send everything again, when there is the least room for it.
	pressedReply = 8 << 20
	// memberStreamWindow and memberConnWindow are what a member may send before it is read: enough for
	// a fast network, and the most that one held Watch stream (one connection) can occupy here.
	memberStreamWindow = 4 << 20
	memberConnWindow   = 16 << 20
	// maxMemberQueuedBytes bounds the requests that wait on one connection for the member's window.
	maxMemberQueuedBytes = 256 << 20

	// maxPendingCalls and maxPendingBytes bound the calls of one cluster that wait because all its
	// connections have as many streams as the member allows (etcd's default allows 2^32-1).
	maxPendingCalls = 4096
	maxPendingBytes = 64 << 20

	// outboundHighWater stops the emission of DATA on a connection whose socket does not take it,
	// outboundLowWater resumes it, blockedTick is how often that is looked at (gnet has no event for it).
	outboundHighWater = 1 << 20
	// maxBlockedBytes is what frames other than DATA may add to that (answers to a flood of PING, say): the connection
	// is given up beyond.
	maxBlockedBytes  = 4 << 20
	outboundLowWater = 256 << 10
	blockedTick      = 5 * time.Millisecond

	// renewStreamID is the identifier of a stream from which on a connection is replaced: a client has those
	// below 2^31, each once, and the ones that are left are for the time until the successor is ready.
	renewStreamID = 1 << 30

	// codecTick is how often codec.Conn.Tick is called while there are connections.
	codecTick = time.Second

	// penaltyAfter answers in a row that tell of a node without a quorum put an endpoint behind the
	// others for penaltyTime.
	penaltyAfter = 3
	penaltyTime  = 5 * time.Second

	// maxFreeCalls and maxFreeCallBytes bound what is kept for reuse: the number of call objects, and
	// the reply buffer kept with one.
	maxFreeCalls     = 1024
	maxFreeCallBytes = codec.KeptReply
)

// PoolConfig says where the clusters are. Zero durations and counts take the defaults.
type PoolConfig struct {
	// Clusters has the endpoint URLs of every cluster: http://host:port or unix:///path; https and unixs with TLS.
	Clusters map[codec.ClusterID][]string
	// Names are the operator's names of the clusters, for texts and metrics.
	Names map[codec.ClusterID]string
	// TLS is for endpoints with TLS; nil: the system's CAs, and no certificate of our own.
	TLS *tlsconn.ClientFiles
	// ConnsPerEndpoint is the number of connections to each endpoint (default 1; one multiplexed
	// connection is not the bottleneck of an event loop).
	ConnsPerEndpoint int
	// Log may be nil.
	Log *slog.Logger
	// Metrics is the set that the pool's metrics are in; nil for the process's default set. Pools with
	// the same set and names (one a loop) share their counters.
	Metrics *metrics.Set

	// Memory counts the replies that are received in part; while it is pressed, a reply has to fit into
	// pressedReply. nil: nothing does.
	Memory *Memory

	DialTimeout  time.Duration // of one dial, and of the wait for the server's first frame
	PingInterval time.Duration // silence after which a connection with open streams is pinged
	PingTimeout  time.Duration // silence after the ping that makes the connection a dead one
	BackoffMin   time.Duration // wait before the first new dial
	BackoffMax   time.Duration // and the longest one

	firstStreamID uint32 // of tests
}

// Validate reports the first endpoint that a Pool could not use.
func (c PoolConfig) Validate() error {
	for _, id := range clusterIDs(c.Clusters) {
		if len(c.Clusters[id]) == 0 {
			return fmt.Errorf("%s: no endpoints", clusterLabel(id, c.Names))
		}
		for _, u := range c.Clusters[id] {
			if _, err := parseEndpoint(u); err != nil {
				return fmt.Errorf("%s: %w", clusterLabel(id, c.Names), err)
			}
		}
	}
	return nil
}

// Pool is the pooled gRPC connections from one event loop to the member clusters and the coordinator. It
// implements codec.Transport.
//
// Goroutines: everything happens on the goroutine of the Loop, and all methods are to be called there
// (except NewPool), also from within what the pool calls. Dials run on goroutines of their own and hand
// over by Post.
//
// The pool never sends a request again: it says (sent == false) when it is certain that no server looked
// at it, and leaves the rest to the caller.
//
// What was sent in a turn of the loop is written at its end, with one write per connection. The hook for
// that is registered by the first mailbox drain after NewPool, so after the hooks of those who were
// wired together with the pool; a hook that runs later still and calls the pool ends with Flush.
type Pool struct {
	cfg  PoolConfig
	loop Loop
	log  *slog.Logger

	// ctx ends the dials.
	ctx    context.Context
	cancel context.CancelFunc

	// Everything following is owned by the loop.

	clusters    map[codec.ClusterID]*poolCluster
	order       []*poolCluster
	links       []*poolLink // all that have a socket or wait for one, also those that drain
	onConnected []func(codec.ClusterID)
	newCheck    func(codec.ClusterID) *Check // nil: nothing is looked at
	timers      poolTimers
	dirty       []*poolLink // have output to write, or are to be looked at, at the end of the turn
	blocked     []*poolLink // over their high-water mark
	blockTimer  poolTimer
	tick        poolTimer
	freeCalls   []*poolCall
	failed      []failedCall // to be completed by the posted drain
	failedSpare []failedCall
	drainFn     func() // p.drainFailed, made once
	drainPosted bool
	flushing    bool
	started     bool
	closed      bool
}

// poolCluster is one cluster as the pool sees it.
type poolCluster struct {
	id        codec.ClusterID
	label     string // "member cluster shard-1" or "coordinator"
	endpoints []*poolEndpoint
	leaving   []*poolEndpoint // removed; used until another one answers
	ready     []*poolLink     // may take new streams
	next      int             // round robin in ready
	pending   pendingCalls
	down      codec.Status // what calls get while ready is empty
	downSince int64        // when it became empty
	closed    bool
	metrics   *clusterMetrics
}

var _ codec.Transport = (*Pool)(nil)

// NewPool makes a pool on loop, which may already run, and starts to dial. Endpoints that PoolConfig.Validate
// refuses are never dialed, and their clusters say why.
func NewPool(cfg PoolConfig, loop Loop) *Pool {
	if cfg.ConnsPerEndpoint <= 0 {
		cfg.ConnsPerEndpoint = 1
	}
	setDefault(&cfg.DialTimeout, defaultDialTimeout)
	setDefault(&cfg.PingInterval, defaultPingInterval)
	setDefault(&cfg.PingTimeout, defaultPingTimeout)
	setDefault(&cfg.BackoffMin, defaultBackoffMin)
	setDefault(&cfg.BackoffMax, max(defaultBackoffMax, cfg.BackoffMin))
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.GetDefaultSet()
	}
	if cfg.TLS == nil {
		cfg.TLS, _ = tlsconn.NewClientFiles(tlsconn.ClientOptions{}, nil) // without files nothing can fail
	}
	p := &Pool{cfg: cfg, loop: loop, log: cfg.Log, clusters: make(map[codec.ClusterID]*poolCluster, len(cfg.Clusters))}
	if p.log == nil {
		p.log = slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelError + 1}))
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.timers.init(func() { loop.Post(p.runTimers) })
	p.blockTimer.owner = (*blockedTimer)(p)
	p.tick.owner = (*tickTimer)(p)
	p.drainFn = p.drainFailed
	for _, id := range clusterIDs(cfg.Clusters) {
		label := clusterLabel(id, cfg.Names)
		cl := &poolCluster{id: id, label: label, metrics: newClusterMetrics(cfg.Metrics, metricLabel(id, cfg.Names))}
		for _, u := range cfg.Clusters[id] {
			cl.endpoints = append(cl.endpoints, newPoolEndpoint(p, cl, u))
		}
		cl.describeDown()
		p.clusters[id] = cl
		p.order = append(p.order, cl)
	}
	loop.Post(p.start)
	return p
}

func setDefault(d *time.Duration, def time.Duration) {
	if *d <= 0 {
		*d = def
	}
}

// clusterIDs returns the IDs in order: the coordinator (-1), then the members.
func clusterIDs(m map[codec.ClusterID][]string) []codec.ClusterID {
	ids := make([]codec.ClusterID, 0, len(m))
	for id := range m {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func clusterLabel(id codec.ClusterID, names map[codec.ClusterID]string) string {
	if id == codec.Coordinator {
		return "coordinator"
	}
	return "member cluster " + metricLabel(id, names)
}

func metricLabel(id codec.ClusterID, names map[codec.ClusterID]string) string {
	switch name := names[id]; {
	case name != "":
		return name
	case id == codec.Coordinator:
		return "coordinator"
	default:
		return fmt.Sprintf("shard-%d", int(id))
	}
}

// start begins on the loop.
func (p *Pool) start() {
	if p.closed {
		return
	}
	p.started = true
	p.loop.OnTurnEnd(p.Flush)
	for _, cl := range p.order {
		for _, ep := range cl.endpoints {
			ep.start()
		}
	}
}

// OnConnected registers f, which is called (on the loop) whenever a cluster that had no usable connection has
// one again. Clusters that are connected already are not reported.
func (p *Pool) OnConnected(f func(codec.ClusterID)) { p.onConnected = append(p.onConnected, f) }

// Connected says whether the cluster has a usable connection.
func (p *Pool) Connected(id codec.ClusterID) bool {
	cl := p.clusters[id]
	return cl != nil && len(cl.ready) > 0
}

// Down says for how long a cluster has had no usable connection, and why; 0 while it has one.
func (p *Pool) Down(id codec.ClusterID) (why string, since time.Duration) {
	if cl := p.clusters[id]; cl != nil && len(cl.ready) == 0 {
		return cl.down.Msg, time.Duration(p.timers.now() - cl.downSince)
	}
	return "", 0
}

// Call implements codec.Transport. Its statuses are the server's own, untouched, and these of the pool:
//   - Unavailable, naming the cluster: no connection (sent false), or the connection was lost (sent true,
//     unless the request was still in this process);
//   - DeadlineExceeded "context deadline exceeded": timeout passed, the stream was reset;
//   - Unavailable (sent true): the same, and nothing at all came on that connection meanwhile, while others of the cluster brought something;
//   - ResourceExhausted: more than maxPendingCalls wait for the member's stream limit (sent false);
//   - Internal: an answer that no unary call may have.
func (p *Pool) Call(to codec.ClusterID, m codec.Method, req []byte, timeout time.Duration, done codec.Completion) {
	cl := p.clusters[to]
	if cl == nil {
		p.fail(nil, done, codec.Status{Code: codec.Unavailable, Msg: fmt.Sprintf("cluster %d is not in the configuration", int(to))})
		return
	}
	switch {
	case timeout <= 0:
		p.fail(cl, done, statusDeadline)
		return
	case p.closed || len(cl.ready) == 0:
		p.fail(cl, done, cl.down)
		return
	}
	c := p.acquireCall()
	c.cluster, c.method, c.done, c.span = cl, m, done, int64(timeout)
	now := p.timers.now()
	cl.metrics.inFlight.Inc()
	p.timers.set(&c.timer, now+int64(timeout))
	if cl.pending.empty() && p.open(c, req, now) {
		return
	}
	if !cl.pending.push(c, req) {
		p.failCall(c, statusTooManyStreams, false)
	}
}

// Watch implements codec.Transport. The stream goes to one endpoint and stays there; OnEnd says that it is over,
// and the caller opens another.
func (p *Pool) Watch(to codec.ClusterID, req []byte, sink codec.WatchSink) codec.WatchHandle {
	w := p.stream(to, codec.MethodWatch, sink)
	w.Send(req)
	return w
}

// KeepAlive implements codec.Transport, as Watch does.
func (p *Pool) KeepAlive(to codec.ClusterID, sink codec.WatchSink) codec.WatchHandle {
	return p.stream(to, codec.MethodLeaseKeepAlive, sink)
}

// stream opens a stream in both directions.
func (p *Pool) stream(to codec.ClusterID, m codec.Method, sink codec.WatchSink) *poolWatch {
	w := &poolWatch{pool: p, sink: sink}
	cl := p.clusters[to]
	switch {
	case cl == nil:
		w.endLater(codec.Status{Code: codec.Unavailable, Msg: fmt.Sprintf("cluster %d is not in the configuration", int(to))})
	case p.closed || len(cl.ready) == 0:
		w.endLater(cl.down)
	default:
		l, s := cl.openStream(m, true, p.timers.now())
		if s == nil {
			w.endLater(statusTooManyStreams)
			break
		}
		w.link, w.stream = l, s
		l.watches = append(l.watches, w)
		s.User = w
		l.opened(s)
		l.touch()
	}
	return w
}

// The ranks of connections: a lower one is used before.
const (
	rankGood = iota
	rankPenalized
	rankDoubted // it may be dead, while a penalized one answers
	ranks
)

func (l *poolLink) rank(now int64) int {
	switch {
	case l.doubted():
		return rankDoubted
	case l.ep.penalized(now):
		return rankPenalized
	}
	return rankGood
}

// openStream opens a stream on the next connection in turn, of those with the lowest rank that take another one. It returns nil if
// none does.
func (cl *poolCluster) openStream(m codec.Method, hasLeader bool, now int64) (*poolLink, *codec.Stream) {
	n := len(cl.ready)
	for rank := range ranks {
		for i := range n {
			at := (cl.next + i) % n
			l := cl.ready[at]
			if l.rank(now) != rank {
				continue
			}
			// No grpc-timeout goes along: it would change from call to call, and so spoil the
			// cached header block; the pool resets what takes too long.
			if s := l.conn.Open(codec.MethodPath(m), hasLeader, 0); s != nil {
				cl.next = at + 1
				s.Spared = m == codec.MethodWatch
				return l, s
			}
		}
	}
	return nil, nil
}

// heardBut says whether another connection than l has brought something since a moment.
func (cl *poolCluster) heardBut(l *poolLink, since int64) bool {
	return slices.ContainsFunc(cl.ready, func(o *poolLink) bool { return o != l && o.lastRecv >= since })
}

// linkReady takes l into use.
func (cl *poolCluster) linkReady(p *Pool, l *poolLink) {
	cl.ready = append(cl.ready, l)
	cl.leave()
	if len(cl.ready) == 1 {
		for _, f := range p.onConnected {
			f(cl.id)
		}
	}
}

// linkGone takes l out of use. Calls that waited for a free stream fail with the last connection.
func (cl *poolCluster) linkGone(p *Pool, l *poolLink) {
	if i := slices.Index(cl.ready, l); i >= 0 {
		cl.ready = slices.Delete(cl.ready, i, i+1)
		cl.downSince = p.timers.now()
	}
	if len(cl.ready) > 0 {
		return
	}
	for !cl.pending.empty() {
		c := cl.pending.first()
		cl.pending.remove(c)
		p.failCall(c, cl.down, false)
	}
}

// Flush writes what was sent since the last turn's end. The pool's own hook calls it; see Pool.
func (p *Pool) Flush() {
	if p.flushing {
		return
	}
	p.flushing = true
	defer func() { p.flushing = false }()
	for _, cl := range p.order {
		p.openPending(cl)
	}
	// A lost connection makes callers send on another one, which is then appended here.
	for i := 0; i < len(p.dirty); i++ {
		l := p.dirty[i]
		l.dirty = false
		l.flush()
	}
	clear(p.dirty)
	p.dirty = p.dirty[:0]
}

// Close ends everything: all calls and streams are reported (Unavailable) before it returns, except that within a
// Completion or WatchSink those of the same connection are reported after that; nothing is dialed any more,
// sockets close. The pool may still be called afterwards, and answers Unavailable.
func (p *Pool) Close() {
	if p.closed {
		return
	}
	p.closed = true
	p.cancel()
	p.timers.stop()
	for _, cl := range p.order {
		cl.closed = true
		cl.describeDown()
		for _, ep := range cl.endpoints {
			ep.stop()
		}
	}
	for _, l := range slices.Clone(p.links) {
		l.shutdown(errPoolClosed)
	}
	p.drainFailed()
}

var errPoolClosed = errors.New("closed by this side")
