package sim

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"time"

	"spindle/codec"
	"spindle/shard"
	"spindle/watchring"
)

// Bounds of a run, in virtual time.
const (
	maxStart    = 60 * time.Second // for all proxies to be ready
	maxChaos    = 60 * time.Second // of faults, if the clients have not issued all their operations before
	maxDrain    = 90 * time.Second // for all operations to finish once the faults have stopped
	maxSettle   = 20 * time.Second // for every frontier to reach now once nothing is written any more
	maxOutlive  = 5 * time.Minute  // for the keys of leases that have ended to go: reconciliations come each minute
	maxSpins    = 20000            // turns at one moment: more is a livelock
	maxWalks    = 20000            // the same for a hub: it goes over the ring at most, not over what a rebuild left out
	maxTimeouts = 4                // times the shard timeout, for an operation to end one way or the other
	maxCrashes  = 6
	maxWipes    = 8
	maxMistakes = 4
	maxStalls   = 12
	maxDeaths   = 4
	maxRestores = 6
	maxViewers  = 8 // streams open at one proxy
	maxFailures = 0 // cores that give up; nothing in a run is a reason to
)

// Run is one run.
type Run struct {
	Config
	net     *Net
	proxies []*proxy
	chaos   bool // faults are on
	issued  int  // operations begun
	open    int  // operations under way
	ops     []*op
	forced  int64   // somebody else compacted a member up to this revision, 0 if nobody did
	forces  []force // each time
	// compacted is the largest revision that a client was told is compacted.
	compacted   int64
	compactedAt int64 // virtual time when it was told so
	shown       int64 // the largest revision that any client was shown
	expired     map[expiry]bool
	leaseIDs    []int64         // that clients were given
	foreigns    map[string]bool // values that somebody else put
	part        *shard.Partition
	follows     []*follower
	viewers     []*viewer
	fault       error // what was found while running
	wiped       int64 // when the coordinator lost its data last, virtual ns
	loss        *loss // of a member's data, nil before
	healed      int64 // when a restored member was given its newest state last, ns
	stats       Stats
}

// Stats tells what a run did.
type Stats struct {
	Events, Ops, OK, Unknown, Crashes, Failures, Lapped, Facts, Compactions int
	// Wipes counts losses of the coordinator, Stalls proxies that stood still, Mistakes those that came to another
	// coordinator.
	Wipes, Stalls, Mistakes int
	// Cuts counts partitions, Deaths clusters that died and came back, Fulls members that were out of space, Mid the stalls
	// in the middle of something (midReplace and so on).
	Cuts, Deaths, Fulls int
	Mid                 [midSteps]int
	// Restores counts members that were restored to an older state, Losses those that did not get their newest one back.
	// Cut counts starts that were to accept that and ended early.
	Restores, Losses, Cut int
	// Both counts how often the coordinator was lost while a member had an older state, or a member got one while the coordinator was lost.
	Both int
	// Outdated counts proxies that started again because a loss was accepted.
	Outdated int
	// Streams counts RangeStreams that ended well, Chunks the chunks of all.
	Streams, Chunks int
	// Leased counts puts that got a lease of a client, Ended the deletes by the end of one.
	Leased, Ended int
	// Spared counts revisions that a batch left to what had happened without a record. One stays unused if the stream was
	// slow to show that the batch before it had covered that already.
	Spared int
	// Withdrawn counts operations that their client canceled.
	Withdrawn int
	// Viewed counts events that watches delivered, Canceled the watches that were canceled.
	Viewed, Canceled int
	// Histories counts reads of the past, PastEntries the revisions that they brought.
	Histories, PastEntries int
	// Judged counts operations of a key that porcupine has put in order, Undecided the keys for which it had no time.
	Judged, Undecided int
	// Now is the largest revision handed out in the end.
	Now int64
	// SlowestAlive is the longest that one took which did not need a dead shard.
	SlowestAlive time.Duration
	// Slowest is the longest that an operation took, in virtual time.
	Slowest time.Duration
	Core    shard.Stats
}

type expiry struct {
	shard int
	local int64
}

// Go runs a configuration to its end, and checks it.
func Go(cfg Config) (Stats, error) {
	r := newRun(cfg)
	err := r.drive()
	r.stats.Events, r.stats.Ops = int(r.net.events), len(r.ops)
	for _, p := range r.proxies {
		if p.core != nil {
			r.stats.Core = addStats(r.stats.Core, p.core.Stats())
		}
	}
	if err == nil && !cfg.LinearOnly {
		err = r.check()
	}
	if err == nil {
		err = r.linear()
	}
	if err != nil {
		err = fmt.Errorf("seed %d: %w", cfg.Seed, err)
	}
	return r.stats, err
}

// newRun makes the world of a run. Its proxies start with the first step.
func newRun(cfg Config) *Run {
	r := &Run{Config: cfg, expired: map[expiry]bool{}, foreigns: map[string]bool{}}
	r.net = NewNet(rand.New(rand.NewPCG(cfg.Seed, 1)), cfg.Shards)
	r.net.Trace, r.net.Tamper, r.net.TamperReply, r.net.Sent = cfg.Trace, cfg.Tamper, cfg.TamperReply, r.sent
	for _, m := range r.net.Members {
		m.MaxTxnOps, m.MaxRequestBytes = cfg.MaxTxnOps, cfg.MaxRequestBytes
		m.AutoLease = leaseOf
		m.Grant(simLease)
	}
	for i := range cfg.Proxies {
		p := &proxy{r: r, idx: i, skew: int64(r.net.Between(0, time.Hour))}
		r.proxies = append(r.proxies, p)
		for j := range cfg.Clients {
			p.clients = append(p.clients, &client{p: p, name: fmt.Sprintf("p%dc%d", i, j), alive: cfg.Dead && j%2 == 0})
		}
		p.boot(r.net.Between(0, 50*time.Millisecond))
	}
	return r
}

func (r *Run) fail(format string, args ...any) {
	if r.fault == nil {
		r.fault = fmt.Errorf(format, args...)
		r.net.tracef("VIOLATION: %v", r.fault)
	}
}

// until runs the world until cond holds, for at most d; false if it never held.
func (r *Run) until(d time.Duration, cond func() bool) bool {
	end := r.net.now + int64(d)
	for r.fault == nil && !cond() {
		if !r.net.Step(end) {
			return cond()
		}
		for _, c := range append([]*Cluster{r.net.Coord}, r.net.Members...) {
			if c.Broken != nil {
				r.fail("%s: %v", c, c.Broken)
			}
		}
	}
	return r.fault == nil
}

func (r *Run) drive() error {
	all := func(f func(p *proxy) bool) bool {
		for _, p := range r.proxies {
			if !f(p) {
				return false
			}
		}
		return true
	}
	ready := func() bool { return all(func(p *proxy) bool { return p.ready }) }
	if !r.until(maxStart, ready) && r.fault == nil {
		r.fail("not every proxy is ready after %v: %s", maxStart, r.whyNotReady())
	}
	if r.fault != nil {
		return r.fault
	}
	r.chaos = true
	r.net.Faults = r.Faults
	r.net.tracef("---- all ready: faults on")
	if r.Chaos > 0 {
		r.net.After(r.net.Between(0, 2*r.Chaos), r.mischief)
	}
	if r.Lose {
		r.net.After(r.net.Between(0, time.Second), r.lose)
	}
	if r.Dead {
		r.deadCluster().Pause()
	}
	for _, p := range r.proxies {
		for _, c := range p.clients {
			c.next()
		}
	}
	r.until(maxChaos, func() bool { return r.issued >= r.Ops })
	if r.fault != nil {
		return r.fault
	}
	r.calm()
	r.net.tracef("---- faults off")
	if l := r.loss; l != nil {
		if !r.until(maxDrain, func() bool { return !r.losing() }) && r.fault == nil {
			r.fail("the loss of %s is not accepted %v after the faults stopped: %s", l.c, maxDrain, r.whyNotReady())
		}
		r.stats.Cut += l.cuts
	}
	if !r.until(maxDrain, func() bool { return r.issued >= r.Ops && r.open == 0 && ready() }) && r.fault == nil {
		r.fail("%d operations of %d begun have not finished %v after the faults stopped: %s; %s", r.open, r.issued, maxDrain, r.openOps(), r.whyNotReady())
	}
	if r.fault != nil {
		return r.fault
	}
	r.net.tracef("---- all operations have finished")
	// What waits for a record gets one, and every frontier reaches now, without further traffic. What is
	// late arrives first.
	r.until(MaxLate+3*time.Second, func() bool { return false })
	if l := r.loss; l != nil { // a proxy that has nothing else to do sees to that in a while
		_, end := l.fence()
		r.until(time.Minute, func() bool { return r.unrecorded(end) == nil })
	}
	if r.fault != nil {
		return r.fault
	}
	if r.awaitLeases(); r.fault != nil {
		return r.fault
	}
	var now int64
	left := len(r.proxies)
	for _, p := range r.proxies {
		if !p.ready {
			return fmt.Errorf("p%d is not ready any more in a calm world", p.idx)
		}
		p.core.Now(func(rev int64, st codec.Status) {
			left--
			if st.Code != codec.OK {
				r.fail("now fails on p%d in a calm world: %s", p.idx, st.Msg)
			}
			now = max(now, rev)
			r.stats.Now = now
		})
		p.turn()
	}
	for _, v := range r.viewers {
		v.unblock()
		v.askProgress()
	}
	seen := func() bool {
		for _, v := range r.viewers {
			if !v.settled(now) {
				return false
			}
		}
		return true
	}
	if !r.until(maxSettle, func() bool {
		return left == 0 && all(func(p *proxy) bool { return p.core.Frontier().Get(watchring.All) >= now }) && seen()
	}) && r.fault == nil {
		s := ""
		for _, p := range r.proxies {
			s += fmt.Sprintf(" p%d: %d", p.idx, p.core.Frontier().Get(watchring.All))
			for i := range r.Shards {
				s += fmt.Sprintf(" F%d=%d", i, p.core.Frontier().Get(i))
			}
		}
		for _, v := range r.viewers {
			if !v.settled(now) {
				s += fmt.Sprintf(" %s was promised %d", v.name, v.views[0].promised)
			}
		}
		r.fail("frontiers or watches do not reach now (%d) in a calm world:%s", now, s)
	}
	return r.fault
}

func (r *Run) whyNotReady() string {
	s := ""
	for _, p := range r.proxies {
		if !p.up {
			s += fmt.Sprintf(" p%d is down;", p.idx)
		} else if ok, why := p.core.Ready(); !ok {
			s += fmt.Sprintf(" p%d: %s;", p.idx, why)
		}
	}
	return s
}

func (r *Run) openOps() string {
	s := ""
	for _, o := range r.ops {
		if !o.ended {
			s += " " + o.String() + ";"
		}
	}
	return s
}

func (r *Run) key() string { return keyName(r.net.Rand.IntN(r.Keys)) }

// keyName names the keys of a run. Every third one has a lease on the members, so that it may expire.
func keyName(i int) string {
	if i%3 == 2 {
		return fmt.Sprintf("x%02d", i)
	}
	return fmt.Sprintf("k%02d", i)
}

// simLease is the lease that the keys which may expire carry.
const simLease = 7

func leaseOf(key []byte) int64 {
	if len(key) > 0 && key[0] == 'x' {
		return simLease
	}
	return 0
}

// show notes that a client was shown rev.
func (r *Run) show(rev int64) { r.shown = max(r.shown, rev) }

// plus adds up what several runs did; of the slowest it keeps the larger.
func (s Stats) plus(o Stats) Stats {
	a, b := reflect.ValueOf(&s).Elem(), reflect.ValueOf(o)
	for i := range a.NumField() {
		if f := a.Field(i); f.Kind() == reflect.Int {
			f.SetInt(f.Int() + b.Field(i).Int())
		}
	}
	for i := range s.Mid {
		s.Mid[i] += o.Mid[i]
	}
	s.Slowest, s.SlowestAlive = max(s.Slowest, o.Slowest), max(s.SlowestAlive, o.SlowestAlive)
	s.Core = addStats(s.Core, o.Core)
	return s
}

func addStats(a, b shard.Stats) shard.Stats {
	a.Batches += b.Batches
	a.BatchedWrites += b.BatchedWrites
	a.Rejected += b.Rejected
	a.Fences += b.Fences
	a.WrongCreates += b.WrongCreates
	a.FlatFailed += b.FlatFailed
	a.Ahead += b.Ahead
	a.Settled += b.Settled
	a.LostReplies += b.LostReplies
	a.Doomed += b.Doomed
	a.DoomedWrong += b.DoomedWrong
	a.ReadBatches += b.ReadBatches
	a.BatchedReads += b.BatchedReads
	a.Rereads += b.Rereads
	a.RecentReads += b.RecentReads
	a.Unrecorded += b.Unrecorded
	a.Foreign += b.Foreign
	a.Rebuilds += b.Rebuilds
	a.LeaseAttaches += b.LeaseAttaches
	a.LeaseCopiesRevoked += b.LeaseCopiesRevoked
	a.LeaseReconciliations += b.LeaseReconciliations
	a.LeasesReconciled += b.LeasesReconciled
	a.LeaseOrphans += b.LeaseOrphans
	a.LargeWaited += b.LargeWaited
	a.LargeRefused += b.LargeRefused
	return a
}

var errNoAnswer = errors.New("the proxy died")
