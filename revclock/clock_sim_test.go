package revclock

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"spindle/codec"
)

// The simulation runs several Clocks against one modelled coordinator and modelled shards, and checks what
// the rest of Spindle relies on.

type sim struct {
	t      *testing.T
	seed   uint64
	w      *world
	epoch  ID
	shards []simShard
	procs  []*proc
	nextID byte

	byRev   map[int64]int64 // coordinator's revision → N after the tick there
	owner   map[int64]string
	highest int64   // largest revision granted to anybody
	highs   []int64 // ... per shard
	snaps   map[int64]string
	total   Stats
}

type simShard struct {
	clock   int64
	granted []Range // that may still commit
}

type proc struct {
	s       *sim
	id      ID
	c       *Clock
	l       *link
	out     []uint64 // outstanding token per shard, 0 none
	token   uint64
	nows    []simNow
	front   []int64
	started bool
	lost    error
	timer   int64
	seen    []int64 // time up to which records were delivered, per shard
}

type simNow struct {
	ticket uint64
	floor  int64
	floors []int64
}

func newSim(t *testing.T, seed uint64, shards int) *sim {
	s := &sim{
		t: t, seed: seed, w: newWorld(seed), epoch: ID{0xe0, 1}, shards: make([]simShard, shards), byRev: map[int64]int64{},
		owner: map[int64]string{}, highs: make([]int64, shards), snaps: map[int64]string{}, highest: 1,
	}
	s.w.apply(codec.MethodTxn, createTxn(s.epoch, shards))
	return s
}

// createTxn is the request that fills an empty coordinator.
func createTxn(epoch ID, shards int) []byte {
	return (&Found{Rev: 1}).AppendReplaceTxn(nil, epoch, &Snapshot{N: 1, Shards: make([]SnapshotShard, shards)})
}

func (s *sim) fatalf(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf("seed %d: %s", s.seed, fmt.Sprintf(format, args...))
}

// startProc starts a proxy: it reads the clocks first, as a proxy must.
func (s *sim) startProc() *proc {
	s.nextID++
	n := len(s.shards)
	p := &proc{s: s, id: ID{s.nextID}, out: make([]uint64, n), front: make([]int64, n), seen: make([]int64, n)}
	p.l = &link{w: s.w, turn: p.turn}
	p.c = New(Config{
		Proxy: p.id, Shards: n, Now: func() int64 { return s.w.now }, SnapshotEvery: 20,
		Rand: rand.New(rand.NewPCG(s.seed, uint64(s.nextID))), CallTimeout: time.Second,
	}, p.l, p)
	args := StartArgs{Epoch: s.epoch, Cluster: 77}
	for i := range s.shards {
		args.Clocks = append(args.Clocks, s.shards[i].clock)
		p.c.Log().SetClock(i, s.shards[i].clock)
	}
	s.procs = append(s.procs, p)
	p.c.Start(args)
	p.turn()
	return p
}

func (s *sim) kill(p *proc) {
	p.l.dead = true
	st := p.c.Stats()
	s.total.FastTicks += st.FastTicks
	s.total.LostTicks += st.LostTicks
	s.total.Reticks += st.Reticks
	s.total.Orphans += st.Orphans
	s.total.Stalls += st.Stalls
	s.total.Reloads += st.Reloads
	s.total.Snapshots += st.Snapshots
	s.total.Granted += st.Granted
	s.procs = slices.DeleteFunc(s.procs, func(q *proc) bool { return p == q })
}

// turn is the end of a turn of the loop.
func (p *proc) turn() {
	if p.l.dead {
		return
	}
	p.c.Flush()
	p.check()
	if d := p.c.Deadline(); d > 0 && d != p.timer {
		p.timer = d
		p.s.w.at(d, func() {
			if !p.l.dead {
				p.timer = 0
				p.c.Tick()
				p.turn()
			}
		})
	}
}

func (p *proc) check() {
	if !p.started {
		return
	}
	l := p.c.Log()
	if n, ok := p.s.byRev[l.Rev()]; ok && n != l.N() {
		p.s.fatalf("N is %d at %d and %d elsewhere", l.N(), l.Rev(), n)
	}
	p.s.byRev[l.Rev()] = l.N()
	snap := string(l.AppendSnapshot(nil))
	if old, ok := p.s.snaps[l.Rev()]; ok && old != snap {
		p.s.fatalf("two folds up to %d differ: %x and %x", l.Rev(), old, snap)
	}
	p.s.snaps[l.Rev()] = snap
	for i := range p.front {
		f := l.Frontier(i)
		if f < p.front[i] {
			p.s.fatalf("frontier of %d went back from %d to %d", i, p.front[i], f)
		}
		p.front[i] = f
		prev := l.Clock(i)
		for _, r := range l.Open(i) {
			if r.First <= prev || r.Last < r.First {
				p.s.fatalf("open ranges of %d are not ascending: %v above %d", i, l.Open(i), l.Clock(i))
			}
			prev = r.Last
		}
		if a, _ := l.A(i); len(l.Open(i)) > 0 && prev != a || len(l.Open(i)) == 0 && a > l.Clock(i) {
			p.s.fatalf("open ranges of %d end at %d, A is %d", i, prev, a)
		}
	}
}

func (p *proc) request(shard int) {
	if p.out[shard] != 0 {
		return
	}
	p.token++
	p.out[shard] = p.token
	r := p.s.w.rng
	filter := NewFilter(nil, 1)
	FilterAdd(filter, []byte("k"))
	if !p.c.Request(Request{
		Shard: shard, Count: 1 + r.IntN(5), Committed: p.c.Log().Clock(shard), Turn: r.IntN(20) == 0, Filter: filter, Token: p.token,
	}) {
		p.s.fatalf("request refused")
	}
}

func (p *proc) askNow() {
	n := simNow{floor: p.s.highest, floors: slices.Clone(p.s.highs)}
	n.ticket = p.c.Now()
	p.nows = append(p.nows, n)
}

func (p *proc) Granted(shard int, token uint64, r Range) {
	s := p.s
	if p.out[shard] != token || token == 0 {
		s.fatalf("token %d of shard %d granted, waiting for %d", token, shard, p.out[shard])
	}
	p.out[shard] = 0
	if r.Holder != p.id || r.Orphan || r.Merged || len(r.Filter) == 0 {
		s.fatalf("granted %+v", r)
	}
	for rev := r.First; rev <= r.Last; rev++ {
		if o, ok := s.owner[rev]; ok {
			s.fatalf("revision %d granted to %s and %x", rev, o, p.id[:1])
		}
		s.owner[rev] = fmt.Sprintf("%x", p.id[:1])
	}
	s.highest = max(s.highest, r.Last)
	s.highs[shard] = max(s.highs[shard], r.Last)
	s.shards[shard].granted = append(s.shards[shard].granted, r)
	// The batch arrives after a while, or never.
	if s.w.rng.IntN(15) > 0 {
		s.w.after(s.w.delay(), func() { s.commit(shard, r) })
	}
}

// commit is the batch's arrival at the shard, under its guard.
func (s *sim) commit(shard int, r Range) {
	sh := &s.shards[shard]
	if sh.clock >= r.First {
		return
	}
	for _, p := range s.procs {
		if p.started && p.c.Log().Frontier(shard) >= r.First {
			s.fatalf("%v commits on %d, but a proxy's frontier there is %d already (clock %d, open %v)", r, shard,
				p.c.Log().Frontier(shard), p.c.Log().Clock(shard), p.c.Log().Open(shard))
		}
	}
	sh.clock = r.Last
	for _, p := range s.procs {
		p.seen[shard] = max(p.seen[shard], s.w.now+int64(s.w.delay()))
		s.w.at(p.seen[shard], func() {
			if !p.l.dead {
				p.c.Log().Committed(shard, r.First, r.Last, r.Holder)
				p.turn()
			}
		})
	}
}

func (p *proc) Folded() {}

func (p *proc) NowDone(ticket uint64, n int64, a []int64) {
	for len(p.nows) > 0 && p.nows[0].ticket <= ticket {
		f := p.nows[0]
		p.nows = p.nows[1:]
		if n < f.floor {
			p.s.fatalf("now is %d, but %d had been granted before", n, f.floor)
		}
		for i := range a {
			if a[i] < f.floors[i] || a[i] > n {
				p.s.fatalf("A of %d is %d, floor %d, now %d", i, a[i], f.floors[i], n)
			}
		}
	}
}

func (p *proc) Started() {
	if p.started {
		p.s.fatalf("started twice")
	}
	p.started = true
}

func (p *proc) Lost(err error) { p.lost = err }

// run lets the world go on for a while, with work.
func (s *sim) run(d time.Duration, work bool) {
	limit := s.w.now + int64(d)
	next := s.w.now
	for {
		if work && s.w.now >= next && len(s.procs) > 0 {
			next = s.w.now + int64(s.w.rng.IntN(2000))*int64(time.Microsecond)
			p := s.procs[s.w.rng.IntN(len(s.procs))]
			if s.w.rng.IntN(3) == 0 {
				p.askNow()
			} else {
				p.request(s.w.rng.IntN(len(s.shards)))
			}
			p.turn()
			s.w.at(next, func() {})
		}
		if !s.w.step(limit) {
			return
		}
		for _, p := range s.procs {
			if p.lost != nil {
				s.fatalf("lost: %v", p.lost)
			}
		}
	}
}

func TestClockSimulation(t *testing.T) {
	seeds := 60
	if v := os.Getenv("REVCLOCK_SEEDS"); v != "" {
		seeds, _ = strconv.Atoi(v)
	}
	if testing.Short() {
		seeds = 30
	}
	var total Stats
	for seed := range uint64(seeds) {
		s := newSim(t, seed, 1+int(seed%4))
		s.w.faults = seed%8 != 0
		for range 1 + seed%3 {
			s.startProc()
		}
		for round := range 4 {
			s.run(2*time.Second, true)
			switch {
			case round == 1 && len(s.procs) > 0: // a crash; what it asked for may still arrive
				s.kill(s.procs[s.w.rng.IntN(len(s.procs))])
			case round == 2:
				s.startProc()
			}
		}
		s.settle()
		for len(s.procs) > 0 {
			s.kill(s.procs[0])
		}
		total.FastTicks += s.total.FastTicks
		total.LostTicks += s.total.LostTicks
		total.Reticks += s.total.Reticks
		total.Orphans += s.total.Orphans
		total.Stalls += s.total.Stalls
		total.Reloads += s.total.Reloads
		total.Snapshots += s.total.Snapshots
		total.Granted += s.total.Granted
	}
	t.Logf("%+v", total)
	if total.FastTicks == 0 || total.LostTicks == 0 || total.Reticks == 0 || total.Orphans == 0 || total.Stalls == 0 ||
		total.Reloads == 0 || total.Snapshots == 0 {
		t.Fatalf("something never happened: %+v", total)
	}
}

// settle ends the faults and waits: everything asked for must come, and all logs become equal.
func (s *sim) settle() {
	s.w.faults = false
	s.run(10*time.Second, false)
	for _, p := range s.procs {
		if p.started {
			p.askNow()
			p.turn() // a proxy that nobody asks anything does not notice that its watch has gone silent
		}
	}
	s.run(10*time.Second, false)
	for _, p := range s.procs {
		if !p.started {
			s.fatalf("proxy %x has not started: %s", p.id[:1], p.c.LastError())
		}
		for i, tok := range p.out {
			if tok != 0 {
				s.fatalf("proxy %x waits for a range of shard %d: %s", p.id[:1], i, p.c.LastError())
			}
		}
		if len(p.nows) > 0 {
			s.fatalf("proxy %x waits for now: %s", p.id[:1], p.c.LastError())
		}
		a, b := s.procs[0].c.Log(), p.c.Log()
		if a.N() != b.N() || a.Rev() != b.Rev() || !bytes.Equal(a.AppendSnapshot(nil), b.AppendSnapshot(nil)) {
			s.fatalf("logs differ: %d at %d, %d at %d", a.N(), a.Rev(), b.N(), b.Rev())
		}
	}
}

func TestFirstStartOfAllAtOnce(t *testing.T) {
	s := newSim(t, 5, 3)
	for range 3 {
		s.startProc()
	}
	s.run(time.Second, false)
	for _, p := range s.procs {
		if !p.started || p.c.Log().N() != 1 {
			t.Fatalf("started %v, N %d", p.started, p.c.Log().N())
		}
	}
	p := s.procs[0]
	p.request(1)
	p.turn()
	s.run(time.Second, false)
	if r := s.shards[1].granted; len(r) != 1 || r[0].First != 2 {
		t.Fatalf("first range %v", r)
	}
}

// quiet makes a world with one running proxy and no faults.
func quiet(t *testing.T) (*sim, *proc) {
	s := newSim(t, 1, 2)
	p := s.startProc()
	s.run(time.Second, false)
	if !p.started {
		t.Fatal(p.c.LastError())
	}
	p.request(0)
	p.turn()
	s.w.step(1 << 62)
	s.run(time.Second, false)
	return s, p
}

func (s *sim) runUntilLost(p *proc) string {
	limit := s.w.now + int64(10*time.Second)
	for p.lost == nil && s.w.step(limit) {
	}
	if p.lost == nil {
		s.t.Fatal("not lost")
	}
	return p.lost.Error()
}

func TestLost(t *testing.T) {
	has := func(t *testing.T, got, want string) {
		t.Helper()
		if !bytes.Contains([]byte(got), []byte(want)) {
			t.Fatalf("lost with %q, want %q", got, want)
		}
	}
	t.Run("wiped, seen by the reopened watch", func(t *testing.T) {
		s, p := quiet(t)
		s.w.wipe()
		has(t, s.runUntilLost(p), "lost its data")
	})
	t.Run("wiped, seen by a tick", func(t *testing.T) {
		s, p := quiet(t)
		s.w.streams = nil
		s.w.wipe()
		p.request(1)
		p.turn()
		has(t, s.runUntilLost(p), "lost its data")
	})
	t.Run("wiped, seen by a start", func(t *testing.T) {
		s, p := quiet(t)
		s.w.wipe()
		s.kill(p)
		s.shards[0].clock = 2
		q := s.startProc()
		has(t, s.runUntilLost(q), "lost its data")
	})
	t.Run("wiped while the log was caught up", func(t *testing.T) {
		// The watch then waits for a revision that is far away (shard/sim, TestRebuild seed 151).
		s, p := quiet(t)
		p.request(0)
		p.turn()
		s.run(time.Second, false)
		q := s.startProc()
		for q.c.state != stateCatching && s.w.step(s.w.now+int64(time.Second)) {
		}
		if q.c.state != stateCatching {
			t.Fatal("it does not catch up")
		}
		s.w.wipe()
		has(t, s.runUntilLost(q), "lost its data")
	})
	t.Run("rebuilt, seen by the watch", func(t *testing.T) {
		s, p := quiet(t)
		s.w.put([]byte("e"), AppendEpoch(nil, ID{9}))
		s.w.rev++
		s.w.pump(s.w.streams[0])
		has(t, s.runUntilLost(p), "epoch 09")
		if p.c.Deadline() != 0 || p.c.LastError() == "" {
			t.Fatal("not idle")
		}
	})
	t.Run("older state", func(t *testing.T) {
		s, p := quiet(t)
		s.w.kvs["t"].ModRevision--
		p.askNow()
		p.turn()
		has(t, s.runUntilLost(p), "went back")
	})
	t.Run("behind the clocks", func(t *testing.T) {
		s, _ := quiet(t)
		s.shards[1].clock = 1000
		has(t, s.runUntilLost(s.startProc()), "is behind")
	})
	t.Run("another cluster", func(t *testing.T) {
		s, _ := quiet(t)
		s.w.cluster = 78
		has(t, s.runUntilLost(s.startProc()), "cluster ID 4e")
	})
	t.Run("unknown tick", func(t *testing.T) {
		s, p := quiet(t)
		s.w.put([]byte("t"), []byte{2, 0})
		s.w.rev++
		s.w.pump(s.w.streams[0])
		has(t, s.runUntilLost(p), "cannot read")
	})
	t.Run("history gone", func(t *testing.T) {
		s, _ := quiet(t)
		s.w.compactTo(s.w.rev + 1)
		s.w.rev += 5
		has(t, s.runUntilLost(s.startProc()), "auto-compaction")
	})
}

func TestUnavailableIsRetriedForever(t *testing.T) {
	s := newSim(t, 3, 1)
	s.w.refuse = codec.Status{Code: codec.Unavailable, Msg: "connection refused"}
	p := s.startProc()
	s.run(time.Minute, false)
	if p.started || p.lost != nil || p.c.LastError() != "reading the coordinator: connection refused" {
		t.Fatal(p.started, p.lost, p.c.LastError())
	}
	if n := p.c.Stats().CallErrors; n < 50 || n > 1000 {
		t.Fatalf("%d attempts in a minute", n)
	}
	s.w.refuse = codec.Status{}
	s.run(5*time.Second, false)
	if !p.started || p.c.LastError() != "" {
		t.Fatal("not started", p.c.LastError())
	}
}

// An event handler that stops the Clock gets nothing more.
func TestStopInHandler(t *testing.T) {
	s, p := quiet(t)
	p.request(0)
	p.request(1)
	stopping := &stopper{proc: p}
	p.c.ev = stopping
	p.turn()
	s.w.step(1 << 62)
	s.run(5*time.Second, false)
	if stopping.n != 1 {
		t.Fatalf("%d events", stopping.n)
	}
	if p.c.Running() || p.c.Deadline() != 0 {
		t.Fatal("not stopped")
	}
}

type stopper struct {
	*proc
	n int
}

func (p *stopper) Granted(int, uint64, Range)     { p.n++; p.c.Stop() }
func (p *stopper) Folded()                        { p.n++ }
func (p *stopper) NowDone(uint64, int64, []int64) { p.n++ }

func TestRequestBounds(t *testing.T) {
	_, p := quiet(t)
	for _, r := range []Request{
		{Shard: -1, Count: 1}, {Shard: 2, Count: 1}, {Shard: 0}, {Shard: 0, Count: MaxCount + 1},
		{Shard: 0, Count: 1, Filter: make([]byte, MaxFilter+1)}, {Shard: 0, Count: 1, Committed: -1},
	} {
		if p.c.Request(r) {
			t.Fatalf("%+v was taken", r)
		}
	}
	if !p.c.Request(Request{Shard: 0, Count: 1}) || p.c.Request(Request{Shard: 0, Count: 1}) {
		t.Fatal("one request per shard")
	}
}
