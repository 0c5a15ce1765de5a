package sim

import (
	"os"
	"testing"
	"time"

	"spindle/shard"
)

// aheads has a batch closed behind nearly every one, by clients that hardly pause, while replies are lost or late, streams stand still and
// members are compacted under them, so that what became of a batch must be found out, or cannot be, while another one waits for that.
func aheads(c *Config) {
	c.Ahead, c.Leases = true, true
	c.Shards, c.Proxies, c.Clients, c.Keys, c.Ops, c.Think = 1+int(c.Seed)%2, 1+int(c.Seed/2)%2, 8, 16, 240, time.Millisecond
	c.MaxTxnOps, c.MaxRequestBytes, c.Pad = 128, defaultMaxRequestBytes, 0
	c.AutoCompact = shard.AutoCompact{}
	c.Faults = Faults{LoseReply: 0.08, Unsent: 0.05, SlowReply: 0.1, SlowRequest: 0.05, Refused: 0.03}
	c.Chaos = 30 * time.Millisecond
	c.Events = ChaosEvents{StreamHole: true, Lag: true, Compact: true, Reset: true, Expire: true, Crash: c.Seed%3 == 0, Wipe: c.Seed%3 == 1, Hole: c.Seed%3 == 2}
}

// TestAhead runs seeds in which batches are settled while another one is closed behind them.
func TestAhead(t *testing.T) {
	sum := runSeeds(t, 25, aheads)
	if n := seedsOf(25); os.Getenv(envSeed) == "" && (sum.Core.Ahead < 10*n || sum.Core.Settled < n) {
		t.Errorf("%d batches were closed ahead, %d were settled later", sum.Core.Ahead, sum.Core.Settled)
	}
}
