package sim

import (
	"math/rand/v2"
	"time"

	"spindle/codec"
	"spindle/shard"
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
	// Dead lets shard 0 of the map be without a quorum from the first operation to the last. Half of the
	// clients keep away from its keys.
	Dead bool
	// RingSize is the proxies' ring.
	RingSize int
	// RingBytes is what its entries may weigh, 0 for the default.
	RingBytes int64
	// HistoryBytes is what a read of the past keeps of one shard.
	HistoryBytes int
	// MaxTxnOps and MaxRequestBytes are the members' limits; Pad is what values are padded with, at most.
	MaxTxnOps, MaxRequestBytes, Pad int
	// Window and Timeout are the core's ReorderWindow and ShardTimeout.
	Window, Timeout time.Duration
	SnapshotEvery   int
	// PageKeys and ChunkBytes make the pages and chunks of lists small.
	PageKeys, ChunkBytes int

	// Leases lets clients grant, keep, revoke and use leases.
	Leases bool
	// OneLease lets them do so all the time, with one ID.
	OneLease bool
	// Ahead has proxies close a batch behind the one that is away whenever something waits.
	Ahead bool
	// Swaps lets clients compare and swap most of the time.
	Swaps bool
	// Lose has a member lose data for good, and an operator accept that.
	Lose bool
	// Wide lets Txns have ranges of other shards behind what they write.
	Wide bool
	// Ranges gives the proxies a range map; without it keys are hashed.
	Ranges bool
	// AutoCompact is what the proxies compact by themselves.
	AutoCompact shard.AutoCompact

	// LinearOnly leaves the judgment to porcupine alone.
	LinearOnly bool
	// Accept is the proxies' AcceptDataLoss.
	Accept []string

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
	// Wipe lets the coordinator lose its data, Stall lets proxies stand still, Mistake leads them to another
	// system's coordinator.
	Wipe, Stall, Mistake bool
	// Cut parts proxies from clusters, in one direction or both, Die takes clusters away for long, Full lets members be
	// out of space, StallMid stops proxies in the middle of a rebuild, a fence, a compaction or an attach.
	Cut, Die, Full, StallMid bool
	// Foreign lets somebody else put and delete keys on a member. Nothing is compacted then: what clients saw of a
	// key before a foreign put may be gone with a compaction.
	Foreign bool
	// Restore lets members be restored to an older state for a while.
	Restore bool
}

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
	if r.IntN(2) == 0 {
		c.RingSize = 32
	}
	if seed%3 == 0 {
		c.RingBytes = 1 + rand.New(rand.NewPCG(seed, 0x41b6)).Int64N(8000)
	}
	if r.IntN(2) == 0 {
		c.HistoryBytes = 1 + r.IntN(3000)
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
	if r.IntN(4) > 0 {
		c.PageKeys, c.ChunkBytes = 1+r.IntN(4), 1+r.IntN(200)
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
	c.Ranges = r.IntN(3) == 0
	switch r.IntN(8) {
	case 0:
		c.AutoCompact = shard.AutoCompact{Mode: shard.AutoCompactPeriodic, Period: ms(200, 3000)}
	case 1:
		c.AutoCompact = shard.AutoCompact{Mode: shard.AutoCompactRevision, Keep: int64(1 + r.IntN(60)), Every: ms(50, 1000)}
	}
	if c.Chaos > 0 && r.IntN(3) == 0 {
		c.Events.Foreign, c.Events.Compact, c.AutoCompact = true, false, shard.AutoCompact{}
	}
	c.Leases = r.IntN(3) == 0
	if c.Chaos > 0 {
		on := func() bool { return r.IntN(3) == 0 }
		c.Events.Wipe, c.Events.Stall, c.Events.Mistake = on(), on(), on()
	}
	// From a source of its own: the seeds of before stay what they were in all else.
	late := rand.New(rand.NewPCG(seed, 0xfa017))
	if c.Chaos > 0 {
		on := func() bool { return late.IntN(4) == 0 }
		c.Events.Cut, c.Events.Die, c.Events.Full, c.Events.StallMid = on(), on(), on(), on()
		if on() {
			c.Faults.Duplicate = 0.1 * late.Float64()
		}
	}
	c.Wide = !c.Events.Foreign && late.IntN(2) == 0 // a member counts keys that clients do not see
	c.Events.Restore = c.Chaos > 0 && rand.New(rand.NewPCG(seed, 0x4e57)).IntN(4) == 0
	c.Ahead = rand.New(rand.NewPCG(seed, 0xa4ead)).IntN(4) > 0
	return c
}

// partition is the range map that c asks for: the keys of a run (see keyName) are divided among the shards,
// not evenly, and in another order than the members'.
func (c *Config) partition() shard.PartitionSpec {
	if !c.Ranges {
		return shard.PartitionSpec{}
	}
	spec := shard.PartitionSpec{Kind: shard.PartitionRange}
	for i := range c.Shards {
		r := shard.RangeSpec{Member: (i + int(c.Seed)) % c.Shards}
		if i > 0 {
			r.Start = []byte(keyName((i - 1) * c.Keys / c.Shards))
			if n := len(spec.Ranges); string(r.Start) <= string(spec.Ranges[n-1].Start) {
				r.Start = append([]byte(spec.Ranges[n-1].Start), '0')
			}
		}
		spec.Ranges = append(spec.Ranges, r)
	}
	return spec
}
