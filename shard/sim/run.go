package sim

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/revclock"
	"spindle/shard"
	"spindle/watchring"
)

// Config is what one run is made of.
type Config struct {
	Seed    uint64
	Shards  int
	Proxies int
	Clients int // per proxy
	Keys    int // few keys contend
	Ops     int // of all clients together
	// Think is the longest pause of a client between two operations.
	Think time.Duration
	// Base and Jitter are the one-way delays of a link; Far is added for the last proxy.
	Base, Jitter, Far time.Duration
	// Faults are the chances per request while the chaos lasts.
	Faults Faults
	// Chaos is the mean time between two larger events, 0 for none, and Events chooses among them.
	Chaos  time.Duration
	Events ChaosEvents
	// RingSize is the proxies' ring.
	RingSize int
	// MaxTxnOps and MaxRequestBytes are the members' limits; Pad is what values are padded with, at most.
	MaxTxnOps, MaxRequestBytes, Pad int
	// Window and Timeout are the core's ReorderWindow and ShardTimeout.
	Window, Timeout time.Duration
	SnapshotEvery   int

	Sabotage shard.Sabotage
	// Tamper and TamperReply plant bugs on the wire; see Net.
	Tamper      func(to codec.ClusterID, m codec.Method, req []byte) []byte
	TamperReply func(from codec.ClusterID, m codec.Method, req, resp []byte) []byte
	// Trace, if set, gets a line for everything that happens.
	Trace func(line string)
}

// ChaosEvents says which larger events may happen.
type ChaosEvents struct {
	Reset, Down, Hole, Pause, Lag, StreamHole, Crash, Expire bool
	// Compact lets somebody else compact a member.
	Compact bool
}

// Bounds of a run, in virtual time.
const (
	maxStart    = 60 * time.Second // for all proxies to be ready
	maxChaos    = 60 * time.Second // of faults, if the clients have not issued all their operations before
	maxDrain    = 90 * time.Second // for all operations to finish once the faults have stopped
	maxSettle   = 20 * time.Second // for every frontier to reach now once nothing is written any more
	maxSpins    = 20000            // turns at one moment: more is a livelock
	maxCrashes  = 6
	maxFailures = 0 // cores that give up; nothing in a run is a reason to
)

// ConfigOf makes the configuration of a seed: every seed has faults of its own, many have few.
func ConfigOf(seed uint64) Config {
	r := rand.New(rand.NewPCG(seed, 0xc0f19))
	ms := func(a, b int) time.Duration { return time.Duration(a+r.IntN(b-a+1)) * time.Millisecond }
	some := func(p float64) float64 {
		if r.IntN(2) == 0 {
			return 0
		}
		return p * r.Float64()
	}
	c := Config{
		Seed: seed, Shards: 1 + r.IntN(4), Proxies: 1 + r.IntN(3), Clients: 1 + r.IntN(5),
		Keys: 2 + r.IntN(12), Ops: 60 + r.IntN(240),
		Think: ms(0, 20), Base: time.Duration(50+r.IntN(500)) * time.Microsecond, Jitter: time.Duration(r.IntN(3000)) * time.Microsecond,
		RingSize: 1 << 12, MaxTxnOps: 128, MaxRequestBytes: defaultMaxRequestBytes,
		Window: 250 * time.Millisecond, Timeout: 5 * time.Second, SnapshotEvery: 5 + r.IntN(100),
	}
	if r.IntN(3) == 0 {
		c.Far = ms(1, 8)
	}
	if r.IntN(6) == 0 {
		c.RingSize = 32
	}
	if r.IntN(3) == 0 {
		c.SnapshotEvery = 1 + r.IntN(8)
	}
	switch r.IntN(6) {
	case 0:
		c.MaxTxnOps = 12 + r.IntN(30)
	case 1:
		c.MaxRequestBytes, c.Pad = 4<<10, 600
	}
	switch r.IntN(6) {
	case 0:
		c.Think = ms(100, 400)
	case 1, 2: // crowded: batches of many
		c.Think, c.Clients, c.Shards = 0, 4+r.IntN(12), 1+r.IntN(2)
		c.Keys = 8 + r.IntN(30)
	}
	if r.IntN(5) > 0 {
		c.Faults = Faults{
			LoseRequest: some(0.04), LoseReply: some(0.08), Late: some(0.06), Refused: some(0.03),
			NoLeader: some(0.05), Unsent: some(0.04), SlowReply: some(0.05), SlowRequest: some(0.05),
		}
	}
	if r.IntN(5) > 0 {
		on := func() bool { return r.IntN(2) == 0 }
		c.Chaos = ms(10, 150)
		c.Events = ChaosEvents{Reset: on(), Down: on(), Hole: r.IntN(4) == 0, Pause: on(), Lag: on(), StreamHole: on(), Crash: r.IntN(3) == 0, Expire: on(), Compact: r.IntN(6) == 0}
	}
	return c
}

// Run is one run.
type Run struct {
	Config
	net     *Net
	proxies []*proxy
	chaos   bool // faults are on
	issued  int  // operations begun
	open    int  // operations under way
	ops     []*op
	forced  int64 // somebody else compacted a member up to this revision, 0 if nobody did
	shown   int64 // the largest revision that any client was shown
	expired map[expiry]bool
	part    *shard.Partition
	follows []*follower
	fault   error // what was found while running
	stats   Stats
}

// Stats tells what a run did.
type Stats struct {
	Events, Ops, OK, Unknown, Crashes, Failures, Lapped, Facts, Compactions int
	// Now is the largest revision handed out in the end.
	Now int64
	// Slowest is the longest that an operation took, in virtual time.
	Slowest time.Duration
	Core    shard.Stats
}

type expiry struct {
	shard int
	local int64
}

// proxy is one place where a proxy runs, through all its lives.
type proxy struct {
	r        *Run
	idx      int
	life     int
	host     *Host
	core     *shard.Core
	up       bool
	ready    bool
	timerAt  int64
	spinAt   int64
	spins    int
	clients  []*client
	followed []*follower
	skew     int64
}

// Go runs a configuration to its end, and checks it.
func Go(cfg Config) (Stats, error) {
	r := &Run{Config: cfg, expired: map[expiry]bool{}}
	r.net = NewNet(rand.New(rand.NewPCG(cfg.Seed, 1)), cfg.Shards)
	r.net.Trace, r.net.Tamper, r.net.TamperReply = cfg.Trace, cfg.Tamper, cfg.TamperReply
	for _, m := range r.net.Members {
		m.MaxTxnOps, m.MaxRequestBytes = cfg.MaxTxnOps, cfg.MaxRequestBytes
		m.AutoLease = leaseOf
		m.Grant(simLease)
	}
	for i := range cfg.Proxies {
		p := &proxy{r: r, idx: i, skew: int64(r.net.Between(0, time.Hour))}
		r.proxies = append(r.proxies, p)
		for j := range cfg.Clients {
			p.clients = append(p.clients, &client{p: p, name: fmt.Sprintf("p%dc%d", i, j)})
		}
		p.boot(r.net.Between(0, 50*time.Millisecond))
	}
	err := r.drive()
	r.stats.Events, r.stats.Ops = int(r.net.events), len(r.ops)
	for _, p := range r.proxies {
		if p.core != nil {
			r.stats.Core = addStats(r.stats.Core, p.core.Stats())
		}
	}
	if err == nil {
		err = r.check()
	}
	if err != nil {
		err = fmt.Errorf("seed %d: %w", cfg.Seed, err)
	}
	return r.stats, err
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
	if !r.until(maxDrain, func() bool { return r.issued >= r.Ops && r.open == 0 && ready() }) && r.fault == nil {
		r.fail("%d operations of %d begun have not finished %v after the faults stopped: %s; %s", r.open, r.issued, maxDrain, r.openOps(), r.whyNotReady())
	}
	if r.fault != nil {
		return r.fault
	}
	r.net.tracef("---- all operations have finished")
	// What waits for a record gets one, and every frontier reaches now, without further traffic.
	r.until(2*time.Second, func() bool { return false })
	if r.fault != nil {
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
	if !r.until(maxSettle, func() bool {
		return left == 0 && all(func(p *proxy) bool { return p.core.Frontier().Get(watchring.All) >= now })
	}) && r.fault == nil {
		s := ""
		for _, p := range r.proxies {
			s += fmt.Sprintf(" p%d: %d", p.idx, p.core.Frontier().Get(watchring.All))
			for i := range r.Shards {
				s += fmt.Sprintf(" F%d=%d", i, p.core.Frontier().Get(i))
			}
		}
		r.fail("frontiers do not reach now (%d) in a calm world:%s", now, s)
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

// boot starts a new life of p after d.
func (p *proxy) boot(d time.Duration) {
	r := p.r
	r.net.After(d, func() {
		p.life++
		base := r.Base
		if p.idx == r.Proxies-1 {
			base += r.Far
		}
		p.host = r.net.NewHost(fmt.Sprintf("p%d.%d", p.idx, p.life), base, r.Jitter)
		host := p.host
		p.host.Turn = func() {
			if p.host == host {
				p.turn()
			}
		}
		src := rand.New(rand.NewPCG(r.Seed, uint64(100+p.idx*1000+p.life)))
		var id revclock.ID
		id[0], id[1] = byte(p.idx), byte(p.life)
		for i := 2; i < len(id); i++ {
			id[i] = byte(src.IntN(256))
		}
		names := make([]string, r.Shards)
		for i := range names {
			names[i] = fmt.Sprintf("m%d", i)
		}
		log := slog.New(slog.NewTextHandler(io.Discard, nil))
		if r.net.Trace != nil {
			log = slog.New(slog.NewTextHandler(traceWriter{r.net, host.Name}, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: dropTime}))
		}
		p.core = shard.NewCore(shard.CoreConfig{
			Proxy: id, Names: names, Now: func() int64 { return r.net.now + p.skew }, Rand: src, Log: log,
			RingSize: r.RingSize, ReorderWindow: r.Window, ShardTimeout: r.Timeout, SnapshotEvery: r.SnapshotEvery,
			MemberMaxTxnOps: r.MaxTxnOps, MemberMaxRequestBytes: r.MaxRequestBytes, Sabotage: r.Sabotage, MemberName: host.Name,
		}, p.host)
		p.up, p.ready, p.timerAt = true, false, 0
		r.net.tracef("%s: starts", host.Name)
		p.core.Start()
		p.turn()
	})
}

func dropTime(groups []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey && len(groups) == 0 {
		return slog.Attr{}
	}
	return a
}

type traceWriter struct {
	w    *Net
	name string
}

func (t traceWriter) Write(b []byte) (int, error) {
	t.w.tracef("%s: log: %s", t.name, b[:max(len(b)-1, 0)])
	return len(b), nil
}

// crash ends p's process.
func (p *proxy) crash() {
	r := p.r
	r.net.tracef("%s: crashes", p.host.Name)
	p.host.Kill()
	p.up, p.ready = false, false
	r.stats.Core = addStats(r.stats.Core, p.core.Stats())
	p.core = nil
	for _, f := range p.followed {
		f.stopped = true
	}
	p.followed = nil
	for _, c := range p.clients {
		c.proxyDied()
	}
}

// turn ends a turn of p's loop: what it has to send leaves, and its timer is set.
func (p *proxy) turn() {
	r := p.r
	if !p.up || r.fault != nil {
		return
	}
	if p.spinAt != r.net.now {
		p.spinAt, p.spins = r.net.now, 0
	}
	if p.spins++; p.spins > maxSpins {
		r.fail("%s spins: %d turns at one moment", p.host.Name, p.spins)
		return
	}
	core := p.core
	core.Flush()
	if why := core.Failed(); why != "" {
		r.stats.Failures++
		if r.stats.Failures > maxFailures {
			r.fail("%s gave up: %s", p.host.Name, why)
			return
		}
		p.crash()
		p.boot(r.net.Between(0, 100*time.Millisecond))
		return
	}
	if ok, _ := core.Ready(); ok && !p.ready {
		p.ready = true
		r.net.tracef("%s: ready, frontier %d", p.host.Name, core.Frontier().Get(watchring.All))
		r.part = core.Partition()
		p.follow()
		for _, c := range p.clients {
			c.proxyReady()
		}
		core.Flush()
	}
	if d := core.Deadline(); d > 0 {
		d -= p.skew
		d = max(d, r.net.now)
		if p.timerAt == 0 || d < p.timerAt {
			p.timerAt = d
			life := p.life
			// Timers of a real loop are late now and then.
			at := d
			if r.net.Chance(0.3) {
				at += int64(r.net.Between(0, time.Millisecond))
			}
			r.net.at(at, func() {
				if p.life != life || !p.up || p.timerAt != d {
					return
				}
				p.timerAt = 0
				p.core.Tick()
				p.turn()
			})
		}
	}
}

// mischief does one of the larger things that can go wrong, and comes back.
func (r *Run) mischief() {
	if !r.chaos {
		return
	}
	w := r.net
	p := r.proxies[w.Rand.IntN(len(r.proxies))]
	id := codec.ClusterID(w.Rand.IntN(r.Shards+1) - 1)
	ev := &r.Events
	long := w.Between(0, 300*time.Millisecond)
	if w.Chance(0.1) {
		long = w.Between(0, 7*time.Second)
	}
	kinds := []struct {
		on bool
		f  func()
	}{
		{ev.Reset && p.up, func() { p.host.Link(id).Reset() }},
		{ev.Down && p.up, func() {
			l := p.host.Link(id)
			w.tracef("%s-%s: down for %v", p.host.Name, l.cluster, long)
			l.Reset()
			l.Down = true
			w.After(long, func() { l.Down = false })
		}},
		{ev.Hole && p.up, func() {
			l := p.host.Link(id)
			w.tracef("%s-%s: a hole for %v", p.host.Name, l.cluster, long)
			l.Hole = true
			w.After(long, func() {
				w.tracef("%s-%s: the hole ends in a reset", p.host.Name, l.cluster)
				l.Resume()
				l.Reset()
			})
		}},
		{ev.Pause, func() {
			c := w.cluster(id)
			if c.paused {
				return
			}
			w.tracef("%s: paused for %v", c, long)
			c.Pause()
			w.After(long, func() {
				w.tracef("%s: goes on", c)
				c.Resume()
			})
		}},
		{ev.Lag && p.up, func() {
			l := p.host.Link(id)
			lag := w.Between(0, 300*time.Millisecond)
			w.tracef("%s-%s: streams lag by %v for %v", p.host.Name, l.cluster, lag, long)
			l.StreamLag = lag
			w.After(long, func() { l.StreamLag = 0 })
		}},
		{ev.StreamHole && p.up, func() {
			l := p.host.Link(id)
			d := min(long, 2*time.Second)
			w.tracef("%s-%s: streams stand still for %v", p.host.Name, l.cluster, d)
			l.StreamHole = true
			w.After(d, func() { l.Resume() })
		}},
		{ev.Crash && p.ready && r.stats.Crashes < maxCrashes, func() {
			r.stats.Crashes++
			p.crash()
			p.boot(long)
		}},
		{ev.Expire && id >= 0, func() {
			c := w.cluster(id)
			if c.paused {
				return
			}
			var keys []string
			for range 1 + w.Rand.IntN(3) {
				if k := r.key(); leaseOf([]byte(k)) != 0 {
					keys = append(keys, k)
				}
			}
			before := c.Rev()
			c.Expire(keys...)
			if c.Rev() != before {
				w.tracef("%s: %v expire at L%d", c, keys, c.Rev())
				r.expired[expiry{int(id), c.Rev()}] = true
			}
		}},
	}
	if ev.Compact && id >= 0 && w.Chance(0.3) {
		r.forceCompact(w.Members[id])
	}
	for range 20 {
		if k := kinds[w.Rand.IntN(len(kinds))]; k.on {
			k.f()
			break
		}
	}
	w.After(w.Between(0, 2*r.Chaos), r.mischief)
}

// forceCompact compacts a member behind the proxies' backs.
func (r *Run) forceCompact(c *Cluster) {
	at := c.Rev() - int64(r.net.Rand.IntN(10))
	clock := c.at([]byte(keyClock), c.Rev())
	if c.paused || clock == nil || at <= c.Compacted() {
		return
	}
	c.compact = at
	if rec, err := parseRecord(clock.KV.Value); err == nil {
		// What has no record yet will have one of the next revisions.
		r.forced = max(r.forced, rec.last+maxBatch)
	}
	r.stats.Compactions++
	r.net.tracef("%s: somebody compacts it at L%d", c, at)
}

// maxBatch is more than the revisions between two records of a run.
const maxBatch = 200

// calm ends all faults. Those that end by themselves have their time.
func (r *Run) calm() {
	r.chaos = false
	r.net.Faults = Faults{}
	for _, c := range append([]*Cluster{r.net.Coord}, r.net.Members...) {
		if c.paused {
			c.Resume()
		}
	}
	for _, p := range r.proxies {
		if p.host == nil {
			continue
		}
		for _, id := range p.host.ids() {
			l := p.host.Link(id)
			l.Down, l.StreamLag = false, 0
			if l.Hole {
				l.Resume()
				l.Reset()
			}
			l.Resume()
		}
	}
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

// follower reads a proxy's ring behind a frontier, as a Hub does.
type follower struct {
	p       *proxy
	ring    *watchring.Ring
	front   *watchring.Frontier
	shard   int // or watchring.All
	start   int64
	cursor  int64
	last    int64 // where the frontier was
	got     []*delivered
	stopped bool
	name    string
}

type delivered struct {
	rev    int64
	shard  int
	events []*mvccpb.Event
}

// follow begins to follow all frontiers of a proxy that became ready.
func (p *proxy) follow() {
	core := p.core
	for i := watchring.All; i < p.r.Shards; i++ {
		f := &follower{p: p, ring: core.Ring(), front: core.Frontier(), shard: i, name: fmt.Sprintf("%s/%d", p.host.Name, i)}
		f.start = f.ring.Tail()
		f.cursor = f.start
		p.followed = append(p.followed, f)
		p.r.follows = append(p.r.follows, f)
	}
	core.OnFrontier(func() {
		for _, f := range p.followed {
			f.advance()
		}
	})
	for _, f := range p.followed {
		f.advance()
	}
}

func (f *follower) advance() {
	if f.stopped {
		return
	}
	r := f.p.r
	to := f.front.Get(f.shard)
	if to < f.last {
		r.fail("%s: the frontier fell from %d to %d", f.name, f.last, to)
		return
	}
	f.last = to
	if to <= f.cursor {
		return // while a stream was down the ring may have gone past what is complete
	}
	for rev := f.cursor + 1; rev <= to; rev++ {
		e, lapped := f.ring.Load(rev)
		if lapped {
			// Lost: a Hub would go on from the history. Here a new follower begins.
			r.stats.Lapped++
			f.cursor = rev - 1
			f.stopped = true
			n := &follower{p: f.p, ring: f.ring, front: f.front, shard: f.shard, start: to, cursor: to, name: f.name + "'"}
			for i := range f.p.followed {
				if f.p.followed[i] == f {
					f.p.followed[i] = n
				}
			}
			r.follows = append(r.follows, n)
			return
		}
		if e == nil || f.shard != watchring.All && e.Shard != f.shard {
			continue
		}
		d := &delivered{rev: rev, shard: e.Shard}
		for i := range e.Events {
			ev := &mvccpb.Event{}
			if err := proto.Unmarshal(e.Events[i].Body, ev); err != nil {
				r.fail("%s: event at %d: %v", f.name, rev, err)
				return
			}
			bare := &mvccpb.Event{}
			if err := proto.Unmarshal(e.Events[i].Body[:e.Events[i].NoPrev], bare); err != nil || bare.PrevKv != nil || !proto.Equal(bare.Kv, ev.Kv) {
				r.fail("%s: event at %d: NoPrev is wrong", f.name, rev)
				return
			}
			if string(e.Events[i].Key) != string(ev.Kv.Key) || e.Events[i].Delete != (ev.Type == mvccpb.Event_DELETE) {
				r.fail("%s: event at %d: key or kind do not fit the body", f.name, rev)
				return
			}
			d.events = append(d.events, ev)
		}
		f.got = append(f.got, d)
		r.show(rev)
	}
	f.cursor = to
	r.show(to) // a progress notification
}

func addStats(a, b shard.Stats) shard.Stats {
	a.Batches += b.Batches
	a.BatchedWrites += b.BatchedWrites
	a.Rejected += b.Rejected
	a.Fences += b.Fences
	a.WrongCreates += b.WrongCreates
	a.Settled += b.Settled
	a.LostReplies += b.LostReplies
	a.ReadBatches += b.ReadBatches
	a.BatchedReads += b.BatchedReads
	a.Rereads += b.Rereads
	a.Unrecorded += b.Unrecorded
	a.Foreign += b.Foreign
	return a
}

var errNoAnswer = errors.New("the proxy died")
