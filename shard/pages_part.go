package shard

import (
	"bytes"
	"math"

	"spindle/codec"
)

// This file is one shard's share of a list that is read page by page: how large a page is asked for, how it
// is read at the shard's fixed state (inside a batch: before and after it), and how many keys there are.

// Bounds of pages.
const (
	// firstPageKeys is the size of a stream's first page, before the size of its values is known.
	firstPageKeys = 32
	// pageGrowth bounds how much larger than the last one a page may be, so that a region of large
	// values behind one of small values is met by few of them.
	pageGrowth = 4
	// pageShrink is how much smaller a page is asked for that turned out to be too large for one answer.
	pageShrink = 8
	// pageRoom is how many times what it aims at a page of a stream or a long list may be: a longer one is not kept, and asked for
	// anew, with fewer keys.
	pageRoom = 2
	// maxPageKeys and maxPageBytes are what a page of a stream aims at, minPageBytes what it aims at when
	// many streams share pageBudget, the bytes that the pages of all streams may hold, or when memory is short. Those and wholePageBytes are
	// a little less than a power of two, which is what the codec's buffers have.
	maxPageKeys  = 4 << 10
	maxPageBytes = 15 << 18
	minPageBytes = 32 << 10
	pageBudget   = 32 << 20
	// wholeFactor times more keys than a stream's first page has that of a unary list without a limit, so
	// that ordinary lists take one page; its further ones aim at wholePageBytes, and have at most wholePageKeys.
	wholeFactor    = 32
	wholePageBytes = 15 << 18
	wholePageKeys  = 16 << 10
	// maxReserve bounds the memory that is set aside for a unary answer from its first pages' sizes: the largest message
	// that Go's clients take. What is not written costs nothing; an answer that grows is copied again and again, and one of
	// 1 GiB that began with 256 MiB took 4 GiB.
	maxReserve = 2 << 30
	// pageSlack is what a shard is asked for beyond its share of a limit, plus shareSpread times the
	// share's square root: a hash spreads keys evenly, but not exactly.
	pageSlack   = 4
	shareSpread = 3
)

// pagePart is one shard's share.
type pagePart struct {
	r       *pagedRead
	s       *shardState
	located bool
	local   int64 // the shard's state, 0: the newest
	inside  bool  // the state lies within the batch of next
	next    point
	rec     Record // of that batch, once read
	recText []byte // what rec points to
	known   int64  // what the shard's clock has been at when the newest state was asked for
	clock   []byte // record that came along with a read of the newest state
	rev     int64  // the shard's revision in that reply
	replied bool

	from     []byte // the next key to ask for
	more     bool   // there may be keys at or behind it
	inFlight bool
	call     *pageCall // that asks for it, while its answer is awaited
	limit    int64     // keys of the last page asked for
	perKey   int64     // bytes, in the last page

	it      partIter  // over page
	was     []pageEnd // of a page from which foreign values were taken out, as the member sent it
	page    []byte
	ahead   []byte // the page behind it, if full
	full    bool
	skipped int64

	pageSum, aheadSum pageSum // what is in the two

	fetched int64  // keys of the pages that have come
	upTo    []byte // where the page that is asked for ends at the latest; nil: at the range's end
	waits   bool   // for a look before it is asked for
	endless bool   // a look found no ends

	first []byte   // the first page, before it is one of pages
	pages [][]byte // that were gathered
	size  int64    // of their keys in client form
	keys  int64

	counted bool
	total   int64 // keys of the shard in the whole range, at its local revision
	taken   int64 // keys merged, or walked over to count them
}

// pageLimit is how many keys the next page asks for, 0 for a count.
func (p *pagePart) pageLimit() int64 {
	r := p.r
	limit := int64(math.MaxInt64)
	if r.spec.limit > 0 {
		limit = r.c.shareOf(r.spec.limit-min(r.sent, r.spec.limit-1), len(r.parts))
	}
	if r.stream == nil && !r.spec.countOnly && r.sent < r.spec.limit {
		return limit
	}
	want := int64(r.c.cfg.PageKeys)
	if r.whole() && want >= firstPageKeys {
		want *= wholeFactor
	}
	if p.limit > 0 {
		growth := int64(pageGrowth)
		switch {
		case p.jumps():
			growth = shapeGrowth
		case r.gathering && len(p.pages) > 1:
			growth = gatherGrowth
		}
		want = min(p.fullPage(), p.limit*growth)
		if rest := p.total - p.fetched; r.gathering && rest < want+want/4 {
			want = rest // a page of its own would cost the member more
		}
	}
	if r.spec.limit > 0 && r.sent >= r.spec.limit {
		return max(want, 1) // the rest is only counted
	}
	return max(min(want, limit), 1)
}

// fullPage is how many keys like those of the last page a page may have in the end.
func (p *pagePart) fullPage() int64 {
	aim, most := p.r.pageAim()
	return min(aim/p.bytesPerKey(), most)
}

// pageAim is what r's pages aim at in the end, in bytes, and how many keys they have at most.
func (r *pagedRead) pageAim() (bytes, keys int64) {
	switch {
	case !r.whole() || r.c.cfg.PageKeys < firstPageKeys:
		return r.c.pageBytes(len(r.parts)), maxPageKeys
	case r.gathering:
		return gatherPageBytes, wholePageKeys
	}
	return wholePageBytes, wholePageKeys
}

// shareOf is what one of n shards is asked for when limit keys are wanted: most likely enough of it.
func (c *Core) shareOf(limit int64, n int) int64 {
	share := limit / int64(n)
	if c.cfg.PageKeys < firstPageKeys {
		return max(share, 1)
	}
	extra := int64(shareSpread*math.Sqrt(float64(share))) + pageSlack
	if share > limit-extra { // their sum may be beyond int64
		return limit
	}
	return share + extra
}

// pageBytes is what a page of a stream over n shards aims at. Each part holds two pages.
func (c *Core) pageBytes(n int) int64 {
	if c.cfg.Memory.Pressed() {
		return minPageBytes
	}
	return min(max(pageBudget/int64(2*n*max(c.rangeStreams, 1)), minPageBytes), maxPageBytes)
}

// fetch asks for the part's next page.
func (p *pagePart) fetch() {
	if p.inFlight || p.full || !p.more || !p.located {
		return
	}
	p.inFlight = true
	p.limit = p.pageLimit()
	if p.needsEnds() {
		if r := p.r; !r.looking {
			r.looking = true
			(&endsCall{p: p, gen: r.gen}).send()
		}
		if p.waits = p.total-p.fetched > lookKeys; p.waits {
			return
		}
	}
	p.ask()
}

// ask asks for the page.
func (p *pagePart) ask() {
	p.upTo = p.nextEnd()
	p.r.countPages()
	(&pageCall{p: p, gen: p.r.gen, deadline: p.r.c.deadline()}).send()
}

// pageCall is the Completion of one page's read.
type pageCall struct {
	p        *pagePart
	gen      int
	deadline int64
	sum      pageSum // of the reply, but inside a batch
	rewrite  *pageRewriter
	asItIs   bool  // the reply is not to be rewritten: it could not be
	room     int64 // counted in Memory for the reply until it is here
}

// setAside counts the reply in Memory before it comes. What a list of one answer has room for counts its pages; once it is given up, they still come.
func (q *pageCall) setAside() {
	if q.room == 0 && q.Reserved() > 0 {
		aim, _ := q.p.r.pageAim()
		q.room = max(aim, q.p.expected())
		q.p.r.c.cfg.Memory.Add(q.room)
	}
}

// Reserved implements codec.Receiving: a page is taken up to pageRoom times what Memory counts for it before it is here.
func (q *pageCall) Reserved() int {
	p := q.p
	if r := p.r; p.limit <= 1 || r.spec.countOnly || r.stream == nil && !r.gathering {
		return 0
	}
	aim, _ := p.r.pageAim()
	return int(pageRoom * max(aim, p.expected()))
}

// expected is how many bytes the page that is asked for will have if its keys are like those of the last one; 0 if that is not known.
func (p *pagePart) expected() int64 {
	if p.perKey == 0 || p.r.spec.countOnly {
		return 0
	}
	return min(p.limit, maxEstimate/p.perKey) * p.perKey
}

// Rewriter implements codec.Receiving: pages of whole lists become what clients get.
func (q *pageCall) Rewriter() codec.Rewriter {
	r := q.p.r
	if !r.gathering && (r.stream == nil || r.spec.limit > 0 || r.spec.keysOnly || r.spec.countOnly) || q.txn() || q.asItIs {
		q.rewrite = nil
		return nil
	}
	q.rewrite = new(pageRewriter)
	return q.rewrite
}

func (q *pageCall) send() {
	p := q.p
	c := p.r.c
	p.call = q
	if p.r.stream != nil {
		q.setAside()
	}
	body := c.scratch[:0]
	size := p.expected()
	switch {
	case p.inside:
		for _, local := range [2]int64{p.local, p.local - 1} {
			body = p.appendRead(body, local)
		}
		body = appendGet(body, txnSuccess, KeyClock, p.local)
		if !p.r.latest {
			body = appendGet(body, txnSuccess, KeyCompact, 0)
		}
	case !p.r.latest:
		// Another proxy may have compacted it meanwhile, and this one's stream may not have shown that yet.
		body = appendGet(p.appendRead(body, p.local), txnSuccess, KeyCompact, 0)
	case p.local == 0:
		p.known = p.s.floor()
		body = appendGet(p.appendRead(body, 0), txnSuccess, KeyClock, 0)
	default:
		c.scratch = p.appendFields(body, p.local)
		p.s.callLarge(codec.MethodRange, c.scratch, size, q)
		return
	}
	c.scratch = body
	p.s.callLarge(codec.MethodTxn, body, size, q)
}

// appendRead appends the page's range as an operation of a Txn.
func (p *pagePart) appendRead(dst []byte, local int64) []byte {
	dst, m := codec.BeginMessage(dst, txnSuccess)
	dst, m2 := codec.BeginMessage(dst, 1)
	dst = p.appendFields(dst, local)
	return codec.EndMessage(codec.EndMessage(dst, m2), m)
}

// appendFields appends the fields of the page's RangeRequest.
func (p *pagePart) appendFields(dst []byte, local int64) []byte {
	dst = codec.AppendBytes(dst, 1, p.from)
	end := p.upTo
	if end == nil {
		end = p.r.iv.End
	}
	dst = codec.AppendBytes(dst, 2, end)
	if p.r.spec.countOnly && !p.inside {
		return codec.AppendBool(codec.AppendInt(dst, 4, local), 9, true)
	}
	dst = codec.AppendInt(dst, 3, p.limit)
	return codec.AppendInt(dst, 4, local)
}

func (q *pageCall) Complete(resp []byte, st codec.Status, sent bool) {
	p := q.p
	r := p.r
	c := r.c
	c.cfg.Memory.Add(-q.room)
	q.room = 0
	if r.over || r.gen != q.gen {
		return
	}
	p.call = nil
	switch {
	case r.op.canceled:
		r.end(statusCanceled)
	case st == codec.ErrCompacted:
		r.compacted(p)
	case definite(st) && st != codec.ErrFutureRev:
		r.end(st)
	case st.Code == codec.ResourceExhausted && st != codec.ErrTooManyRequests && p.limit > 1:
		// The page is larger than any answer that a member may give: large values follow small ones.
		p.limit = max(p.limit/pageShrink, 1)
		q.send()
	case st.Code != codec.OK && c.cfg.Now() >= q.deadline:
		r.end(codec.ErrTimeout)
	case st.Code != codec.OK:
		c.after(c.jitter(retryDelay), func() {
			if !r.over && r.gen == q.gen {
				q.send()
			}
		})
	case q.rewrite.spoiled():
		if len(resp) > codec.KeptReply {
			codec.Recycle(resp)
		}
		q.asItIs = true
		q.send()
	case q.foreign(resp):
		q.clean(resp)
	default:
		p.inFlight = false
		if !r.latest {
			t, ok := parseTxnReply(resp, nil)
			switch n := len(t.resps); {
			case !ok || n < 2:
				r.end(codec.Status{Code: codec.Internal, Msg: "spindle: unreadable answer of member cluster " + p.s.name})
				return
			case p.s.compactedBy(t.resps[n-1], r.rev):
				r.end(codec.ErrCompacted)
				return
			case !p.inside:
				resp = t.resps[0]
			}
		}
		if !p.take(resp, q.sum) {
			r.end(codec.Status{Code: codec.Internal, Msg: "spindle: unreadable answer of member cluster " + p.s.name})
			return
		}
		p.full, p.replied = true, true
		if !r.countPages() {
			r.c.stats.LargeRefused++
			r.end(codec.ErrTooManyRequests)
			return
		}
		r.decide()
		r.merge()
	}
}

// txn says that the page is read by a Txn.
func (q *pageCall) txn() bool {
	p := q.p
	return p.inside || !p.r.latest || p.local == 0
}

// foreign says that the page holds values that somebody else wrote.
func (q *pageCall) foreign(resp []byte) bool {
	if q.rewrite.rewrote() {
		q.sum = q.rewrite.sum
		return false
	}
	if !q.txn() {
		q.sum = sumPage(resp)
		return q.sum.foreign
	}
	t, _ := parseTxnReply(resp, nil)
	if q.p.inside || len(t.resps) == 0 {
		return anyForeign(t.resps...)
	}
	q.sum = sumPage(t.resps[0])
	return q.sum.foreign
}

// clean goes on with a page of what clients are to see.
func (q *pageCall) clean(resp []byte) {
	r := q.p.r
	next := func(clean []byte, st codec.Status) {
		switch {
		case r.over || r.gen != q.gen:
		case st.Code != codec.OK:
			r.end(st)
		default:
			q.Complete(bytes.Clone(clean), st, true) // a long one is kept
		}
	}
	end := func(part []byte) {
		e := sumPage(part).end
		e.key = bytes.Clone(e.key)
		q.p.was = append(q.p.was, e)
	}
	if q.txn() {
		t, _ := parseTxnReply(resp, nil)
		for _, part := range t.resps {
			end(part)
		}
		q.p.s.cleanTxn(&t, q.deadline, next)
		return
	}
	end(resp)
	q.p.s.cleanse([][]byte{resp}, q.deadline, func(parts [][]byte, st codec.Status) {
		if st.Code != codec.OK {
			next(nil, st)
			return
		}
		next(parts[0], st)
	})
}

// take makes resp the page ahead.
func (p *pagePart) take(resp []byte, sum pageSum) bool {
	var last pageEnd
	switch {
	case p.inside:
		t, ok := parseTxnReply(resp, nil)
		if !ok || len(t.resps) < 3 {
			return false
		}
		if p.rec.Last == 0 {
			kv, _ := firstKV(t.resps[2])
			p.recText = append(p.recText[:0], kv.Value...)
			if !p.rec.Parse(p.recText) {
				return false
			}
		}
		after, before := p.endOf(sumPage(t.resps[0]).end, 0), p.endOf(sumPage(t.resps[1]).end, 1)
		if after.bad || before.bad {
			return false
		}
		// Both show the same keys up to the last one of the shorter.
		last = after
		if before.more && (!after.more || bytes.Compare(before.key, after.key) < 0) {
			last.key, last.more = before.key, true
		}
		last.n = max(after.n, before.n)
		upTo := last.key
		if !last.more {
			upTo = nil
		}
		if p.ahead, ok = mergeAtRevision(p.ahead[:0], t.resps[0], t.resps[1], p.r.rev, &p.rec, upTo); !ok {
			return false
		}
	case p.local == 0:
		t, ok := parseTxnReply(resp, nil)
		if !ok || len(t.resps) != 2 {
			return false
		}
		p.rev = t.rev
		p.clock = append(p.clock[:0], t.resps[1]...)
		last = p.endOf(sum.end, 0)
		p.ahead = keepPage(p.ahead, t.resps[0], len(resp) > codec.KeptReply)
	default:
		last = p.endOf(sum.end, 0)
		p.ahead = keepPage(p.ahead, resp, len(resp) > codec.KeptReply)
	}
	p.was, p.aheadSum = p.was[:0], sum
	p.aheadSum.end.key = nil // it lies in the reply
	if last.bad || last.more && last.n == 0 {
		return false
	}
	if p.counted && p.r.op.admitted {
		p.r.c.listMoves(p.r.op)
	}
	if !p.counted {
		p.counted, p.total = true, last.count
		p.r.c.listPage(p.r.op, len(resp))
	} else if p.r.gathering {
		p.r.c.listPage(p.r.op, len(resp))
	}
	p.fetched += last.n
	p.more = last.more
	if last.n > 0 {
		p.perKey = int64(len(resp))/last.n + 1
	}
	switch {
	case p.more:
		p.from = append(append(p.from[:0], last.key...), 0)
	case p.upTo != nil:
		p.more, p.from = true, append(p.from[:0], p.upTo...)
	}
	return true
}

// keepPage returns page to be kept, which is part of a reply: that of another owner is copied to old's memory, if it
// fits.
func keepPage(old, page []byte, owned bool) []byte {
	if owned {
		codec.Recycle(old)
		return page
	}
	if cap(old) < len(page) {
		codec.Recycle(old)
		old = codec.Borrow(len(page))
	}
	return append(old[:0], page...)
}

// endOf returns the end of the page's i-th range, of which e is left, wherever its keys have gone meanwhile.
func (p *pagePart) endOf(e pageEnd, i int) pageEnd {
	if i < len(p.was) {
		was := p.was[i]
		e.key, e.n, e.more, e.bad = was.key, was.n, was.more, e.bad || was.bad
	}
	return e
}

// advance makes the part's next key known; false if a page must arrive first.
func (p *pagePart) advance() bool {
	for !p.it.have {
		if p.it.next() {
			return true
		}
		if p.it.it.Bad {
			p.r.end(codec.Status{Code: codec.Internal, Msg: "spindle: unreadable answer of member cluster " + p.s.name})
			return false
		}
		p.skipped += p.it.skipped
		p.it.skipped = 0
		if !p.full {
			if !p.more && !p.inFlight && p.located {
				return true // the end
			}
			p.fetch()
			return false
		}
		p.page, p.ahead, p.full = p.ahead, p.page, false
		p.pageSum = p.aheadSum
		if cap(p.ahead) > codec.KeptReply {
			codec.Recycle(p.ahead)
			p.ahead = nil
		}
		p.it = partIter{it: codec.Fields{Msg: p.page}, client: p.pageSum.client}
		if p.it.client {
			p.it.skipped = p.pageSum.end.n - p.pageSum.keys
		}
		if p.r.stream != nil || p.r.whole() && p.r.admitted {
			p.fetch() // the next one comes while this one is merged
		}
	}
	return true
}

// count is the number of the part's keys in the whole range; known is false while it has to be read.
func (p *pagePart) count() (n int64, known bool) {
	if !p.inside {
		if !p.counted {
			p.fetch()
			return 0, false
		}
		return p.total - p.skipped, true
	}
	if !p.counted {
		p.fetch()
		return 0, false
	}
	// The batch's later requests are undone: the ring knows what they did.
	undone, ok := int64(0), true
	ring := p.r.c.ring
	for rev := p.r.rev + 1; rev <= p.next.last && ok; rev++ {
		e, lapped := ring.Load(rev)
		ok = !lapped
		if e == nil || e.Shard != p.s.idx {
			continue
		}
		for i := range e.Events {
			switch ev := &e.Events[i]; {
			case !p.r.iv.Contains(ev.Key):
			case ev.Delete:
				undone++
			case ev.Create:
				undone--
			}
		}
	}
	if ok {
		return p.total + undone, true
	}
	// Too long ago: the rest of the keys is walked over.
	for p.advance() {
		if !p.it.have {
			return p.taken, true
		}
		p.it.have = false
		p.taken++
	}
	return 0, false
}
