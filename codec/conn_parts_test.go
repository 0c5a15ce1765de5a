package codec

import (
	"bytes"
	"testing"
)

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
	if got := r.c.QueueMemory(); got < 3*cap(body) {
		t.Errorf("%d bytes of memory are counted for 3 times %d", got, cap(body))
	}
	if r.c.SendParts(all[2], []byte("mine"), body, false) || r.c.SendParts(all[2], nil, body[:minShared-1], true) {
		t.Error("kept what is not shared, or small")
	}
	got := map[uint32][]byte{}
	collect := func() {
		for out := r.flush(); len(out) > 0; out = r.flush() {
			for len(out) > 0 {
				h := parseFrameHeader(out)
				if h.typ == frameData {
					got[h.stream] = append(got[h.stream], out[frameHeaderLen:frameHeaderLen+int(h.length)]...)
				}
				out = out[frameHeaderLen+int(h.length):]
			}
		}
	}
	collect()
	r.feed(appendWindowUpdate(nil, 0, 1<<30))
	for _, s := range all {
		r.feed(appendWindowUpdate(nil, s.ID, 1<<30))
	}
	collect()
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
