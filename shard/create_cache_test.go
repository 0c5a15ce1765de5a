package shard

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
)

func TestCreateCache(t *testing.T) {
	c := NewCreateCache(100)
	k := []byte("k")
	want := func(local, meta, mod int64, ok bool) {
		t.Helper()
		if l, m, d, o := c.Get(k); l != local || m != meta || d != mod || o != ok {
			t.Fatalf("got %d %d %d %v", l, m, d, o)
		}
	}
	want(0, 0, 0, false)
	c.Learn(k, 5, 50, 55)
	want(5, 50, 55, true)
	c.Learn(k, 3, 30, 54) // older
	c.Deleted(k, 54)
	want(5, 50, 55, true)
	c.Deleted(k, 60)
	want(0, 0, 60, true)
	c.Learn(k, 7, 70, 70)
	want(7, 70, 70, true)
	c.Forget(k)
	want(0, 0, 0, false)
	c.Forget(k)
	c.Learn(k, 3, 30, 54) // what is forgotten may be learned from anything
	want(3, 30, 54, true)
	for _, long := range [][]byte{nil, bytes.Repeat(k, cacheMaxKey+1)} {
		c.Learn(long, 1, 1, 1)
		if _, _, _, ok := c.Get(long); ok {
			t.Fatal("cached")
		}
	}
}

// Against a map that forgets nothing: the cache may miss, but what it says is the newest that it was told
// since it forgot the key.
func TestCreateCacheAgainstMap(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 0))
		c := NewCreateCache(64)
		type fact struct{ local, meta, mod int64 }
		all := map[string]map[fact]bool{}
		newest := map[string]fact{}
		keys := 20 + r.IntN(400)
		hits, miss := 0, 0
		for i := range int64(20000) {
			n := r.IntN(keys)
			k := fmt.Appendf(nil, "%0*d", 3+n%7*30, n)
			if n%50 == 0 {
				k = append(k, bytes.Repeat([]byte("x"), cacheMaxKey-len(k))...)
			}
			old, known := newest[string(k)]
			switch r.IntN(4) {
			case 0:
				l, m, d, ok := c.Get(k)
				if !ok {
					miss++
					continue
				}
				hits++
				if !all[string(k)][fact{l, m, d}] {
					t.Fatalf("seed %d: %s: %d %d %d was never said", seed, k, l, m, d)
				}
			case 1:
				c.Forget(k)
				delete(newest, string(k))
				if _, _, _, ok := c.Get(k); ok {
					t.Fatal("not forgotten")
				}
			default:
				f := fact{i, i * 2, max(0, i-int64(r.IntN(100)))}
				if r.IntN(3) == 0 {
					f.local, f.meta = 0, 0
				}
				c.Learn(k, f.local, f.meta, f.mod)
				if all[string(k)] == nil {
					all[string(k)] = map[fact]bool{}
				}
				all[string(k)][f] = true
				l, m, d, ok := c.Get(k)
				if !ok || d < f.mod {
					t.Fatalf("seed %d: not learned", seed)
				}
				if got := (fact{l, m, d}); got != f && (!known || got != old) {
					t.Fatalf("seed %d: got %v after %v and %v", seed, got, old, f)
				}
				newest[string(k)] = fact{l, m, d}
			}
		}
		if hits == 0 || keys > 200 && miss == 0 {
			t.Fatalf("seed %d: %d hits, %d misses", seed, hits, miss)
		}
	}
}

// A key that is used stays, though its bytes in the ring are overtaken again and again.
func TestCreateCacheKeepsUsedKeys(t *testing.T) {
	c := NewCreateCache(1 << 10)
	hot := []byte("/registry/leases/kube-system/kube-scheduler")
	c.Learn(hot, 1, 1, 1)
	missed := 0
	for i := range 100000 {
		c.Learn(fmt.Appendf(nil, "/registry/events/default/%060d", i), 1, 1, 1)
		if i%50 == 0 {
			if _, _, _, ok := c.Get(hot); !ok {
				missed++
				c.Learn(hot, 1, 1, 1)
			}
		}
	}
	if missed > 5 {
		t.Fatalf("missed %d times of 2000", missed)
	}
}

func TestCreateCacheHoldsItsSize(t *testing.T) {
	const n = 1 << 12
	c := NewCreateCache(n)
	key := func(i int) []byte {
		return fmt.Appendf(nil, "/registry/pods/namespace-%d/pod-with-a-usual-name-%d", i%10, i)
	}
	for i := range n / 2 {
		c.Learn(key(i), 1, 1, 1)
	}
	found := 0
	for i := range n / 2 {
		if _, _, _, ok := c.Get(key(i)); ok {
			found++
		}
	}
	if found < n/2*9/10 {
		t.Fatalf("holds %d of %d keys at half its size", found, n/2)
	}
}
