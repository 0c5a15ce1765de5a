package shard

import (
	"bytes"
	"slices"

	"spindle/codec"
)

// This file remembers what the last long stream of a range was like: the same prefixes are listed again and again. With it a list
// knows from its first page on how large its pages may be, and where they may end (pages_ends.go), without a look at the keys.
// What is remembered is never part of an answer. It chooses how many keys a page asks for, and at which key of the range it
// ends; the next one goes on where that one ended. So a shape that lies, because the keys are others by now, costs a
// few pages more, or one of each shard that has shapeGrowth times the keys of the first.

const (
	// maxShapes is how many ranges are remembered, and maxShapeBytes what they may take together: the one that was listed
	// least lately goes.
	maxShapes     = 256
	maxShapeBytes = 4 << 20
	// shapeOverhead is what a shape takes beside its keys, and a key beside its bytes.
	shapeOverhead = 64
	// maxShapeEnds is how many ends a shape has at most; if there would be more, every second one is dropped. Keys longer than
	// maxShapeEnd are none, and of ranges whose names are longer than maxShapeKey nothing is remembered.
	maxShapeEnds = 128
	maxShapeEnd  = 256
	maxShapeKey  = 1 << 10
	// shapeGrowth is pageGrowth for the page behind the first, where the size of values is remembered.
	shapeGrowth = 32
)

// listShape is what is remembered of one range. It is never changed.
type listShape struct {
	ends   [][]byte // ascending
	span   int64    // bytes of the list between two of them, over all shards
	perKey int64    // bytes
	memory int64
}

// listShapes is the Core's memory of lists.
type listShapes struct {
	of     map[string]*listShape
	lately []string // its keys, the one that was listed last at the end
	memory int64
}

// shapeKey is the name of a range.
func shapeKey(iv Interval) string {
	return string(append(codec.AppendBytes(nil, 1, iv.Key), iv.End...))
}

// get returns what is remembered of iv, nil if nothing is.
func (l *listShapes) get(iv Interval) *listShape {
	if len(l.of) == 0 || len(iv.Key)+len(iv.End) > maxShapeKey {
		return nil
	}
	return l.of[shapeKey(iv)]
}

// put remembers s of iv.
func (l *listShapes) put(iv Interval, s *listShape) {
	if len(iv.Key)+len(iv.End) > maxShapeKey {
		return
	}
	key := shapeKey(iv)
	s.memory = int64(2*len(key) + shapeOverhead)
	for _, end := range s.ends {
		s.memory += int64(len(end) + shapeOverhead)
	}
	l.drop(key)
	if l.of == nil {
		l.of = make(map[string]*listShape)
	}
	l.of[key] = s
	l.lately = append(l.lately, key)
	l.memory += s.memory
	for len(l.lately) > maxShapes || l.memory > maxShapeBytes {
		l.drop(l.lately[0])
	}
}

func (l *listShapes) drop(key string) {
	if s := l.of[key]; s != nil {
		l.memory -= s.memory
		delete(l.of, key)
		l.lately = slices.DeleteFunc(l.lately, func(k string) bool { return k == key })
	}
}

// shapeDraft becomes the shape of a stream that is under way.
type shapeDraft struct {
	ends    [][]byte
	size    int64
	skip, n int // of skip keys that it is told of one is an end
}

// chunk takes the last key of a chunk, and its size.
func (d *shapeDraft) chunk(key []byte, size int) {
	d.size += int64(size)
	d.skip = max(d.skip, 1)
	if d.n++; d.n%d.skip != 0 || len(key) > maxShapeEnd {
		return
	}
	if len(d.ends) == maxShapeEnds {
		for i := 1; i < len(d.ends); i += 2 {
			d.ends[i/2] = d.ends[i]
		}
		clear(d.ends[maxShapeEnds/2:])
		d.ends = d.ends[:maxShapeEnds/2]
		d.skip *= 2
		if d.n%d.skip != 0 {
			return
		}
	}
	d.ends = append(d.ends, bytes.Clone(key))
}

// recall takes what is remembered of r's range. Ends that are not in it would be no places of it.
func (r *pagedRead) recall() {
	r.shape, r.ends, r.known, r.draft = nil, nil, 0, shapeDraft{}
	if s := r.c.shapes.get(r.iv); s != nil && r.spec.limit <= 0 {
		r.shape, r.ends = s, s.ends
		if i := slices.IndexFunc(r.ends, func(end []byte) bool { return !r.iv.Contains(end) }); i >= 0 {
			r.ends = r.ends[:i]
		}
		r.ends, r.known = slices.Clip(r.ends), len(r.ends)
	}
}

// shaped says that r shows what its range is like.
func (r *pagedRead) shaped() bool { return r.stream != nil && r.spec.limit <= 0 && !r.spec.keysOnly }

// remember keeps the shape of a stream that has come to its end. Of those that are no longer than a page of each shard nothing is worth it.
func (r *pagedRead) remember() {
	d := &r.draft
	if !r.shaped() || r.sent == 0 || len(d.ends) < len(r.parts) {
		return
	}
	r.c.shapes.put(r.iv, &listShape{ends: slices.Clip(d.ends), span: d.size/int64(len(d.ends)) + 1, perKey: d.size/r.sent + 1})
}

// stride is how many of a shape's ends make a page.
func (p *pagePart) stride() int {
	r := p.r
	if r.c.cfg.PageKeys < firstPageKeys {
		return 1
	}
	span := r.shape.span/int64(len(r.parts)) + 1
	return int(max(p.fullPage()*p.bytesPerKey()*4/5/span, 1)) // keys are not spread so evenly that the page's limit should be met
}

// jumps says that the part's next page is the one behind the first, of whose size the shape tells more than that. From then on
// what has come tells: values may be others by now.
func (p *pagePart) jumps() bool {
	return p.r.shape != nil && p.fetched <= firstPageKeys && p.r.c.cfg.PageKeys >= firstPageKeys // but where a test has small pages
}

// bytesPerKey is what a key is taken to have.
func (p *pagePart) bytesPerKey() int64 {
	if p.jumps() {
		return max(p.perKey, p.r.shape.perKey, 1)
	}
	return max(p.perKey, 1)
}
