package shard

import (
	"encoding/binary"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/revclock"
)

// The reserved keys of a shard. All keys whose first byte is 0 are Spindle's; clients never see them.
const (
	KeyClock    = "\x00clock"   // a Record; rewritten by every batch
	KeyMap      = "\x00map"     // a Map
	KeyID       = "\x00id"      // the shard's identity
	KeyCompact  = "\x00compact" // up to which revision clients compacted
	KeyLoss     = "\x00loss"    // there while an accepted loss is not fenced yet
	KeyLeases   = "\x00lease/"  // prefix of lease markers: KeyLeases ‖ 16 hex digits of the client's lease ID
	KeyLeaseEnd = "\x00lease0"  // end of the range of all lease markers
	// KeyUserFirst is the smallest key that a client can have; ranges that begin below are clamped to it.
	KeyUserFirst = "\x01"
)

const smallFormat = 1 // of the identity, the compaction record, the mark of a loss, the lease marker

// AppendIdentity appends the value of KeyID: 0x01 ‖ identity[16], random, written once at the shard's
// first start.
func AppendIdentity(dst []byte, id revclock.ID) []byte {
	return append(append(dst, smallFormat), id[:]...)
}

// ParseIdentity reads a value of KeyID.
func ParseIdentity(v []byte) (id revclock.ID, ok bool) {
	p := revclock.Parser{B: v}
	if p.Byte() != smallFormat {
		return id, false
	}
	id = p.ID()
	return id, p.Done() && id != revclock.ID{}
}

// AppendCompaction appends the value of KeyCompact: 0x01 ‖ be64(rev). The revision is big-endian, so that
// a shard can compare two of these by VALUE and it never goes back.
func AppendCompaction(dst []byte, rev int64) []byte {
	return binary.BigEndian.AppendUint64(append(dst, smallFormat), uint64(rev))
}

// ParseCompaction reads a value of KeyCompact.
func ParseCompaction(v []byte) (rev int64, ok bool) {
	p := revclock.Parser{B: v}
	if p.Byte() != smallFormat {
		return 0, false
	}
	rev = int64(p.Be64())
	return rev, p.Done() && rev >= 0
}

// LossMark is the value of KeyLoss. It says what may be missing, so that an older copy of a shard that holds a mark does not have
// a later loss accepted, see accept.go.
type LossMark struct {
	Epoch revclock.ID // believed when the loss was accepted: that the shard's map does not name it is accepted
	Rev   int64       // that the clock is below a C_i of up to this is accepted
}

// AppendLossMark appends 0x01 ‖ epoch[16] ‖ be64(rev).
func AppendLossMark(dst []byte, m LossMark) []byte {
	dst = append(append(dst, smallFormat), m.Epoch[:]...)
	return binary.BigEndian.AppendUint64(dst, uint64(m.Rev))
}

// ParseLossMark reads a value of KeyLoss.
func ParseLossMark(v []byte) (m LossMark, ok bool) {
	p := revclock.Parser{B: v}
	if p.Byte() != smallFormat {
		return m, false
	}
	m = LossMark{Epoch: p.ID(), Rev: int64(p.Be64())}
	return m, p.Done() && m.Rev >= 0
}

// LeaseMarker is the value of a marker: which lease on the members stands for a client's lease, and
// which shards hold copies of it.
type LeaseMarker struct {
	Member int64 // ID of the lease on the members
	Shards []int // ascending
}

// leaseKeySize is the size of every key that AppendLeaseKey makes.
const leaseKeySize = len(KeyLeases) + 16

// AppendLeaseKey appends the key of the marker of a client's lease, and of its copies.
func AppendLeaseKey(dst []byte, lease int64) []byte {
	dst = append(dst, KeyLeases...)
	for shift := 60; shift >= 0; shift -= 4 {
		dst = append(dst, "0123456789abcdef"[uint64(lease)>>shift&15])
	}
	return dst
}

// ParseLeaseKey reads a key that AppendLeaseKey made.
func ParseLeaseKey(key []byte) (lease int64, ok bool) {
	if len(key) != len(KeyLeases)+16 || string(key[:len(KeyLeases)]) != KeyLeases {
		return 0, false
	}
	for _, c := range key[len(KeyLeases):] {
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		default:
			return 0, false
		}
		lease = lease<<4 | int64(c)
	}
	return lease, true
}

// AppendLeaseMarker appends 0x01 ‖ uvarint member's lease ID ‖ (uvarint shard index)*.
func AppendLeaseMarker(dst []byte, m *LeaseMarker) []byte {
	dst = append(dst, smallFormat)
	dst = protowire.AppendVarint(dst, uint64(m.Member))
	for _, i := range m.Shards {
		dst = protowire.AppendVarint(dst, uint64(i))
	}
	return dst
}

// ParseLeaseMarker reads the value of a marker into m, whose Shards are reused.
func ParseLeaseMarker(m *LeaseMarker, v []byte) bool {
	*m = LeaseMarker{Shards: m.Shards[:0]}
	p := revclock.Parser{B: v}
	if p.Byte() != smallFormat {
		return false
	}
	m.Member = int64(p.Uvarint())
	last := -1
	for len(p.B) > 0 {
		i := p.Uvarint()
		if p.Bad || i >= MaxShards || int(i) <= last {
			return false
		}
		last = int(i)
		m.Shards = append(m.Shards, last)
	}
	return p.Done()
}
