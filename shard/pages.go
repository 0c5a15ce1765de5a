package shard

import (
	"bytes"
	"math"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// This file is the road of lists that are read page by page: RangeStream, lists with a limit over several
// shards, counts at a revision. The state is fixed first (one revision for all shards, each located once),
// then every shard is paged by (its local revision, next key), and the pages are merged by key as they come.

// Bounds of pages.
const (
	// firstPageKeys is the size of a stream's first page, before the size of its values is known.
	firstPageKeys = 32
	// pageGrowth bounds how much larger than the last one a page may be, so that a region of large
	// values behind one of small values is met by few of them.
	pageGrowth = 4
	// pageShrink is how much smaller a page is asked for that turned out to be too large for one answer.
	pageShrink = 8
	// maxPageKeys and maxPageBytes are what a page of a stream aims at, minPageBytes what it aims at when
	// many streams share pageBudget: the bytes that the pages of all streams may hold.
	maxPageKeys  = 2048
	maxPageBytes = 512 << 10
	minPageBytes = 32 << 10
	pageBudget   = 16 << 20
	// wholeFactor times more keys than a stream's first page has that of a unary list without a limit, so
	// that ordinary lists take one page; its further ones aim at wholePageBytes.
	wholeFactor    = 32
	wholePageBytes = 4 << 20
	// maxReserve bounds the memory that is set aside for a unary answer from its first pages' sizes.
	maxReserve = 256 << 20
	// pageSlack is what a shard is asked for beyond its share of a limit, plus shareSpread times the
	// share's square root: a hash spreads keys evenly, but not exactly.
	pageSlack   = 4
	shareSpread = 3
)

// pagedRead is one list under way. out, op and stream say what becomes of it: a unary answer is collected
// in op.Resp, a stream emits chunks while it is wanted.
//
// gen counts attempts to fix a state: what belongs to an earlier one is ignored when it arrives.
type pagedRead struct {
	c        *Core
	op       *Op
	stream   *RangeStream // nil for a unary answer
	spec     rangeSpec
	iv       Interval
	shards   []*shardState
	parts    []pagePart
	gen      int
	latest   bool // no revision was named: ErrCompacted before the first byte means "again"
	fixed    bool // the state is: h, and every part's place
	rev, h   int64
	haveNow  bool
	n        int64
	a        []int64
	out      []byte
	sent     int64 // keys in out and in emitted chunks
	emitted  bool
	over     bool
	merging  bool
	cut      bool  // the limit is reached and there is more: only the count is missing
	deadline int64 // for the state to be fixed
}

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
	clock   []byte // record that came along with a read of the newest state
	rev     int64  // the shard's revision in that reply
	replied bool

	from     []byte // the next key to ask for
	more     bool   // there may be keys at or behind it
	inFlight bool
	limit    int64 // keys of the last page asked for
	perKey   int64 // bytes, in the last page

	it      partIter // over page
	page    []byte
	ahead   []byte // the page behind it, if full
	full    bool
	skipped int64

	counted bool
	total   int64 // keys of the shard in the whole range, at its local revision
	taken   int64 // keys merged, or walked over to count them
}

func (c *Core) newPagedRead(op *Op, stream *RangeStream) *pagedRead {
	p := &op.core.plan
	shards := c.readSet(op)
	r := &pagedRead{c: c, op: op, stream: stream, spec: p.ranges[0], iv: p.ops[0].interval(),
		shards: shards, parts: make([]pagePart, len(shards)), deadline: c.deadline()}
	if r.spec.countOnly {
		r.spec.limit = 0
	}
	for i, s := range shards {
		r.parts[i] = pagePart{r: r, s: s}
	}
	c.at(r.deadline, func() {
		if !r.over && !r.fixed { // from then on each page has a deadline of its own
			r.end(codec.ErrTimeout)
		}
	})
	return r
}

// paged says that p, a Range, is read page by page: a list in the order of keys, and a count at a
// revision, which inside a batch nothing but a list can tell.
func (p *Plan) paged() bool {
	r := &p.ranges[0]
	return p.ops[0].end != nil && r.plain() && (!r.countOnly || r.rev > 0)
}

// begin reads the first page of every shard beside now.
func (r *pagedRead) begin() {
	r.restart()
	r.latest, r.haveNow = true, false
	r.c.awaitNow(&pagedNow{r, r.gen})
	for i := range r.parts {
		p := &r.parts[i]
		p.located = true
		p.fetch()
	}
}

func (r *pagedRead) restart() {
	r.gen++
	r.fixed, r.cut = false, false
	for i := range r.parts {
		p := &r.parts[i]
		*p = pagePart{r: r, s: p.s, from: append(p.from[:0], r.iv.Key...), more: true,
			page: p.page[:0], ahead: p.ahead[:0], recText: p.recText[:0], clock: p.clock[:0]}
	}
}

// pagedNow is the nowWaiter of a pagedRead.
type pagedNow struct {
	r   *pagedRead
	gen int
}

func (w *pagedNow) nowDone(n int64, a []int64) {
	if r := w.r; !r.over && r.gen == w.gen {
		r.n, r.a, r.haveNow = n, append(r.a[:0], a...), true
		r.decide()
	}
}

func (w *pagedNow) abandon(st codec.Status) {
	if !w.r.over && w.r.gen == w.gen {
		w.r.end(st)
	}
}

// decide looks whether what was read beside now is exact at now: no batch in flight anywhere.
func (r *pagedRead) decide() {
	if r.fixed || !r.haveNow {
		return
	}
	exact := true
	for i := range r.parts {
		p := &r.parts[i]
		if !p.replied {
			return
		}
		kv, _ := firstKV(p.clock)
		rec, ok := ParseRecord(kv.Value)
		if !ok {
			r.end(codec.Status{Code: codec.Internal, Msg: "spindle: member cluster " + p.s.name + " shows no clock record"})
			return
		}
		s := p.s
		settled := p.rev == kv.ModRevision || s.pos >= p.rev && s.lastUnrecorded <= kv.ModRevision
		exact = exact && settled && rec.Last >= r.a[s.idx] && rec.Last <= r.n
	}
	if exact {
		for i := range r.parts {
			r.parts[i].local = r.parts[i].rev // what follows is read at the same state
		}
		r.fix(r.n)
		r.merge()
		return
	}
	r.c.stats.Rereads++
	n, gen := r.n, r.gen
	r.haveNow = false
	r.c.awaitFrontiers(r.shards, n, r.deadline, func() {
		if !r.over && r.gen == gen {
			r.lookAt(n, n)
		}
	})
}

func (r *pagedRead) fix(h int64) {
	r.fixed, r.h = true, h
	if r.stream == nil {
		hdr := r.c.hdr
		hdr.Revision = h
		r.out = codec.AppendHeaderField(r.op.Resp[:0], &hdr)
	} else {
		r.out = beginChunk(r.out)
	}
}

// lookAt reads the state at rev, and answers with header h. The frontier must be at rev.
func (r *pagedRead) lookAt(rev, h int64) {
	if r.over {
		return
	}
	r.restart()
	r.rev = rev
	r.fix(h)
	gen := r.gen
	for i := range r.parts {
		p := &r.parts[i]
		p.s.locate(rev, func(at located, st codec.Status) {
			switch {
			case r.over || r.gen != gen:
				return
			case st == codec.ErrCompacted:
				r.compacted(p)
				return
			case st.Code != codec.OK:
				r.end(st)
				return
			}
			p.located, p.local, p.inside, p.next = true, at.base.local, at.inside, at.next
			if at.inside {
				p.local = at.next.local
			}
			p.fetch()
		})
	}
}

// compacted handles that a member has no history for a part's state any more.
func (r *pagedRead) compacted(p *pagePart) {
	if !r.latest || r.emitted {
		r.end(codec.ErrCompacted)
		return
	}
	if p.local != 0 && p.local == p.s.rec.local {
		// Somebody compacted the member up to its newest record: only another record helps.
		p.s.wantFence = true
		p.s.touch()
	}
	if r.c.cfg.Now() >= r.deadline {
		r.end(codec.ErrTimeout)
		return
	}
	r.sent = 0
	r.begin()
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
	want, aim := int64(r.c.cfg.PageKeys), r.c.pageBytes(len(r.parts))
	if r.whole() && want >= firstPageKeys {
		want, aim = want*wholeFactor, wholePageBytes
	}
	if p.limit > 0 {
		want = min(aim/max(p.perKey, 1), p.limit*pageGrowth, maxPageKeys)
	}
	if r.spec.limit > 0 && r.sent >= r.spec.limit {
		return max(want, 1) // the rest is only counted
	}
	return max(min(want, limit), 1)
}

// whole says that the answer is unary and has no limit.
func (r *pagedRead) whole() bool { return r.stream == nil && r.spec.limit <= 0 }

// reserve makes room for a unary answer, as large as the first pages make it seem.
func (r *pagedRead) reserve() {
	size, keys := int64(0), int64(math.MaxInt64)
	if r.spec.limit > 0 {
		keys = r.spec.limit
	}
	for i := range r.parts {
		p := &r.parts[i]
		n := min(p.total, keys, maxReserve)
		size += min(n*min(p.perKey, maxReserve/max(n, 1)+1), maxReserve)
	}
	if r.spec.limit > 0 {
		size /= int64(len(r.parts)) // each was counted as if it had them all
		size += size / 4
	}
	r.out = slices.Grow(r.out, int(min(size, maxReserve)))
}

// shareOf is what one of n shards is asked for when limit keys are wanted: most likely enough of it.
func (c *Core) shareOf(limit int64, n int) int64 {
	share := limit / int64(n)
	if c.cfg.PageKeys < firstPageKeys {
		return max(share, 1)
	}
	return min(limit, share+int64(shareSpread*math.Sqrt(float64(share)))+pageSlack)
}

// pageBytes is what a page of a stream over n shards aims at. Each part holds two pages.
func (c *Core) pageBytes(n int) int64 {
	return min(max(pageBudget/int64(2*n*max(c.rangeStreams, 1)), minPageBytes), maxPageBytes)
}

// fetch asks for the part's next page.
func (p *pagePart) fetch() {
	if p.inFlight || p.full || !p.more || !p.located {
		return
	}
	p.inFlight = true
	p.limit = p.pageLimit()
	(&pageCall{p: p, gen: p.r.gen, deadline: p.r.c.deadline()}).send()
}

// pageCall is the Completion of one page's read.
type pageCall struct {
	p        *pagePart
	gen      int
	deadline int64
}

func (q *pageCall) send() {
	p := q.p
	c := p.r.c
	body := c.scratch[:0]
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
		body = appendGet(p.appendRead(body, 0), txnSuccess, KeyClock, 0)
	default:
		c.scratch = p.appendFields(body, p.local)
		c.tr.Call(p.s.cluster, codec.MethodRange, c.scratch, c.cfg.ShardTimeout, q)
		return
	}
	c.scratch = body
	c.tr.Call(p.s.cluster, codec.MethodTxn, body, c.cfg.ShardTimeout, q)
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
	dst = codec.AppendBytes(dst, 2, p.r.iv.End)
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
	if r.over || r.gen != q.gen {
		return
	}
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
		if !p.take(resp) {
			r.end(codec.Status{Code: codec.Internal, Msg: "spindle: unreadable answer of member cluster " + p.s.name})
			return
		}
		p.full, p.replied = true, true
		r.decide()
		r.merge()
	}
}

// take makes resp the page ahead.
func (p *pagePart) take(resp []byte) bool {
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
		after, before := endOf(t.resps[0]), endOf(t.resps[1])
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
		last = endOf(t.resps[0])
		p.ahead = append(p.ahead[:0], t.resps[0]...)
	default:
		last = endOf(resp)
		p.ahead = append(p.ahead[:0], resp...)
	}
	if last.bad || last.more && last.n == 0 {
		return false
	}
	if !p.counted {
		p.counted, p.total = true, last.count
	}
	p.more = last.more
	if last.n > 0 {
		p.perKey = int64(len(resp))/last.n + 1
	}
	if p.more {
		p.from = append(append(p.from[:0], last.key...), 0)
	}
	return true
}

// pageEnd is what stands at the end of a member's RangeResponse.
type pageEnd struct {
	key       []byte // the last one
	n, count  int64
	more, bad bool
}

func endOf(resp []byte) (e pageEnd) {
	it := codec.Fields{Msg: resp}
	var kv []byte
	for it.Next() {
		switch it.Field.Num {
		case 2:
			kv = it.Field.Bytes
			e.n++
		case 3:
			e.more = it.Field.Val != 0
		case 4:
			e.count = int64(it.Field.Val)
		}
	}
	last, ok := codec.ParseKV(kv)
	e.key, e.bad = last.Key, it.Bad || !ok
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
		p.it = partIter{it: codec.Fields{Msg: p.page}}
		if p.r.stream != nil || p.r.whole() {
			p.fetch() // the next one comes while this one is merged
		}
	}
	return true
}

// merge moves keys from the pages to the answer, as far as they go.
func (r *pagedRead) merge() {
	if r.over || !r.fixed || r.merging {
		return
	}
	r.merging = true
	r.mergeOn()
	r.merging = false
}

func (r *pagedRead) mergeOn() {
	if r.cut {
		r.finish(true)
		return
	}
	for !r.over && (r.stream == nil || r.stream.wanted) {
		if r.spec.countOnly {
			r.finish(false)
			return
		}
		full := r.spec.limit > 0 && r.sent >= r.spec.limit
		ready, more, best := true, false, -1
		for i := range r.parts {
			p := &r.parts[i]
			if full && !p.it.have && !p.full && p.more && p.located && !p.inside {
				more = true // the member said so: no need to see the keys
				continue
			}
			if !p.advance() {
				if r.over {
					return
				}
				ready = false
				continue
			}
			if p.it.have {
				more = true
				if best < 0 || bytes.Compare(p.it.kv.Key, r.parts[best].it.kv.Key) < 0 {
					best = i
				}
			}
		}
		switch {
		case full && (more || ready):
			r.finish(more)
			return
		case !ready:
			return
		case best < 0:
			r.finish(false)
			return
		}
		p := &r.parts[best]
		if r.sent == 0 && r.stream == nil {
			r.reserve()
		}
		r.out = r.spec.appendKV(r.out, &p.it.kv.KV)
		p.it.have = false
		p.taken++
		r.sent++
		if r.stream != nil && len(r.out) >= r.c.cfg.ChunkBytes {
			r.emit()
		}
	}
}

// finish ends the answer once the count is known.
func (r *pagedRead) finish(more bool) {
	r.cut = more
	count := r.sent
	if more || r.spec.countOnly {
		count = 0
		for i := range r.parts {
			n, known := r.parts[i].count()
			if !known {
				return
			}
			count += n
		}
	}
	if r.stream != nil {
		hdr := r.c.hdr
		hdr.Revision = r.h
		r.out = codec.AppendHeaderField(r.out, &hdr)
	}
	r.out = codec.AppendBool(r.out, 3, more)
	r.out = codec.AppendInt(r.out, 4, count)
	if r.stream != nil {
		r.emit()
	} else {
		r.op.Resp, r.out = r.out, nil
	}
	r.end(codec.Status{})
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

// end answers with st, once, and lets go of everything.
func (r *pagedRead) end(st codec.Status) {
	if r.over {
		return
	}
	r.over = true
	op, stream := r.op, r.stream
	r.drop()
	if stream != nil {
		stream.ended(st)
		return
	}
	r.c.finish(op, st)
}

func (r *pagedRead) drop() {
	r.over, r.op, r.stream, r.out, r.a = true, nil, nil, nil, nil
	r.spec, r.iv = rangeSpec{}, Interval{}
	for i := range r.parts {
		r.parts[i] = pagePart{r: r} // calls under way still complete it
	}
}

// chunkRoom is what stands free before a chunk's fields: the tag and length of its RangeResponse.
const chunkRoom = 1 + 5

// chunkSlack is room for the key that closes a chunk, if it is of ordinary size.
const chunkSlack = 8 << 10

func beginChunk(buf []byte) []byte { return append(buf[:0], make([]byte, chunkRoom)...) }

// emit hands out what was merged as one RangeStreamResponse.
func (r *pagedRead) emit() {
	n := len(r.out) - chunkRoom
	at := chunkRoom - 1 - protowire.SizeVarint(uint64(n))
	protowire.AppendVarint(protowire.AppendTag(r.out[:at], 1, protowire.BytesType), uint64(n))
	s, chunk := r.stream, r.out[at:]
	r.out, r.emitted = nil, true
	s.wanted = false
	s.Chunk(s, chunk)
	if !r.over {
		r.out = beginChunk(make([]byte, 0, r.c.cfg.ChunkBytes+chunkSlack))
	}
}
