package revclock

import (
	"math/rand/v2"
	"testing"
	"time"

	"spindle/codec"
)

// However long the coordinator was away, it is asked again soon after its connection is there: the dials have waited
// already. (Found by server/e2e/chaos: a second passed between the two.)
func TestRetriesStaySoon(t *testing.T) {
	now := int64(1)
	c := &Clock{cfg: Config{Now: func() int64 { return now }, Rand: rand.New(rand.NewPCG(1, 1))}}
	var r retry
	for range 100 {
		c.failed(&r, "asking", codec.Status{Code: codec.Unavailable})
		if wait := time.Duration(r.at - now); wait <= 0 || wait > 200*time.Millisecond {
			t.Fatalf("attempt %d waits %v", r.n, wait)
		}
	}
}
