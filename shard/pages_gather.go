package shard

import (
	"bytes"

	"spindle/codec"
)

// This file is the road of a unary list that is longer than its first pages: all pages are gathered as they are, and become a
// List, which merges them while it is sent. A page is large then, since it costs no memory beside the answer, and the
// members have less to do for few of them: 25,000 keys of 1 KiB cost etcd 88 ms of CPU in one page, 108 ms in seven.

const (
	// gatherPageBytes is what pages that are gathered aim at, beside wholePageKeys. It is a part of what etcd itself would
	// have to put together for the same list.
	gatherPageBytes = 15 << 20
	// gatherGrowth is pageGrowth from the second of them on. The first one's size is told by small pages, behind which the
	// values may be larger.
	gatherGrowth = 8
)

// long says that r, whose first pages are here, is gathered. Not those without values, of which pages hold much more than
// the answer; nor those inside a batch, where pages are made of two.
func (r *pagedRead) long() bool {
	more := false
	for i := range r.parts {
		p := &r.parts[i]
		if p.inside {
			return false
		}
		more = more || p.more
	}
	return more && r.whole() && !r.spec.keysOnly && !r.spec.countOnly
}

// gather begins, with the first pages. They become client pages later: the members wait for the next requests.
func (r *pagedRead) gather() {
	r.gathering = true
	waiting := false
	for i := range r.parts {
		p := &r.parts[i]
		p.first = p.page
		p.page, p.it = nil, partIter{}
		r.gathered += int64(cap(p.first))
		waiting = waiting || p.full
	}
	if !r.grownTo(r.gathered, 0) {
		return
	}
	for i := range r.parts {
		r.parts[i].fetch()
	}
	if waiting { // nothing else may be coming
		r.gatherOn()
	}
}

// gatherOn takes the pages that have come, and ends when there are no more.
func (r *pagedRead) gatherOn() {
	done := true
	for i := range r.parts {
		p := &r.parts[i]
		if first := p.first; first != nil {
			p.first = nil
			r.gathered -= int64(cap(first))
			if !p.keepGathered(first, p.pageSum) {
				return
			}
		}
		if p.full {
			page := p.ahead
			p.ahead, p.full = nil, false
			if !p.keepGathered(page, p.aheadSum) {
				return
			}
		}
		if p.more {
			done = false
			p.fetch()
		} else if p.inFlight {
			done = false
		}
	}
	if !done || r.over {
		return
	}
	parts := make([]listPart, len(r.parts))
	size, count := int64(0), int64(0)
	for i := range r.parts {
		p := &r.parts[i]
		parts[i].pages = p.pages
		p.pages = nil
		size += p.size
		count += p.keys
	}
	l := newList(bytes.Clone(r.out), parts, size, codec.AppendInt(nil, 4, count))
	r.out = nil
	if r.op.Lists {
		r.op.List = l
	} else {
		r.op.Resp = l.Next(unzeroed(l.Len()), l.Len())
		l.Drop()
	}
	r.end(codec.Status{})
}

// keepGathered takes one page. false: there is no room for it, and the list has ended.
func (p *pagePart) keepGathered(page []byte, sum pageSum) bool {
	r := p.r
	if !sum.client {
		raw := page
		page = clientPage(raw, &sum)
		codec.Recycle(raw)
	}
	p.size += sum.size
	p.keys += sum.keys // what a member counts has foreign keys, too
	if len(page) == 0 {
		codec.Recycle(page) // the List's pages have keys
		return true
	}
	p.pages = append(p.pages, page)
	r.gathered += int64(cap(page))
	return r.grownTo(r.gathered, 0)
}
