package shard

import (
	"bytes"

	"github.com/cespare/xxhash/v2"
)

// CreateCache remembers of recent keys where they were created, for writes must carry a key's create
// revision in their stamp. Its memory is fixed when it is made, and no method allocates. It belongs to
// one goroutine.
//
// It may forget (a miss costs the write one read) but never mixes up two keys: two keys created by one
// batch share their local create revision, so the guard on it, which catches a stale fact, would not
// catch a fact of the other key. Therefore the key itself is kept and compared. Keys stand in one ring
// of bytes that is written round and round; one that is still used is written again before its bytes are
// overtaken. The hash only chooses the place, so that keys made to collide cost their owner misses.
type CreateCache struct {
	slots []createSlot // sets of cacheWays, most recently used first
	mask  uint64       // number of sets − 1
	keys  []byte
	head  uint64 // where the next key goes: counts on, keys[head % len(keys)]
}

// cacheWays is the number of places that a key can have.
const cacheWays = 4

// Sizes of a CreateCache.
const (
	cacheKeyBytes = 96   // of the ring of keys, per entry: registry keys have 40 to 90
	cacheMaxKey   = 2048 // longer keys are not cached
	cacheMinSize  = 64   // entries
)

type createSlot struct {
	hash  uint64
	at    uint64 // place of the key in the ring
	size  uint32 // of the key; 0: nothing here
	local int64
	meta  int64
	mod   int64
}

// NewCreateCache makes a cache of the given number of entries, rounded up to a power of two. One entry
// takes about 150 bytes.
func NewCreateCache(entries int) *CreateCache {
	n := cacheMinSize
	for n < entries && n < 1<<30 {
		n <<= 1
	}
	return &CreateCache{
		slots: make([]createSlot, n),
		mask:  uint64(n/cacheWays - 1),
		keys:  make([]byte, max(n*cacheKeyBytes, 2*cacheMaxKey)),
	}
}

// set returns the places of a key.
func (c *CreateCache) set(hash uint64) []createSlot {
	i := hash & c.mask * cacheWays
	return c.slots[i : i+cacheWays : i+cacheWays]
}

// find returns the place of key in its set, or -1.
func (c *CreateCache) find(set []createSlot, hash uint64, key []byte) int {
	for i := range set {
		s := &set[i]
		if s.size == 0 || s.hash != hash || int(s.size) != len(key) || c.head-s.at > uint64(len(c.keys)) {
			continue
		}
		o := s.at % uint64(len(c.keys))
		if bytes.Equal(c.keys[o:o+uint64(s.size)], key) {
			return i
		}
	}
	return -1
}

// Get returns what is known of key: the local and the meta revision that created it, both 0 if it is
// known not to exist, and mod, the meta revision of the change that this is known from.
func (c *CreateCache) Get(key []byte) (local, meta, mod int64, ok bool) {
	hash := xxhash.Sum64(key)
	set := c.set(hash)
	i := c.find(set, hash, key)
	if i < 0 {
		return 0, 0, 0, false
	}
	s := c.use(set, i, key)
	return s.local, s.meta, s.mod, true
}

// Learn takes a fact: at meta revision mod, key existed, created at meta revision meta, which is revision
// local of its shard. Facts may come in any order: an older one changes nothing.
func (c *CreateCache) Learn(key []byte, local, meta, mod int64) {
	if len(key) == 0 || len(key) > cacheMaxKey {
		return
	}
	hash := xxhash.Sum64(key)
	set := c.set(hash)
	i := c.find(set, hash, key)
	if i < 0 {
		i = cacheWays - 1
		set[i] = createSlot{hash: hash, at: c.store(key), size: uint32(len(key)), mod: mod}
	} else if mod < set[i].mod {
		return
	}
	s := c.use(set, i, key)
	s.local, s.meta, s.mod = local, meta, mod
}

// Deleted takes the fact that key did not exist at meta revision mod.
func (c *CreateCache) Deleted(key []byte, mod int64) { c.Learn(key, 0, 0, mod) }

// Forget drops what is known of key, because a guard has shown that it is wrong.
func (c *CreateCache) Forget(key []byte) {
	hash := xxhash.Sum64(key)
	set := c.set(hash)
	if i := c.find(set, hash, key); i >= 0 {
		set[i] = createSlot{}
	}
}

// use makes entry i the most recently used of its set, and saves its key from being overtaken soon.
func (c *CreateCache) use(set []createSlot, i int, key []byte) *createSlot {
	if i > 0 {
		s := set[i]
		copy(set[1:i+1], set[:i])
		set[0] = s
	}
	s := &set[0]
	if c.head-s.at > uint64(len(c.keys))/2 {
		s.at = c.store(key)
	}
	return s
}

// store writes key into the ring, in one piece.
func (c *CreateCache) store(key []byte) (at uint64) {
	size := uint64(len(c.keys))
	if o := c.head % size; o+uint64(len(key)) > size {
		c.head += size - o
	}
	at = c.head
	copy(c.keys[at%size:], key)
	c.head += uint64(len(key))
	return at
}
