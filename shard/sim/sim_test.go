package sim

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"
)

// The environment of the simulation's tests.
const (
	envSeed  = "SPINDLE_SIM_SEED"  // run this one seed alone, with its whole trace
	envSeeds = "SPINDLE_SIM_SEEDS" // how many seeds TestSimulation runs
	envFirst = "SPINDLE_SIM_FIRST" // the first of them
)

// traceTail is how many lines of a failed run's trace are shown.
const traceTail = 80

func envInt(t *testing.T, name string, def int) int {
	s := os.Getenv(name)
	if s == "" {
		return def
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// report runs a failed configuration again for its trace, and shows the end of it.
func report(t *testing.T, cfg Config, err error) {
	t.Helper()
	var lines []string
	cfg.Trace = func(l string) {
		if len(lines) == 4*traceTail {
			lines = append(lines[:0], lines[len(lines)-traceTail:]...)
		}
		lines = append(lines, l)
	}
	_, again := Go(cfg)
	for _, l := range lines[max(0, len(lines)-traceTail):] {
		t.Log(clip(l))
	}
	if again == nil || again.Error() != err.Error() {
		t.Logf("the second run of the seed was another one: %v", again)
	}
	t.Errorf("%v\nsee all of it with %s=%d go test ./shard/sim -run TestSimulation", err, envSeed, cfg.Seed)
}

func clip(s string) string {
	if len(s) > 400 {
		return s[:400] + "..."
	}
	return s
}

// TestSimulation runs many seeds.
func TestSimulation(t *testing.T) {
	if os.Getenv(envSeed) != "" {
		cfg := ConfigOf(uint64(envInt(t, envSeed, 0)))
		t.Logf("%+v", cfg)
		cfg.Trace = func(l string) { fmt.Println(clip(l)) }
		stats, err := Go(cfg)
		t.Logf("%+v", stats)
		if err != nil {
			t.Error(err)
		}
		return
	}
	n, limit := envInt(t, envSeeds, 0), 25*time.Second
	if testing.Short() || raceEnabled {
		limit = 8 * time.Second
	}
	if n > 0 {
		limit = 24 * time.Hour
	} else {
		n = 1 << 30
	}
	first := envInt(t, envFirst, 1)
	start := time.Now()
	var sum Stats
	seeds, failed := 0, 0
	for seed := first; seed < first+n && time.Since(start) < limit && failed < 3; seed++ {
		cfg := ConfigOf(uint64(seed))
		stats, err := Go(cfg)
		if err != nil {
			failed++
			report(t, cfg, err)
		}
		seeds++
		sum.Events += stats.Events
		sum.Ops += stats.Ops
		sum.OK += stats.OK
		sum.Unknown += stats.Unknown
		sum.Facts += stats.Facts
		sum.Crashes += stats.Crashes
		sum.Lapped += stats.Lapped
		sum.Compactions += stats.Compactions
		sum.Wipes += stats.Wipes
		sum.Stalls += stats.Stalls
		sum.Restores += stats.Restores
		sum.Mistakes += stats.Mistakes
		sum.Viewed += stats.Viewed
		sum.Streams += stats.Streams
		sum.Chunks += stats.Chunks
		sum.Canceled += stats.Canceled
		sum.Leased += stats.Leased
		sum.Ended += stats.Ended
		sum.Histories += stats.Histories
		sum.PastEntries += stats.PastEntries
		sum.Slowest = max(sum.Slowest, stats.Slowest)
		sum.Core = addStats(sum.Core, stats.Core)
	}
	t.Logf("%d seeds in %v: %+v", seeds, time.Since(start).Round(time.Millisecond), sum)
}

// TestCalm runs seeds in which nothing goes wrong: then no operation fails (Go checks that), none waits
// for a timer that is there for faults, and revisions are consecutive: every request that went into a
// batch has one, and nothing else has.
func TestCalm(t *testing.T) {
	slowest := time.Duration(0)
	dense := 0
	for seed := uint64(1); seed <= 60; seed++ {
		cfg := ConfigOf(seed)
		cfg.Faults, cfg.Chaos, cfg.RingSize, cfg.RingBytes = Faults{}, 0, 1<<12, 0
		stats, err := Go(cfg)
		if err != nil {
			report(t, cfg, err)
			continue
		}
		// A write may be overtaken, or find that it was wrong about its keys, and go again, some times in a row
		// on keys that are created and deleted all the time; and it waits in a queue behind others.
		if limit := 40 * (4*(cfg.Base+cfg.Jitter+cfg.Far) + 5*time.Millisecond); stats.Slowest > limit {
			t.Errorf("seed %d: an operation took %v, links take up to %v", seed, stats.Slowest, cfg.Base+cfg.Jitter+cfg.Far)
		}
		slowest = max(slowest, stats.Slowest)
		c := stats.Core
		if cfg.Proxies == 1 && c.Fences == 0 && c.Rejected == 0 {
			dense++
			// A write that its client gave up while its range was on the way leaves its revision unused. What happens without
			// a record (a lease that ends) has one of its own, if the batch that follows knew of it.
			if least := 1 + int64(c.BatchedWrites) + int64(stats.Spared); stats.Now < least || stats.Now > least+int64(stats.Withdrawn) {
				t.Errorf("seed %d: now is %d at the end, after %d writes", seed, stats.Now, c.BatchedWrites)
			}
		}
	}
	t.Logf("slowest operation %v; revisions of %d seeds are consecutive", slowest, dense)
	if dense < 5 {
		t.Errorf("only %d runs could be looked at for consecutive revisions", dense)
	}
}

// TestDeadShard runs seeds in which one shard has no quorum: who does not need it notices nothing, and
// whoever does gets an answer in the end.
func TestDeadShard(t *testing.T) {
	slowest := time.Duration(0)
	ok := 0
	for seed := uint64(1); seed <= 30; seed++ {
		cfg := ConfigOf(seed)
		cfg.Faults, cfg.Chaos, cfg.RingSize, cfg.RingBytes = Faults{}, 0, 1<<12, 0
		cfg.Leases = false // they need their homes
		cfg.Dead, cfg.Shards, cfg.Clients, cfg.Keys, cfg.Think = true, 2+int(seed)%3, max(cfg.Clients, 2), 12, time.Millisecond
		stats, err := Go(cfg)
		if err != nil {
			report(t, cfg, err)
			continue
		}
		if limit := 40 * (4*(cfg.Base+cfg.Jitter+cfg.Far) + 5*time.Millisecond); stats.SlowestAlive > limit {
			t.Errorf("seed %d: an operation without the dead shard took %v, links take up to %v", seed, stats.SlowestAlive, cfg.Base+cfg.Jitter+cfg.Far)
		}
		slowest = max(slowest, stats.SlowestAlive)
		ok += stats.OK
	}
	t.Logf("%d operations were answered, the slowest of the living after %v", ok, slowest)
}

// oneLease makes a run in which one lease ends and comes again all the time, and a proxy whose stream lags believes
// in the one before.
func oneLease(c *Config) {
	c.Leases, c.OneLease, c.Shards, c.Proxies, c.Keys, c.Clients, c.Ops, c.Pad = true, true, 2, 2, 4, 4, 150, 0
	c.Faults, c.Think, c.Chaos, c.Events = Faults{}, 5*time.Millisecond, 20*time.Millisecond, ChaosEvents{Lag: true, StreamHole: true}
}

// TestOneLease runs such seeds.
func TestOneLease(t *testing.T) {
	var sum Stats
	for seed := uint64(1); seed <= 60 && !t.Failed(); seed++ {
		cfg := ConfigOf(seed)
		oneLease(&cfg)
		stats, err := Go(cfg)
		if err != nil {
			report(t, cfg, err)
		}
		sum.Leased += stats.Leased
		sum.Ended += stats.Ended
		sum.Core = addStats(sum.Core, stats.Core)
	}
	t.Logf("%d puts with the lease, %d deletes by its end: %+v", sum.Leased, sum.Ended, sum.Core)
}

// TestDeterminism runs seeds twice and compares the traces.
func TestDeterminism(t *testing.T) {
	for seed := uint64(1); seed <= 5; seed++ {
		trace := func() (lines []string) {
			cfg := ConfigOf(seed)
			cfg.Trace = func(l string) { lines = append(lines, l) }
			if _, err := Go(cfg); err != nil {
				t.Log(err)
			}
			return lines
		}
		a, b := trace(), trace()
		for i := range a {
			if i >= len(b) || a[i] != b[i] {
				other := "nothing"
				if i < len(b) {
					other = b[i]
				}
				t.Fatalf("seed %d, line %d of the trace:\n%s\n%s", seed, i, a[i], other)
			}
		}
	}
}

// rebuilds makes the coordinator's losses the main event of a run.
func rebuilds(c *Config) {
	c.Shards, c.Proxies = max(c.Shards, 2), max(c.Proxies, 2)
	c.Chaos = max(c.Chaos, 60*time.Millisecond)
	c.Events.Wipe, c.Events.Stall, c.Events.Down, c.Events.Pause = true, true, true, true
	c.Events.Mistake = c.Seed%3 == 0
}

// TestRebuild runs seeds in which the coordinator loses its data again and again, while proxies stand still and
// members cannot be reached.
func TestRebuild(t *testing.T) {
	limit := 20 * time.Second
	if testing.Short() || raceEnabled {
		limit = 6 * time.Second
	}
	n := envInt(t, envSeeds, 0)
	if n > 0 {
		limit = 24 * time.Hour
	} else {
		n = 1 << 30
	}
	first, start, seeds, failed := envInt(t, envFirst, 1), time.Now(), 0, 0
	if os.Getenv(envSeed) != "" {
		first, n = envInt(t, envSeed, 0), 1
	}
	var sum Stats
	for seed := first; seed < first+n && time.Since(start) < limit && failed < 3; seed++ {
		cfg := ConfigOf(uint64(seed))
		rebuilds(&cfg)
		if os.Getenv(envSeed) != "" {
			cfg.Trace = func(l string) { fmt.Println(clip(l)) }
		}
		stats, err := Go(cfg)
		if err != nil {
			failed++
			report(t, cfg, err)
		}
		seeds++
		sum.Ops += stats.Ops
		sum.OK += stats.OK
		sum.Facts += stats.Facts
		sum.Viewed += stats.Viewed
		sum.Wipes += stats.Wipes
		sum.Stalls += stats.Stalls
		sum.Restores += stats.Restores
		sum.Mistakes += stats.Mistakes
		sum.Lapped += stats.Lapped
		sum.Slowest = max(sum.Slowest, stats.Slowest)
		sum.Core = addStats(sum.Core, stats.Core)
	}
	t.Logf("%d seeds in %v: %+v", seeds, time.Since(start).Round(time.Millisecond), sum)
	if sum.Core.Rebuilds == 0 {
		t.Error("nothing was rebuilt")
	}
}

// TestFirstStartHazard loses the coordinator while proxies start for the first time, before any clock has left 0: what
// was handed out by then must not be handed out again.
func TestFirstStartHazard(t *testing.T) {
	rebuilt := uint64(0)
	for seed := uint64(1); seed <= 40; seed++ {
		cfg := ConfigOf(seed)
		cfg.Proxies, cfg.Shards, cfg.Ops = max(cfg.Proxies, 2), max(cfg.Shards, 2), min(cfg.Ops, 100)
		cfg.Faults = Faults{SlowRequest: 0.1} // batches that are on their way when the coordinator is lost
		r := newRun(cfg)
		for range 3 {
			r.net.After(r.net.Between(20*time.Millisecond, 150*time.Millisecond), func() {
				r.net.tracef("coord: loses its data")
				r.net.Coord.Wipe(r.net.Coord.ClusterID)
			})
		}
		r.stats.Wipes = 3
		err := r.drive()
		if err == nil {
			err = r.check()
		}
		if err != nil {
			t.Errorf("seed %d: %v", seed, clip(err.Error()))
		}
		for _, p := range r.proxies {
			if p.core != nil {
				rebuilt += p.core.Stats().Rebuilds
			}
		}
	}
	t.Logf("%d times a coordinator got an epoch", rebuilt)
}
