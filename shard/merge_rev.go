package shard

import (
	"bytes"
	"slices"

	"spindle/codec"
)

// MergeAtRevision builds what a range held at meta revision r, where r lies inside a batch of one shard:
// after is the whole range (no limit) at the batch's local revision, before the same at the local
// revision before it, both RangeResponses in member form, and rec the batch's clock record. It appends a
// RangeResponse in member form that AnswerRange takes.
//
// The batch writes each key by one request at most. So a key of the later state counts if its stamp is
// not above r, else its earlier version does; a key that is gone later was deleted at the revision that
// the record gives, and counts in its earlier version if that is above r.
//
// ok is false when the bytes are not well-formed, a value has no stamp, or the record does not explain a
// key that is gone.
func MergeAtRevision(dst, after, before []byte, r int64, rec *Record) (out []byte, ok bool) {
	return mergeAtRevision(dst, after, before, r, rec, nil)
}

// mergeAtRevision is MergeAtRevision for pages: keys behind last are left out, unless it is nil.
func mergeAtRevision(dst, after, before []byte, r int64, rec *Record, last []byte) (out []byte, ok bool) {
	late, ok := storedKVs(after, last)
	if !ok {
		return dst, false
	}
	early, ok := storedKVs(before, last)
	if !ok {
		return dst, false
	}
	// Ranges come in order unless a shard was asked for another one.
	byKey := func(a, b storedKV) int { return bytes.Compare(a.key, b.key) }
	slices.SortFunc(late, byKey)
	slices.SortFunc(early, byKey)
	count := int64(0)
	add := func(kv *storedKV) {
		dst = codec.AppendBytes(dst, 2, kv.raw)
		count++
	}
	i, j := 0, 0
	for i < len(late) || j < len(early) {
		order := 0
		switch {
		case i == len(late):
			order = 1
		case j == len(early):
			order = -1
		default:
			order = bytes.Compare(late[i].key, early[j].key)
		}
		switch {
		case order > 0: // gone
			at, known := rec.RevOfDelete(early[j].key)
			if !known {
				return dst, false
			}
			if at > r {
				add(&early[j])
			}
			j++
		case late[i].mod <= r:
			add(&late[i])
			i++
			if order == 0 {
				j++
			}
		default:
			i++
			if order == 0 {
				add(&early[j])
				j++
			}
		}
	}
	return codec.AppendInt(dst, 4, count), true
}

// storedKV is a KeyValue of a shard: its key, its meta mod revision and its bytes.
type storedKV struct {
	key, raw []byte
	mod      int64
}

func storedKVs(resp, last []byte) (kvs []storedKV, ok bool) {
	it := codec.Fields{Msg: resp}
	for it.Next() {
		if it.Field.Num != 2 {
			continue
		}
		var kv snapKV
		if stamped, ok := parseStored(it.Field.Bytes, &kv); !ok || !stamped {
			return nil, false
		}
		if last != nil && bytes.Compare(kv.Key, last) > 0 {
			continue
		}
		kvs = append(kvs, storedKV{kv.Key, it.Field.Bytes, kv.ModRevision})
	}
	return kvs, !it.Bad
}
