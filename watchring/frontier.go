package watchring

import "sync/atomic"

// All is the index that names all shards together where one shard's index could stand.
const All = -1

// Frontier publishes how far the ring is complete: per shard F_i, the smallest of them, and the revision
// below which history is compacted. Written by the goroutine that owns the Core, read by any.
type Frontier struct {
	all     atomic.Int64
	shards  []atomic.Int64
	compact atomic.Int64
}

// NewFrontier makes a Frontier for n shards at revision rev.
func NewFrontier(n int, rev int64) *Frontier {
	f := &Frontier{shards: make([]atomic.Int64, n)}
	for i := range f.shards {
		f.shards[i].Store(rev)
	}
	f.all.Store(rev)
	return f
}

// Shards returns the number of shards.
func (f *Frontier) Shards() int { return len(f.shards) }

// Get returns the frontier of one shard, or of all of them for All: a revision up to which the ring
// holds everything that the shard will ever hold.
func (f *Frontier) Get(shard int) int64 {
	if shard == All {
		return f.all.Load()
	}
	return f.shards[shard].Load()
}

// Set raises shard i's frontier to rev; a frontier never goes back. It reports whether the smallest
// of all shards rose.
func (f *Frontier) Set(i int, rev int64) bool {
	if rev <= f.shards[i].Load() {
		return false
	}
	f.shards[i].Store(rev)
	least := rev
	for j := range f.shards {
		if v := f.shards[j].Load(); v < least {
			least = v
		}
	}
	if least <= f.all.Load() {
		return false
	}
	f.all.Store(least)
	return true
}

// Compacted returns the compact revision: watches may start at it, not below.
func (f *Frontier) Compacted() int64 { return f.compact.Load() }

// SetCompacted raises the compact revision.
func (f *Frontier) SetCompacted(rev int64) {
	if rev > f.compact.Load() {
		f.compact.Store(rev)
	}
}
