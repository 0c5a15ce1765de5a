package shard

import (
	"bytes"
	"encoding/binary"
	"sort"

	"github.com/cespare/xxhash/v2"
)

// Partition answers which shard a key lies on. It is made of one Map and does not change; a changed map
// makes another Partition. Any goroutine may use it.
type Partition struct {
	kind   PartitionKind
	n      int
	table  [Slots]uint16
	splits []MapSplit
}

// NewPartition makes the Partition of m, which must be valid and stay unchanged.
func NewPartition(m *Map) *Partition {
	p := &Partition{kind: m.Kind, n: len(m.Shards), splits: m.Splits}
	copy(p.table[:], m.Table)
	return p
}

// Shards returns the number of shards.
func (p *Partition) Shards() int { return p.n }

// Slot returns the slot of a key.
func Slot(key []byte) int { return int(xxhash.Sum64(key) & (Slots - 1)) }

// ShardOf returns the shard of a key.
func (p *Partition) ShardOf(key []byte) int {
	if p.kind == PartitionRange {
		return p.splits[p.split(key)].Shard
	}
	return int(p.table[Slot(key)])
}

// HomeOf returns the shard that judges the lease id, see docs/leases.md.
func (p *Partition) HomeOf(id int64) int {
	var key [8]byte
	binary.BigEndian.PutUint64(key[:], uint64(id))
	slot := Slot(key[:])
	if p.kind == PartitionRange {
		return slot * p.n / Slots
	}
	return int(p.table[slot])
}

// split returns the place of the last range that begins at or before key.
func (p *Partition) split(key []byte) int {
	return sort.Search(len(p.splits), func(i int) bool { return bytes.Compare(p.splits[i].Start, key) > 0 }) - 1
}

// ShardsOf returns where the keys from key up to end lie, as etcd has them: an empty end means the one
// key, "\0" everything from key on. With all set they may lie on several shards (AppendShards tells
// which), else shard has them all.
func (p *Partition) ShardsOf(key, end []byte) (shard int, all bool) {
	if p.n == 1 {
		return 0, false
	}
	if oneKey(key, end) {
		return p.ShardOf(key), false
	}
	if p.kind == PartitionRange {
		lo, hi := p.splitsOf(key, end)
		for i := lo + 1; i <= hi; i++ {
			if p.splits[i].Shard != p.splits[lo].Shard {
				return 0, true
			}
		}
		return p.splits[lo].Shard, false
	}
	return 0, true
}

// AppendShards appends the shards that may hold keys from key up to end, ascending.
func (p *Partition) AppendShards(dst []int, key, end []byte) []int {
	shard, all := p.ShardsOf(key, end)
	if !all {
		return append(dst, shard)
	}
	if p.kind == PartitionRange {
		first := len(dst)
		lo, hi := p.splitsOf(key, end)
	next:
		for i := lo; i <= hi; i++ {
			s := p.splits[i].Shard
			for _, d := range dst[first:] {
				if d == s {
					continue next
				}
			}
			dst = append(dst, s)
		}
		sort.Ints(dst[first:])
		return dst
	}
	for i := range p.n {
		dst = append(dst, i)
	}
	return dst
}

// splitsOf returns the first and last range that key..end touches.
func (p *Partition) splitsOf(key, end []byte) (lo, hi int) {
	lo = p.split(key)
	if infinite(end) {
		return lo, len(p.splits) - 1
	}
	hi = sort.Search(len(p.splits), func(i int) bool { return bytes.Compare(p.splits[i].Start, end) >= 0 }) - 1
	return lo, max(lo, hi)
}

// oneKey says whether a range holds one key at most: no end, an end that is the key's successor, or an
// end at or before it.
func oneKey(key, end []byte) bool {
	if len(end) == 0 {
		return true
	}
	if infinite(end) {
		return false
	}
	if len(end) == len(key)+1 && end[len(key)] == 0 && bytes.Equal(end[:len(key)], key) {
		return true
	}
	return bytes.Compare(end, key) <= 0
}

func infinite(end []byte) bool { return len(end) == 1 && end[0] == 0 }
