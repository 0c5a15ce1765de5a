package sim

import (
	"testing"

	"spindle/shard"
)

// TestPorcupineBites plants bugs that porcupine must find alone, from what clients were told.
func TestPorcupineBites(t *testing.T) {
	if raceEnabled {
		t.Skip("the same seeds, in one goroutine, many times slower: the plain run has them")
	}
	for name, plant := range map[string]func(*Config){
		"guard dropped": func(c *Config) { c.Sabotage = shard.Sabotage{DropGuard: true} },
		"new range on a rejection without looking": func(c *Config) { c.Sabotage = shard.Sabotage{RetickWithoutLooking: true} },
		"a Get from the ring ignores open ranges":  func(c *Config) { c.Sabotage = shard.Sabotage{RecentIgnoresRanges: true} },
		"full means not applied":                   func(c *Config) { long(c, ChaosEvents{Full: true}); c.Sabotage.NoSpaceUnapplied = true },
	} {
		t.Run(name, func(t *testing.T) {
			for seed := uint64(1); seed <= biteSeeds; seed++ {
				cfg := ConfigOf(seed)
				cfg.LinearOnly = true
				plant(&cfg)
				if _, err := Go(cfg); err != nil {
					t.Logf("found after %d seeds: %s", seed, clip(err.Error()))
					return
				}
			}
			t.Error("not found")
		})
	}
}
