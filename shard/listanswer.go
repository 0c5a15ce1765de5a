package shard

import (
	"bytes"

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

	// What is being appended, in three pieces: the fields of a key up to its value, the value, what is behind it.
	piece  [3][]byte
	before []byte // memory of piece[0]
	behind []byte // memory of piece[2]
	from   *listPart
}

// listPart is the pages of one shard, in the order of their keys.
type listPart struct {
	it    partIter
	page  []byte
	pages [][]byte
}

// newList makes the answer of a header, the parts' keys, which take size bytes, and what stands behind them.
func newList(header []byte, parts []listPart, size int64, end []byte) *List {
	l := &List{parts: parts, end: end, left: len(header) + int(size) + len(end)}
	l.piece[0] = header
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
		done := true
		for i, b := range l.piece {
			if len(b) == 0 {
				continue
			}
			k := min(len(b), n)
			dst = append(dst, b[:k]...)
			n -= k
			if l.piece[i] = b[k:]; k < len(b) {
				done = false
				break
			}
		}
		if done && n > 0 {
			dst, n = l.keys(dst, n)
		}
	}
	return dst
}

// keys appends keys as long as whole ones fit into n bytes, and prepares the pieces of the next one. It returns what is
// left of n.
func (l *List) keys(dst []byte, n int) ([]byte, int) {
	if l.from != nil {
		l.advance(l.from) // its key has been sent, from its page
		l.from = nil
	}
	for {
		p := l.first()
		if p == nil {
			l.piece[0], l.end = l.end, nil
			if len(l.piece[0]) == 0 {
				// The length was counted from these very bytes. A client refuses what is no protobuf.
				return append(dst, make([]byte, n)...), 0
			}
			return dst, n
		}
		kv := &p.it.kv.KV
		if size := sizeKVField(kv); size <= n {
			dst = appendKVField(dst, 2, kv)
			n -= size
			l.advance(p)
			continue
		}
		l.before = appendKVBefore(l.before[:0], 2, kv)
		l.behind = codec.AppendInt(l.behind[:0], 6, kv.Lease)
		l.piece = [3][]byte{l.before, kv.Value, l.behind}
		l.from = p
		return dst, n
	}
}

// first returns the part with the smallest key, nil when all are at their end.
func (l *List) first() *listPart {
	var best *listPart
	for i := range l.parts {
		if p := &l.parts[i]; p.it.have && (best == nil || bytes.Compare(p.it.kv.Key, best.it.kv.Key) < 0) {
			best = p
		}
	}
	return best
}

// advance moves to p's next key, and lets go of the page that has none.
func (l *List) advance(p *listPart) {
	for !p.it.next() && len(p.pages)+len(p.page) > 0 {
		l.mem -= cap(p.page)
		codec.Recycle(p.page)
		p.page = nil
		if len(p.pages) == 0 {
			return
		}
		p.page, p.pages[0] = p.pages[0], nil
		p.pages = p.pages[1:]
		p.it = partIter{it: codec.Fields{Msg: p.page}}
	}
}
