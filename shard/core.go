package shard

import (
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	"spindle/codec"
	"spindle/revclock"
	"spindle/watchring"
)

// CoreConfig is what a Core is made with. Zero durations and sizes take the defaults of NewCore.
type CoreConfig struct {
	// Proxy is this process's identity, random at every start.
	Proxy revclock.ID
	// Names are the member clusters' names, in the order of the transport's ClusterIDs.
	Names []string
	// Partition is what the configuration says about where keys lie.
	Partition PartitionSpec
	// AutoCompact compacts without being asked.
	AutoCompact AutoCompact
	// Now is the clock, in nanoseconds; it never runs backwards.
	Now func() int64
	// Rand is the source of jitter and of new identities. The simulation seeds it.
	Rand *rand.Rand
	Log  *slog.Logger

	// RingSize is the number of revisions held for watches, RingBytes what their events may weigh.
	RingSize  int
	RingBytes int64
	// ReorderWindow is how long another proxy's range may stay open before this proxy fences it.
	ReorderWindow time.Duration
	// ShardTimeout is how long a request waits for a shard (or the coordinator) before the client gets
	// etcd's "request timed out".
	ShardTimeout time.Duration

	// HistoryBytes is how much a History keeps of one shard before it holds that shard's stream back.
	HistoryBytes int

	// Memory bounds what large answers may take; nil: nothing does.
	Memory *Memory
	// Limits are enforced towards clients.
	Limits Limits
	// MemberMaxTxnOps and MemberMaxRequestBytes are what the members accept (etcd's --max-txn-ops and
	// --max-request-bytes): they bound a batch.
	MemberMaxTxnOps       int
	MemberMaxRequestBytes int
	// MemberQuotaBytes is the quota (etcd's --quota-backend-bytes) of members that do not report it; 0: none is known.
	MemberQuotaBytes int64

	// MemberName and ClientURLs are how this proxy shows itself in Cluster.MemberList.
	MemberName string
	ClientURLs []string

	// SnapshotEvery is the number of ticks between two snapshots on the coordinator.
	SnapshotEvery int

	// PageKeys and ChunkBytes are the size of a stream's first page of a shard, in keys, and what a chunk
	// of it is closed at. For tests: with fewer keys than the default nothing beyond a shard's share of a
	// limit is asked for either.
	PageKeys, ChunkBytes int
	// CreateEntries is the size of the cache of create revisions. For tests of many short-lived Cores.
	CreateEntries int

	// ReplaceCoordinator lets a coordinator take the place of the one that the partition map names, although its
	// etcd has another cluster ID. It must be empty.
	ReplaceCoordinator bool

	// AcceptDataLoss names member clusters that may be behind what was seen of them.
	AcceptDataLoss []string

	// Sabotage plants bugs for the simulation to find. Never set outside of tests.
	Sabotage Sabotage
}

// Sabotage is a set of planted bugs; see shard/sim.
type Sabotage struct {
	// DropGuard leaves the clock guard out of batches.
	DropGuard bool
	// BareFlat leaves the requests' compares out of flat batches, FlatTwice sends a flat batch that failed again in its
	// nested form without its guard.
	BareFlat, FlatTwice bool
	// RetickWithoutLooking takes a new range for a rejected batch without looking for its record.
	RetickWithoutLooking bool
	// FrontierIgnoresRanges moves the frontier to N whatever ranges are open.
	FrontierIgnoresRanges bool
	// UnrecordedBehind gives what has no record the revision of the record before.
	UnrecordedBehind bool
	// KeepCopies does not revoke the copies of a lease that ended.
	KeepCopies bool
	// HistoryAhead lets a read of the past go on before every shard's stream has come there.
	HistoryAhead bool
	// CompactionUnread lets reads at a revision ignore the compaction record that they bring along.
	CompactionUnread bool
	// RebuildSkipsShard leaves a shard out of a rebuild. RebuildFencesFirst fences before the coordinator has the new
	// epoch, and believes that then. RebuildNoFence does not fence, and believes what the coordinator names.
	RebuildSkipsShard, RebuildFencesFirst, RebuildNoFence bool
	// NoSpaceUnapplied takes a member's answer that it is out of space for the proof that nothing was applied.
	NoSpaceUnapplied bool
	// CutOffNow lets a proxy that does not reach the coordinator go on with the epoch and the now that it knows.
	CutOffNow bool
	// DeadShardPassed moves the frontier of a shard without a live stream to N whatever ranges are open there.
	DeadShardPassed bool
	// WideAtNow reads the ranges behind a Txn at now, not at the Txn's revision.
	WideAtNow bool
	// RecentIgnoresRanges answers Gets from the ring whatever ranges are open.
	RecentIgnoresRanges bool
	// TrustConnections uses connections to members without looking where they lead, and batches and reads take what clock they find.
	TrustConnections bool
}

// Core is one proxy's protocol: requests come in as Ops, leave as batches and reads to the member
// clusters, ranges of revisions come from the clock, the members' watch streams fill the ring.
//
// A Core belongs to one goroutine (the core loop). It has no sockets, timers or goroutines of its own:
// everything arrives as a call, time is Config.Now, and Deadline says when Tick wants to be called.
// Flush must be called at the end of every turn of the loop; that is where batches and reads leave, so
// that everything which arrived in one turn travels together.
type Core struct {
	cfg   CoreConfig
	tr    codec.Transport
	log   *slog.Logger
	clock *revclock.Clock

	state  coreState
	reason string // why not ready
	// refusals says which shards are refused and why, a line for each.
	refusals string
	boot     *bootstrap

	connecting *connecting // nil while the coordinator is believed
	knownN     int64       // the largest N that a believed coordinator has shown
	maxClock   int64       // the largest clock that a stream has shown

	hdr    codec.Header
	m      *Map
	part   *Partition
	shards []*shardState // by index in the map

	ring       *watchring.Ring
	frontier   *watchring.Frontier
	onFrontier func()
	creates    *CreateCache
	recent     *recentIndex
	recentTurn *recentBatch // takes the Gets of this turn
	freeRecent []*recentBatch
	compacted  int64 // below it nothing is answered, -1 for nothing
	watchFrom  int64 // below it no watch begins, if that is above compacted: events were lost
	compactRec int64 // the largest compaction record of a shard
	completing bool  // a compaction that was cut short is being completed
	auto       autoCompactor
	histories  []*History
	large      largeReads
	gates      []*listGate
	gatesOpen  bool // one of them has room again
	gatesArmed bool // a timer will look whose time is over
	gatesLook  bool // a timer will open them
	leases     leases

	timers   timerHeap
	timerSeq uint64

	dirty        bool // some shard has something to flush
	nowQueue     []nowEntry
	sweeping     bool
	lagLooks     bool // a timer will look at who waits for frontiers
	probing      bool
	naming       bool // a timer will look whether clocks have to be named
	historyTimer bool // one will look whether a History can give its place up
	waiters      []frontierWaiter
	frontierRose bool
	stale        bool // the log or a stream moved: recompute frontiers

	nextToken uint64
	scratch   []byte
	// setScratch is for sets of shards.
	setScratch   []int
	resps        [][]byte
	part1        [1][]byte
	freeReads    []*readBatch
	freeAttempts []*attempt

	rangeStreams int // open
	stats        Stats
}

type coreState uint8

const (
	stateStarting coreState = iota
	stateReady
	stateFailed
	stateClosed
)

// Stats counts what a Core did. Read on the core's goroutine.
type Stats struct {
	Batches, BatchedWrites, Rejected, Fences, WrongCreates, Settled, LostReplies uint64
	ReadBatches, BatchedReads, Rereads, RecentReads, LargeWaited, LargeRefused   uint64
	Unrecorded, Foreign                                                          uint64
	// Rebuilds of the coordinator that this proxy has brought to their end.
	Rebuilds uint64
	// FlatFailed counts batches that were sent again in their nested form.
	FlatFailed uint64
	// Leases that were brought to a shard, copies that this proxy revoked after their lease had ended, turns
	// of reconciliation, those of them that every shard has answered, and copies found by them that no marker named.
	LeaseAttaches, LeaseCopiesRevoked, LeaseReconciliations, LeasesReconciled, LeaseOrphans uint64
}

type nowEntry struct {
	ticket uint64
	at     int64 // when it began to wait, ns
	w      nowWaiter
}

// nowWaiter hears of a linearizable now; a is valid only during the call.
type nowWaiter interface {
	nowDone(n int64, a []int64)
	// abandon ends the wait: the Core stops.
	abandon(st codec.Status)
}

type frontierWaiter struct {
	shard    int // or watchring.All
	rev      int64
	since    int64 // ns
	deadline int64 // ns; dropped then: who waits has a timer of its own
	f        func()
}

// NewCore makes a Core. Start begins its work.
func NewCore(cfg CoreConfig, tr codec.Transport) *Core {
	def := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.ReorderWindow == 0 {
		cfg.ReorderWindow = 250 * time.Millisecond
	}
	if cfg.ShardTimeout == 0 {
		cfg.ShardTimeout = 5 * time.Second
	}
	if cfg.RingBytes == 0 {
		cfg.RingBytes = 256 << 20
	}
	def(&cfg.RingSize, 1<<16)
	def(&cfg.HistoryBytes, defaultHistoryBytes)
	def(&cfg.Limits.MaxTxnOps, 128)
	def(&cfg.Limits.MaxRequestBytes, 1536<<10)
	def(&cfg.MemberMaxTxnOps, 128)
	def(&cfg.PageKeys, firstPageKeys)
	def(&cfg.ChunkBytes, streamChunkBytes)
	def(&cfg.CreateEntries, 1<<17)
	def(&cfg.MemberMaxRequestBytes, 1536<<10)
	c := &Core{cfg: cfg, tr: tr, log: cfg.Log, reason: "starting", compacted: -1, compactRec: -1}
	c.clock = revclock.New(revclock.Config{
		Proxy:         cfg.Proxy,
		Shards:        len(cfg.Names),
		Now:           cfg.Now,
		Rand:          cfg.Rand,
		SnapshotEvery: cfg.SnapshotEvery,
	}, tr, (*clockEvents)(c))
	c.creates = NewCreateCache(cfg.CreateEntries)
	c.recent = newRecentIndex(cfg.RingSize)
	c.leases = newLeases(c)
	if t, ok := tr.(checking); ok {
		t.CheckWith(c.NewCheck)
	}
	return c
}

// Start begins: it looks at the shards and the coordinator, creates what a first start must create,
// and opens the streams. It never gives up on a member that does not answer. Ready tells the rest.
func (c *Core) Start() {
	c.boot = newBootstrap(c)
	c.boot.begin()
}

// Ready reports whether requests are served, and if not, why: a sentence for an operator. If they are, the second result
// tells which shards are refused, a line for each.
func (c *Core) Ready() (bool, string) {
	if c.state == stateReady {
		if c.connecting != nil {
			return false, c.connecting.waitingFor()
		}
		return true, c.refusals
	}
	if c.state == stateStarting && c.boot != nil {
		return false, c.boot.waitingFor()
	}
	return false, c.reason
}

// Failed returns the sentence with which the Core gave up, or "".
func (c *Core) Failed() string {
	if c.state == stateFailed {
		return c.reason
	}
	return ""
}

// Ring returns the ring, Frontier the frontiers; both are nil before the Core was ready once.
func (c *Core) Ring() *watchring.Ring { return c.ring }

// Frontier returns the published frontiers.
func (c *Core) Frontier() *watchring.Frontier { return c.frontier }

// OnFrontier sets the function that is called at the end of a turn in which a frontier rose.
func (c *Core) OnFrontier(f func()) { c.onFrontier = f }

// Header returns the header that answers carry, with the revision left 0.
func (c *Core) Header() codec.Header { return c.hdr }

// Partition returns which shard a key lies on; nil before the Core was ready once.
func (c *Core) Partition() *Partition { return c.part }

// Stats returns the counters.
func (c *Core) Stats() Stats { return c.stats }

// Close stops the Core: open streams end, requests under way get Unavailable.
func (c *Core) Close() {
	if c.state == stateClosed {
		return
	}
	c.stop(codec.ErrStopped)
	c.state, c.reason = stateClosed, "stopped"
}

// fail gives up: the coordinator or a shard is not what this Core believed in.
func (c *Core) fail(err error) {
	if c.state == stateFailed || c.state == stateClosed {
		return
	}
	c.log.Error("cannot serve", "err", err)
	c.stop(codec.Status{Code: codec.Unavailable, Msg: "etcdserver: " + err.Error()})
	c.state, c.reason = stateFailed, err.Error()
}

// stop ends everything under way with st.
func (c *Core) stop(st codec.Status) {
	c.state = stateFailed
	for _, s := range c.shards {
		s.stop(st)
	}
	for len(c.histories) > 0 {
		c.histories[0].Close()
	}
	c.leases.stop(st)
	c.clock.Stop()
	queue := c.nowQueue
	c.nowQueue = nil
	for _, e := range queue {
		e.w.abandon(st)
	}
	c.stopLists(st)
	// Timers stay: requests that wait for something else end at their deadlines.
}

// Submit takes a request. op.Done is called when it is answered, possibly within Submit.
func (c *Core) Submit(op *Op) {
	op.canceled, op.admitted, op.Status, op.Resp = false, false, codec.Status{}, op.Resp[:0]
	if c.state != stateReady {
		_, why := c.Ready()
		c.finish(op, codec.Status{Code: codec.Unavailable, Msg: "etcdserver: not ready: " + why})
		return
	}
	p := &op.core.plan
	switch op.Kind {
	case OpRange, OpPut, OpDeleteRange, OpTxn:
		p.Reset()
		if st := p.Parse(op.Kind, op.Msg, &c.cfg.Limits); st.Code != codec.OK {
			c.finish(op, st)
			return
		}
		switch {
		case op.Kind == OpRange:
			if c.enterList(op) {
				c.submitRange(op)
			}
		case p.ReadOnly():
			if c.enterList(op) {
				c.submitReadTxn(op)
			}
		default:
			c.submitWrite(op)
		}
	case OpCompact:
		c.submitCompact(op)
	case OpStatus:
		c.submitStatus(op)
	case OpAlarm:
		c.submitAlarm(op)
	case OpMemberList:
		c.submitMemberList(op)
	case OpLeaseGrant, OpLeaseRevoke, OpLeaseKeepAlive, OpLeaseTimeToLive, OpLeaseLeases:
		c.submitLease(op)
	default:
		c.finish(op, codec.Status{Code: codec.Unimplemented, Msg: "spindle: not built"})
	}
}

// Cancel says that nobody waits for op any more. A write that is not in a batch yet is dropped, all
// else runs to its end; op.Done is called in any case, and may have been.
func (c *Core) Cancel(op *Op) { op.canceled = true }

// Now calls done with a revision that is at least as large as every revision that anyone was shown
// before the call.
func (c *Core) Now(done func(rev int64, st codec.Status)) {
	if c.state != stateReady {
		_, why := c.Ready()
		done(0, codec.Status{Code: codec.Unavailable, Msg: "etcdserver: not ready: " + why})
		return
	}
	c.awaitNow(&nowCall{done: done})
}

type nowCall struct {
	done func(rev int64, st codec.Status)
}

func (w *nowCall) nowDone(n int64, _ []int64) {
	if w.done != nil {
		f := w.done
		w.done = nil
		f(n, codec.Status{})
	}
}

func (w *nowCall) abandon(st codec.Status) {
	if w.done != nil {
		f := w.done
		w.done = nil
		f(0, st)
	}
}

func (c *Core) awaitNow(w nowWaiter) {
	if c.cfg.Sabotage.CutOffNow && c.connecting == nil && c.clock.LastError() != "" {
		c.after(0, func() { w.nowDone(c.clock.Log().N(), c.clock.Log().AppendA(nil)) })
		return
	}
	c.nowQueue = append(c.nowQueue, nowEntry{c.clock.Now(), c.cfg.Now(), w})
	c.armSweep()
}

func (c *Core) armSweep() {
	if !c.sweeping {
		c.sweeping = true
		c.after(c.cfg.ShardTimeout/8, c.sweep)
	}
}

// sweep ends the wait of those who have waited for the coordinator for too long, and forgets those whose
// wait for a frontier has ended otherwise.
func (c *Core) sweep() {
	c.sweeping = false
	now := c.cfg.Now()
	c.waiters = slices.DeleteFunc(c.waiters, func(w frontierWaiter) bool { return w.deadline <= now })
	limit := now - int64(c.cfg.ShardTimeout)
	k := 0
	for k < len(c.nowQueue) && c.nowQueue[k].at <= limit {
		k++
	}
	late := c.nowQueue[:k:k]
	c.nowQueue = c.nowQueue[k:]
	if len(c.nowQueue) > 0 || len(c.waiters) > 0 {
		c.armSweep()
	}
	for _, e := range late {
		e.w.abandon(codec.ErrTimeout)
	}
}

// awaitFrontier calls f once the frontier of shard (or All) is at rev, at once if it is there, never
// after the deadline.
func (c *Core) awaitFrontier(shard int, rev, deadline int64, f func()) {
	if c.frontier.Get(shard) >= rev {
		f()
		return
	}
	c.waiters = append(c.waiters, frontierWaiter{shard, rev, c.cfg.Now(), deadline, f})
	c.armSweep()
	c.armLagLook()
}

// finish answers op with st. Resp must be complete when st is OK.
func (c *Core) finish(op *Op, st codec.Status) {
	c.leaveList(op)
	op.Status = st
	op.Done(op)
}

// Flush ends a turn: closed batches, reads, ticks leave; frontiers are published.
func (c *Core) Flush() {
	if c.state == stateFailed || c.state == stateClosed {
		return
	}
	for range 8 { // what is woken may itself have something to send
		if c.gatesOpen {
			c.startLists()
		}
		if c.stale {
			c.stale = false
			c.moveFrontiers()
		}
		if c.frontierRose {
			c.frontierRose = false
			c.wakeWaiters()
			c.tryHistories()
			if c.onFrontier != nil {
				c.onFrontier()
			}
		}
		if c.dirty {
			c.dirty = false
			for _, s := range c.shards {
				s.flushWrites()
				s.flushReads()
			}
		}
		c.recentTurn = nil // its now leaves
		c.clock.Flush()
		if !c.dirty && !c.stale && !c.frontierRose && !c.gatesOpen {
			return
		}
	}
	c.after(0, func() {}) // there is more: another turn, at once
}

func (c *Core) wakeWaiters() {
	if len(c.waiters) == 0 {
		return
	}
	all := c.waiters
	c.waiters = nil
	for _, w := range all {
		if c.frontier.Get(w.shard) >= w.rev {
			w.f()
		} else {
			c.waiters = append(c.waiters, w)
		}
	}
}

// moveFrontiers recomputes every F_i from the log and the streams, and publishes it.
func (c *Core) moveFrontiers() {
	if c.frontier == nil {
		return
	}
	l := c.clock.Log()
	for i, s := range c.shards {
		if c.connecting != nil {
			// The log may be of a coordinator that is not believed. What a stream has shown stays true.
			if f := l.Clock(i); f > c.frontier.Get(i) {
				c.frontier.Set(i, f)
				c.frontierRose = true
			}
			continue
		}
		f := l.Frontier(i)
		if c.cfg.Sabotage.FrontierIgnoresRanges || c.cfg.Sabotage.DeadShardPassed && s.handle == nil {
			f = l.N()
		}
		if f > c.frontier.Get(i) {
			c.frontier.Set(i, f)
			c.frontierRose = true
		}
		if s.streaming {
			s.watchOpenRanges()
		}
	}
	if c.frontierRose {
		c.publishCompaction()
	}
	c.trimRing()
	for _, s := range c.shards {
		s.resumeStream()
	}
}
