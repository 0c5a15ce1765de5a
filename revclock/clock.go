package revclock

import (
	"math/rand/v2"
	"time"

	"spindle/codec"
)

// Config is what a Clock is made with. Zero numbers take the defaults of New.
type Config struct {
	// Proxy is the identity of this process, random at every start: the holder of its ranges.
	Proxy ID
	// Shards is the number of shards of the partition map.
	Shards int
	// Now is the clock in nanoseconds; it never runs backwards and is above 0.
	Now func() int64
	// Rand is the source of jitter. The simulation seeds it.
	Rand *rand.Rand
	// SnapshotEvery is the number of ticks after which a snapshot is written (default 1000). Proxies add
	// up to an eighth of it at random, so that they do not all write the same one.
	SnapshotEvery int
	// CallTimeout bounds one request to the coordinator (default 2 s), after which its outcome is looked for.
	CallTimeout time.Duration
	// WatchStall is how long the watch may lack a tick that is known to be there (default 1 s) before it
	// is opened anew, on another node.
	WatchStall time.Duration
}

// StartArgs is what the shards say.
type StartArgs struct {
	// Epoch is the one that every shard's map names.
	Epoch ID
	// N is the largest N that is known to have been handed out: a coordinator that has less has lost data.
	N int64
	// Clocks has the largest clock seen of each shard. It must have been read before the call of Start:
	// in the other order, a busy system looks like a coordinator that has lost data.
	Clocks []int64
	// Cluster is the cluster ID that the map names for the coordinator, 0 to accept any.
	Cluster uint64
}

// Stats counts what a Clock did.
type Stats struct {
	Ticks      uint64 // sent
	Granted    uint64 // requests that got a range
	FastTicks  uint64 // own ticks that the reply of the coordinator already told
	LostTicks  uint64 // ticks whose outcome had to be looked for
	Reticks    uint64 // ticks sent again, with a new nonce
	Orphans    uint64 // own ranges that nobody used
	Folded     uint64 // ticks folded, of everybody
	NowReads   uint64 // linearizable reads sent
	Nows       uint64 // nows answered by them
	Watches    uint64 // watches opened
	Stalls     uint64 // watches given up because they lacked a tick that is there
	Reloads    uint64 // folds that went on from a snapshot, because history was compacted
	Snapshots  uint64 // written
	CallErrors uint64 // requests to the coordinator that failed
}

// Retries of requests to the coordinator.
const (
	backoffMin = int64(10 * time.Millisecond)
	// The connections wait longer between two dials. This wait comes on top of that one when the coordinator is back, so it
	// is short.
	backoffMax = int64(100 * time.Millisecond)
	// maxHoles bounds the attempts to find a snapshot that the coordinator's history still reaches back to.
	maxHoles = 8
)

type clockState uint8

const (
	stateIdle     clockState = iota // before Start, after Stop or Lost
	stateReading                    // reads e, s and t
	stateCatching                   // folds up to what was read
	stateRunning
)

// Clock keeps a Log up to date with the coordinator, and hands out ranges of revisions and nows.
//
// It belongs to one goroutine (the core's); all methods and the completions of the Transport run there.
// Flush must be called at the end of each turn in which anything of it was called or completed: only
// Flush sends. Events are reported from within completions, never from within Request, Now or Flush;
// handlers may call every method.
//
// Requests and nows wait while the coordinator does not answer, however long; LastError tells why. They
// are dropped by Lost and by Stop.
type Clock struct {
	cfg   Config
	tr    codec.Transport
	ev    Events
	log   *Log
	stats Stats

	state    clockState
	gen      uint64 // completions of an older one are ignored; new with each Start and Stop
	args     StartArgs
	epoch    []byte // the value of the key e
	epochMod int64  // its revision on the coordinator, as read
	started  bool   // Started was reported
	lastErr  string
	buf      []byte
	val      []byte

	read   readState
	watch  watchState
	ticks  tickState
	now    nowState
	snap   snapState
	grants []grant
	as     []int64
}

// grant is a range that is to be reported.
type grant struct {
	shard int
	token uint64
	r     Range
}

// retry spaces out attempts of one kind.
type retry struct {
	n  int
	at int64 // not before
}

// New makes a Clock. Its Log exists at once, so that the streams can tell it their clocks; all else
// waits for Start.
func New(cfg Config, tr codec.Transport, ev Events) *Clock {
	if cfg.Rand == nil {
		cfg.Rand = rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	}
	if cfg.SnapshotEvery <= 0 {
		cfg.SnapshotEvery = 1000
	}
	if cfg.CallTimeout <= 0 {
		cfg.CallTimeout = 2 * time.Second
	}
	if cfg.WatchStall <= 0 {
		cfg.WatchStall = time.Second
	}
	c := &Clock{cfg: cfg, tr: tr, ev: ev, log: NewLog(cfg.Proxy, cfg.Shards)}
	c.ticks.slots = make([]tickSlot, cfg.Shards)
	return c
}

// Log returns the fold. The owner tells it the shards' clocks (Committed, SetClock), and changes nothing else.
func (c *Clock) Log() *Log { return c.log }

// Stats returns the counters.
func (c *Clock) Stats() Stats { return c.stats }

// Running says that the Log follows the coordinator.
func (c *Clock) Running() bool { return c.state == stateRunning }

// LastError returns why the latest request to the coordinator failed, or "" if it did not.
func (c *Clock) LastError() string { return c.lastErr }

// Start connects to the coordinator: Started or Lost is reported, after any time.
func (c *Clock) Start(args StartArgs) {
	c.reset()
	c.log.restart()
	c.args = args
	c.epoch = AppendEpoch(nil, args.Epoch)
	c.state = stateReading
	c.Flush()
}

// Stop ends everything, without an event.
func (c *Clock) Stop() { c.reset() }

// reset goes back to idle. Clocks in the Log stay, tickets and nonces count on.
func (c *Clock) reset() {
	c.gen++
	c.state, c.started = stateIdle, false
	c.closeWatch()
	c.read, c.snap = readState{}, snapState{}
	c.watch = watchState{gen: c.watch.gen}
	c.now = nowState{ticket: c.now.ticket, asked: c.now.ticket}
	clear(c.ticks.slots)
	c.ticks = tickState{slots: c.ticks.slots, nonce: c.ticks.nonce}
	c.grants = c.grants[:0]
	c.lastErr, c.epochMod = "", 0
}

// lose reports that the coordinator is not the one believed in.
func (c *Clock) lose(err error) {
	if c.state == stateIdle {
		return
	}
	c.reset()
	c.lastErr = err.Error()
	c.ev.Lost(err)
}

// Flush sends what waits and is due. See Clock.
func (c *Clock) Flush() {
	now := c.cfg.Now()
	if c.state == stateReading {
		c.sendRead(now)
		return
	}
	c.openWatch(now)
	if c.state == stateRunning {
		c.sendTick(now)
		c.sendNow(now)
		c.sendSnapshot(now)
	}
}

// Deadline returns when Tick wants to be called, in the nanoseconds of Config.Now; 0 for never.
func (c *Clock) Deadline() int64 {
	var least int64
	due := func(wanted bool, at int64) {
		if wanted && at > 0 && (least == 0 || at < least) {
			least = at
		}
	}
	switch c.state {
	case stateIdle:
		return 0
	case stateReading:
		due(!c.read.busy, c.read.retry.at)
		return least
	}
	due(c.watch.handle == nil, c.watch.retry.at)
	due(c.watch.handle != nil, c.watch.stallAt)
	if c.state == stateRunning {
		due((c.ticks.waiting > 0 || c.ticks.naming) && !c.ticks.active, c.ticks.retry.at)
		due(c.now.ticket > c.now.asked && !c.now.busy, c.now.retry.at)
		due(c.snapshotDue() && !c.snap.busy, c.snap.retry.at)
	}
	return least
}

// Tick does what is due.
func (c *Clock) Tick() {
	c.checkStall(c.cfg.Now())
	c.Flush()
}

// failed notes that a request failed, and sets when the next attempt may be.
func (c *Clock) failed(r *retry, what string, st codec.Status) {
	c.stats.CallErrors++
	c.lastErr = what + ": " + st.Msg
	d := backoffMin << min(r.n, 10)
	d = min(d, backoffMax)
	r.n++
	r.at = c.cfg.Now() + d/2 + c.cfg.Rand.Int64N(d)
}

func (c *Clock) succeeded(r *retry) {
	*r = retry{}
	c.lastErr = ""
}

// call is one request to the coordinator; done gets the outcome if the Clock has not been restarted since.
type call struct {
	c    *Clock
	gen  uint64
	done func(c *Clock, id uint64, resp []byte, st codec.Status, sent bool)
	id   uint64
}

func (k *call) Complete(resp []byte, st codec.Status, sent bool) {
	if k.c.gen == k.gen {
		k.done(k.c, k.id, resp, st, sent)
	}
}

func (c *Clock) call(m codec.Method, req []byte, id uint64, done func(c *Clock, id uint64, resp []byte, st codec.Status, sent bool)) {
	c.tr.Call(codec.Coordinator, m, req, c.cfg.CallTimeout, &call{c, c.gen, done, id})
}

var statusUnreadable = codec.Status{Code: codec.Internal, Msg: "the coordinator's answer cannot be read"}

// moved is called after ticks were folded: it settles what waited for them and reports everything.
// The Clock may have been stopped or started anew when it returns.
func (c *Clock) moved(folded bool) {
	gen := c.gen
	c.armStall()
	if c.state == stateCatching && c.log.rev >= c.read.goal {
		if !c.caughtUp() {
			return
		}
		folded = true
	}
	grants := c.grants
	c.grants = nil
	for i := range grants {
		c.stats.Granted++
		c.ev.Granted(grants[i].shard, grants[i].token, grants[i].r)
		if c.gen != gen {
			return
		}
	}
	if c.grants == nil {
		clear(grants)
		c.grants = grants[:0]
	}
	if !c.started {
		return
	}
	if folded {
		if c.ev.Folded(); c.gen != gen {
			return
		}
	}
	if c.state == stateRunning {
		c.settleTick()
		c.answerNows()
	}
	c.armStall()
}
