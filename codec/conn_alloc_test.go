//go:build !race

package codec

import (
	"bytes"
	"testing"
)

// exchange is one unary request as a client with an indexed header block sends it, over and over.
type exchange struct {
	c    *Conn
	e    *replyer
	req  []byte
	next uint32
	data int // offset of the DATA frame
}

// replyer answers each request with a constant.
type replyer struct {
	c     *Conn
	reply []byte
	n     int
}

func (e *replyer) OnRequest(*Stream)         {}
func (e *replyer) OnMessage(*Stream, []byte) { e.n++ }
func (e *replyer) OnHalfClose(s *Stream) {
	e.c.Send(s, e.reply)
	e.c.Finish(s, Status{})
}
func (e *replyer) OnCancel(*Stream)  {}
func (e *replyer) OnDrained(*Stream) {}

func newExchange(t testing.TB, reqSize, replySize int) *exchange {
	x := &exchange{e: &replyer{reply: make([]byte, replySize)}, next: 1}
	x.c = NewServerConn(ConnConfig{}, x.e)
	x.e.c = x.c
	hello := appendSetting(appendFrameHeader([]byte(clientPreface), 6, frameSettings, 0, 0), settingInitialWindowSize, maxWindow)
	if err := x.c.Feed(hello); err != nil {
		t.Fatal(err)
	}
	enc := requestEncoder{authority: "127.0.0.1:2379"}
	for range 2 { // the second block is all indexes
		block := enc.append(nil, MethodPath(MethodRange), true, 0)
		x.req = appendHeaders(nil, 0, false, block)
		x.data = len(x.req)
		x.req = appendFrameHeader(x.req, prefixLen+reqSize, frameData, flagEndStream, 0)
		x.req = append(appendPrefix(x.req, reqSize), bytes.Repeat([]byte{1}, reqSize)...)
		x.run(t)
	}
	return x
}

func (x *exchange) run(t testing.TB) {
	for _, at := range [2]int{5, x.data + 5} {
		x.req[at], x.req[at+1], x.req[at+2], x.req[at+3] = byte(x.next>>24), byte(x.next>>16), byte(x.next>>8), byte(x.next)
	}
	x.next += 2
	if err := x.c.Feed(x.req); err != nil {
		t.Fatal(err)
	}
	n := len(x.c.Output())
	if n == 0 {
		t.Fatal("no answer")
	}
	x.c.Flushed()
	// The client gives the window back.
	if x.c.sendWin < 1<<20 {
		x.c.sendWin = maxWindow
	}
}

func TestUnaryExchangeAllocatesNothing(t *testing.T) {
	for _, size := range []int{50, 10_000} {
		x := newExchange(t, size, 340)
		if n := testing.AllocsPerRun(1000, func() { x.run(t) }); n != 0 {
			t.Errorf("request of %d bytes: %v allocations", size, n)
		}
	}
}

// Many answers in one Output, and answers larger than a frame, take their memory from the pools.
func TestManyAnswersAllocateNothing(t *testing.T) {
	for _, size := range []int{340, 100_000} {
		x := newExchange(t, 50, size)
		run := func() {
			for range 64 {
				for _, at := range [2]int{5, x.data + 5} {
					x.req[at], x.req[at+1], x.req[at+2], x.req[at+3] = byte(x.next>>24), byte(x.next>>16), byte(x.next>>8), byte(x.next)
				}
				x.next += 2
				if err := x.c.Feed(x.req); err != nil {
					t.Fatal(err)
				}
			}
			for len(x.c.Output()) > 0 {
				x.c.Flushed()
			}
			x.c.sendWin = maxWindow
		}
		for range 20 {
			run()
		}
		// A garbage collection in between empties the pools: a few allocations over all rounds are that.
		if n := testing.AllocsPerRun(50, run); n > 2 {
			t.Errorf("64 answers of %d bytes: %v allocations", size, n)
		}
		if x.c.Streams() != 0 {
			t.Errorf("%d streams left", x.c.Streams())
		}
	}
}

// A unary call between two Conns.
func TestConnToConnAllocatesNothing(t *testing.T) {
	e := &replyer{reply: make([]byte, 340)}
	srv := NewServerConn(ConnConfig{}, e)
	e.c = srv
	ev := &endCounter{}
	cl := NewClientConn(ConnConfig{}, "h", ev)
	msg := make([]byte, 100)
	path := MethodPath(MethodTxn)
	run := func() {
		s := cl.Open(path, false, 0)
		cl.Send(s, msg)
		cl.CloseSend(s)
		for range 2 {
			if err := srv.Feed(cl.Output()); err != nil {
				t.Fatal(err)
			}
			cl.Flushed()
			if err := cl.Feed(srv.Output()); err != nil {
				t.Fatal(err)
			}
			srv.Flushed()
		}
	}
	for range 5 {
		run()
	}
	if n := testing.AllocsPerRun(1000, run); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if ev.ended != ev.msgs || ev.bad != 0 || ev.ended < 1000 {
		t.Errorf("%+v", ev)
	}
}

// Turns with many calls and turns with one: the memory of Output comes from the pools, and begins at the size of
// the last turns.
func TestTurnsOfManyCallsAllocateNothing(t *testing.T) {
	e := &replyer{reply: make([]byte, 340)}
	srv := NewServerConn(ConnConfig{}, e)
	e.c = srv
	ev := &endCounter{}
	cl := NewClientConn(ConnConfig{}, "h", ev)
	msg := make([]byte, 700)
	path := MethodPath(MethodTxn)
	turn := func(calls int) {
		for range calls {
			s := cl.Open(path, false, 0)
			cl.Send(s, msg)
			cl.CloseSend(s)
		}
		for range 2 {
			if err := srv.Feed(cl.Output()); err != nil {
				t.Fatal(err)
			}
			cl.Flushed()
			if err := cl.Feed(srv.Output()); err != nil {
				t.Fatal(err)
			}
			srv.Flushed()
		}
	}
	run := func() {
		turn(32)
		for range 8 {
			turn(1)
		}
	}
	for range 5 {
		run()
	}
	if n := testing.AllocsPerRun(500, run); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if ev.ended != ev.msgs || ev.bad != 0 {
		t.Errorf("%+v", ev)
	}
}

type endCounter struct{ msgs, ended, bad int }

func (e *endCounter) OnMessage(*Stream, []byte) { e.msgs++ }
func (e *endCounter) OnEnd(_ *Stream, st Status, _ bool) {
	e.ended++
	if st.Code != OK {
		e.bad++
	}
}
func (e *endCounter) OnGoAway() {}
func (e *endCounter) OnPong()   {}

// go test ./codec -run - -bench Unary
func BenchmarkServerUnary(b *testing.B) {
	x := newExchange(b, 60, 340)
	b.ReportAllocs()
	for b.Loop() {
		x.run(b)
	}
}
