package watchring

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

func TestRingSize(t *testing.T) {
	for size, want := range map[int]int64{0: 1, 1: 1, 2: 2, 3: 4, 1000: 1024} {
		if got := NewRing(size, 1, 0).Size(); got != want {
			t.Errorf("size %d: %d slots, want %d", size, got, want)
		}
	}
}

func TestRingLapped(t *testing.T) {
	r := NewRing(4, 1<<20, 0)
	for rev := int64(1); rev <= 6; rev++ {
		r.Publish(&Entry{Rev: rev, Size: 10})
	}
	if r.Tail() != 2 || r.Bytes() != 40 {
		t.Fatalf("tail %d, bytes %d", r.Tail(), r.Bytes())
	}
	for rev := int64(1); rev <= 7; rev++ {
		e, lapped := r.Load(rev)
		switch {
		case rev <= 2 && !lapped, rev > 2 && lapped:
			t.Errorf("revision %d: lapped = %v", rev, lapped)
		case rev > 2 && rev < 7 && (e == nil || e.Rev != rev), rev == 7 && e != nil:
			t.Errorf("revision %d: %v", rev, e)
		}
	}
	r.Publish(&Entry{Rev: 2, Size: 10}) // too late
	if e, lapped := r.Load(2); e != nil || !lapped || r.Bytes() != 40 {
		t.Errorf("late entry: %v %v, %d bytes", e, lapped, r.Bytes())
	}
}

// TestRingAgainstSlice compares a ring with a plain map, under random publishes out of order, trims,
// tails and jumps.
func TestRingAgainstSlice(t *testing.T) {
	for seed := uint64(0); seed < 150; seed++ {
		rng := seeded(t, seed)
		size := 1 << rng.IntN(7)
		limit := int64(1 + rng.IntN(2000))
		start := rng.Int64N(100)
		r := NewRing(size, limit, start)
		truth := map[int64]*Entry{} // never forgets
		next := start + 1           // all below are published or have no event
		jumped := int64(0)          // revisions without slots below next
		for step := 0; step < 200; step++ {
			switch rng.IntN(8) {
			case 0:
				r.Trim(next - 1)
				if r.Bytes() > limit && r.Tail() < next-1 {
					t.Fatalf("seed %d: trim left %d bytes, limit %d", seed, r.Bytes(), limit)
				}
			case 1:
				r.RaiseTail(r.Tail() + rng.Int64N(5))
			case 2:
				if rng.IntN(4) == 0 {
					to := next - 1 + rng.Int64N(3*int64(size))
					r.Jump(next-1, to)
					jumped += to - (next - 1)
					next = to + 1
				}
			default:
				// A window of revisions, published in any order, some without events.
				n := int64(1 + rng.IntN(size))
				for _, i := range rng.Perm(int(n)) {
					rev := next + int64(i)
					if rng.IntN(3) == 0 {
						continue
					}
					e := &Entry{Rev: rev, Size: 1 + rng.IntN(100)}
					truth[rev] = e
					r.Publish(e)
				}
				next += n
			}
			var held int64
			for rev := start; rev < next; rev++ {
				e, lapped := r.Load(rev)
				if lapped != (rev <= r.Tail()) {
					t.Fatalf("seed %d: revision %d, tail %d: lapped = %v", seed, rev, r.Tail(), lapped)
				}
				if lapped {
					continue
				}
				if e != truth[rev] {
					t.Fatalf("seed %d: revision %d: %v, want %v", seed, rev, e, truth[rev])
				}
				if e != nil {
					held += int64(e.Size)
				}
				for to := r.Skip(rev, next-1); e == nil && to > rev; to-- {
					if truth[to] != nil {
						t.Fatalf("seed %d: skip from %d passes the entry of %d", seed, rev, to)
					}
				}
			}
			if held != r.Bytes() {
				t.Fatalf("seed %d: charged %d bytes, holds %d", seed, r.Bytes(), held)
			}
			if keep := next - 1 - r.Tail(); keep < 0 {
				next = r.Tail() + 1 // the tail was raised above all; go on behind it
			}
		}
	}
}

// TestRingJumpKeepsEntries shows that a jump longer than the ring laps nobody.
func TestRingJumpKeepsEntries(t *testing.T) {
	r := NewRing(8, 1<<20, 0)
	for rev := int64(1); rev <= 4; rev++ {
		r.Publish(&Entry{Rev: rev, Size: 1})
	}
	r.Jump(4, 4+1<<20)
	for rev := int64(5 + 1<<20); rev <= 8+1<<20; rev++ {
		r.Publish(&Entry{Rev: rev, Size: 1})
	}
	if r.Tail() != 0 || r.Bytes() != 8 {
		t.Fatalf("tail %d, bytes %d", r.Tail(), r.Bytes())
	}
	for _, rev := range []int64{5, 1000, 4 + 1<<20} {
		if e, lapped := r.Load(rev); e != nil || lapped || r.Skip(rev, 1<<30) != 4+1<<20 {
			t.Errorf("revision %d: %v %v, skip to %d", rev, e, lapped, r.Skip(rev, 1<<30))
		}
	}
	r.Publish(&Entry{Rev: 9 + 1<<20, Size: 1})
	if r.Tail() != 1 {
		t.Errorf("tail %d, want 1", r.Tail())
	}
}

// TestRingSkipsWhatNobodyPublished: where a rebuild was no jump, a reader still passes what it left out in one step.
func TestRingSkipsWhatNobodyPublished(t *testing.T) {
	r := NewRing(8, 1<<20, 0)
	r.Publish(&Entry{Rev: 4, Size: 1})
	if to := r.Skip(5, 5+1<<20); to != 5+1<<20 {
		t.Errorf("skip from 5 to %d", to)
	}
	if to := r.Skip(3, 5+1<<20); to != 3 {
		t.Errorf("skip from 3 to %d, and there is an entry of 4", to)
	}
}

// TestRingConcurrent publishes from one goroutine per shard while readers follow the frontier: what a
// reader gets is what was published, and nothing is missing that it was not told of.
func TestRingConcurrent(t *testing.T) {
	const shards, revs, readers = 4, 10000, 3
	rng := seeded(t, 1)
	ring := NewRing(1024, 64<<10, 0)
	front := NewFrontier(shards, 0)
	owner := make([]int, revs+1)
	for i := range owner {
		owner[i] = rng.IntN(shards + 1) // the last one: no event at all
	}
	var published [shards]atomic.Int64 // what the owner of the frontier may announce
	var done atomic.Bool
	var wg, readersWG sync.WaitGroup
	for s := 0; s < shards; s++ {
		wg.Add(1)
		go func() {
			defer wg.Done()
			// Not further ahead of the slowest than the ring allows.
			for rev := int64(1); rev <= revs; rev++ {
				for rev > front.Get(All)+ring.Size()/2 {
					if done.Load() {
						return
					}
					runtime.Gosched()
				}
				if owner[rev] == s {
					ring.Publish(&Entry{Rev: rev, Shard: s, Size: 100})
				}
				published[s].Store(rev)
			}
		}()
	}
	wg.Add(1)
	go func() {
		defer wg.Done()
		for front.Get(All) < revs && !done.Load() {
			for s := range published {
				front.Set(s, published[s].Load())
			}
			ring.Trim(front.Get(All))
			runtime.Gosched()
		}
	}()
	for i := 0; i < readers; i++ {
		set := i - 1 // All, then single shards
		readersWG.Add(1)
		go func() {
			defer readersWG.Done()
			local := rand.New(rand.NewPCG(1, uint64(set)))
			for cursor := int64(0); cursor < revs; {
				limit := front.Get(set)
				for cursor < limit {
					rev := cursor + 1
					e, lapped := ring.Load(rev)
					if lapped {
						cursor = max(rev, min(ring.Tail(), limit))
						continue
					}
					has := owner[rev] < shards && (set == All || owner[rev] == set)
					if e != nil && (e.Rev != rev || e.Shard != owner[rev]) || has && e == nil {
						t.Errorf("set %d, revision %d of shard %d: %v", set, rev, owner[rev], e)
						done.Store(true)
						return
					}
					cursor = rev
					if e == nil {
						for cursor = ring.Skip(rev, limit); rev < cursor; rev++ {
							if owner[rev+1] < shards && (set == All || owner[rev+1] == set) {
								t.Errorf("set %d: revision %d of shard %d was skipped", set, rev+1, owner[rev+1])
								done.Store(true)
								return
							}
						}
					}
					if local.IntN(1000) == 0 {
						break
					}
				}
				if done.Load() {
					return
				}
				runtime.Gosched()
			}
		}()
	}
	readersWG.Wait()
	wg.Wait()
	ring.RaiseTail(revs)
	if ring.Bytes() != 0 {
		t.Errorf("an empty ring is charged with %d bytes", ring.Bytes())
	}
}

func TestFrontier(t *testing.T) {
	f := NewFrontier(3, 5)
	if f.Shards() != 3 || f.Get(All) != 5 || f.Get(2) != 5 {
		t.Fatal("new frontier")
	}
	if f.Set(0, 9) || f.Set(1, 7) {
		t.Error("the smallest has not risen")
	}
	if !f.Set(2, 8) || f.Get(All) != 7 {
		t.Errorf("all = %d, want 7", f.Get(All))
	}
	if f.Set(1, 6) || f.Get(1) != 7 {
		t.Error("a frontier went back")
	}
	f.SetCompacted(4)
	f.SetCompacted(3)
	if f.Compacted() != 4 {
		t.Error("the compact revision went back")
	}
}
