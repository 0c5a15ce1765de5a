package codec

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// takeData appends the DATA of one Output to got, by stream; false: there was no output.
func takeData(r *rawServer, got map[uint32][]byte) bool {
	out := r.flush()
	some := len(out) > 0
	for len(out) > 0 {
		h := parseFrameHeader(out)
		if h.typ == frameData {
			got[h.stream] = append(got[h.stream], out[frameHeaderLen:frameHeaderLen+int(h.length)]...)
		}
		out = out[frameHeaderLen+int(h.length):]
	}
	return some
}

// takeAll gives all window there is, and appends all DATA that comes to got.
func takeAll(r *rawServer, all []*Stream, got map[uint32][]byte) {
	r.feed(appendWindowUpdate(nil, 0, 1<<30))
	for _, s := range all {
		r.feed(appendWindowUpdate(nil, s.ID, 1<<30))
	}
	for takeData(r, got) {
	}
}

// A body that many streams get waits once for all of them, reaches each of them whole, and its memory is nobody's
// buffer afterwards.
func TestSharedBodies(t *testing.T) {
	r := newRawServer(t, ConnConfig{})
	var all []*Stream
	r.e.onReq = func(s *Stream) { all = append(all, s) }
	for range 3 {
		r.feed(r.headers("/t/Hang", false))
	}
	r.flush()
	body := make([]byte, 100<<10, 128<<10)
	for i := range body {
		body[i] = byte(i * 7)
	}
	was := bytes.Clone(body)
	if r.c.SendParts(all[0], []byte("small"), []byte("one"), true) {
		t.Error("a message that is in Output was kept")
	}
	// The first goes out up to the connection's window, the others not at all.
	for i, head := range []string{"first", "second", "third"} {
		if !r.c.SendParts(all[i], []byte(head), body, true) {
			t.Errorf("%s: a body that waits was copied", head)
		}
	}
	if got := r.c.QueueMemory(); got < 3*len(body) {
		t.Errorf("%d bytes of memory are counted for 3 times %d", got, len(body))
	}
	if r.c.SendParts(all[2], []byte("mine"), body, false) || r.c.SendParts(all[2], nil, body[:minShared-1], true) {
		t.Error("kept what is not shared, or small")
	}
	got := map[uint32][]byte{}
	takeAll(r, all, got)
	message := func(head string, body []byte) []byte {
		return append(append(appendPrefix(nil, len(head)+len(body)), head...), body...)
	}
	want := [][]byte{
		append(message("small", []byte("one")), message("first", was)...),
		message("second", was),
		append(append(message("third", was), message("mine", was)...), message("", was[:minShared-1])...),
	}
	for i, s := range all {
		if !bytes.Equal(got[s.ID], want[i]) {
			t.Errorf("stream %d got %d bytes, not the %d that were sent", i, len(got[s.ID]), len(want[i]))
		}
	}
	if r.c.Queued() != 0 || r.c.QueueMemory() != 0 {
		t.Errorf("%d bytes wait, %d of memory", r.c.Queued(), r.c.QueueMemory())
	}
	for range 8 {
		b := getBuffer(len(body))
		clear(b.b[:cap(b.b)])
	}
	if !bytes.Equal(body, was) {
		t.Error("the memory of a shared body is used as a buffer")
	}
}

// What follows a shared body on one stream is not written into the body's spare capacity, where it would reach other streams.
func TestSharedBodyIsNoBlock(t *testing.T) {
	r := newRawServer(t, ConnConfig{})
	var all []*Stream
	r.e.onReq = func(s *Stream) { all = append(all, s) }
	for range 2 {
		r.feed(r.headers("/t/Hang", false))
	}
	r.flush()
	for _, s := range all {
		r.c.Send(s, make([]byte, 100<<10)) // uses up the window
	}
	body := make([]byte, 8<<10, 16<<10)
	for _, s := range all {
		if !r.c.SendParts(s, []byte("head"), body, true) {
			t.Fatal("a shared body that waits was copied")
		}
	}
	a, b := bytes.Repeat([]byte("a"), 100), bytes.Repeat([]byte("b"), 100)
	r.c.Send(all[0], a)
	r.c.Send(all[1], b)
	got := map[uint32][]byte{}
	takeAll(r, all, got)
	for i, want := range [][]byte{a, b} {
		if !bytes.HasSuffix(got[all[i].ID], want) {
			t.Errorf("stream %d does not end with its own last message", i)
		}
	}
	if spare := body[len(body):cap(body)]; !bytes.Equal(spare, make([]byte, len(spare))) {
		t.Error("the spare capacity of a shared body was written to")
	}
	var q queue
	q.pushBlock(&buffer{b: make([]byte, 1, 100), shared: true})
	if q.push([]byte("x")); q.head == q.tail {
		t.Error("a queue appended to a shared block")
	}
}

// A shared body of which only the end waits counts as what it keeps alive: all of it.
func TestSharedBodyCountsWhole(t *testing.T) {
	r := newRawServer(t, ConnConfig{})
	var s *Stream
	r.e.onReq = func(x *Stream) { s = x }
	r.feed(r.headers("/t/Hang", false))
	r.flush()
	const size = 300 << 10
	r.feed(appendWindowUpdate(nil, 0, 1<<30))
	r.feed(appendWindowUpdate(nil, s.ID, size-65_535-4500))
	if !r.c.SendParts(s, []byte("h"), make([]byte, size), true) || r.c.QueueMemory() < size {
		t.Errorf("%d bytes are counted for a body of %d, of which %d wait", r.c.QueueMemory(), size, r.c.Queued())
	}
}

// Messages of all kinds, shared by several streams or not, reach each stream whole and in their order, whatever windows and
// the socket allow meanwhile, and nothing is left of them.
func TestSharedBodiesAmongOthers(t *testing.T) {
	sizes := []int{0, 1, 10, 100, 4095, 4096, 5000, 20_000, 70_000, 300_000}
	for seed := uint64(1); seed <= 20; seed++ {
		rng := rand.New(rand.NewPCG(seed, 0))
		r := newRawServer(t, ConnConfig{})
		var all []*Stream
		r.e.onReq = func(s *Stream) { all = append(all, s) }
		for range 2 + rng.IntN(4) {
			r.feed(r.headers("/t/Hang", false))
		}
		r.flush()
		got, want := map[uint32][]byte{}, map[uint32][]byte{}
		expect := func(s *Stream, head, body []byte) {
			want[s.ID] = append(append(appendPrefix(want[s.ID], len(head)+len(body)), head...), body...)
		}
		filled := func(n int) []byte { // with spare capacity, for others to write to
			b, fill := make([]byte, n, n+rng.IntN(n+64)), byte(rng.Uint32())
			for i := range b {
				b[i] = fill + byte(i)
			}
			return b
		}
		var sources []*byteSource
		for range 60 {
			s, body := all[rng.IntN(len(all))], filled(sizes[rng.IntN(len(sizes))])
			switch rng.IntN(8) {
			case 0, 1:
				for _, s := range all {
					if rng.IntN(3) > 0 {
						head := filled(rng.IntN(80))
						expect(s, head, body)
						r.c.SendParts(s, head, body, true)
					}
				}
			case 2:
				expect(s, nil, body)
				r.c.Send(s, body)
				clear(body)
			case 3:
				expect(s, nil, body)
				r.c.SendOwned(s, body)
			case 4:
				expect(s, nil, body)
				src := &byteSource{b: body}
				sources = append(sources, src)
				r.c.SendFrom(s, src)
			case 5:
				r.feed(appendWindowUpdate(nil, s.ID, 1+rng.Uint32N(100_000)))
			case 6:
				r.feed(appendWindowUpdate(nil, 0, 1+rng.Uint32N(300_000)))
			case 7:
				r.c.SetBlocked(rng.IntN(2) == 0)
				takeData(r, got)
			}
		}
		r.c.SetBlocked(false)
		takeAll(r, all, got)
		for i, s := range all {
			if !bytes.Equal(got[s.ID], want[s.ID]) {
				t.Errorf("seed %d: stream %d got %d bytes, not the %d that were sent", seed, i, len(got[s.ID]), len(want[s.ID]))
			}
		}
		for _, src := range sources {
			if src.drops != 1 {
				t.Errorf("seed %d: a source was dropped %d times", seed, src.drops)
			}
		}
		if r.c.Queued() != 0 || r.c.QueueMemory() != 0 {
			t.Errorf("seed %d: %d bytes wait, %d of memory", seed, r.c.Queued(), r.c.QueueMemory())
		}
	}
}

// byteSource is a Source of bytes that are there.
type byteSource struct {
	b     []byte
	drops int
}

func (f *byteSource) Next(dst []byte, n int) []byte {
	dst = append(dst, f.b[:n]...)
	f.b = f.b[n:]
	return dst
}
func (f *byteSource) Len() int { return len(f.b) }
func (f *byteSource) Mem() int { return len(f.b) + 7 }
func (f *byteSource) Drop()    { f.drops++ }
