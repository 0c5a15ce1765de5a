package shard

import (
	"bytes"
	"slices"

	"spindle/codec"
)

// This file keeps the cost of a long list linear. For every page, whatever its limit, etcd counts the keys from
// the page's start to the end of the range (storage/mvcc/index.go, Revisions), so a list that always named the
// range's end would cost its members the square of its length. Therefore a part with many pages before it looks at
// the keys alone, many pages at once, and gives pages ends that are near. An end is only a place where the list is
// divided: whatever state it was seen in, what the pages show is the same. So all parts use the ends that one has
// found: keys that are spread by a hash are divided alike everywhere. A part that is beyond all ends looks itself.

// Bounds of a look, in pages of the size that they come to have.
const (
	// longPart is how many pages must lie before a part for a look to pay, if no other part has use of it; of several
	// parts less, down to longParts.
	longPart  = 16
	longParts = 4
	// segmentPages is how many pages share an end. A page counts the rest of its segment.
	segmentPages = 2
	// lookPages is how many pages one look goes over at most, lookKeys how many keys. lookShare is how many times
	// a stream's page (see pageBytes, which shrinks when there are many streams) the answer may be, about; the keys
	// of one segment it always holds. It is let go of at once, and a list has one under way.
	lookPages = 64
	lookKeys  = 64 << 10
	lookShare = 2
	// lookOverhead is what a key alone takes in a member's answer beside its bytes.
	lookOverhead = 48
)

// needsEnds says that a look should come before the part's next page.
func (p *pagePart) needsEnds() bool {
	long, _ := p.r.segments()
	return p.r.spec.limit <= 0 && p.counted && !p.endless && !p.jumps() && p.total-p.fetched > long*p.sparse() && p.nextEnd() == nil
}

// nextEnd returns an end behind the part's next key, nil if there is none: the first one, or of those of a shape one that is
// a page away. All that is left is one page if it fits: it is known how many keys that are, but not how many are where.
func (p *pagePart) nextEnd() []byte {
	r := p.r
	if !p.counted {
		return nil // its first page counts all
	}
	i, equal := slices.BinarySearchFunc(r.ends, p.from, bytes.Compare)
	for ; equal && i < len(r.ends) && bytes.Equal(r.ends[i], p.from); i++ { // a page that ended where it begins would never come to an end
	}
	if i < r.known {
		if p.total-p.fetched <= p.limit && r.known-i <= 2*p.stride() { // the shape knows of no large values among them
			return nil
		}
		i = min(i+p.stride(), r.known) - 1
	}
	if i == len(r.ends) {
		return nil
	}
	return r.ends[i]
}

// sparse is the size of pages that ends are made for: first pages are small, but there are few of them. (Where a
// test makes pages small, it is that of the next one.)
func (p *pagePart) sparse() int64 {
	if p.r.c.cfg.PageKeys < firstPageKeys {
		return p.limit
	}
	return max(p.limit, p.fullPage())
}

// segments returns from how many pages on a part is long, and how many of them share an end: fewer where a test
// makes pages small, whose lists are short.
func (r *pagedRead) segments() (long, pages int64) {
	if r.c.cfg.PageKeys < firstPageKeys {
		return 1, 1
	}
	return max(longPart/int64(len(r.parts)), longParts), segmentPages
}

// endsCall is the Completion of a look at the keys. While it is under way parts read on without ends, unless what is left of
// them is more than lookKeys, and dear to count. Those wait, and their pages follow, also when it failed.
type endsCall struct {
	p   *pagePart
	gen int
}

func (q *endsCall) send() {
	p := q.p
	c := p.r.c
	room := lookShare * c.pageBytes(len(p.r.parts)) / int64(len(p.from)+lookOverhead)
	limit := min(lookPages*p.sparse(), max(min(lookKeys, room), segmentPages*p.sparse()))
	body := codec.AppendBytes(c.scratch[:0], 1, p.from)
	body = codec.AppendBytes(body, 2, p.r.iv.End)
	body = codec.AppendInt(body, 3, limit)
	body = codec.AppendInt(body, 4, p.local)
	c.scratch = codec.AppendBool(body, 8, true) // keys_only
	p.s.callLarge(codec.MethodRange, c.scratch, limit*int64(len(p.from)+lookOverhead), q)
}

func (q *endsCall) Complete(resp []byte, st codec.Status, sent bool) {
	p := q.p
	r := p.r
	if r.over || r.gen != q.gen {
		return
	}
	r.looking = false
	if st.Code == codec.OK {
		p.divide(resp)
	}
	if len(resp) > codec.KeptReply {
		codec.Recycle(resp)
	}
	p.endless = p.nextEnd() == nil
	for i := range r.parts {
		if p := &r.parts[i]; p.waits {
			p.waits = false
			p.ask()
		}
	}
}

// divide takes every so many'th key of a look as an end. They lie behind those that are known, which the part has
// passed; a page that ended where it begins would never come to an end.
func (p *pagePart) divide(resp []byte) {
	it := codec.Fields{Msg: resp}
	_, pages := p.r.segments()
	every := pages * p.sparse()
	for n := int64(0); it.Next(); {
		if it.Field.Num != 2 {
			continue
		}
		if n++; n%every != 0 {
			continue
		}
		if kv, ok := codec.ParseKV(it.Field.Bytes); ok && bytes.Compare(kv.Key, p.from) > 0 {
			p.r.ends = append(p.r.ends, bytes.Clone(kv.Key))
		}
	}
}
