package shard

import (
	"math/rand/v2"
	"testing"
)

// TestShares: what the shards are asked for together stays near the limit, and with keys spread by a hash
// hardly any page needs a second look.
func TestShares(t *testing.T) {
	const seed = 4
	rng := rand.New(rand.NewPCG(seed, 0))
	c := &Core{cfg: CoreConfig{PageKeys: firstPageKeys}}
	for _, limit := range []int64{1, 7, 100, 500, 10000} {
		for _, n := range []int{1, 2, 3, 8, 64} {
			share := c.shareOf(limit, n)
			if share < 1 || share > limit || share*int64(n) < limit {
				t.Fatalf("limit %d over %d: a share of %d", limit, n, share)
			}
			if limit >= 500 && n <= 8 && share*int64(n) > limit*17/10 {
				t.Errorf("limit %d over %d: %d keys are asked for", limit, n, share*int64(n))
			}
			short := 0
			for range 200 {
				parts := make([]int64, n)
				for range limit {
					parts[rng.IntN(n)]++
				}
				for _, k := range parts {
					if k > share {
						short++
						break
					}
				}
			}
			if short > 20 {
				t.Errorf("seed %d, limit %d over %d, a share of %d: %d of 200 pages need a second look", seed, limit, n, share, short)
			}
		}
	}
	if s := c.shareOf(1<<62, 3); s <= 0 {
		t.Errorf("a huge limit gives %d", s)
	}
}
