package shard

import (
	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// pageRewriter makes what clients get of a page, a member's RangeResponse, while that comes in: the fields of its keys in client
// form, and nothing else. So each byte is looked at when it is in the processor's cache; a page that lies whole in memory
// is walked over at the price of a memory access or two for each key, and then once more when it is merged. It
// implements codec.Rewriter.
//
// A page that holds anything but stamped values and Spindle's own keys spoils it. Then the page is asked for again, to be seen as
// the member has it.
type pageRewriter struct {
	used bool // something came
	bad  bool
	sum  pageSum
	last []byte // key; memory of sum.end.key
	part []byte // a field whose end has not come: for as long as the page is under way, up to its longest key with its value, uncounted
}

// rewrote says that the reply was rewritten; one that came in one piece was not.
func (w *pageRewriter) rewrote() bool { return w != nil && w.used }

// spoiled says that the reply is of no use.
func (w *pageRewriter) spoiled() bool { return w.rewrote() && (w.bad || len(w.part) > 0) }

// Rewrite implements codec.Rewriter. p is not kept.
func (w *pageRewriter) Rewrite(dst, p []byte) []byte {
	w.used, w.sum.client = true, true
	for len(w.part) > 0 && len(p) > 0 && !w.bad {
		f := w.fieldAt(w.part)
		k := min(max(f.end-len(w.part), 1), len(p)) // byte by byte until the length is here
		w.part = append(w.part, p[:k]...)
		p = p[k:]
		if f = w.fieldAt(w.part); f.end == len(w.part) {
			dst = w.take(dst, w.part, f)
			w.part = w.part[:0]
		}
	}
	for len(p) > 0 && !w.bad {
		f := w.fieldAt(p)
		if f.end == 0 || f.end > len(p) {
			w.part = append(w.part[:0], p...)
			break
		}
		dst = w.take(dst, p, f)
		p = p[f.end:]
	}
	return dst
}

// pageField is where a field of a RangeResponse lies in the bytes that it begins.
type pageField struct {
	num       protowire.Number
	val       uint64 // of a number
	body, end int    // of bytes; end is that of the field, 0 if it cannot be told yet
}

// maxFieldHead is the longest that tag and length, or number, of a field are.
const maxFieldHead = 2 * 10

// fieldAt looks at the field that begins p, which is not empty.
func (w *pageRewriter) fieldAt(p []byte) pageField {
	num, typ, n := protowire.ConsumeTag(p)
	if n > 0 && typ != protowire.BytesType && typ != protowire.VarintType {
		w.bad = true // RangeResponse has no others
		return pageField{}
	}
	m := 0
	val := uint64(0)
	if n > 0 {
		val, m = protowire.ConsumeVarint(p[n:])
	}
	switch {
	case n < 0 || m < 0:
		w.bad = len(p) >= maxFieldHead
		return pageField{}
	case typ == protowire.VarintType:
		return pageField{num: num, val: val, end: n + m}
	case val > maxMemberMessageBytes:
		w.bad = true
		return pageField{}
	}
	return pageField{num: num, body: n + m, end: n + m + int(val)}
}

// take takes the field f of p.
func (w *pageRewriter) take(dst, p []byte, f pageField) []byte {
	switch {
	case f.num == 2 && f.body > 0:
		return w.key(dst, p[f.body:f.end])
	case f.num == 2:
		w.bad = true
	case f.num == 3:
		w.sum.end.more = f.val != 0
	case f.num == 4:
		w.sum.end.count = int64(f.val)
	}
	return dst
}

// key takes one key.
func (w *pageRewriter) key(dst, msg []byte) []byte {
	var kv snapKV
	stamped, ok := parseStored(msg, &kv)
	w.sum.end.n++
	w.last = append(w.last[:0], kv.Key...)
	w.sum.end.key = w.last
	switch {
	case !ok, !stamped && !isReserved(kv.Key):
		w.bad = true
	case stamped:
		// It is shorter than what the member stores, unless its revisions are out of all proportion to the member's.
		size := sizeKVField(&kv.KV)
		if len(dst)+size > cap(dst) {
			w.bad = true
			break
		}
		w.sum.keys++
		w.sum.size += int64(size)
		return appendKVField(dst, 2, &kv.KV)
	}
	return dst
}

// clientPage makes a rewritten page of one that is as the member has it. sum is what is in it.
func clientPage(page []byte, sum *pageSum) []byte {
	dst := codec.Borrow(int(sum.size))
	for it := (partIter{it: codec.Fields{Msg: page}}); it.next(); {
		dst = appendKVField(dst, 2, &it.kv.KV)
	}
	sum.client = true
	return dst
}
