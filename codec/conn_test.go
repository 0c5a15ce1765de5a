package codec

import (
	"bytes"
	"runtime"
	"strings"
	"testing"
)

// A blocked socket holds back DATA and trailers, so that a peer that does not read costs streams, not memory.
func TestBlockedHoldsBackAnswers(t *testing.T) {
	r := newRawServer(t, ConnConfig{MaxConcurrentStreams: 10})
	r.c.SetBlocked(true)
	for i := 0; i < 10; i++ {
		r.feed(r.headers("/t/None", true))
	}
	if out := r.flush(); len(out) != 0 || r.c.Streams() != 10 {
		t.Fatalf("%d streams, % x", r.c.Streams(), out)
	}
	r.feed(r.headers("/t/None", true))
	if out := r.flush(); !bytes.Equal(out, appendRSTStream(nil, r.id, h2RefusedStream)) {
		t.Fatalf("% x", out)
	}
	r.c.SetBlocked(false)
	if out := r.flush(); bytes.Count(out, []byte("grpc-status")) != 10 || r.c.Streams() != 0 {
		t.Errorf("%d streams, % x", r.c.Streams(), out)
	}
}

func TestNotHTTP2(t *testing.T) {
	e := &echo{}
	e.c = NewServerConn(ConnConfig{}, e)
	if err := e.c.Feed([]byte("GET / HTTP/1.1\r\n")); err == nil || !strings.Contains(err.Error(), "preface") {
		t.Error(err)
	}
	if err := e.c.Feed([]byte("x")); err == nil {
		t.Error("Feed after an error")
	}
	e.c.Close()
	e.c.Close()
}

// Handlers may do anything to the Conn: end this stream, others, the connection.
func TestReentrancy(t *testing.T) {
	r := newRawServer(t, ConnConfig{})
	var first *Stream
	r.e.onReq = func(s *Stream) {
		if first == nil {
			first = s
			return
		}
		r.c.Reset(first)
		r.c.Finish(s, Status{Aborted, "at once"})
		r.c.Finish(s, Status{})
		r.c.Send(s, []byte("ignored"))
		r.c.Reset(s)
		r.c.Hold(s, true)
	}
	p := r.headers("/t/Stream", false)
	p = append(p, r.headers("/t/Stream", false)...)
	p = append(append(appendFrameHeader(p, 7, frameData, flagEndStream, r.id), appendPrefix(nil, 2)...), "ab"...)
	r.feed(p)
	if r.c.Streams() != 0 || r.e.canceled != 0 {
		t.Errorf("%d streams, %d canceled", r.c.Streams(), r.e.canceled)
	}
	r.flush()
	r.e.onReq = func(*Stream) { r.c.Close() }
	if err := r.c.Feed(append(r.headers("/t/Stream", false), p...)); err == nil {
		t.Error("Feed goes on after Close")
	}
	if r.e.canceled != 1 || r.c.Streams() != 0 {
		t.Errorf("%d streams, %d canceled", r.c.Streams(), r.e.canceled)
	}
}

// An idle connection with one stream keeps little.
func TestIdleConnIsSmall(t *testing.T) {
	const n = 500
	conns := make([]*rawServer, n)
	measure := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := measure()
	for i := range conns {
		r := newRawServer(t, ConnConfig{})
		for j := 0; j < 50; j++ { // some life first
			r.feed(r.headers("/t/Unary", true))
		}
		r.feed(r.headers("/t/Stream", false))
		r.flush()
		r.c.Tick()
		r.enc, r.buf = nil, bytes.Buffer{}
		conns[i] = r
	}
	per := (measure() - before) / n
	runtime.KeepAlive(conns)
	t.Logf("%d bytes a connection", per)
	if per > 8<<10 {
		t.Errorf("an idle connection takes %d bytes", per)
	}
}

// Streams take turns: a small message does not wait for all of a large one, and one Output is bounded
// whatever the windows.
func TestFairTurns(t *testing.T) {
	r := newRawServer(t, ConnConfig{})
	r.feed(appendSetting(appendFrameHeader(nil, 6, frameSettings, 0, 0), settingInitialWindowSize, maxWindow))
	r.feed(appendWindowUpdate(nil, 0, 1<<30))
	var all []*Stream
	r.e.onReq = func(s *Stream) { all = append(all, s) }
	for range 3 {
		r.feed(r.headers("/t/Hang", false))
	}
	r.flush()
	r.c.Send(all[0], make([]byte, 4<<20))
	r.c.Send(all[1], make([]byte, 4<<20))
	r.c.Send(all[2], []byte("a small one"))
	total, small := 0, -1
	for out := r.flush(); len(out) > 0; out = r.flush() {
		if len(out) > outputTarget+2*maxFrameSize {
			t.Fatalf("one Output of %d bytes", len(out))
		}
		if i := bytes.Index(out, []byte("a small one")); i >= 0 {
			small = total + i
		}
		total += len(out)
	}
	if total < 8<<20 || r.c.Queued() != 0 || r.e.drained != 3 {
		t.Errorf("%d bytes, %d queued, %d drained", total, r.c.Queued(), r.e.drained)
	}
	if small < 0 || small > outputTarget+4*maxFrameSize {
		t.Errorf("the small message came after %d bytes", small)
	}
}
