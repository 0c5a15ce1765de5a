package shard

import "slices"

// leaseTable remembers recently used leases: which M stands for X, and c on the shards where the lease is attached.
// It may forget, and it may be wrong: M is found to be gone by whoever uses it, and c is guarded. It belongs to one
// goroutine.
type leaseTable struct {
	limit          int
	entries        map[int64]*leaseEntry // by X
	newest, oldest *leaseEntry           // in order of use
}

type leaseEntry struct {
	x, m         int64
	copies       []leaseCopy
	newer, older *leaseEntry
}

type leaseCopy struct {
	shard  int
	create int64 // c
}

func newLeaseTable(limit int) leaseTable {
	return leaseTable{limit: limit, entries: make(map[int64]*leaseEntry)}
}

// get returns what is known of X, nil if nothing is.
func (t *leaseTable) get(x int64) *leaseEntry {
	e := t.entries[x]
	if e != nil && t.newest != e {
		t.unlink(e)
		t.link(e)
	}
	return e
}

// create returns c on a shard, 0 if it is not known.
func (e *leaseEntry) create(shard int) int64 {
	for _, cp := range e.copies {
		if cp.shard == shard {
			return cp.create
		}
	}
	return 0
}

// learn takes that X is M on the members, and c on one shard if create is not 0.
func (t *leaseTable) learn(x, m int64, shard int, create int64) {
	e := t.get(x)
	if e == nil {
		if len(t.entries) >= t.limit {
			t.drop(t.oldest)
		}
		e = &leaseEntry{x: x}
		t.entries[x] = e
		t.link(e)
	}
	if e.m != m {
		e.m, e.copies = m, e.copies[:0]
	}
	if create == 0 {
		return
	}
	e.copies = slices.DeleteFunc(e.copies, func(cp leaseCopy) bool { return cp.shard == shard })
	e.copies = append(e.copies, leaseCopy{shard, create})
}

// gone takes that X's key on a shard was deleted at a local revision.
func (t *leaseTable) gone(x int64, shard int, local int64) {
	if e := t.entries[x]; e != nil {
		e.copies = slices.DeleteFunc(e.copies, func(cp leaseCopy) bool { return cp.shard == shard && cp.create < local })
	}
}

// wrong takes that a guard on c has failed.
func (t *leaseTable) wrong(x int64, shard int, create int64) {
	if e := t.entries[x]; e != nil {
		e.copies = slices.DeleteFunc(e.copies, func(cp leaseCopy) bool { return cp.shard == shard && cp.create == create })
	}
}

// ended takes that M, which stood for X, is gone.
func (t *leaseTable) ended(x, m int64) {
	if e := t.entries[x]; e != nil && e.m == m {
		t.drop(e)
	}
}

// forget drops what is known of X.
func (t *leaseTable) forget(x int64) {
	if e := t.entries[x]; e != nil {
		t.drop(e)
	}
}

func (t *leaseTable) drop(e *leaseEntry) {
	t.unlink(e)
	delete(t.entries, e.x)
}

func (t *leaseTable) link(e *leaseEntry) {
	e.older, e.newer = t.newest, nil
	if t.newest != nil {
		t.newest.newer = e
	} else {
		t.oldest = e
	}
	t.newest = e
}

func (t *leaseTable) unlink(e *leaseEntry) {
	if e.newer != nil {
		e.newer.older = e.older
	} else {
		t.newest = e.older
	}
	if e.older != nil {
		e.older.newer = e.newer
	} else {
		t.oldest = e.newer
	}
	e.newer, e.older = nil, nil
}
