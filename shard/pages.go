package shard

import (
	"bytes"
	"math"
	"strings"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
	"spindle/revclock"
)

// This file is the road of lists that are read page by page: RangeStream, lists with a limit over several
// shards, counts at a revision. The state is fixed first (one revision for all shards, each located once),
// then every shard is paged by (its local revision, next key), and the pages are merged by key as they come.

// pagedRead is one list under way. out, op and stream say what becomes of it: a unary answer is collected
// in op.Resp, or gathered for a List (pages_gather.go), a stream emits chunks while it is wanted.
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
	epoch    revclock.ID // of now
	out      []byte
	sent     int64 // keys in out and in emitted chunks
	emitted  bool
	over     bool
	merging  bool
	cut      bool  // the limit is reached and there is more: only the count is missing
	deadline int64 // for the state to be fixed
	held     int64 // bytes in Memory
	waiting  bool  // for room in Memory
	admitted bool  // its answer may be put together: it is small, or has room
	expected int64 // bytes of the answer, while it waits
	// roomUntil is until when it may wait for room in any case, ns
	roomUntil int64
	ends      [][]byte   // ascending; places where pages end, see pages_ends.go
	looking   bool       // a look for more of them is under way
	shape     *listShape // what the range was like, nil if that is not remembered
	known     int        // ends that come from it: the first ones
	draft     shapeDraft // what it is like now

	gathering bool  // all pages are kept, for a List
	gathered  int64 // bytes of them
}

func (c *Core) newPagedRead(op *Op, stream *RangeStream) *pagedRead {
	p := &op.core.plan
	shards := c.readSet(op)
	r := &pagedRead{c: c, op: op, stream: stream, spec: p.ranges[0], iv: p.ops[0].interval(),
		shards: shards, parts: make([]pagePart, len(shards))}
	if r.spec.countOnly {
		r.spec.limit = 0
	}
	for i, s := range shards {
		r.parts[i] = pagePart{r: r, s: s}
	}
	r.watchStart()
	return r
}

// watchStart bounds the time until the state is fixed; from then on each page has a deadline of its own.
func (r *pagedRead) watchStart() {
	at := r.c.deadline()
	r.deadline = at
	r.c.at(at, func() {
		if !r.over && !r.fixed && !r.waiting && r.deadline == at {
			r.end(codec.ErrTimeout)
		}
	})
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
	r.fixed, r.cut, r.looking = false, false, false
	r.recall()
	r.gathering, r.gathered = false, 0
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
		r.n, r.a, r.haveNow, r.epoch = n, append(r.a[:0], a...), true, r.c.m.Epoch
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
		if rec.Last < p.known {
			s.wentBack(rec.Last, p.known)
			exact = false
			break
		}
		s.saw(point{rec.First, rec.Last, kv.ModRevision})
		settled := p.rev == kv.ModRevision || s.pos >= p.rev && s.lastUnrecorded <= kv.ModRevision
		exact = exact && settled && rec.Last >= r.a[s.idx] && rec.Last <= r.n && s.sameEpoch(&rec, kv.ModRevision) && r.epoch == r.c.m.Epoch
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
		r.out = r.out[:0]
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

// whole says that the answer is unary and has no limit.
func (r *pagedRead) whole() bool { return r.stream == nil && r.spec.limit <= 0 }

// estimate is how large the first pages make a unary answer seem.
func (r *pagedRead) estimate() int64 {
	size := int64(0)
	for i := range r.parts {
		p := &r.parts[i]
		n := p.total
		if r.spec.limit > 0 {
			n = min(n, r.spec.limit/int64(len(r.parts))+1)
		}
		if p.perKey > 0 {
			size += min(n, maxEstimate/p.perKey) * p.perKey
		}
	}
	return min(size, maxEstimate)
}

// reserve makes room for a unary answer, as large as the first pages make it seem.
func (r *pagedRead) reserve() {
	if r.spec.keysOnly {
		return // pages bring values, which the answer has not
	}
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
	if n := int(min(size, maxReserve)); n > len(r.out) {
		r.out = append(unzeroed(len(r.out)+n), r.out...)
	}
}

// unzeroed returns an empty slice of capacity n. A large answer is written once, front to back, and to zero its memory
// before that took a quarter of what the proxy does for it, in a piece that the garbage collector waits for.
func unzeroed(n int) []byte {
	var b strings.Builder // which alone makes bytes that are not zeroed
	b.Grow(n)
	b.WriteByte(0)
	return unsafe.Slice(unsafe.StringData(b.String()), b.Cap())[:0]
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
	if r.gathering {
		r.gatherOn()
		return
	}
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
			if !r.admit() {
				return
			}
			if r.long() {
				r.gather()
				return
			}
			r.reserve()
			for i := range r.parts {
				if r.whole() {
					r.parts[i].fetch() // no page beyond the first was asked for before
				}
			}
		}
		r.beginChunk()
		r.out = p.it.append(r.out, &r.spec)
		p.it.have = false
		p.taken++
		r.sent++
		if !r.grown() {
			return
		}
		if r.stream != nil && len(r.out) >= r.c.cfg.ChunkBytes {
			if r.shaped() {
				r.draft.chunk(p.it.kv.Key, len(r.out))
			}
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
	r.beginChunk()
	if r.stream != nil {
		hdr := r.c.hdr
		hdr.Revision = r.h
		r.out = codec.AppendHeaderField(r.out, &hdr)
	}
	r.out = codec.AppendBool(r.out, 3, more)
	r.out = codec.AppendInt(r.out, 4, count)
	if r.stream != nil {
		r.remember()
		r.emit()
	} else {
		r.op.Resp, r.out = r.out, nil
	}
	r.end(codec.Status{})
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
	r.release()
	r.over, r.op, r.stream, r.out, r.a, r.ends = true, nil, nil, nil, nil, nil
	r.shape, r.known, r.draft = nil, 0, shapeDraft{}
	r.spec, r.iv = rangeSpec{}, Interval{}
	for i := range r.parts {
		r.parts[i] = pagePart{r: r} // calls under way still complete it
	}
}

// chunkRoom is what stands free before a chunk's fields: the tag and length of its RangeResponse.
const chunkRoom = 1 + 5

// beginChunk begins a stream's next chunk, if none is begun. Its memory is that of the one before, which has been passed
// on: a new piece for each would leave as much garbage as the list is long, and before the collector begins to look
// for it the process grows by as much as it holds anyway, the ring above all.
func (r *pagedRead) beginChunk() {
	if r.stream != nil && len(r.out) == 0 {
		r.out = append(r.out, make([]byte, chunkRoom)...)
	}
}

// emit hands out what was merged as one RangeStreamResponse.
func (r *pagedRead) emit() {
	n := len(r.out) - chunkRoom
	at := chunkRoom - 1 - protowire.SizeVarint(uint64(n))
	protowire.AppendVarint(protowire.AppendTag(r.out[:at], 1, protowire.BytesType), uint64(n))
	s, chunk := r.stream, r.out[at:]
	if r.out = r.out[:0]; cap(r.out) > maxKeptChunk {
		r.out = nil
	}
	r.emitted = true
	s.wanted = false
	s.Chunk(s, chunk)
}
