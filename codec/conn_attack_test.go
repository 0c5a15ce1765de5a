package codec

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"
)

// What hostile or broken peers send, and how far it may take them. Classes and numbers of CVEs are in
// limits.go.

// rawServer is a server's Conn, greeted, and fed by hand.
type rawServer struct {
	t   *testing.T
	e   *echo
	c   *Conn
	enc *hpack.Encoder
	buf bytes.Buffer
	id  uint32 // last opened
}

func newRawServer(t *testing.T, cfg ConnConfig) *rawServer {
	r := &rawServer{t: t, e: &echo{}}
	r.e.c = NewServerConn(cfg, r.e)
	r.c = r.e.c
	r.enc = hpack.NewEncoder(&r.buf)
	r.feed(appendFrameHeader([]byte(clientPreface), 0, frameSettings, 0, 0))
	r.flush()
	return r
}

func (r *rawServer) flush() []byte {
	out := bytes.Clone(r.c.Output())
	r.c.Flushed()
	return out
}

func (r *rawServer) feed(p []byte) {
	r.t.Helper()
	if err := r.c.Feed(p); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rawServer) headers(path string, endStream bool) []byte {
	r.id += 2
	if r.id == 2 {
		r.id = 1
	}
	block := encodeBlock(r.enc, &r.buf, ":method", "POST", ":scheme", "http", ":path", path, ":authority", "a",
		"content-type", "application/grpc", "te", "trailers")
	return appendHeaders(nil, r.id, endStream, block)
}

// until feeds what next makes, and flushes after each, until the connection ends; it returns after how many.
func (r *rawServer) until(code h2Code, most int, next func() []byte) int {
	r.t.Helper()
	for i := 0; i < most; i++ {
		if err := r.c.Feed(next()); err != nil {
			var ce *ConnError
			if !errors.As(err, &ce) || h2Code(ce.Code) != code {
				r.t.Fatalf("ended by %v, want %v", err, code)
			}
			if out := r.c.Output(); !bytes.Contains(out, appendGoAway(nil, r.id, code, err.Error())) {
				r.t.Fatalf("no GOAWAY in % x", out)
			}
			r.c.Close()
			return i
		}
		r.flush()
	}
	r.t.Fatalf("not stopped after %d", most)
	return 0
}

func TestAttackRapidReset(t *testing.T) {
	r := newRawServer(t, ConnConfig{})
	n := r.until(h2EnhanceYourCalm, 10*resetBurst, func() []byte {
		p := r.headers("/t/Hang", false)
		return appendRSTStream(p, r.id, h2Cancel)
	})
	if n < resetBurst || n > resetBurst+2 {
		t.Errorf("stopped after %d resets", n)
	}
	// One that waits for its answers, or for the clock, is left alone.
	r = newRawServer(t, ConnConfig{})
	for i := 0; i < 3*resetBurst; i++ {
		r.feed(append(r.headers("/t/Stream", false), appendFrameHeader(nil, 5, frameData, 0, r.id)...))
		r.feed(make([]byte, 5))
		r.feed(appendRSTStream(nil, r.id, h2Cancel))
		r.flush()
	}
	for i := 0; i < 3*resetBurst; i++ {
		r.feed(appendRSTStream(r.headers("/t/Hang", false), r.id, h2Cancel))
		if i%resetRefill == 0 {
			r.c.Tick()
		}
		r.flush()
	}
	if r.c.Streams() != 0 {
		t.Error("streams left")
	}
}

func TestAttackMadeYouReset(t *testing.T) {
	tricks := map[string]func(r *rawServer) []byte{
		"window update of 0": func(r *rawServer) []byte { return appendWindowUpdate(nil, r.id, 0) },
		"window overflow":    func(r *rawServer) []byte { return appendWindowUpdate(nil, r.id, maxWindow) },
		"self-dependency": func(r *rawServer) []byte {
			return append(appendFrameHeader(nil, 5, framePriority, 0, r.id), byte(r.id>>24), byte(r.id>>16), byte(r.id>>8), byte(r.id), 0)
		},
		"short priority": func(r *rawServer) []byte { return append(appendFrameHeader(nil, 1, framePriority, 0, r.id), 0) },
		"data after end": func(r *rawServer) []byte {
			return appendFrameHeader(appendFrameHeader(nil, 0, frameData, flagEndStream, r.id), 0, frameData, flagEndStream, r.id)
		},
	}
	for name, trick := range tricks {
		r := newRawServer(t, ConnConfig{})
		n := r.until(h2EnhanceYourCalm, 10*resetBurst, func() []byte {
			p := r.headers("/t/Hang", false)
			return append(p, trick(r)...)
		})
		if n > resetBurst+2 || r.e.canceled != r.e.requests {
			t.Errorf("%s: stopped after %d, %d of %d canceled", name, n, r.e.canceled, r.e.requests)
		}
	}
}

// Work that outlives its stream takes places: a client that resets gets no more of it than one that waits.
func TestWorkOfResetStreamsTakesPlaces(t *testing.T) {
	r := newRawServer(t, ConnConfig{MaxConcurrentStreams: 3})
	r.e.onCancel = func(*Stream) { r.c.AddWork(1) }
	for i := 0; i < 10; i++ {
		r.feed(appendRSTStream(r.headers("/t/Hang", false), r.id, h2Cancel))
	}
	if r.e.requests != 3 {
		t.Fatalf("%d requests were let in", r.e.requests)
	}
	r.flush()
	r.feed(r.headers("/t/Hang", false))
	if out := r.flush(); !bytes.Equal(out, appendRSTStream(nil, r.id, h2RefusedStream)) {
		t.Fatalf("% x", out)
	}
	r.c.AddWork(-1)
	r.feed(r.headers("/t/Hang", false))
	if r.e.requests != 4 {
		t.Error("a free place was not given")
	}
}

func TestAttackControlFloods(t *testing.T) {
	ping := appendPing(nil, false, [8]byte{})
	// A peer that does not read: the socket is blocked, and its replies pile up.
	for name, frame := range map[string][]byte{"ping": ping, "settings": appendFrameHeader(nil, 0, frameSettings, 0, 0)} {
		r := newRawServer(t, ConnConfig{})
		r.c.SetBlocked(true)
		if n := r.until(h2EnhanceYourCalm, 2*maxControlQueued, func() []byte { return frame }); n > maxControlQueued {
			t.Errorf("%s: stopped after %d", name, n)
		}
	}
	// One that reads may ping as it likes.
	r := newRawServer(t, ConnConfig{})
	for i := 0; i < 2*maxControlQueued; i++ {
		r.feed(ping)
		r.flush()
	}
}

func TestAttackIdleFrames(t *testing.T) {
	for name, make := range map[string]func(r *rawServer) []byte{
		"empty data": func(r *rawServer) []byte { return appendFrameHeader(nil, 0, frameData, 0, 1) },
		"priority": func(r *rawServer) []byte {
			return append(appendFrameHeader(nil, 5, framePriority, 0, 9), 0, 0, 0, 1, 0)
		},
		"unknown type":  func(r *rawServer) []byte { return appendFrameHeader(nil, 0, 0x77, 0, 0) },
		"late window":   func(r *rawServer) []byte { return appendWindowUpdate(nil, 3, 1) },
		"settings acks": func(r *rawServer) []byte { return appendSettingsAck(nil) },
	} {
		r := newRawServer(t, ConnConfig{})
		r.feed(r.headers("/t/Stream", false))
		r.feed(r.headers("/t/Unary", true)) // stream 3, over at once
		if n := r.until(h2EnhanceYourCalm, 2*idleFrameBurst, func() []byte { return make(r) }); n < idleFrameBurst/2 {
			t.Errorf("%s: stopped after %d", name, n)
		}
	}
}

func TestAttackContinuationFlood(t *testing.T) {
	r := newRawServer(t, ConnConfig{})
	r.feed(appendFrameHeader(nil, 0, frameHeaders, 0, 1))
	r.id = 0
	n := r.until(h2EnhanceYourCalm, 1000, func() []byte { return appendFrameHeader(nil, 0, frameContinuation, 0, 1) })
	if n > maxContinuations {
		t.Errorf("stopped after %d", n)
	}
	r = newRawServer(t, ConnConfig{})
	r.feed(appendFrameHeader(nil, 0, frameHeaders, 0, 1))
	r.id = 0
	n = r.until(h2EnhanceYourCalm, 1000, func() []byte {
		return append(appendFrameHeader(nil, 16000, frameContinuation, 0, 1), make([]byte, 16000)...)
	})
	if n > 4 {
		t.Errorf("stopped after %d", n)
	}
}

func TestHeaderLimitAnswer(t *testing.T) {
	r := newRawServer(t, ConnConfig{})
	kv := []string{":method", "POST", ":scheme", "http", ":path", "/t/Unary", ":authority", "a", "content-type", "application/grpc"}
	for i := 0; i < 100; i++ {
		kv = append(kv, "x", "")
	}
	r.feed(appendHeaders(nil, 1, false, encodeBlock(r.enc, &r.buf, kv...)))
	if out := r.flush(); !bytes.Contains(out, []byte("431")) || r.e.requests != 0 {
		t.Errorf("% x", out)
	}
	r.id = 1
	r.feed(r.headers("/t/Unary", true)) // the table is still in step
	if r.e.requests != 1 {
		t.Error("the connection is broken")
	}
}

// Messages received in part cannot fill the memory, and what streams announce costs nothing.
func TestAttackPartialMessages(t *testing.T) {
	r := newRawServer(t, ConnConfig{MaxMessageBytes: 64 << 10, ConnWindow: 128 << 10})
	limit := maxAssemblingMessages * 64 << 10
	piece := append(appendPrefix(nil, 64<<10), make([]byte, 10_000)...)
	for i := 0; i < 2000; i++ {
		r.feed(r.headers("/t/Hang", false))
		r.feed(append(appendFrameHeader(nil, len(piece), frameData, 0, r.id), piece...))
		r.flush()
		if r.c.assembling > limit {
			t.Fatalf("%d bytes are kept", r.c.assembling)
		}
	}
	if r.e.canceled == 0 || r.c.assembling < limit/2 {
		t.Errorf("%d canceled, %d bytes kept", r.e.canceled, r.c.assembling)
	}
	r.c.Close()
	if r.c.assembling != 0 || r.e.canceled != r.e.requests {
		t.Errorf("after Close: %d bytes, %d of %d canceled", r.c.assembling, r.e.canceled, r.e.requests)
	}
}

func TestHardQueueLimit(t *testing.T) {
	r := newRawServer(t, ConnConfig{MaxQueuedBytes: 100_000})
	r.feed(appendSetting(appendFrameHeader(nil, 6, frameSettings, 0, 0), settingInitialWindowSize, 0))
	var s *Stream
	r.e.onReq = func(x *Stream) { s = x }
	r.feed(r.headers("/t/Hang", false))
	r.flush()
	sends := 0
	for ; s.Queued() > 0 || sends == 0; sends++ {
		r.c.Send(s, make([]byte, 50_000))
		if sends > 100 {
			t.Fatal("no limit")
		}
	}
	if r.e.canceled != 0 {
		t.Error("OnCancel from within Send")
	}
	r.c.Finish(s, Status{}) // the owner does not know yet
	out := r.flush()
	if r.e.canceled != 1 || r.c.Queued() != 0 || sends < hardQueueFactor*2 ||
		!bytes.Equal(out, appendRSTStream(nil, r.id, h2EnhanceYourCalm)) {
		t.Errorf("%d canceled, %d queued, %d sends, % x", r.e.canceled, r.c.Queued(), sends, out)
	}
}

// Bytes changed at random, or random altogether: an error or not, never a panic, never endless.
func TestRandomBytesNeverPanic(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	rnd := rand.New(rand.NewPCG(seed, 4))
	defer func() {
		if x := recover(); x != nil {
			t.Fatalf("seed %d: %v", seed, x)
		}
	}()
	for i := 0; i < 3000; i++ {
		e := &echo{}
		e.c = NewServerConn(ConnConfig{}, e)
		cl := NewClientConn(ConnConfig{}, "h", newClientEvents())
		for j := 0; j < 4; j++ {
			s := cl.Open([]string{"/t/Unary", "/t/Stream", "/t/Hang", "/t/Error"}[j], true, time.Second)
			s.User = &rpc{msgs: make(chan []byte, 100), end: make(chan rpcEnd, 2)}
			cl.Send(s, make([]byte, rnd.IntN(300)))
			if rnd.IntN(2) == 0 {
				cl.CloseSend(s)
			}
		}
		in := bytes.Clone(cl.Output())
		cl.Flushed()
		for n := rnd.IntN(4); n > 0; n-- {
			in[len(clientPreface)+rnd.IntN(len(in)-len(clientPreface))] ^= 1 << rnd.IntN(8)
		}
		cut := rnd.IntN(len(in))
		if e.c.Feed(in[:cut]) == nil {
			e.c.Feed(in[cut:])
		}
		back := bytes.Clone(e.c.Output())
		for n := rnd.IntN(4); n > 0; n-- {
			back[rnd.IntN(len(back))] ^= 1 << rnd.IntN(8)
		}
		cl.Feed(back)
		e.c.Close()
		cl.Close()
		if e.c.Streams() != 0 || cl.Streams() != 0 || e.c.assembling != 0 {
			t.Fatalf("seed %d: something is left after Close", seed)
		}
	}
}

// TestSmallAnswers: a field that the peer's table holds costs it one byte a request; repeating it in the answer
// must not make a flood of small requests into one of large answers.
func TestSmallAnswers(t *testing.T) {
	e := &echo{}
	e.c = NewServerConn(ConnConfig{}, e)
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	in := append([]byte(clientPreface), appendFrameHeader(nil, 0, frameSettings, 0, 0)...)
	const requests = 100
	for i := range uint32(requests) {
		buf.Reset()
		for _, kv := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/"}, {"content-type", strings.Repeat("x", 3000)}} {
			enc.WriteField(hpack.HeaderField{Name: kv[0], Value: kv[1]})
		}
		in = appendHeaders(in, 2*i+1, true, buf.Bytes())
	}
	if err := e.c.Feed(in); err != nil {
		t.Fatal(err)
	}
	if n := len(e.c.Output()); n > requests*600 {
		t.Errorf("%d bytes of answers to %d bytes", n, len(in))
	}
}

// Clients whose deadlines pass by the hundred, because a member is away, keep their connection; those that reset at once
// do not (TestAttackRapidReset).
func TestDeadlinesAreNoResetFlood(t *testing.T) {
	r := newRawServer(t, ConnConfig{})
	for range 3 {
		var ids []uint32
		for range 3 * resetBurst {
			r.feed(r.headers("/t/Hang", true))
			ids = append(ids, r.id)
		}
		for range freeResetTicks {
			r.c.Tick()
		}
		for _, id := range ids {
			r.feed(appendRSTStream(nil, id, h2Cancel))
		}
		r.flush()
	}
	if r.c.Streams() != 0 || r.c.resets != resetBurst {
		t.Errorf("%d streams, %d resets left", r.c.Streams(), r.c.resets)
	}
	// A young one costs as ever.
	r.feed(r.headers("/t/Hang", true))
	r.c.Tick()
	r.feed(appendRSTStream(nil, r.id, h2Cancel))
	if r.c.resets != resetBurst-1 {
		t.Errorf("%d resets left", r.c.resets)
	}
}

// member is a client's side that counts messages.
type member struct {
	ended map[uint32]Status
	got   map[uint32]int
}

func (m *member) OnMessage(s *Stream, _ []byte)      { m.got[s.ID]++ }
func (m *member) OnEnd(s *Stream, st Status, _ bool) { m.ended[s.ID] = st }
func (m *member) OnGoAway()                          {}
func (m *member) OnPong()                            {}

// While memory is short a large answer of a member gives way; pages and what a watch brings come through, however many
// of them are on their way.
func TestLargeAnswersGiveWayAlone(t *testing.T) {
	m := &member{ended: map[uint32]Status{}, got: map[uint32]int{}}
	const full, page = 8 << 20, 4 << 20
	c := NewClientConn(ConnConfig{StreamWindow: 4 << 20, ConnWindow: 16 << 20, MaxMessageBytes: 512 << 20,
		MaxPartialBytes: 1 << 30, Full: func() bool { return true }, FullBytes: full}, "x", m)
	feed := func(p []byte) {
		t.Helper()
		if err := c.Feed(p); err != nil {
			t.Fatal(err)
		}
		c.Flushed()
	}
	feed(appendFrameHeader(nil, 0, frameSettings, 0, 0))
	open := func() uint32 {
		s := c.Open("/x", false, 0)
		feed(appendHeaders(nil, s.ID, false, responseHeaders))
		return s.ID
	}
	const frame = 16 << 10
	begin := func(id uint32, size int) {
		feed(appendPrefix(appendFrameHeader(nil, prefixLen, frameData, 0, id), size))
	}
	part := func(id uint32, n int) { // in frames
		for range n {
			feed(append(appendFrameHeader(nil, frame, frameData, 0, id), make([]byte, frame)...))
		}
	}
	var pages []uint32
	for range 4 {
		id := open()
		begin(id, page)
		part(id, page/frame-1)
		pages = append(pages, id)
	}
	watch, large := open(), open()
	begin(watch, 2*frame)
	part(watch, 1)
	begin(large, full+1)
	part(large, 1)
	if m.ended[large].Code != ResourceExhausted || len(m.ended) != 1 {
		t.Errorf("ended: %v", m.ended)
	}
	part(watch, 1)
	for _, id := range pages {
		part(id, 1)
		if m.got[id] != 1 {
			t.Errorf("no page on %d", id)
		}
	}
	if m.got[watch] != 1 || c.Partial() != 0 {
		t.Errorf("%d messages of the watch, %d bytes are kept", m.got[watch], c.Partial())
	}
}

// A spared stream's message is kept whatever the others have, up to its own bound; whoever comes behind it on its place is not
// spared.
func TestSparedStreams(t *testing.T) {
	m := &member{ended: map[uint32]Status{}, got: map[uint32]int{}}
	const frame = 16 << 10
	c := NewClientConn(ConnConfig{StreamWindow: 4 << 20, ConnWindow: 16 << 20, MaxMessageBytes: 512 << 20,
		MaxPartialBytes: 1 << 20, Full: func() bool { return true }, FullBytes: frame}, "x", m)
	feed := func(p []byte) {
		t.Helper()
		if err := c.Feed(p); err != nil {
			t.Fatal(err)
		}
		c.Flushed()
	}
	feed(appendFrameHeader(nil, 0, frameSettings, 0, 0))
	send := func(spared bool, size int) (*Stream, uint32) {
		s := c.Open("/x", false, 0)
		id := s.ID
		s.Spared = spared
		feed(appendHeaders(nil, id, false, responseHeaders))
		feed(appendPrefix(appendFrameHeader(nil, prefixLen, frameData, 0, id), size))
		for sent := 0; sent < min(size, 3<<20) && m.ended[id].Code == OK; sent += frame {
			feed(append(appendFrameHeader(nil, frame, frameData, 0, id), make([]byte, frame)...))
		}
		return s, id
	}
	if s, id := send(true, 3<<20); m.got[id] != 1 || len(m.ended) != 0 {
		t.Errorf("a watch's message of 3 MiB: %d came, %v", m.got[id], m.ended)
	} else {
		c.Reset(s)
	}
	if _, id := send(true, MaxSparedBytes+1); m.ended[id].Code != ResourceExhausted {
		t.Errorf("a message beyond the bound: %v", m.ended)
	}
	for range 3 {
		if s := c.Open("/x", false, 0); s.Spared {
			t.Error("a new stream is spared")
		}
	}
	if _, id := send(false, 3<<20); m.got[id] != 0 || m.ended[id].Code != ResourceExhausted {
		t.Errorf("an answer of 3 MiB: %v", m.ended)
	}
}

// Room that was set aside for an answer: a longer one is refused as soon as its length is here; one that fits comes also when memory is
// short, and is not counted a second time. The next stream has none.
func TestReservedMessage(t *testing.T) {
	const frame, room = 16 << 10, 1 << 20
	m := &member{ended: map[uint32]Status{}, got: map[uint32]int{}}
	c := NewClientConn(ConnConfig{StreamWindow: 4 << 20, ConnWindow: 16 << 20, MaxMessageBytes: 512 << 20,
		Full: func() bool { return true }, FullBytes: frame}, "x", m)
	feed := func(p []byte) {
		t.Helper()
		if err := c.Feed(p); err != nil {
			t.Fatal(err)
		}
		c.Flushed()
	}
	feed(appendFrameHeader(nil, 0, frameSettings, 0, 0))
	begin := func(reserved, size int) (*Stream, uint32) {
		s := c.Open("/x", false, 0)
		if s.Reserved != 0 {
			t.Error("a new stream has room")
		}
		id := s.ID
		s.Reserved = reserved
		feed(appendHeaders(nil, id, false, responseHeaders))
		feed(appendPrefix(appendFrameHeader(nil, prefixLen, frameData, 0, id), size))
		return s, id
	}
	if _, id := begin(room, room+1); m.ended[id].Code != ResourceExhausted || m.got[id] != 0 {
		t.Errorf("a message beyond its room: %v", m.ended)
	}
	s, id := begin(room, room)
	for sent := 0; sent < room; sent += frame {
		if n := c.Partial(); n != 0 {
			t.Fatalf("%d bytes are counted twice", n)
		}
		feed(append(appendFrameHeader(nil, frame, frameData, 0, id), make([]byte, frame)...))
	}
	if m.got[id] != 1 || m.ended[id].Code != OK {
		t.Errorf("a message that has room: %d came, %v", m.got[id], m.ended)
	}
	c.Reset(s)
	s, _ = begin(room, room)
	feed(append(appendFrameHeader(nil, frame, frameData, 0, s.ID), make([]byte, frame)...))
	c.Reset(s)
	if c.assembling != 0 || c.reserved != 0 {
		t.Errorf("%d bytes, %d reserved, after the last stream", c.assembling, c.reserved)
	}
	_, id = begin(0, 4*frame)
	for i := 0; i < 2 && m.ended[id].Code == OK; i++ {
		feed(append(appendFrameHeader(nil, frame, frameData, 0, id), make([]byte, frame)...))
	}
	if m.ended[id].Code != ResourceExhausted {
		t.Errorf("an answer without room: %v", m.ended)
	}
}
