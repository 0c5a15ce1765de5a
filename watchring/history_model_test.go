package watchring

import "slices"

// modelPast is the shards' history in a world: it answers from the true history, in chunks of any size, at any
// time, and now and then finds a part of it compacted.
type modelPast struct {
	w    *world
	open []*modelReader
	lost int64 // somebody has compacted the shards up to here
	sync bool  // some answers come from within Next
}

type modelReader struct {
	p    *modelPast
	set  int
	pos  int64
	done func(HistoryChunk)
	over bool
}

func (p *modelPast) OpenHistory(set int, from int64) HistoryReader {
	r := &modelReader{p: p, set: set, pos: from - 1}
	p.open = append(p.open, r)
	p.w.counts.opened++
	return r
}

func (r *modelReader) Next(max int, done func(HistoryChunk)) {
	if r.done != nil || r.over {
		r.p.w.fail("Next of a reader that is busy (%v) or closed (%v)", r.done != nil, r.over)
	}
	r.done = done
	if r.p.sync && r.p.w.rng.IntN(2) == 0 {
		r.answer(false)
	}
}

func (r *modelReader) Close() {
	if r.over {
		r.p.w.fail("a reader is closed twice")
	}
	r.over, r.done = true, nil
	r.p.open = slices.DeleteFunc(r.p.open, func(x *modelReader) bool { return x == r })
}

// answer gives some reader, or all, a chunk. It returns false when there was nothing to say to anybody.
func (p *modelPast) answer(all bool) (any bool) {
	if p == nil || len(p.open) == 0 {
		return false
	}
	if all {
		for _, r := range slices.Clone(p.open) {
			any = r.answer(true) || any
		}
		return any
	}
	if p.w.rng.IntN(50) == 0 {
		p.lost = max(p.lost, p.w.front.Get(All)-p.w.rng.Int64N(60))
	}
	return p.open[p.w.rng.IntN(len(p.open))].answer(false)
}

func (r *modelReader) answer(everything bool) bool {
	w := r.p.w
	front := w.front.Get(r.set)
	if r.done == nil || front <= r.pos {
		return false
	}
	done := r.done
	r.done = nil
	if lost := max(r.p.lost, w.front.Compacted()); r.pos+1 < lost {
		w.counts.gone++
		done(HistoryChunk{Compact: lost})
		return true
	}
	upTo := r.pos + 1 + w.rng.Int64N(front-r.pos)
	if everything || w.rng.IntN(3) == 0 {
		upTo = front
	}
	c := HistoryChunk{UpTo: upTo}
	for _, e := range w.entries {
		if e.Rev > r.pos && e.Rev <= upTo && (r.set == All || e.Shard == r.set) {
			c.Entries = append(c.Entries, e)
		}
	}
	r.pos = upTo
	w.counts.chunks++
	done(c)
	return true
}
