package watchring

import "sync/atomic"

// Event is one change of one key as clients see it: the stamp removed, revisions mapped. Its bytes are
// never changed once the Entry that holds it was published, so that all watchers can share them.
type Event struct {
	Key    []byte
	Delete bool
	// Create says that the key came into being (create_revision == mod_revision).
	Create bool
	// Body is an encoded mvccpb.Event: type, kv, and prev_kv last if there is one.
	Body []byte
	// NoPrev is the length of the prefix of Body that is the same event without prev_kv.
	NoPrev int
}

// Entry is everything that happened at one revision on its shard.
type Entry struct {
	Rev    int64
	Shard  int // index of the shard in the map
	Events []Event
	// Size is the memory that the entry is charged with, in bytes.
	Size int
}

// Ring holds the entries of the latest revisions. Slot Rev mod size holds the entry of Rev, or an older
// one if Rev had no event, or a newer one if the reader has been lapped.
//
// Publish and Advance may be called by one goroutine per shard at the same time, Load by any. No call
// blocks or takes a lock.
type Ring struct {
	mask  int64
	slots []atomic.Pointer[Entry]
	tail  atomic.Int64 // events of revisions <= tail may be gone
	bytes atomic.Int64 // sum of Size of the entries held
	limit int64
}

// NewRing makes a ring of size slots (rounded up to a power of two) that drops its oldest entries when
// they are charged with more than maxBytes together. Events of revisions <= tail are not in it.
func NewRing(size int, maxBytes int64, tail int64) *Ring {
	n := int64(1)
	for n < int64(size) {
		n <<= 1
	}
	r := &Ring{mask: n - 1, slots: make([]atomic.Pointer[Entry], n), limit: maxBytes}
	r.tail.Store(tail)
	return r
}

// Size returns the number of slots.
func (r *Ring) Size() int64 { return r.mask + 1 }

// Tail returns the revision up to which events may have been dropped: a reader must start above it.
func (r *Ring) Tail() int64 { return r.tail.Load() }

// Bytes returns what the entries held are charged with.
func (r *Ring) Bytes() int64 { return r.bytes.Load() }

// RaiseTail drops everything up to rev (a compaction, a jump).
func (r *Ring) RaiseTail(rev int64) {
	for {
		t := r.tail.Load()
		if rev <= t || r.tail.CompareAndSwap(t, rev) {
			return
		}
	}
}

// Publish puts e into its slot. It must happen before the shard's frontier passes e.Rev. An entry older
// than the one in the slot (the writer has been lapped by another shard's) is dropped: such a revision
// is at or below the tail by then.
func (r *Ring) Publish(e *Entry) {
	r.RaiseTail(e.Rev - r.Size())
	slot := &r.slots[e.Rev&r.mask]
	for {
		old := slot.Load()
		if old != nil && old.Rev >= e.Rev {
			return
		}
		if slot.CompareAndSwap(old, e) {
			d := int64(e.Size)
			if old != nil {
				d -= int64(old.Size)
			}
			r.bytes.Add(d)
			return
		}
	}
}

// Trim drops entries from the tail on while the ring holds more bytes than its limit, never beyond
// upTo (the frontier of the slowest reader that must not lose anything, or the global frontier).
func (r *Ring) Trim(upTo int64) {
	for r.bytes.Load() > r.limit {
		t := r.tail.Load()
		if t >= upTo {
			return
		}
		if !r.tail.CompareAndSwap(t, t+1) {
			continue
		}
		slot := &r.slots[(t+1)&r.mask]
		if old := slot.Load(); old != nil && old.Rev <= t+1 && slot.CompareAndSwap(old, nil) {
			r.bytes.Add(-int64(old.Size))
		}
	}
}

// Load returns the entry of rev, or nil if rev had no event. lapped is true when rev's events may have
// been dropped; the caller must not go on. The caller must know that the frontier is at or above rev.
func (r *Ring) Load(rev int64) (e *Entry, lapped bool) {
	e = r.slots[rev&r.mask].Load()
	if r.tail.Load() >= rev {
		return nil, true
	}
	if e == nil || e.Rev < rev {
		return nil, false
	}
	if e.Rev > rev {
		return nil, true
	}
	return e, false
}
