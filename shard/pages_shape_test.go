package shard

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"spindle/codec"
)

// shapeMember answers pages from the keys of each shard, at once when it is asked to go on.
type shapeMember struct {
	codec.Transport
	t     *testing.T
	of    []*[]codec.KV // of a shard, ascending
	calls []func()
	pages int
	looks int
	most  int // bytes of the longest page that came
	huge  int // pages that are longer are refused; 0: none
	spill int // pages that were refused because less was set aside for them
	held  int64
	mem   *Memory // the most that it had is held
	st    codec.Status
	rng   *rand.Rand
}

func (m *shapeMember) Call(to codec.ClusterID, method codec.Method, req []byte, _ time.Duration, done codec.Completion) {
	if method != codec.MethodRange {
		m.t.Fatalf("a call of method %d", method)
	}
	var from, end []byte
	limit, keysOnly := 0, false
	for it := (codec.Fields{Msg: bytes.Clone(req)}); it.Next(); {
		switch it.Field.Num {
		case 1:
			from = it.Field.Bytes
		case 2:
			end = it.Field.Bytes
		case 3:
			limit = int(it.Field.Val)
		case 8:
			keysOnly = true
		}
	}
	if len(end) == 0 || !isInfinity(end) && bytes.Compare(from, end) > 0 {
		m.t.Fatalf("a page from %q to %q", from, end)
	}
	kvs := *m.of[to]
	iv := Interval{from, end}
	var resp []byte
	n, count := 0, 0
	for i := range kvs {
		if !iv.Contains(kvs[i].Key) {
			continue
		}
		if count++; count <= limit {
			kv := kvs[i]
			if keysOnly {
				kv.Value = nil
			}
			resp = appendKVField(resp, 2, &kv)
			n++
		}
	}
	resp = codec.AppendInt(codec.AppendBool(resp, 3, n < count), 4, int64(count))
	if keysOnly {
		m.looks++
	} else {
		m.pages++
	}
	m.held = max(m.held, m.mem.Used())
	reserved := 0
	if r, ok := done.(codec.Receiving); ok {
		reserved = r.Reserved()
	}
	m.calls = append(m.calls, func() {
		switch w := codec.Rewriter(nil); {
		case m.huge > 0 && len(resp) > m.huge:
			done.Complete(nil, codec.Status{Code: codec.ResourceExhausted, Msg: "too large"}, true)
			return
		case reserved > 0 && len(resp) > reserved:
			m.spill++
			done.Complete(nil, codec.Status{Code: codec.ResourceExhausted, Msg: "larger than what was set aside"}, true)
			return
		case len(resp) > 10<<10: // it comes in pieces
			if r, ok := done.(codec.Receiving); ok {
				w = r.Rewriter()
			}
			if w != nil {
				dst := codec.Borrow(len(resp))
				for got := 0; got < len(resp); {
					k := min(len(resp)-got, 1+m.rng.IntN(32<<10))
					dst = w.Rewrite(dst, resp[got:got+k])
					got += k
				}
				resp = dst
			}
		}
		if !keysOnly {
			m.most = max(m.most, len(resp))
		}
		done.Complete(resp, codec.Status{}, true)
	})
}

// stream lists iv of a fixed state, over as many shards as there are, and returns the chunks' keys.
func (m *shapeMember) stream(c *Core, iv Interval) []byte {
	m.pages, m.looks, m.most, m.spill = 0, 0, 0, 0
	var got, chunk []byte
	ended := false
	s := &RangeStream{c: c,
		Chunk: func(s *RangeStream, msg []byte) { chunk = msg },
		Done: func(s *RangeStream) {
			ended = true
			if m.st = s.Status; m.st.Code != codec.OK && m.st != codec.ErrTooManyRequests {
				m.t.Fatalf("the stream ends with %v", s.Status)
			}
		}}
	c.rangeStreams++
	r := &pagedRead{c: c, op: &s.op, stream: s, iv: iv, latest: true, parts: make([]pagePart, len(m.of))}
	s.read = r
	for i := range r.parts {
		r.parts[i] = pagePart{r: r, s: &shardState{c: c, idx: i, cluster: codec.ClusterID(i)}}
	}
	r.restart()
	r.fix(7)
	for i := range r.parts {
		r.parts[i].located, r.parts[i].local = true, 5
		r.parts[i].fetch()
	}
	c.PullRange(s)
	for !ended || len(chunk) > 0 {
		for it := (codec.Fields{Msg: chunk}); it.Next(); {
			for f := (codec.Fields{Msg: it.Field.Bytes}); f.Next(); {
				if f.Field.Num == 2 {
					got = codec.AppendBytes(got, 2, f.Field.Bytes)
				}
			}
		}
		pull := len(chunk) > 0
		chunk = nil
		switch {
		case ended:
		case pull:
			c.PullRange(s)
		case len(m.calls) == 0:
			m.t.Fatal("the stream waits for nothing")
		default:
			i := m.rng.IntN(len(m.calls))
			call := m.calls[i]
			m.calls = slices.Delete(m.calls, i, i+1)
			call()
		}
	}
	for _, call := range m.calls { // what was on its way comes anyway
		call()
	}
	m.calls = nil
	return got
}

func newShapeMember(t *testing.T, seed uint64, shards int) (*shapeMember, *Core) {
	m := &shapeMember{t: t, rng: rand.New(rand.NewPCG(seed, 21))}
	for range shards {
		m.of = append(m.of, new([]codec.KV))
	}
	return m, &Core{cfg: CoreConfig{PageKeys: firstPageKeys, ChunkBytes: streamChunkBytes, ShardTimeout: time.Second,
		Now: func() int64 { return 1 }}, tr: m, state: stateReady}
}

// fill gives the shards n keys that are not there yet with values of about size bytes, and says what a list of all shows.
func (m *shapeMember) fill(prefix string, n, size int) {
	for i := range n {
		kv := codec.KV{Key: fmt.Appendf(nil, "%s%06d", prefix, i), CreateRevision: 2, ModRevision: 3, Version: 1,
			Value: append(AppendStamp(nil, 9, 4), make([]byte, size/2+m.rng.IntN(size+1))...)}
		at := m.of[m.rng.IntN(len(m.of))]
		*at = append(*at, kv)
	}
	for _, kvs := range m.of {
		slices.SortFunc(*kvs, func(a, b codec.KV) int { return bytes.Compare(a.Key, b.Key) })
	}
}

func (m *shapeMember) want(iv Interval) (want []byte) {
	var all []codec.KV
	for _, kvs := range m.of {
		all = append(all, *kvs...)
	}
	slices.SortFunc(all, func(a, b codec.KV) int { return bytes.Compare(a.Key, b.Key) })
	for i := range all {
		if iv.Contains(all[i].Key) {
			want = append(want, clientPage(appendKVField(nil, 2, &all[i]), new(pageSum))...)
		}
	}
	return want
}

var shapeRange = Interval{Key: []byte("k"), End: []byte("l")}

// TestRememberedShape: the second stream of a range asks for few pages, which are as large as they may be, and does not look at the
// keys; so does one that meets values far from what they were, after a page or two.
func TestRememberedShape(t *testing.T) {
	const keys, size = 30_000, 1 << 10
	m, c := newShapeMember(t, 1, 2)
	m.fill("k", keys, size)
	c.rangeStreams = 7 // others, so that pages are small
	aim := pageBudget / (2 * 2 * 8)
	want := m.want(shapeRange)
	if !bytes.Equal(m.stream(c, shapeRange), want) {
		t.Fatal("the first stream shows something else")
	}
	if first := m.pages; m.looks == 0 || c.shapes.get(shapeRange) == nil {
		t.Fatalf("%d pages, %d looks; remembered: %v", first, m.looks, c.shapes.get(shapeRange) != nil)
	}
	for range 2 { // the second one learns from its own chunks
		if !bytes.Equal(m.stream(c, shapeRange), want) {
			t.Fatal("a stream whose range is known shows something else")
		}
		if least := len(want) / aim; m.looks != 0 || m.pages > 3*least/2+4 || m.most > aim*5/4 {
			t.Errorf("%d pages for %d bytes, the longest of %d, %d looks", m.pages, len(want), m.most, m.looks)
		}
	}
	// Limits, and other ranges, have nothing to do with it.
	other := Interval{Key: []byte("k"), End: []byte("k02")}
	if c.shapes.get(other) != nil {
		t.Error("another range is known")
	}
	if !bytes.Equal(m.stream(c, other), m.want(other)) {
		t.Error("a stream of another range shows something else")
	}
}

// TestShapeThatLies: whatever is remembered, the answer is what the shards have. What it costs is bounded, too.
func TestShapeThatLies(t *testing.T) {
	seed := rand.Uint64()
	m, c := newShapeMember(t, seed, 1)
	rng := m.rng
	for round := range 120 {
		m.of = nil
		for range 1 + rng.IntN(4) {
			m.of = append(m.of, new([]codec.KV))
		}
		for i := range 1 + rng.IntN(3) {
			m.fill(fmt.Sprintf("%c%c%d", "jkl"[rng.IntN(3)], 'a'+rng.IntN(4), i), rng.IntN(1500), 1<<rng.IntN(13))
		}
		m.huge = 0
		if rng.IntN(3) == 0 {
			m.huge = 100 << 10
		}
		s := &listShape{span: 1 << rng.IntN(40), perKey: 1 << rng.IntN(30)}
		for range rng.IntN(2 * maxShapeEnds) {
			s.ends = append(s.ends, fmt.Appendf(nil, "%c%c%d%06d", "jkl"[rng.IntN(3)], 'a'+rng.IntN(4), rng.IntN(3), rng.IntN(1500)))
		}
		slices.SortFunc(s.ends, bytes.Compare)
		iv := []Interval{shapeRange, {Key: []byte("ka"), End: []byte{0}}, {Key: []byte("ja"), End: []byte("kb0007")}}[rng.IntN(3)]
		c.shapes = listShapes{}
		c.shapes.put(iv, s)
		want := m.want(iv)
		if !bytes.Equal(m.stream(c, iv), want) {
			t.Fatalf("seed %d, round %d: with a shape of %d ends, %d bytes apart, keys of %d, the stream shows something else", seed, round, len(s.ends), s.span, s.perKey)
		}
		keys := 0
		for _, kvs := range m.of {
			keys += len(*kvs)
		}
		if most := len(m.of) * (len(s.ends) + 16); m.pages > most && m.huge == 0 {
			t.Fatalf("seed %d, round %d: %d pages for %d keys, with %d ends", seed, round, m.pages, keys, len(s.ends))
		}
	}
}

// TestShapeOfSmallValues: the values behind the first page are far larger than they were. One page of each shard is larger than it
// should be; it is not kept, and what follows are pages of the size that they are to have. (It was kept.)
func TestShapeOfSmallValues(t *testing.T) {
	const size = 8 << 10
	m, c := newShapeMember(t, 3, 1)
	m.fill("ka", firstPageKeys, 10)
	m.fill("kb", 6_000, size)
	c.shapes.put(shapeRange, &listShape{ends: [][]byte{[]byte("kz")}, span: 1, perKey: 10})
	if !bytes.Equal(m.stream(c, shapeRange), m.want(shapeRange)) {
		t.Fatal("the stream shows something else")
	}
	if m.most > pageRoom*maxPageBytes || m.spill != 1 || m.pages > 4+6_000*(size+100)/maxPageBytes*5/4 {
		t.Errorf("%d pages, the longest has %d bytes, %d were larger than what was set aside", m.pages, m.most, m.spill)
	}
	if s := c.shapes.get(shapeRange); s == nil || s.perKey < size/2 {
		t.Errorf("nothing was learned: %v", s)
	}
}

// TestStreamPagesAreCounted: Memory counts the pages of streams while they are there, those on their way too. When it is short they are
// small, and beyond its limit a stream whose pages are of some size ends.
func TestStreamPagesAreCounted(t *testing.T) {
	const limit = 256 << 20
	seed := rand.Uint64()
	m, c := newShapeMember(t, seed, 2)
	m.fill("k", 16_000, 2<<10)
	want := m.want(shapeRange)
	m.mem = NewMemory(limit)
	c.cfg.Memory = m.mem
	for _, x := range []struct {
		used, least, most int64 // before; of the stream while it runs
		st                codec.Status
	}{
		{0, 2 * 2 * maxPageBytes * 3 / 4, pageBudget, codec.Status{}},
		{limit - limit/16, largeAnswer, 3 * largeAnswer, codec.Status{}}, // its chunk above all
		{limit + 1, minPageBytes, 3 * largeAnswer, codec.ErrTooManyRequests},
	} {
		m.mem.Add(x.used)
		m.held = 0
		got := m.stream(c, shapeRange)
		held := m.held - x.used
		if m.st != x.st || m.st.Code == codec.OK && !bytes.Equal(got, want) {
			t.Errorf("seed %d: beside %d bytes the stream ends with %v, %d bytes of %d", seed, x.used, m.st, len(got), len(want))
		}
		if held < x.least || held > x.most {
			t.Errorf("seed %d: beside %d bytes the stream has %d, want %d to %d", seed, x.used, held, x.least, x.most)
		}
		if n := m.mem.Used(); n != x.used {
			t.Errorf("seed %d: %d bytes are left of the stream", seed, n-x.used)
		}
		m.mem.Add(-x.used)
	}
}

// TestShapesAreBounded: what is remembered stays within its bounds, and the range that was listed least lately goes.
func TestShapesAreBounded(t *testing.T) {
	var l listShapes
	iv := func(i int) Interval { return Interval{Key: fmt.Appendf(nil, "k%d", i), End: []byte("l")} }
	small := func() *listShape { return &listShape{ends: [][]byte{[]byte("k")}} }
	for i := range 2 * maxShapes {
		l.put(iv(i), small())
		l.put(iv(0), small())
	}
	if len(l.of) != maxShapes || len(l.lately) != maxShapes || l.get(iv(0)) == nil || l.get(iv(1)) != nil || l.get(iv(2*maxShapes-1)) == nil {
		t.Errorf("%d and %d shapes", len(l.of), len(l.lately))
	}
	large := &listShape{}
	for range maxShapeEnds {
		large.ends = append(large.ends, make([]byte, maxShapeKey))
	}
	for i := range maxShapes {
		s := *large
		l.put(iv(i), &s)
	}
	sum := int64(0)
	for _, s := range l.of {
		sum += s.memory
	}
	if l.memory != sum || sum > maxShapeBytes || len(l.of) != len(l.lately) {
		t.Errorf("%d bytes, counted as %d, in %d shapes", sum, l.memory, len(l.of))
	}
	l.put(Interval{Key: make([]byte, maxShapeKey), End: []byte("l")}, small())
	if l.get(Interval{Key: make([]byte, maxShapeKey), End: []byte("l")}) != nil {
		t.Error("a range with a long name is remembered")
	}
}

// TestShapeDraft: however long a list is, its shape has a bounded number of ends, which divide it evenly.
func TestShapeDraft(t *testing.T) {
	for _, chunks := range []int{1, maxShapeEnds, maxShapeEnds + 1, 3 * maxShapeEnds, 1000 * maxShapeEnds} {
		var d shapeDraft
		for i := range chunks {
			d.chunk(fmt.Appendf(nil, "%08d", i+1), 10)
		}
		n := len(d.ends)
		if n > maxShapeEnds || n < min(chunks, maxShapeEnds/2) || d.size != int64(10*chunks) {
			t.Errorf("%d chunks: %d ends, %d bytes", chunks, n, d.size)
		}
		for i, end := range d.ends {
			if want := fmt.Sprintf("%08d", (i+1)*d.skip); string(end) != want {
				t.Fatalf("%d chunks: end %d is %s, want %s", chunks, i, end, want)
			}
		}
	}
	var d shapeDraft
	if d.chunk(make([]byte, maxShapeKey+1), 10); len(d.ends) != 0 || d.size != 10 {
		t.Errorf("a long key is an end")
	}
}

// Large values behind many small ones: all that is left fits a page by the keys, and not by their bytes, which the shape knows.
func TestLargeValuesBehindSmallOnes(t *testing.T) {
	seed := rand.Uint64()
	m, c := newShapeMember(t, seed, 2)
	m.fill("a", 30_000, 200)
	m.fill("b", 1_500, 32<<10)
	iv := Interval{[]byte("a"), []byte("c")}
	want := m.want(iv)
	for turn := range 2 {
		if !bytes.Equal(m.stream(c, iv), want) {
			t.Fatalf("seed %d: stream %d is not what the members have", seed, turn)
		}
		if most := pageRoom * maxPageBytes; m.most > most || turn > 0 && m.spill > 0 {
			t.Errorf("seed %d: stream %d has a page of %d bytes, at most %d; %d were refused", seed, turn, m.most, most, m.spill)
		}
	}
}
