package watchring

import (
	"fmt"
	"slices"
	"testing"
)

// TestRangeTreeAgainstScan compares the index with a linear scan over random ranges that nest, overlap
// and come and go.
func TestRangeTreeAgainstScan(t *testing.T) {
	for seed := uint64(0); seed < 200; seed++ {
		rng := seeded(t, seed)
		word := func() string {
			b := make([]byte, rng.IntN(4))
			for i := range b {
				b[i] = "abc\x00\xff"[rng.IntN(5)]
			}
			return string(b)
		}
		var tree rangeTree
		var all []*target
		for step := 0; step < 150; step++ {
			if len(all) > 0 && rng.IntN(3) == 0 {
				i := rng.IntN(len(all))
				tree.remove(all[i])
				all = slices.Delete(all, i, i+1)
			} else {
				x := &target{key: word(), end: word()}
				known := slices.ContainsFunc(all, func(y *target) bool { return y.key == x.key && y.end == x.end })
				if known != (tree.get(x.key, x.end) != nil) {
					t.Fatalf("seed %d: get(%q, %q)", seed, x.key, x.end)
				}
				if !known {
					tree.insert(x)
					all = append(all, x)
				}
			}
			key := []byte(word())
			var want []*target
			for _, x := range all {
				if string(key) >= x.key && (x.end == "" || string(key) < x.end) {
					want = append(want, x)
				}
			}
			got := tree.find(nil, key)
			if len(got) != len(want) || tree.n != len(all) {
				t.Fatalf("seed %d: key %q: %d hits, want %d", seed, key, len(got), len(want))
			}
			for _, x := range want {
				if !slices.Contains(got, x) {
					t.Fatalf("seed %d: key %q: range [%q, %q) not found", seed, key, x.key, x.end)
				}
			}
			n := 0
			tree.each(func(*target) { n++ })
			if n != len(all) {
				t.Fatalf("seed %d: each saw %d of %d", seed, n, len(all))
			}
		}
	}
}

func BenchmarkRangeTree(b *testing.B) {
	for _, n := range []int{10, 1000, 10000} {
		b.Run(fmt.Sprintf("Ranges%d", n), func(b *testing.B) {
			var tree rangeTree
			for i := 0; i < n; i++ {
				tree.insert(&target{key: fmt.Sprintf("/registry/%05d/", i), end: fmt.Sprintf("/registry/%05d0", i)})
			}
			tree.insert(&target{key: "/registry/", end: "/registry0"})
			key := []byte(fmt.Sprintf("/registry/%05d/default/name", n/2))
			var hits []*target
			b.ReportAllocs()
			for b.Loop() {
				if hits = tree.find(hits[:0], key); len(hits) != 2 {
					b.Fatal(len(hits))
				}
			}
		})
	}
}
