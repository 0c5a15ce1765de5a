package sim

import (
	"fmt"
	"os"
	"testing"
	"time"

	"spindle/shard"
)

// swaps makes compare-and-swaps of few keys nearly all that happens.
func swaps(c *Config) {
	c.Swaps = true
	c.Shards, c.Keys, c.Clients, c.Think = 1+int(c.Seed)%2, 3+int(c.Seed)%3, 3+int(c.Seed)%5, 5*time.Millisecond
	c.Events.Foreign = false // porcupine judges nothing then
}

// TestContendedSwaps runs seeds in which clients fight for a few keys: most swaps are doomed while they wait, and are read.
func TestContendedSwaps(t *testing.T) {
	sum := runSeeds(t, 40, swaps)
	if n := sum.Core.Doomed; n < 5*seedsOf(40) || sum.Core.DoomedWrong > n/50 {
		t.Errorf("%d were doomed, %d of them were not after all", sum.Core.Doomed, sum.Core.DoomedWrong)
	}
}

// TestDoubtedSwaps reads first for every swap that may fail with a read: whether it can only fail is asked for nothing but time.
func TestDoubtedSwaps(t *testing.T) {
	sum := runSeeds(t, 25, func(c *Config) { swaps(c); c.Sabotage = shard.Sabotage{Doubt: true} })
	if sum.Core.DoomedWrong < 3*seedsOf(25) {
		t.Errorf("%d were read, %d of them were written after all", sum.Core.Doomed, sum.Core.DoomedWrong)
	}
}

// runSeeds runs so many seeds of a kind, or as many as the environment says. It stops at the first that fails.
func runSeeds(t *testing.T, n uint64, shape func(*Config)) (sum Stats) {
	first, runs := envInt(t, envFirst, 1), envInt(t, envSeeds, int(seedsOf(n)))
	one := os.Getenv(envSeed) != ""
	if one {
		first, runs = envInt(t, envSeed, 0), 1
	}
	for seed := first; seed < first+runs; seed++ {
		cfg := ConfigOf(uint64(seed))
		shape(&cfg)
		if one {
			cfg.Trace = func(l string) { fmt.Println(clip(l)) }
		}
		stats, err := Go(cfg)
		if err != nil {
			report(t, cfg, err)
			break
		}
		sum = sum.plus(stats)
	}
	t.Logf("%d seeds from %d on: %+v", runs, first, sum)
	return sum
}
