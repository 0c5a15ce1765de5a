package shard

import (
	"bytes"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// List is the answer to a long Range that is put together while it is sent: the members' pages, which are merged as far as
// the client takes them. So there are no two copies of a long list, the first bytes go out as soon as the last page is
// here, and pages are let go of one after the other. Its length must be known before, and is: that of each key in
// client form was counted when its page came.
//
// It implements codec.Source. Whoever has it may use it on any goroutine, one at a time.
type List struct {
	parts []listPart
	left  int // bytes
	mem   int // capacity of the pages
	end   []byte

	piece []byte    // what is being appended: of from's page, the header or end
	from  *listPart // whose key piece is; nil: nobody's
}

// listPart is the pages of one shard, in the order of their keys: fields of the answer, as a pageRewriter makes them.
type listPart struct {
	key   []byte // the next key, nil at the end
	field []byte // with all that belongs to it, as it is sent
	rest  []byte // of page, behind field
	page  []byte
	pages [][]byte
}

// newList makes the answer of a header, the parts' keys, which take size bytes, and what stands behind them.
func newList(header []byte, parts []listPart, size int64, end []byte) *List {
	l := &List{parts: parts, end: end, left: len(header) + int(size) + len(end)}
	l.piece = header
	for i := range parts {
		for _, page := range parts[i].pages {
			l.mem += cap(page)
		}
		l.advance(&parts[i])
	}
	return l
}

// Len implements codec.Source.
func (l *List) Len() int { return l.left }

// Mem implements codec.Source.
func (l *List) Mem() int { return l.mem }

// Drop implements codec.Source.
func (l *List) Drop() {
	for i := range l.parts {
		p := &l.parts[i]
		codec.Recycle(p.page)
		for _, page := range p.pages {
			codec.Recycle(page)
		}
	}
	*l = List{}
}

// Next implements codec.Source.
func (l *List) Next(dst []byte, n int) []byte {
	l.left -= n
	for n > 0 {
		if len(l.piece) == 0 {
			if dst, n = l.keys(dst, n); n == 0 {
				break
			}
		}
		k := min(len(l.piece), n)
		dst = append(dst, l.piece[:k]...)
		n -= k
		l.piece = l.piece[k:]
	}
	return dst
}

// keys appends keys as long as whole ones fit into n bytes, and makes the next one the piece. It returns what is left of n.
func (l *List) keys(dst []byte, n int) ([]byte, int) {
	if l.from != nil {
		l.advance(l.from) // its key has been sent, from its page
		l.from = nil
	}
	for {
		p := l.first()
		if p == nil {
			l.piece, l.end = l.end, nil
			if len(l.piece) == 0 {
				// The length was counted from these very bytes. A client refuses what is no protobuf.
				return append(dst, make([]byte, n)...), 0
			}
			return dst, n
		}
		if len(p.field) > n {
			l.piece, l.from = p.field, p
			return dst, n
		}
		dst = append(dst, p.field...)
		n -= len(p.field)
		l.advance(p)
	}
}

// first returns the part with the smallest key, nil when all are at their end.
func (l *List) first() *listPart {
	var best *listPart
	for i := range l.parts {
		if p := &l.parts[i]; p.key != nil && (best == nil || bytes.Compare(p.key, best.key) < 0) {
			best = p
		}
	}
	return best
}

// advance moves to p's next key, and lets go of the page that has none.
func (l *List) advance(p *listPart) {
	for !p.next() && len(p.pages)+len(p.page) > 0 {
		l.mem -= cap(p.page)
		codec.Recycle(p.page)
		p.page, p.rest = nil, nil
		if len(p.pages) == 0 {
			return
		}
		p.page, p.pages[0] = p.pages[0], nil
		p.pages, p.rest = p.pages[1:], p.page
	}
}

// next moves to the next key of the page, if there is one: a KeyValue as field 2, whose first field is the key.
func (p *listPart) next() bool {
	p.key, p.field = nil, nil
	if len(p.rest) == 0 {
		return false
	}
	size, n := protowire.ConsumeVarint(p.rest[1:])
	kv := p.rest[1+n : 1+n+int(size)]
	p.field, p.rest = p.rest[:1+n+int(size)], p.rest[1+n+int(size):]
	p.key = clientKey(kv)
	return true
}

// clientKey returns the key of a KeyValue as appendKVField makes it: its first field.
func clientKey(kv []byte) []byte {
	size, n := protowire.ConsumeVarint(kv[1:])
	return kv[1+n:][:size]
}
