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

// Entry is everything that happened at one revision on its shard. It is immutable once published.
type Entry struct {
	Rev    int64
	Shard  int // index of the shard in the map
	Events []Event
	// Size is the memory that the entry is charged with, in bytes.
	Size int
}

// Ring holds the entries of the latest revisions. The slot of a revision holds its entry, or an older
// one (or none) if the revision had no event, or a newer one if the reader has been lapped.
//
// Publish may be called by one goroutine per shard at the same time, Load and the other readers by any;
// RaiseTail, Trim and Jump by any one at a time beside them. No call blocks or takes a lock.
type Ring struct {
	mask  int64
	slots []atomic.Pointer[Entry]
	tail  atomic.Int64 // events of revisions <= tail may be gone
	top   atomic.Int64 // the largest revision that was published
	bytes atomic.Int64 // sum of Size of the entries held
	limit int64
	jumps atomic.Pointer[[]jump] // in order; nil as long as there was none
}

// jump says that revisions above from, up to to, hold no event and take no slots.
type jump struct {
	from, to int64
	skipped  int64 // revisions without a slot, in this jump and all before it
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

// place returns where rev stands in the line of slots, which is rev itself less the revisions that
// jumps have left out. Revisions inside a jump stand where the jump begins.
func (r *Ring) place(rev int64) int64 {
	js := r.jumps.Load()
	if js == nil {
		return rev
	}
	for i := len(*js) - 1; i >= 0; i-- {
		j := &(*js)[i]
		if rev > j.to {
			return rev - j.skipped
		}
		if rev > j.from {
			return j.to - j.skipped
		}
	}
	return rev - (*js)[0].before()
}

// before returns the revisions that jumps before j have left out.
func (j *jump) before() int64 { return j.skipped - (j.to - j.from) }

// revAt is the inverse of place; for the place of a jump it returns the revision before it.
func (r *Ring) revAt(place int64) int64 {
	js := r.jumps.Load()
	if js == nil {
		return place
	}
	for i := len(*js) - 1; i >= 0; i-- {
		if j := &(*js)[i]; place > j.to-j.skipped {
			return place + j.skipped
		}
	}
	return place + (*js)[0].before()
}

// Distance returns how many slots lie between two revisions.
func (r *Ring) Distance(from, to int64) int64 { return r.place(to) - r.place(from) }

// Jump records that no revision above from, up to to, has or will have an event (the jump of a rebuild):
// such revisions take no slots, so that readers and entries before the jump are not lapped by it. It must
// happen before an entry above from is published, and before any frontier passes from. Jumps are made
// in order of revision.
func (r *Ring) Jump(from, to int64) {
	if to <= from {
		return
	}
	var next []jump
	var skipped int64
	if js := r.jumps.Load(); js != nil {
		old := *js
		skipped = old[len(old)-1].skipped
		// Jumps that lie behind the tail as a whole count by their sum alone.
		for len(old) > 1 && old[1].to <= r.tail.Load() {
			old = old[1:]
		}
		next = append(next, old...)
	}
	next = append(next, jump{from: from, to: to, skipped: skipped + to - from})
	r.jumps.Store(&next)
}

// jumpOf returns the jump that rev lies in, nil if it lies in none.
func (r *Ring) jumpOf(rev int64) *jump {
	js := r.jumps.Load()
	if js == nil {
		return nil
	}
	for i := len(*js) - 1; i >= 0; i-- {
		if j := &(*js)[i]; rev > j.from {
			if rev <= j.to {
				return j
			}
			return nil
		}
	}
	return nil
}

// Skip is told a revision without an event, and returns up to where, limit at most, there is surely none either: the
// end of the jump that rev lies in, or limit if nothing was published from rev on. (A million revisions that a rebuild
// has left out are no jump where the streams did not meet at it.) The caller must know that the frontier is at or above
// limit.
func (r *Ring) Skip(rev, limit int64) int64 {
	if r.top.Load() < rev {
		return limit
	}
	if j := r.jumpOf(rev); j != nil {
		return min(j.to, limit)
	}
	return rev
}

// RaiseTail drops everything up to rev (a compaction, a new start). Readers that still need it are
// lapped.
func (r *Ring) RaiseTail(rev int64) {
	for {
		t := r.tail.Load()
		if rev <= t {
			return
		}
		if !r.tail.CompareAndSwap(t, rev) {
			continue
		}
		last := r.place(rev)
		for p := max(r.place(t), last-r.Size()) + 1; p <= last; p++ {
			r.drop(p, rev)
		}
		return
	}
}

// drop empties the slot at place p of an entry that is not above rev.
func (r *Ring) drop(p, rev int64) {
	slot := &r.slots[p&r.mask]
	if old := slot.Load(); old != nil && old.Rev <= rev && slot.CompareAndSwap(old, nil) {
		r.bytes.Add(-int64(old.Size))
	}
}

// Publish puts e into its slot. It must happen before the shard's frontier passes e.Rev. An entry at or
// below the tail is dropped (the writer has been lapped by another shard's). Publish pushes the tail:
// what lies a whole ring below e is gone, so a writer must not run further ahead of the frontier
// than the ring is long, less what it wants to keep for readers.
func (r *Ring) Publish(e *Entry) {
	for top := r.top.Load(); top < e.Rev && !r.top.CompareAndSwap(top, e.Rev); {
		top = r.top.Load()
	}
	p := r.place(e.Rev)
	r.RaiseTail(r.revAt(p - r.Size()))
	slot := &r.slots[p&r.mask]
	for {
		old := slot.Load()
		if old != nil && old.Rev >= e.Rev || r.tail.Load() >= e.Rev {
			return
		}
		if !slot.CompareAndSwap(old, e) {
			continue
		}
		d := int64(e.Size)
		if old != nil {
			d -= int64(old.Size)
		}
		r.bytes.Add(d)
		// The tail may have passed e after the check: whoever raised it may have looked at the slot
		// before e was in it, and the entry would stay charged until the slot is used again.
		if r.tail.Load() >= e.Rev {
			r.drop(p, e.Rev)
		}
		return
	}
}

// Trim drops entries from the tail on while the ring holds more bytes than its limit, never beyond
// upTo. Readers that still need what goes are lapped; entries that come for it later are dropped.
func (r *Ring) Trim(upTo int64) {
	for r.bytes.Load() > r.limit {
		t := r.tail.Load()
		if t >= upTo {
			return
		}
		next := r.Skip(t+1, upTo)
		if !r.tail.CompareAndSwap(t, next) {
			continue
		}
		r.drop(r.place(next), next)
	}
}

// Load returns the entry of rev, or nil if rev had no event. lapped is true when rev's events may have
// been dropped; the caller must not go on. The caller must know that the frontier is at or above rev.
func (r *Ring) Load(rev int64) (e *Entry, lapped bool) {
	e = r.slots[r.place(rev)&r.mask].Load()
	// The tail is read after the slot: whoever empties or reuses a slot raises the tail first.
	if r.tail.Load() >= rev {
		return nil, true
	}
	if e == nil || e.Rev < rev {
		return nil, false
	}
	if e.Rev > rev {
		// Inside a jump the slot may hold what lies behind it.
		return nil, r.jumpOf(rev) == nil
	}
	return e, false
}
