package revclock

import "github.com/cespare/xxhash/v2"

// A filter says which keys a batch may write: a Bloom filter of len(filter)*8 bits, 4 of them a key. With
// h = xxHash64(key, seed 0), a = h's low and b = h's high 32 bits with the lowest bit set, key has the
// bits (a + i·b mod 2^32) mod (8·len), i = 0 to 3; bit k is 1<<(k mod 8) of byte k/8. All proxies must
// compute it alike. A batch that writes nothing has an empty filter; see FilterAll for ranges.

const (
	filterHashes = 4
	filterMin    = 16 // bytes: small batches get nearly exact filters
)

// FilterAll is the filter of a batch that may write anything, ranges for instance. It must not be
// changed.
var FilterAll = []byte{0xff}

// NewFilter appends an empty filter for n keys (about 8 bits a key: one in 40 others seems to be in it)
// to dst[:0]; with more keys than MaxFilter bytes serve well it is FilterAll's.
func NewFilter(dst []byte, n int) []byte {
	dst = dst[:0]
	switch {
	case n <= 0:
		return dst
	case n > MaxFilter:
		return append(dst, FilterAll...)
	}
	for range max(n, filterMin) {
		dst = append(dst, 0)
	}
	return dst
}

// FilterAdd adds key to a filter that NewFilter made for at least one key.
func FilterAdd(filter, key []byte) {
	if len(filter) == 0 {
		return
	}
	bits := uint32(len(filter)) * 8
	h := xxhash.Sum64(key)
	a, b := uint32(h), uint32(h>>32)|1
	for range filterHashes {
		k := a % bits
		filter[k/8] |= 1 << (k % 8)
		a += b
	}
}

// FilterMayContain says whether a batch with this filter may write key.
func FilterMayContain(filter, key []byte) bool {
	if len(filter) == 0 {
		return false
	}
	bits := uint32(len(filter)) * 8
	h := xxhash.Sum64(key)
	a, b := uint32(h), uint32(h>>32)|1
	for range filterHashes {
		k := a % bits
		if filter[k/8]&(1<<(k%8)) == 0 {
			return false
		}
		a += b
	}
	return true
}

// FilterMayContainRange says whether a batch with this filter may write into a range of keys: a filter
// knows nothing of ranges, so everything that writes at all may.
func FilterMayContainRange(filter []byte) bool { return len(filter) > 0 }
