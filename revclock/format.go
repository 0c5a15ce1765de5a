package revclock

import (
	"encoding/binary"
	"errors"
	"math"

	"google.golang.org/protobuf/encoding/protowire"
)

// The keys of the coordinator. Nothing else is in it.
const (
	// KeyEpoch is the coordinator's key that names the epoch.
	KeyEpoch    = "e"
	keySnapshot = "s"
	keyTick     = "t"
)

// Bounds of what is stored on the coordinator.
const (
	// MaxCount is the largest number of revisions that a tick hands out for one shard.
	MaxCount = 1 << 16
	// MaxFilter is the largest filter in bytes.
	MaxFilter = 4 << 10
	// maxShards bounds a parsed tick; the partition map has the same bound.
	maxShards = 1024
)

const format = 1 // of tick, snapshot and epoch

// Errors of the parsers. A tick that cannot be read must stop its reader: every proxy has to count the
// same revisions.
var (
	errTick     = errors.New("the coordinator holds a tick that this version of Spindle cannot read")
	errSnapshot = errors.New("the coordinator holds a snapshot that this version of Spindle cannot read")
	errEpoch    = errors.New("the coordinator holds an epoch that this version of Spindle cannot read")
)

// Tick is a value of the key `t`: who wants how many revisions for which shards.
//
//	0x01 ‖ proxy[16] ‖ uvarint nonce ‖ uvarint n ‖
//	n × (uvarint shard index, uvarint count<<1 | turn, uvarint C_i, uvarint len ‖ filter)
//
// An item with count 0 hands out nothing, and says C_i alone: it has neither turn nor filter, and C_i is not 0. Shards are
// ascending, and there is at least one. The revision that the coordinator gives the put makes
// its place in the log.
type Tick struct {
	Proxy ID
	Nonce uint64 // of the proxy's, not 0; told apart are the ticks of one process
	Items []TickItem
}

// TickItem is the part of one shard in a tick.
type TickItem struct {
	Shard     int
	Count     int // 1 to MaxCount; 0: only Committed is said
	Turn      bool
	Committed int64 // C_i
	Filter    []byte
}

// AppendTick appends the value of the key `t`.
func AppendTick(dst []byte, t *Tick) []byte {
	dst = append(dst, format)
	dst = append(dst, t.Proxy[:]...)
	dst = protowire.AppendVarint(dst, t.Nonce)
	dst = protowire.AppendVarint(dst, uint64(len(t.Items)))
	for i := range t.Items {
		it := &t.Items[i]
		dst = protowire.AppendVarint(dst, uint64(it.Shard))
		count := uint64(it.Count) << 1
		if it.Turn {
			count |= 1
		}
		dst = protowire.AppendVarint(dst, count)
		dst = protowire.AppendVarint(dst, uint64(it.Committed))
		dst = protowire.AppendBytes(dst, it.Filter)
	}
	return dst
}

// Parse reads a value of the key `t` into t, whose Items are reused. Filters are views into v.
func (t *Tick) Parse(v []byte) error {
	p := Parser{B: v}
	f := p.Byte()
	*t = Tick{Proxy: p.ID(), Nonce: p.Uvarint(), Items: t.Items[:0]}
	n := p.Uvarint()
	if p.Bad || f != format || t.Nonce == 0 || n == 0 || n > maxShards {
		return errTick
	}
	last := -1
	for ; n > 0; n-- {
		shard, count, committed := p.Uvarint(), p.Uvarint(), p.Uvarint()
		filter := p.Bytes()
		if p.Bad || shard >= maxShards || int(shard) <= last || count>>1 > MaxCount ||
			count>>1 == 0 && (count != 0 || committed == 0 || len(filter) > 0) || committed > math.MaxInt64 || len(filter) > MaxFilter {
			return errTick
		}
		last = int(shard)
		t.Items = append(t.Items, TickItem{
			Shard: last, Count: int(count >> 1), Turn: count&1 == 1, Committed: int64(committed), Filter: filter,
		})
	}
	if !p.Done() {
		return errTick
	}
	return nil
}

// Snapshot is the value of the key `s`: the fold of the log of ticks up to a revision of the coordinator.
// Two proxies write the same bytes for the same revision.
//
//	0x01 ‖ uvarint coordinator's revision ‖ be64 N ‖ n × (uvarint A_i, holder[16], uvarint C_i)
type Snapshot struct {
	Rev    int64 // of the last tick that is folded in
	N      int64
	Shards []SnapshotShard
}

// SnapshotShard is the part of one shard in a snapshot.
type SnapshotShard struct {
	A      int64 // the last revision that was handed out for the shard
	Holder ID    // to whom
	C      int64 // the largest clock that any tick named as committed
}

// AppendSnapshot appends the value of the key `s`.
func AppendSnapshot(dst []byte, s *Snapshot) []byte {
	dst = append(dst, format)
	dst = protowire.AppendVarint(dst, uint64(s.Rev))
	dst = binary.BigEndian.AppendUint64(dst, uint64(s.N))
	for i := range s.Shards {
		dst = protowire.AppendVarint(dst, uint64(s.Shards[i].A))
		dst = append(dst, s.Shards[i].Holder[:]...)
		dst = protowire.AppendVarint(dst, uint64(s.Shards[i].C))
	}
	return dst
}

// Parse reads a value of the key `s` into s, whose Shards are reused.
func (s *Snapshot) Parse(v []byte) error {
	p := Parser{B: v}
	f := p.Byte()
	rev, n := p.Uvarint(), p.Be64()
	*s = Snapshot{Rev: int64(rev), N: int64(n), Shards: s.Shards[:0]}
	if p.Bad || f != format || rev > math.MaxInt64 || n > math.MaxInt64 {
		return errSnapshot
	}
	for len(p.B) > 0 {
		a := p.Uvarint()
		holder := p.ID()
		c := p.Uvarint()
		if p.Bad || a > n || c > a || len(s.Shards) == maxShards {
			return errSnapshot
		}
		s.Shards = append(s.Shards, SnapshotShard{A: int64(a), Holder: holder, C: int64(c)})
	}
	if p.Bad {
		return errSnapshot
	}
	return nil
}

// AppendEpoch appends the value of the key `e`: 0x01 ‖ epoch[16].
func AppendEpoch(dst []byte, epoch ID) []byte {
	return append(append(dst, format), epoch[:]...)
}

// ParseEpoch reads a value of the key `e`.
func ParseEpoch(v []byte) (epoch ID, err error) {
	p := Parser{B: v}
	f := p.Byte()
	epoch = p.ID()
	if !p.Done() || f != format {
		return ID{}, errEpoch
	}
	return epoch, nil
}
