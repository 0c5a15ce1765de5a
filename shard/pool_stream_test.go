package shard

import (
	"bytes"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"spindle/codec"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestPoolStatusPassesThrough(t *testing.T) {
	m := newFakeMember(t, unary(func(req []byte) ([]byte, error) {
		if len(req) == 0 {
			return nil, nil
		}
		return nil, status.Error(codes.Code(req[0]), "etcdserver: text with % and ü")
	}))
	e := newPoolEnv(t, []string{m.url()})
	e.connected(0)
	for code := codec.Code(1); code <= 16; code++ {
		r := e.call(codec.MethodTxn, []byte{byte(code)})
		if want := (codec.Status{Code: code, Msg: "etcdserver: text with % and ü"}); r.st != want || !r.sent || r.resp != nil {
			t.Errorf("code %d: got %+v", code, r)
		}
		if n := e.counter(metricPoolCalls, "shard-1", codeNames[code]); n != 1 {
			t.Errorf("code %d was counted %d times", code, n)
		}
	}
	if r := e.call(codec.MethodTxn, nil); r.st != (codec.Status{}) || !r.sent || len(r.resp) != 0 {
		t.Errorf("an empty message: got %+v", r)
	}
}

func TestPoolUnaryCardinality(t *testing.T) {
	m := newFakeMember(t, func(path string, s fakeStream) error {
		b, _ := s.recv()
		for range b[0] {
			_ = s.send(b)
		}
		return nil
	})
	e := newPoolEnv(t, []string{m.url()})
	e.connected(0)
	for n, want := range []codec.Status{statusNoMessage, {}, statusTwoMessages, statusTwoMessages} {
		if r := e.call(codec.MethodRange, []byte{byte(n)}); r.st != want || !r.sent {
			t.Errorf("%d messages: got %+v", n, r)
		}
	}
}

func TestPoolUnknownClusterAndNoTime(t *testing.T) {
	m := newFakeMember(t, echo)
	e := newPoolEnv(t, []string{m.url()})
	e.connected(0)
	r := e.begin(7, codec.MethodRange, nil, time.Second).wait(t)
	if r.st.Code != codec.Unavailable || r.sent || !strings.Contains(r.st.Msg, "7") {
		t.Errorf("unknown cluster: %+v", r)
	}
	if r := e.begin(0, codec.MethodRange, nil, 0).wait(t); r.st != statusDeadline || r.sent {
		t.Errorf("no time: %+v", r)
	}
	sink := newTestSink()
	e.loop.do(func() { e.pool.Watch(codec.Coordinator, nil, sink) })
	if st := sink.end(t); st.Code != codec.Unavailable {
		t.Errorf("watch on an unknown cluster: %+v", st)
	}
}

func TestPoolTimeout(t *testing.T) {
	canceled := make(chan struct{}, 1)
	m := newFakeMember(t, func(_ string, s fakeStream) error {
		b, _ := s.recv()
		if string(b) == "hang" {
			<-s.Context().Done()
			canceled <- struct{}{}
			return nil
		}
		return s.send(b)
	})
	e := newPoolEnv(t, []string{m.url()})
	e.connected(0)
	begin := time.Now()
	slow := e.begin(0, codec.MethodTxn, []byte("hang"), 60*time.Millisecond)
	quick := e.begin(0, codec.MethodTxn, []byte("x"), testGuard)
	if r := quick.wait(t); r.st.Code != codec.OK {
		t.Errorf("quick: %+v", r)
	}
	r := slow.wait(t)
	if r.st != statusDeadline || !r.sent || r.resp != nil {
		t.Errorf("slow: %+v", r)
	}
	if d := time.Since(begin); d < 60*time.Millisecond || d > testGuard/2 {
		t.Errorf("timeout after %v", d)
	}
	select {
	case <-canceled:
	case <-time.After(testGuard):
		t.Error("the server was not told")
	}
	if r := e.call(codec.MethodTxn, []byte("x")); r.st.Code != codec.OK {
		t.Errorf("afterwards: %+v", r)
	}
}

// More calls than the member allows streams wait their turn; more than maxPendingCalls fail.
func TestPoolStreamLimit(t *testing.T) {
	hold := make(chan struct{})
	var running, most atomic.Int32
	m := newFakeMember(t, unary(func(req []byte) ([]byte, error) {
		n := running.Add(1)
		defer running.Add(-1)
		for {
			old := most.Load()
			if n <= old || most.CompareAndSwap(old, n) {
				break
			}
		}
		<-hold
		return req, nil
	}), grpc.MaxConcurrentStreams(2))
	e := newPoolEnv(t, []string{m.url()})
	e.connected(0)
	const more = 10
	dones := make(chanDone, maxPendingCalls+more)
	refused := make(chanDone, more)
	e.loop.do(func() {
		for range 2 + maxPendingCalls {
			e.pool.Call(0, codec.MethodTxn, []byte("x"), testGuard, dones)
		}
		for range more {
			e.pool.Call(0, codec.MethodTxn, []byte("x"), testGuard, refused)
		}
		if len(dones)+len(refused) != 0 {
			t.Error("completed from within")
		}
	})
	for range more {
		if r := refused.wait(t); r.st.Code != codec.ResourceExhausted || r.sent {
			t.Errorf("%+v", r)
		}
	}
	// One of those that wait runs out of time, before it was sent.
	e.loop.do(func() {
		cl := e.pool.clusters[0]
		if n := len(cl.pending.list); n != maxPendingCalls {
			t.Errorf("%d pending", n)
		}
		cl.pending.list[7].due(0)
	})
	if r := dones.wait(t); r.st != statusDeadline || r.sent {
		t.Errorf("%+v", r)
	}
	close(hold)
	for range 1 + maxPendingCalls {
		if r := dones.wait(t); r.st.Code != codec.OK || string(r.resp) != "x" || !r.sent {
			t.Fatalf("%+v", r)
		}
	}
	if n := most.Load(); n > 2 {
		t.Errorf("%d at once", n)
	}
	e.loop.do(func() {
		if q := &e.pool.clusters[0].pending; !q.empty() || q.bytes != 0 {
			t.Errorf("%d calls and %d bytes left", len(q.list), q.bytes)
		}
	})
}

// Calls that wait for a stream are certainly unsent when the connection dies.
func TestPoolPendingFailUnsent(t *testing.T) {
	hold := make(chan struct{})
	defer close(hold)
	m := newFakeMember(t, unary(func(req []byte) ([]byte, error) { <-hold; return req, nil }), grpc.MaxConcurrentStreams(1))
	r := newRelay(t, "127.0.0.1:0", m.addr())
	e := newPoolEnv(t, []string{r.url()})
	e.connected(0)
	sent := e.begin(0, codec.MethodTxn, []byte("x"), testGuard)
	waits := e.begin(0, codec.MethodTxn, []byte("x"), testGuard)
	r.stop()
	if got := sent.wait(t); got.st.Code != codec.Unavailable || !got.sent {
		t.Errorf("on a stream: %+v", got)
	}
	if got := waits.wait(t); got.st.Code != codec.Unavailable || got.sent {
		t.Errorf("waiting: %+v", got)
	}
	if n := e.counter(metricPoolInFlight, "shard-1"); n != 0 {
		t.Errorf("%d in flight", n)
	}
}

func TestPoolLargeMessages(t *testing.T) {
	m := newFakeMember(t, echo)
	e := newPoolEnv(t, []string{m.url()})
	e.connected(0)
	big := make([]byte, 20<<20)
	for i := range big {
		big[i] = byte(i * 7 >> 3)
	}
	for range 2 {
		if r := e.call(codec.MethodRange, big); r.st.Code != codec.OK || !bytes.Equal(r.resp, big) {
			t.Fatalf("%v, %d bytes", r.st, len(r.resp))
		}
	}
	e.loop.do(func() {
		for _, c := range e.pool.freeCalls {
			if cap(c.resp) > maxFreeCallBytes {
				t.Errorf("a buffer of %d bytes was kept", cap(c.resp))
			}
		}
	})
}

// A peer that grants windows but does not read its socket must not make gnet's buffer grow without bound.
func TestPoolBlockedSocket(t *testing.T) {
	m := newFakeMember(t, unary(func(req []byte) ([]byte, error) { return req[:1], nil }),
		grpc.InitialWindowSize(64<<20), grpc.InitialConnWindowSize(512<<20))
	r := newRelay(t, "127.0.0.1:0", m.addr())
	e := newPoolEnv(t, []string{r.url()})
	e.connected(0)
	if got := e.call(codec.MethodTxn, []byte("x")); got.st.Code != codec.OK { // windows have arrived
		t.Fatalf("%+v", got)
	}
	r.freeze(true)
	big := make([]byte, 1<<20)
	var dones []chanDone
	for range 32 {
		dones = append(dones, e.begin(0, codec.MethodTxn, big, testGuard))
	}
	e.loop.do(func() {
		l := e.pool.clusters[0].ready[0]
		if n := l.gc.OutboundBuffered(); n > outboundHighWater+4<<20 || !l.blocked {
			t.Errorf("%d bytes in the socket's buffer, blocked=%v", n, l.blocked)
		}
	})
	r.freeze(false)
	for _, d := range dones {
		if got := d.wait(t); got.st.Code != codec.OK || len(got.resp) != 1 {
			t.Fatalf("%+v", got)
		}
	}
	e.until("unblocked", func() bool { return len(e.pool.blocked) == 0 })
}

// A held stream stops the member after a window; others on the connection go on.
func TestPoolHold(t *testing.T) {
	const total, size = 2000, 10 << 10
	var sentOut atomic.Int32
	m := newFakeMember(t, func(path string, s fakeStream) error {
		b, err := s.recv()
		if err != nil || path != codec.MethodPath(codec.MethodWatch) {
			_ = s.send(b)
			return err
		}
		for i := range total {
			msg := make([]byte, size)
			copy(msg, fmt.Sprint(i, " "))
			if err := s.send(msg); err != nil {
				return err
			}
			sentOut.Add(1)
		}
		<-s.Context().Done()
		return nil
	})
	e := newPoolEnv(t, []string{m.url()})
	e.connected(0)
	sink := newTestSink()
	var h codec.WatchHandle
	e.loop.do(func() {
		h = e.pool.Watch(0, []byte("x"), sink)
		h.Hold(true)
	})
	held := 0
	e.until("the flow stops", func() bool {
		n := int(sentOut.Load())
		stopped := n > 0 && n == held && len(sink.messages) > 0
		held = n
		return stopped && n*size >= memberStreamWindow/2
	})
	if held*size > memberStreamWindow+1<<20 || held == total {
		t.Errorf("%d bytes came in spite of Hold", held*size)
	}
	if r := e.call(codec.MethodRange, []byte("y")); r.st.Code != codec.OK {
		t.Errorf("a call beside it: %+v", r)
	}
	e.loop.do(func() { h.Hold(false) })
	for i := range total {
		if got := sink.message(t); !bytes.HasPrefix(got, fmt.Append(nil, i, " ")) || len(got) != size {
			t.Fatalf("message %d is %q", i, got[:10])
		}
	}
	e.loop.do(h.Close)
	if len(sink.ends) > 0 {
		t.Error("OnEnd after Close")
	}
}

// What a caller does from within Complete and OnEnd.
type reentrant struct {
	f    func(st codec.Status)
	runs int
}

func (r *reentrant) Complete(_ []byte, st codec.Status, _ bool) { r.runs++; r.f(st) }
func (r *reentrant) OnMessage([]byte)                           {}
func (r *reentrant) OnEnd(st codec.Status)                      { r.runs++; r.f(st) }

func TestPoolReentrancy(t *testing.T) {
	m := newFakeMember(t, echo)
	r := newRelay(t, "127.0.0.1:0", m.addr())
	e := newPoolEnv(t, []string{r.url()})
	e.connected(0)
	// A chain of calls from within completions, with Flush where it does not belong.
	done := make(chan struct{})
	c := &reentrant{}
	c.f = func(st codec.Status) {
		e.pool.Flush()
		if c.runs == 100 {
			close(done)
			return
		}
		e.pool.Call(0, codec.MethodRange, []byte("x"), testGuard, c)
		e.pool.Flush()
	}
	e.loop.do(func() { e.pool.Call(0, codec.MethodRange, []byte("x"), testGuard, c) })
	select {
	case <-done:
	case <-time.After(testGuard):
		t.Fatal(errTestGuard)
	}
	// Streams of one dying connection that close each other, and calls that go again at once.
	var handles [4]codec.WatchHandle
	ended := make(chan struct{}, 100)
	e.loop.do(func() {
		for i := range handles {
			handles[i] = e.pool.Watch(0, []byte("x"), &reentrant{f: func(codec.Status) {
				for _, h := range handles {
					h.Send([]byte("y"))
					h.Close()
				}
				e.pool.Watch(0, nil, newTestSink())
				ended <- struct{}{}
			}})
		}
	})
	r.kill()
	select {
	case <-ended:
	case <-time.After(testGuard):
		t.Fatal(errTestGuard)
	}
	e.connected(0)
	// Close from within a completion.
	closed := make(chan struct{})
	hang, _ := e.watch([]byte("x"))
	e.loop.do(func() {
		e.pool.Call(0, codec.MethodRange, []byte("x"), testGuard, &reentrant{f: func(codec.Status) {
			e.pool.Close()
			close(closed)
		}})
	})
	<-closed
	if st := hang.end(t); st.Code != codec.Unavailable {
		t.Errorf("%+v", st)
	}
	if len(ended) > 0 {
		t.Error("a stream that was closed has ended too")
	}
}

// A connection whose stream identifiers come to an end is replaced by another, and nobody notices: no call fails, and
// a watch goes on where it is.
func TestPoolLinkRenewsItself(t *testing.T) {
	m := newFakeMember(t, echo)
	e := newPoolEnv(t, []string{m.url()}, func(c *PoolConfig) { c.firstStreamID = renewStreamID - 5 })
	e.connected(0)
	cl := e.pool.clusters[0]
	var first *poolLink
	e.loop.do(func() { first = cl.ready[0] })
	sink, h := e.watch([]byte("one"))
	sink.message(t)
	for e.counter(metricPoolConnects, "shard-1") < 4 { // each connection takes three calls without a thought
		var dones []chanDone
		for range 4 {
			dones = append(dones, e.begin(0, codec.MethodRange, []byte("x"), testGuard))
		}
		for _, d := range dones {
			if r := d.wait(t); r.st.Code != codec.OK || string(r.resp) != "x" {
				t.Fatalf("%+v", r)
			}
		}
	}
	e.until("the first one drains", func() bool { return first.draining && len(cl.ready) == 1 })
	e.loop.do(func() {
		if first.dead || first.slot.link == first || first.slot.old == first {
			t.Error("the first connection did not stay for its watch alone")
		}
		h.Send([]byte("two"))
	})
	if got := sink.message(t); string(got) != "two" {
		t.Errorf("the watch got %q", got)
	}
	e.loop.do(h.Close)
	e.until("the first one is closed", func() bool { return first.dead })
	if l := e.log.lines("does not answer"); len(l) != 0 {
		t.Errorf("logged as a failure: %q", l)
	}
}

// While the member takes no new connection, the old one goes on; when it dies, its slot still dials.
func TestPoolLinkRenewsLate(t *testing.T) {
	m := newFakeMember(t, echo)
	r := newRelay(t, "127.0.0.1:0", m.addr())
	e := newPoolEnv(t, []string{r.url()}, func(c *PoolConfig) { c.firstStreamID = renewStreamID + 1 })
	e.connected(0)
	gone := freePort(t)
	r.mu.Lock()
	r.target = gone
	r.mu.Unlock()
	for range 20 {
		if got := e.call(codec.MethodRange, []byte("x")); got.st.Code != codec.OK {
			t.Fatalf("%+v", got)
		}
	}
	r.mu.Lock()
	r.target = m.addr()
	r.mu.Unlock()
	r.kill()
	e.until("the old one is noticed", func() bool { return e.counter(metricPoolDisconnect, "shard-1") > 0 })
	e.connected(0)
	if got := e.call(codec.MethodRange, []byte("x")); got.st.Code != codec.OK {
		t.Errorf("%+v", got)
	}
}
