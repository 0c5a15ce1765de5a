package codec

import (
	"bytes"
	"testing"
)

// fakeSource makes size bytes that count up, from memory that shrinks with them.
type fakeSource struct {
	size, at, drops int
}

func (f *fakeSource) Next(dst []byte, n int) []byte {
	for range n {
		dst = append(dst, byte(f.at%251))
		f.at++
	}
	return dst
}
func (f *fakeSource) Len() int { return f.size - f.at }
func (f *fakeSource) Mem() int { return 2 * f.Len() }
func (f *fakeSource) Drop()    { f.drops++ }

// TestSendFrom: a message that is made while it is sent comes whole, behind what was queued before it; its memory is counted as long
// as it is held, and dropped once, also when its stream ends before.
func TestSendFrom(t *testing.T) {
	open := func() (*rawServer, *Stream) {
		var s *Stream
		r := newRawServer(t, ConnConfig{})
		r.e.onReq = func(x *Stream) { s = x }
		r.feed(r.headers("/t/Hang", false))
		r.flush()
		return r, s
	}
	data := func(r *rawServer) (got []byte) {
		for range 1000 {
			out := r.flush()
			for len(out) > 0 {
				h := parseFrameHeader(out)
				if h.typ == frameData {
					got = append(got, out[frameHeaderLen:frameHeaderLen+int(h.length)]...)
				}
				out = out[frameHeaderLen+int(h.length):]
			}
			if r.c.Streams() == 0 {
				break
			}
			r.feed(appendWindowUpdate(nil, r.id, 50_001))
			r.feed(appendWindowUpdate(nil, 0, 50_001))
		}
		return got
	}
	for _, size := range []int{0, 1, maxFrameSize - prefixLen, maxFrameSize, 1_000_000} {
		r, s := open()
		first := bytes.Repeat([]byte("f"), 70_000)
		want := append(append(appendPrefix(nil, len(first)), first...), appendPrefix(nil, size)...)
		want = (&fakeSource{size: size}).Next(want, size)
		src := &fakeSource{size: size}
		r.c.Send(s, first)
		r.c.SendFrom(s, src)
		if r.c.QueueMemory() < src.Mem() || r.c.Queued() < src.Len() {
			t.Errorf("%d bytes: %d wait in %d", size, r.c.Queued(), r.c.QueueMemory())
		}
		r.c.Finish(s, Status{})
		if got := data(r); !bytes.Equal(got, want) || src.drops != 1 || r.c.Queued() != 0 || r.c.QueueMemory() != 0 {
			t.Errorf("%d bytes: %d came of %d, dropped %d times, %d wait in %d", size, len(got), len(want), src.drops, r.c.Queued(), r.c.QueueMemory())
		}
	}
	r, s := open()
	src := &fakeSource{size: 1_000_000}
	r.c.SendFrom(s, src)
	r.flush()
	if held := r.c.QueueMemory(); src.at == 0 || held < src.Mem() || held >= 2*src.size {
		t.Errorf("%d bytes were made, %d are counted", src.at, held)
	}
	r.c.Reset(s)
	if src.drops != 1 || r.c.Queued() != 0 || r.c.QueueMemory() != 0 {
		t.Errorf("after the end: dropped %d times, %d wait in %d", src.drops, r.c.Queued(), r.c.QueueMemory())
	}
	late := &fakeSource{size: 1}
	if r.c.SendFrom(s, late); late.drops != 1 {
		t.Error("not dropped, though nothing is sent")
	}
}
