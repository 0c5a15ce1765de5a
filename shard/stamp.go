package shard

import (
	"encoding/binary"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/revclock"
)

// Stamp is what Spindle knows of a stored value; it stands in front of the user's bytes in every value
// on a shard:
//
//	be64(Rev) ‖ uvarint((Rev−Create)<<1 | ext) ‖ [uvarint len ‖ (tag, value)*] ‖ user's bytes
//
// The revision comes first and big-endian, so that a shard itself can compare revisions with a VALUE
// compare. The bracket is there when ext is 1; tag 1 is the version offset (zigzag), tag 2 the client's ID of the lease.
type Stamp struct {
	Rev    int64 // mod revision, at least 1
	Create int64 // create revision, 1 to Rev
	// VersionOffset is added to the version that the shard counts: a key that moved to this shard
	// began anew at 1 there.
	VersionOffset int64
	// Lease is the ID that clients know the key's lease by, if its ID on the shard is another one; else 0.
	Lease int64
}

// MaxStamp is the largest size of a stamp in bytes: what a value grows by at most.
const MaxStamp = 8 + 10 + 1 + 1 + 10 + 1 + 10

const (
	stampTagVersion = 1
	stampTagLease   = 2
)

// maxStampRev bounds the revision of a stamp, so that a text or a protobuf message that somebody else wrote is not
// taken for one: a stamped value begins with a zero byte. A million revisions a second reach it in 2,000 years.
const maxStampRev = 1<<56 - 1

// AppendStamp appends the stamp of a key that never moved.
func AppendStamp(dst []byte, rev, create int64) []byte {
	dst = binary.BigEndian.AppendUint64(dst, uint64(rev))
	return protowire.AppendVarint(dst, uint64(rev-create)<<1)
}

// Append appends s, with the extension if it needs one.
func (s Stamp) Append(dst []byte) []byte {
	if s.VersionOffset == 0 && s.Lease == 0 {
		return AppendStamp(dst, s.Rev, s.Create)
	}
	dst = binary.BigEndian.AppendUint64(dst, uint64(s.Rev))
	dst = protowire.AppendVarint(dst, uint64(s.Rev-s.Create)<<1|1)
	var buf [2 * (1 + 10)]byte
	ext := buf[:0]
	if s.VersionOffset != 0 {
		ext = protowire.AppendVarint(append(ext, stampTagVersion), protowire.EncodeZigZag(s.VersionOffset))
	}
	if s.Lease != 0 {
		ext = protowire.AppendVarint(append(ext, stampTagLease), uint64(s.Lease))
	}
	return protowire.AppendBytes(dst, ext)
}

// ParseStamp splits a stored value; user is a view into v. ok is false for everything that Append does
// not write: a raw value of somebody else, an extension of a later format.
func ParseStamp(v []byte) (s Stamp, user []byte, ok bool) {
	p := revclock.Parser{B: v}
	s.Rev = int64(p.Be64())
	age := p.Uvarint()
	if p.Bad || s.Rev <= 0 || s.Rev > maxStampRev || age>>1 >= uint64(s.Rev) {
		return Stamp{}, nil, false
	}
	s.Create = s.Rev - int64(age>>1)
	if age&1 == 0 {
		return s, p.B, true
	}
	ext := revclock.Parser{B: p.Bytes()}
	for last := uint64(0); ; {
		tag, v := ext.Uvarint(), ext.Uvarint()
		if p.Bad || ext.Bad || tag <= last || v == 0 {
			return Stamp{}, nil, false
		}
		switch tag {
		case stampTagVersion:
			s.VersionOffset = protowire.DecodeZigZag(v)
		case stampTagLease:
			s.Lease = int64(v)
		default:
			return Stamp{}, nil, false
		}
		if last = tag; ext.Done() {
			return s, p.B, true
		}
	}
}

// AppendRevBound appends rev as the first bytes of a stamp, for VALUE compares against stamped values.
// It takes a uint64 because X+1 of the largest revision must not overflow.
func AppendRevBound(dst []byte, rev uint64) []byte {
	return binary.BigEndian.AppendUint64(dst, rev)
}
