package shard

import (
	"log/slog"
	"time"

	"spindle/codec"
	"spindle/revclock"
	"spindle/watchring"
)

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
	outdated string // why this proxy is to be started again
	leaving  leaveStep
	staying  string // why it must not end, "" if it may, or if that was not asked yet

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
	gatesOpen  bool  // one of them has room again
	gatesAt    int64 // when a timer will look whose time is over, 0: none is set
	gatesLook  bool  // a timer will open them
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
	shapes       listShapes
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
	// Doomed counts Txns that were read because they could only fail, DoomedWrong those of them that could be written after all.
	Doomed, DoomedWrong uint64
	// Ahead counts batches that were closed while another one was away.
	Ahead uint64
	// FlatFailed counts batches that were sent again in their nested form.
	FlatFailed uint64
	// Leases that were brought to a shard, copies that this proxy revoked after their lease had ended, turns
	// of reconciliation, those of them that every shard has answered, and copies found by them that no marker named.
	LeaseAttaches, LeaseCopiesRevoked, LeaseReconciliations, LeasesReconciled, LeaseOrphans uint64
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
		switch {
		case c.connecting == nil:
			return true, c.refusals
		case c.staying != "":
			return false, c.connecting.waitingFor() + "; " + c.staying
		}
		return false, c.connecting.waitingFor()
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
	op.core.since = 0
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
	case OpAuthStatus:
		c.submitAuthStatus(op)
	case OpLeaseGrant, OpLeaseRevoke, OpLeaseKeepAlive, OpLeaseTimeToLive, OpLeaseLeases:
		c.submitLease(op)
	default:
		c.finish(op, codec.Status{Code: codec.Unimplemented, Msg: "spindle: not built"})
	}
}

// Cancel says that nobody waits for op any more. A write that is not in a batch yet is dropped, all
// else runs to its end; op.Done is called in any case, and may have been.
func (c *Core) Cancel(op *Op) { op.canceled = true }

// finish answers op with st. Resp must be complete when st is OK.
func (c *Core) finish(op *Op, st codec.Status) {
	c.listEnds(op, st)
	op.Status = st
	op.Done(op)
}
