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
	sets []createSet
	mask uint64 // number of sets − 1
	keys []byte
	head uint64 // where the next key goes: counts on, keys[head % len(keys)]
}

// cacheWays is the number of places that a key can have.
const cacheWays = 4

// Sizes of a CreateCache.
const (
	cacheKeyBytes = 96   // of the ring of keys, per entry: registry keys have 40 to 90
	cacheMaxKey   = 2048 // longer keys are not cached
	cacheMinSize  = 64   // entries
)

// createSet is the places that a key can have. Most lookups are of keys that are not there, and nearly each of them finds the set
// far from the processor: so what they read stands together, in the first 64 bytes, and nothing is moved.
type createSet struct {
	at   [cacheWays]uint64 // place of the key in the ring
	used [cacheWays]uint32 // when it was last used, by the ring's head
	hash [cacheWays]uint16 // the upper bits
	size [cacheWays]uint16 // of the key; 0: nothing here
	fact [cacheWays]createFact
	_    [32]byte // three lines of 64 bytes
}

type createFact struct{ local, meta, mod int64 }

// NewCreateCache makes a cache of the given number of entries, rounded up to a power of two. One entry
// takes about 150 bytes.
func NewCreateCache(entries int) *CreateCache {
	n := cacheMinSize
	for n < entries && n < 1<<30 {
		n <<= 1
	}
	return &CreateCache{
		sets: make([]createSet, n/cacheWays),
		mask: uint64(n/cacheWays - 1),
		keys: make([]byte, max(n*cacheKeyBytes, 2*cacheMaxKey)),
	}
}

// find returns the set of key, and its place there, or -1.
func (c *CreateCache) find(hash uint64, key []byte) (set *createSet, i int) {
	set = &c.sets[hash&c.mask]
	for i := range set.size {
		if set.size[i] == 0 || set.hash[i] != uint16(hash>>48) || int(set.size[i]) != len(key) || c.overtaken(set.at[i]) {
			continue
		}
		o := set.at[i] % uint64(len(c.keys))
		if bytes.Equal(c.keys[o:o+uint64(len(key))], key) {
			return set, i
		}
	}
	return set, -1
}

// overtaken says whether the bytes at a place of the ring belong to other keys by now.
func (c *CreateCache) overtaken(at uint64) bool { return c.head-at > uint64(len(c.keys)) }

// place gives key a place in its set: a free one, else the one that was not used for longest.
func (c *CreateCache) place(set *createSet, hash uint64, key []byte) (i int) {
	now := uint32(c.head)
	for j := range set.size {
		if set.size[j] == 0 {
			i = j
			break
		}
		if now-set.used[j] > now-set.used[i] {
			i = j
		}
	}
	set.hash[i], set.size[i], set.at[i] = uint16(hash>>48), uint16(len(key)), c.store(key)
	return i
}

// Get returns what is known of key: the local and the meta revision that created it, both 0 if it is
// known not to exist, and mod, the meta revision of the change that this is known from.
func (c *CreateCache) Get(key []byte) (local, meta, mod int64, ok bool) {
	set, i := c.find(xxhash.Sum64(key), key)
	if i < 0 {
		return 0, 0, 0, false
	}
	c.use(set, i, key)
	f := &set.fact[i]
	return f.local, f.meta, f.mod, true
}

// Learn takes a fact: at meta revision mod, key existed, created at meta revision meta, which is revision
// local of its shard. Facts may come in any order: an older one changes nothing.
func (c *CreateCache) Learn(key []byte, local, meta, mod int64) {
	if len(key) == 0 || len(key) > cacheMaxKey {
		return
	}
	hash := xxhash.Sum64(key)
	set, i := c.find(hash, key)
	if i < 0 {
		i = c.place(set, hash, key)
	} else if mod < set.fact[i].mod {
		return
	}
	c.use(set, i, key)
	set.fact[i] = createFact{local, meta, mod}
}

// Deleted takes the fact that key did not exist at meta revision mod.
func (c *CreateCache) Deleted(key []byte, mod int64) { c.Learn(key, 0, 0, mod) }

// Forget drops what is known of key, because a guard has shown that it is wrong.
func (c *CreateCache) Forget(key []byte) {
	if set, i := c.find(xxhash.Sum64(key), key); i >= 0 {
		set.size[i] = 0
	}
}

// use notes that a place was used, and saves its key from being overtaken soon.
func (c *CreateCache) use(set *createSet, i int, key []byte) {
	if c.head-set.at[i] > uint64(len(c.keys))/2 {
		set.at[i] = c.store(key)
	}
	set.used[i] = uint32(c.head)
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
