package shard

import (
	"bytes"
	"encoding/binary"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/revclock"
)

// RecordKind says what wrote a clock record.
type RecordKind uint8

// The kinds of records. 0 is not used, so that a zeroed byte is not taken for a record.
const (
	KindBatch   RecordKind = 1 // client requests
	KindFence   RecordKind = 2 // an empty batch, and the record of the first start
	KindRebuild RecordKind = 3 // the fence of a rebuilt coordinator
)

const recordFormat = 1

// Record is the value of KeyClock: what the latest batch on a shard was.
//
//	be64(Last) ‖ 0x01 ‖ kind ‖ epoch[16] ‖ proxy[16] ‖ uvarint batch ‖ uvarint((Last−First)<<1 | spare) ‖
//	uvarint n ‖ n × (uvarint(Rev−First), uvarint len ‖ key, uvarint len ‖ range_end) ‖ uvarint 0
//
// Last comes first and big-endian: VALUE(KeyClock) < be64(X) holds on the shard exactly if Last < X. The
// 0 at the end is the length of an extension; format 1 knows none.
type Record struct {
	First, Last int64
	// Spare says that no request of the batch has First: it is for what happened before the batch.
	Spare bool
	Kind  RecordKind
	Epoch revclock.ID
	Proxy revclock.ID
	Batch uint64
	// Deletes says which revision a deleted key belongs to (an event of a delete carries no stamp): every
	// delete of the batch, of branches that were not taken too, in the order of the batch.
	Deletes []RecordDelete

	hint int // where RevOfDelete found the previous key
}

// RecordDelete is a delete of one key (End empty) or of a range as etcd has it ("\0" is infinity).
type RecordDelete struct {
	Rev      int64
	Key, End []byte
}

// AppendRecord appends the value of KeyClock that r describes.
func AppendRecord(dst []byte, r *Record) []byte {
	dst = binary.BigEndian.AppendUint64(dst, uint64(r.Last))
	dst = append(dst, recordFormat, byte(r.Kind))
	dst = append(dst, r.Epoch[:]...)
	dst = append(dst, r.Proxy[:]...)
	dst = protowire.AppendVarint(dst, r.Batch)
	width := uint64(r.Last-r.First) << 1
	if r.Spare {
		width |= 1
	}
	dst = protowire.AppendVarint(dst, width)
	dst = protowire.AppendVarint(dst, uint64(len(r.Deletes)))
	for i := range r.Deletes {
		d := &r.Deletes[i]
		dst = protowire.AppendVarint(dst, uint64(d.Rev-r.First))
		dst = protowire.AppendBytes(dst, d.Key)
		dst = protowire.AppendBytes(dst, d.End)
	}
	return append(dst, 0)
}

// AppendInitialRecord appends the record that the first start of a system writes: revision 0, by nobody.
func AppendInitialRecord(dst []byte, epoch revclock.ID) []byte {
	return AppendRecord(dst, &Record{Kind: KindFence, Epoch: epoch})
}

// ParseRecord reads a value of KeyClock; keys are views into v. ok is false for what is not a record, or
// of a format or with an extension that this version does not know.
func ParseRecord(v []byte) (r Record, ok bool) {
	ok = r.Parse(v)
	return r, ok
}

// Parse is ParseRecord into an old Record, whose Deletes are reused. On false r is undefined.
func (r *Record) Parse(v []byte) bool {
	const fixed = 8 + 1 + 1 + 16 + 16
	*r = Record{Deletes: r.Deletes[:0]}
	if len(v) < fixed || v[8] != recordFormat {
		return false
	}
	r.Last = int64(binary.BigEndian.Uint64(v))
	r.Kind = RecordKind(v[9])
	if r.Last < 0 || r.Kind < KindBatch || r.Kind > KindRebuild {
		return false
	}
	copy(r.Epoch[:], v[10:])
	copy(r.Proxy[:], v[26:])
	p := revclock.Parser{B: v[fixed:]}
	r.Batch = p.Uvarint()
	width := p.Uvarint()
	if p.Bad || width>>1 > uint64(r.Last) {
		return false
	}
	r.First = r.Last - int64(width>>1)
	r.Spare = width&1 == 1
	if r.First == 0 && r.Last != 0 {
		return false // revision 0 is nobody's
	}
	// A delete takes at least four bytes, so that a lying n costs no memory.
	n := p.Uvarint()
	if n > uint64(len(p.B))/4 {
		return false
	}
	for ; n > 0; n-- {
		off := p.Uvarint()
		key, end := p.Bytes(), p.Bytes()
		if p.Bad || off > width>>1 || len(key) == 0 {
			return false
		}
		r.Deletes = append(r.Deletes, RecordDelete{Rev: r.First + int64(off), Key: key, End: end})
	}
	return p.Uvarint() == 0 && p.Done()
}

// RecordLast returns the revision of a clock record without reading the rest.
func RecordLast(v []byte) (last int64, ok bool) {
	if len(v) < 9 || v[8] != recordFormat {
		return 0, false
	}
	last = int64(binary.BigEndian.Uint64(v))
	return last, last >= 0
}

// RevOfDelete returns the revision that the delete of key belongs to; ok is false if no request of the
// batch deletes it (a lease that expired, somebody who wrote to the shard directly).
//
// A key is deleted by one request of a batch at most, so the first delete that covers it is the one. The
// search begins where the previous one ended: events come in the order of the batch, and a large batch
// of deletes costs no quadratic time.
func (r *Record) RevOfDelete(key []byte) (rev int64, ok bool) {
	n := len(r.Deletes)
	if r.hint >= n {
		r.hint = 0
	}
	for i := r.hint; i < n; i++ {
		if r.Deletes[i].covers(key) {
			r.hint = i
			return r.Deletes[i].Rev, true
		}
	}
	for i := 0; i < r.hint; i++ {
		if r.Deletes[i].covers(key) {
			r.hint = i
			return r.Deletes[i].Rev, true
		}
	}
	return 0, false
}

func (d *RecordDelete) covers(key []byte) bool {
	if len(d.End) == 0 {
		return bytes.Equal(d.Key, key)
	}
	if bytes.Compare(key, d.Key) < 0 {
		return false
	}
	return len(d.End) == 1 && d.End[0] == 0 || bytes.Compare(key, d.End) < 0
}
