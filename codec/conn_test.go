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
	measure := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
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

// One Output is bounded also when many messages that are small come in one turn, and what does not fit follows.
func TestOutputOfManyMessagesIsBounded(t *testing.T) {
	r := newRawServer(t, ConnConfig{})
	r.feed(appendSetting(appendFrameHeader(nil, 6, frameSettings, 0, 0), settingInitialWindowSize, maxWindow))
	r.feed(appendWindowUpdate(nil, 0, 1<<30))
	var all []*Stream
	r.e.onReq = func(s *Stream) { all = append(all, s) }
	const streams, size = 200, 10 << 10
	for range streams {
		r.feed(r.headers("/t/Hang", false))
	}
	r.flush()
	for _, s := range all {
		r.c.Send(s, make([]byte, size))
		r.c.Finish(s, Status{})
	}
	if want := streams*size - outputTarget - 2*size; r.c.Queued() < want {
		t.Errorf("%d bytes wait, want %d at least", r.c.Queued(), want)
	}
	total, ends := 0, 0
	for out := r.flush(); len(out) > 0; out = r.flush() {
		if len(out) > outputTarget+2*maxFrameSize {
			t.Fatalf("one Output of %d bytes", len(out))
		}
		total += len(out)
		ends += bytes.Count(out, []byte("grpc-status"))
	}
	if total < streams*size || ends != streams || r.c.Queued() != 0 {
		t.Errorf("%d bytes, %d of %d answers, %d queued", total, ends, streams, r.c.Queued())
	}
	if r.c.outHint > maxOutHint {
		t.Errorf("the next Output begins with %d bytes", r.c.outHint)
	}
}

// DATA that was under way when this side ended its stream is no offence, however many streams ended since.
func TestLateDataIsNotAReset(t *testing.T) {
	r := newRawServer(t, ConnConfig{})
	var all []*Stream
	r.e.onReq = func(s *Stream) { all = append(all, s) }
	const streams = 3 * resetBurst
	for range streams {
		r.feed(r.headers("/t/Hang", false))
	}
	var late []byte
	for _, s := range all {
		late = append(appendFrameHeader(late, 8, frameData, flagEndStream, s.ID), make([]byte, 8)...)
		r.c.Reset(s)
	}
	r.flush()
	resets := r.c.resets
	r.feed(late)
	if out := r.flush(); len(out) != 0 || r.c.resets != resets {
		t.Errorf("%d resets of the budget used, % x", resets-r.c.resets, out)
	}
	if used := int64(r.c.cfg.ConnWindow) - r.c.recvWin - r.c.recvUnacked; used != 0 {
		t.Errorf("%d bytes of the connection's window are lost", used)
	}
	// It is still a frame without use.
	n := r.until(h2EnhanceYourCalm, 2*idleFrameBurst, func() []byte { return appendFrameHeader(nil, 0, frameData, flagEndStream, 1) })
	if n > idleFrameBurst {
		t.Errorf("stopped after %d", n)
	}
}

// A client has 2^30 streams; then Open says that it has no more, and the others go on.
func TestStreamIDsRunOut(t *testing.T) {
	ev := newClientEvents()
	cl := NewClientConn(ConnConfig{FirstStreamID: maxStreamID - 2}, "h", ev)
	e := &echo{}
	e.c = NewServerConn(ConnConfig{}, e)
	for id := uint32(maxStreamID - 2); id <= maxStreamID; id += 2 {
		s := cl.Open("/t/Unary", false, 0)
		if s == nil || s.ID != id {
			t.Fatalf("want stream %d, got %+v", id, s)
		}
		s.User = &rpc{msgs: make(chan []byte, 1), end: make(chan rpcEnd, 1)}
		cl.Send(s, []byte("x"))
		cl.CloseSend(s)
	}
	for range 2 {
		if s := cl.Open("/t/Unary", false, 0); s != nil {
			t.Fatalf("stream %d", s.ID)
		}
	}
	if err := e.c.Feed(cl.Output()); err != nil {
		t.Fatal(err)
	}
	cl.Flushed()
	if err := cl.Feed(e.c.Output()); err != nil || cl.Streams() != 0 || e.requests != 2 {
		t.Errorf("%v, %d streams left, %d requests", err, cl.Streams(), e.requests)
	}
}
