package shard

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"spindle/codec"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
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

func TestPoolEndpointDownThenUp(t *testing.T) {
	m := newFakeMember(t, echo)
	addr := freePort(t)
	e := newPoolEnv(t, []string{"http://" + addr})
	e.until("an attempt failed twice", func() bool {
		ep := e.pool.clusters[0].endpoints[0]
		return ep.slots[0].attempts >= 2
	})
	r := e.call(codec.MethodRange, []byte("x"))
	if r.st.Code != codec.Unavailable || r.sent || !strings.Contains(r.st.Msg, "member cluster shard-1: no endpoint answers (http://"+addr+": connection refused)") {
		t.Errorf("call while down: %+v", r)
	}
	sink, h := e.watch(nil)
	if st := sink.end(t); st != r.st {
		t.Errorf("watch while down: %+v", st)
	}
	e.loop.do(func() { h.Send(nil); h.Hold(true); h.Close() })
	e.loop.do(func() {
		s := e.pool.Endpoints(0)
		if len(s) != 1 || s[0].Connected || s[0].LastError != "connection refused" || s[0].Since.IsZero() {
			t.Errorf("status while down: %+v", s)
		}
		if e.pool.Connected(0) || e.pool.Unreachable(0) != r.st.Msg {
			t.Errorf("unreachable: %q", e.pool.Unreachable(0))
		}
	})

	newRelay(t, addr, m.addr())
	e.connected(0)
	if r := e.call(codec.MethodRange, []byte("x")); r.st.Code != codec.OK || string(r.resp) != "x" {
		t.Errorf("call when up: %+v", r)
	}
	e.loop.do(func() {
		s := e.pool.Endpoints(0)
		if len(s) != 1 || !s[0].Connected || s[0].LastError != "" || e.pool.Unreachable(0) != "" {
			t.Errorf("status when up: %+v", s)
		}
	})
	if l := e.log.lines("does not answer: connection refused; trying again"); len(l) != 1 {
		t.Errorf("%d lines say that it is down: %q", len(l), l)
	}
	if l := e.log.lines("answers"); len(l) != 1 {
		t.Errorf("%d lines say that it is up: %q", len(l), l)
	}
}

func TestPoolLostConnection(t *testing.T) {
	hold := make(chan struct{})
	m := newFakeMember(t, unary(func(req []byte) ([]byte, error) {
		if string(req) == "hang" {
			<-hold
		}
		return req, nil
	}))
	defer close(hold)
	r := newRelay(t, "127.0.0.1:0", m.addr())
	e := newPoolEnv(t, []string{r.url()})
	for round := range 3 {
		e.connected(0)
		if got := e.call(codec.MethodTxn, []byte("x")); got.st.Code != codec.OK {
			t.Fatalf("round %d: %+v", round, got)
		}
		var dones []chanDone
		for range 10 {
			dones = append(dones, e.begin(0, codec.MethodTxn, []byte("hang"), testGuard))
		}
		sink, h := e.watch([]byte("hang"))
		r.kill()
		for _, d := range dones {
			got := d.wait(t)
			if got.st.Code != codec.Unavailable || !got.sent || !strings.HasPrefix(got.st.Msg, "member cluster shard-1: connection to "+r.url()+" lost: ") {
				t.Errorf("round %d: %+v", round, got)
			}
		}
		if st := sink.end(t); st.Code != codec.Unavailable {
			t.Errorf("round %d: watch ended with %+v", round, st)
		}
		e.loop.do(func() { h.Send(nil); h.Hold(true); h.Hold(false); h.Close() })
		if len(sink.ends) > 0 {
			t.Error("OnEnd twice")
		}
	}
	e.connected(0)
	if n := e.counter(metricPoolInFlight, "shard-1"); n != 0 {
		t.Errorf("%d calls in flight", n)
	}
	if n := e.counter(metricPoolDisconnect, "shard-1"); n != 3 {
		t.Errorf("%d disconnects", n)
	}
	if n := e.counter(metricPoolConnects, "shard-1"); n != 4 {
		t.Errorf("%d connects", n)
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
	quick := e.begin(0, codec.MethodTxn, []byte("x"), 10*time.Second)
	if r := quick.wait(t); r.st.Code != codec.OK {
		t.Errorf("quick: %+v", r)
	}
	r := slow.wait(t)
	if r.st != statusDeadline || !r.sent || r.resp != nil {
		t.Errorf("slow: %+v", r)
	}
	if d := time.Since(begin); d < 60*time.Millisecond || d > 5*time.Second {
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

// A listener that takes connections and says nothing is no endpoint.
func TestPoolSilentListener(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	e := newPoolEnv(t, []string{"http://" + ln.Addr().String()}, func(c *PoolConfig) { c.DialTimeout = 50 * time.Millisecond })
	e.until("given up", func() bool { return e.pool.Endpoints(0)[0].LastError == errNoSettings.Error() })
	e.loop.do(func() {
		if e.pool.Connected(0) {
			t.Error("counts as connected")
		}
	})
}

// What is no HTTP/2 is no endpoint either.
func TestPoolNotHTTP2(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
			c.Close()
		}
	}()
	e := newPoolEnv(t, []string{"http://" + ln.Addr().String()})
	e.until("several attempts", func() bool { return e.pool.clusters[0].endpoints[0].slots[0].attempts > 3 })
	if r := e.call(codec.MethodRange, nil); r.st.Code != codec.Unavailable || r.sent {
		t.Errorf("got %+v", r)
	}
	if l := e.log.lines("does not answer"); len(l) != 1 {
		t.Errorf("log: %q", l)
	}
}

func TestPoolBlackHole(t *testing.T) {
	m := newFakeMember(t, echo)
	r := newRelay(t, "127.0.0.1:0", m.addr())
	e := newPoolEnv(t, []string{r.url()}, func(c *PoolConfig) {
		c.PingInterval, c.PingTimeout = 50*time.Millisecond, 50*time.Millisecond
	})
	e.connected(0)
	sink, _ := e.watch([]byte("hello"))
	if got := sink.message(t); string(got) != "hello" {
		t.Fatalf("got %q", got)
	}
	// Pings are answered, so the stream stays.
	l := e.pool.clusters[0].ready[0]
	var first int64
	e.loop.do(func() { first = l.lastRecv })
	e.until("three pings answered", func() bool { return l.lastRecv-first > int64(150*time.Millisecond) })
	r.freeze(true)
	begin := time.Now()
	done := e.begin(0, codec.MethodTxn, []byte("x"), testGuard)
	if got := done.wait(t); got.st.Code != codec.Unavailable || !got.sent || !strings.Contains(got.st.Msg, errPingTimeout.Error()) {
		t.Errorf("call: %+v", got)
	}
	if st := sink.end(t); st.Code != codec.Unavailable {
		t.Errorf("watch: %+v", st)
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("found after %v", d)
	}
	if n := e.counter(metricPoolDeadConns, "shard-1"); n == 0 {
		t.Error("not counted")
	}
	r.freeze(false)
	e.connected(0)
	if got := e.call(codec.MethodTxn, []byte("x")); got.st.Code != codec.OK {
		t.Errorf("afterwards: %+v", got)
	}
}

// Without streams nothing is pinged (etcd would close the connection); the first stream after a long silence has a
// ping follow at once.
func TestPoolPingsOnlyWithStreams(t *testing.T) {
	var pings, streams atomic.Int32
	pinged := make(chan int32, 100)
	addr := rawMember(t, func(fr *http2.Framer, f http2.Frame) {
		switch f := f.(type) {
		case *http2.PingFrame:
			if !f.IsAck() {
				pings.Add(1)
				_ = fr.WritePing(true, f.Data)
				pinged <- streams.Load()
			}
		case *http2.HeadersFrame:
			streams.Add(1)
		}
	})
	e := newPoolEnv(t, []string{"http://" + addr}, func(c *PoolConfig) {
		c.PingInterval, c.PingTimeout = 20*time.Millisecond, testGuard
	})
	e.connected(0)
	l := e.pool.clusters[0].ready[0]
	e.until("a long silence", func() bool { return e.pool.timers.now()-l.lastRecv > int64(100*time.Millisecond) })
	if n := pings.Load(); n != 0 {
		t.Errorf("%d pings without a stream", n)
	}
	_, h := e.watch(nil)
	for range 3 {
		select {
		case n := <-pinged:
			if n != 1 {
				t.Errorf("ping with %d streams", n)
			}
		case <-time.After(testGuard):
			t.Fatal("no ping")
		}
	}
	e.loop.do(h.Close)
	e.until("pings stop", func() bool { return l.pinged == 0 && l.timer.place == 0 })
}

func TestPoolTwoEndpointsOneDies(t *testing.T) {
	var hits [2]atomic.Int32
	var urls []string
	var relays []*relay
	for i := range hits {
		m := newFakeMember(t, unary(func(req []byte) ([]byte, error) { hits[i].Add(1); return req, nil }))
		r := newRelay(t, "127.0.0.1:0", m.addr())
		relays = append(relays, r)
		urls = append(urls, r.url())
	}
	e := newPoolEnv(t, urls)
	e.until("both", func() bool { return len(e.pool.clusters[0].ready) == 2 })
	for range 10 {
		if r := e.call(codec.MethodRange, []byte("x")); r.st.Code != codec.OK {
			t.Fatalf("%+v", r)
		}
	}
	if a, b := hits[0].Load(), hits[1].Load(); a != 5 || b != 5 {
		t.Errorf("not in turn: %d, %d", a, b)
	}
	relays[0].stop()
	e.until("one", func() bool { return len(e.pool.clusters[0].ready) == 1 })
	for range 10 {
		if r := e.call(codec.MethodRange, []byte("x")); r.st.Code != codec.OK {
			t.Fatalf("%+v", r)
		}
	}
	if a, b := hits[0].Load(), hits[1].Load(); a != 5 || b != 15 {
		t.Errorf("after one died: %d, %d", a, b)
	}
	e.loop.do(func() {
		s := e.pool.Endpoints(0)
		if s[0].Connected || !s[1].Connected || s[0].LastError == "" {
			t.Errorf("%+v", s)
		}
	})
}

func TestPoolPenalty(t *testing.T) {
	var hits [2]atomic.Int32
	bad := newFakeMember(t, unary(func(req []byte) ([]byte, error) {
		hits[0].Add(1)
		return nil, status.Error(codes.Unavailable, "etcdserver: request timed out, possibly due to connection lost")
	}))
	good := newFakeMember(t, unary(func(req []byte) ([]byte, error) { hits[1].Add(1); return req, nil }))
	e := newPoolEnv(t, []string{bad.url(), good.url()})
	e.until("both", func() bool { return len(e.pool.clusters[0].ready) == 2 })
	for range 40 {
		e.call(codec.MethodRange, nil)
	}
	if a, b := hits[0].Load(), hits[1].Load(); a != penaltyAfter || b != 40-penaltyAfter {
		t.Errorf("bad endpoint got %d calls, good one %d", a, b)
	}
	// Alone it is asked all the same.
	good.srv.Stop()
	e.until("one", func() bool { return len(e.pool.clusters[0].ready) == 1 })
	if r := e.call(codec.MethodRange, nil); !strings.HasPrefix(r.st.Msg, codec.ErrTimeout.Msg) {
		t.Errorf("%+v", r)
	}
}

func TestPoolWatchNoLeaderPenalty(t *testing.T) {
	var asked [2]atomic.Int32
	var urls []string
	for i := range asked {
		m := newFakeMember(t, func(_ string, s fakeStream) error {
			asked[i].Add(1)
			if i == 0 {
				return status.Error(codes.Unavailable, "etcdserver: no leader")
			}
			<-s.Context().Done()
			return nil
		})
		urls = append(urls, m.url())
	}
	e := newPoolEnv(t, urls)
	e.until("both", func() bool { return len(e.pool.clusters[0].ready) == 2 })
	e.loop.do(func() { // the bad one first
		cl := e.pool.clusters[0]
		cl.next = 0
		if cl.ready[0].ep != cl.endpoints[0] {
			cl.next = 1
		}
	})
	sink, _ := e.watch(nil)
	if st := sink.end(t); st != codec.ErrNoLeader {
		t.Errorf("%+v", st)
	}
	for range 4 {
		e.watch(nil)
	}
	e.until("all on the good one", func() bool { return asked[1].Load() == 4 })
	if n := asked[0].Load(); n != 1 {
		t.Errorf("the node without a leader was asked %d times", n)
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

// rawMember is an HTTP/2 server made of frames: handle sees every frame after the SETTINGS were exchanged.
func rawMember(t testing.TB, handle func(*http2.Framer, http2.Frame)) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				preface := make([]byte, len(http2.ClientPreface))
				if _, err := io.ReadFull(c, preface); err != nil || string(preface) != http2.ClientPreface {
					return
				}
				fr := http2.NewFramer(c, c)
				_ = fr.WriteSettings()
				for {
					f, err := fr.ReadFrame()
					if err != nil {
						return
					}
					if s, ok := f.(*http2.SettingsFrame); ok && !s.IsAck() {
						_ = fr.WriteSettingsAck()
						continue
					}
					handle(fr, f)
				}
			}()
		}
	}()
	return ln.Addr().String()
}

// rawHeaders writes a header block of literals.
func rawHeaders(fr *http2.Framer, id uint32, end bool, kv ...string) {
	var b bytes.Buffer
	enc := hpack.NewEncoder(&b)
	for i := 0; i < len(kv); i += 2 {
		_ = enc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1], Sensitive: true})
	}
	_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: b.Bytes(), EndStream: end, EndHeaders: true})
}

func rawAnswer(fr *http2.Framer, id uint32, msg string) {
	rawHeaders(fr, id, false, ":status", "200", "content-type", "application/grpc")
	_ = fr.WriteData(id, false, append([]byte{0, 0, 0, 0, byte(len(msg))}, msg...))
	rawHeaders(fr, id, true, "grpc-status", "0", "grpc-message", "")
}

func TestPoolResetStreams(t *testing.T) {
	for _, c := range []struct {
		code http2.ErrCode
		sent bool
	}{{http2.ErrCodeRefusedStream, false}, {http2.ErrCodeInternal, true}, {http2.ErrCodeCancel, true}} {
		addr := rawMember(t, func(fr *http2.Framer, f http2.Frame) {
			if d, ok := f.(*http2.DataFrame); ok && d.StreamEnded() {
				if d.StreamID == 1 {
					_ = fr.WriteRSTStream(1, c.code)
				} else {
					rawAnswer(fr, d.StreamID, "x")
				}
			}
		})
		e := newPoolEnv(t, []string{"http://" + addr})
		e.connected(0)
		if r := e.call(codec.MethodTxn, []byte("x")); r.st.Code == codec.OK || r.sent != c.sent {
			t.Errorf("%v: %+v", c.code, r)
		}
		if r := e.call(codec.MethodTxn, []byte("x")); r.st.Code != codec.OK || string(r.resp) != "x" {
			t.Errorf("%v, the next call: %+v", c.code, r)
		}
	}
}

// After GOAWAY the streams above its last one are unsent, those below finish, and new calls go to a new connection.
func TestPoolGoAway(t *testing.T) {
	var conns atomic.Int32
	finish := make(chan struct{})
	addr := rawMember(t, func(fr *http2.Framer, f http2.Frame) {
		switch f := f.(type) {
		case *http2.WindowUpdateFrame:
		case *http2.DataFrame:
			if !f.StreamEnded() {
				return
			}
			if f.StreamID == 1 {
				if conns.Add(1) > 1 {
					rawAnswer(fr, 1, "new")
				}
				return
			}
			_ = fr.WriteGoAway(1, http2.ErrCodeNo, nil)
			go func() {
				<-finish
				rawAnswer(fr, 1, "old")
			}()
		}
	})
	e := newPoolEnv(t, []string{"http://" + addr})
	e.connected(0)
	var one, two chanDone = make(chanDone, 1), make(chanDone, 1)
	e.loop.do(func() {
		e.pool.Call(0, codec.MethodTxn, []byte("1"), testGuard, one)
		e.pool.Call(0, codec.MethodTxn, []byte("2"), testGuard, two)
	})
	if r := two.wait(t); r.st.Code != codec.Unavailable || r.sent {
		t.Errorf("above the last stream: %+v", r)
	}
	e.connected(0)
	if r := e.call(codec.MethodTxn, []byte("3")); r.st.Code != codec.OK || string(r.resp) != "new" {
		t.Errorf("on the new connection: %+v", r)
	}
	if len(one) > 0 {
		t.Errorf("the old stream ended early: %+v", <-one)
	}
	close(finish)
	if r := one.wait(t); r.st.Code != codec.OK || string(r.resp) != "old" {
		t.Errorf("on the old connection: %+v", r)
	}
	e.until("the old link is closed", func() bool { return len(e.pool.links) == 1 })
	if l := e.log.lines("does not answer"); len(l) != 0 {
		t.Errorf("a graceful end was logged as a failure: %q", l)
	}
}

// A member that stops (GracefulStop) and comes back.
func TestPoolGracefulRestart(t *testing.T) {
	a := newFakeMember(t, echo)
	r := newRelay(t, "127.0.0.1:0", a.addr())
	e := newPoolEnv(t, []string{r.url()})
	e.connected(0)
	sink, _ := e.watch([]byte("x"))
	sink.message(t)
	b := newFakeMember(t, echo)
	r.mu.Lock()
	r.target = b.addr()
	r.mu.Unlock()
	a.srv.Stop()
	if st := sink.end(t); st.Code != codec.Unavailable {
		t.Errorf("%+v", st)
	}
	e.connected(0)
	if r := e.call(codec.MethodRange, []byte("y")); r.st.Code != codec.OK || string(r.resp) != "y" {
		t.Errorf("%+v", r)
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

func TestPoolClose(t *testing.T) {
	hold := make(chan struct{})
	m := newFakeMember(t, func(_ string, s fakeStream) error { <-hold; return nil })
	defer close(hold)
	e := newPoolEnv(t, []string{m.url(), "http://" + freePort(t)}, func(c *PoolConfig) {
		c.Clusters[1] = []string{"http://" + freePort(t)}
		c.ConnsPerEndpoint = 3
	})
	e.until("all links", func() bool { return len(e.pool.clusters[0].ready) == 3 })
	call := e.begin(0, codec.MethodTxn, []byte("x"), testGuard)
	down := make(chanDone, 1)
	sink, h := e.watch([]byte("x"))
	e.loop.do(func() {
		e.pool.Call(1, codec.MethodTxn, []byte("x"), testGuard, down)
		e.pool.Close()
		if len(call) != 1 || len(down) != 1 || len(sink.ends) != 1 {
			t.Error("not everything was reported before Close returned")
		}
		h.Close()
		e.pool.Close()
	})
	if r := call.wait(t); r.st.Code != codec.Unavailable || !r.sent {
		t.Errorf("%+v", r)
	}
	if r := down.wait(t); r.st.Code != codec.Unavailable || r.sent {
		t.Errorf("%+v", r)
	}
	if r := e.call(codec.MethodTxn, nil); r.st != (codec.Status{Code: codec.Unavailable, Msg: "member cluster shard-1: the connections are closed"}) || r.sent {
		t.Errorf("%+v", r)
	}
	e.loop.do(func() {
		if len(e.pool.links) != 0 || e.pool.Connected(0) || len(e.pool.timers.heap) != 0 {
			t.Error("something is left")
		}
	})
	if n := e.counter(metricPoolConnected, "shard-1", m.url()); n != 0 {
		t.Errorf("%d connections are still counted", n)
	}
	e.until("the goroutines are gone", func() bool { return !strings.Contains(stacks(), "poolSlot).dial") })
}

// stacks returns the stacks of all goroutines.
func stacks() string {
	buf := make([]byte, 4<<20)
	return string(buf[:runtime.Stack(buf, true)])
}

func TestPoolUnixSocket(t *testing.T) {
	m := newFakeMember(t, echo)
	path := t.TempDir() + "/member"
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = m.srv.Serve(ln) }()
	e := newPoolEnv(t, []string{"unix://" + path})
	e.connected(0)
	if r := e.call(codec.MethodRange, []byte("x")); r.st.Code != codec.OK || string(r.resp) != "x" {
		t.Errorf("%+v", r)
	}
}

func TestPoolEndpointURLs(t *testing.T) {
	for _, c := range []struct{ in, network, address, authority, err string }{
		{"http://127.0.0.1:2379", "tcp", "127.0.0.1:2379", "127.0.0.1:2379", ""},
		{"http://etcd-0.etcd:2379/", "tcp", "etcd-0.etcd:2379", "etcd-0.etcd:2379", ""},
		{"http://[::1]:2379", "tcp", "[::1]:2379", "[::1]:2379", ""},
		{"unix:///run/etcd.sock", "unix", "/run/etcd.sock", "localhost", ""},
		{"unix://etcd:0", "unix", "etcd:0", "localhost", ""},
		{"unix:", "", "", "", "no socket path"},
		{"https://127.0.0.1:2379", "", "", "", "https is not supported yet"},
		{"http://127.0.0.1", "", "", "", "a host and a port"},
		{"http://:2379", "", "", "", "a host and a port"},
		{"127.0.0.1:2379", "", "", "", "not a URL"},
		{"localhost:2379", "", "", "", "want http://host:port"},
		{"http://127.0.0.1:2379/v3", "", "", "", "nothing may follow"},
		{"http://u:p@127.0.0.1:2379", "", "", "", "nothing may follow"},
		{"", "", "", "", "want http://host:port"},
	} {
		got, err := parseEndpoint(c.in)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: error %v", c.in, err)
			}
			continue
		}
		if err != nil || got != (endpointAddr{c.network, c.address, c.authority}) {
			t.Errorf("%q: %+v, %v", c.in, got, err)
		}
	}
	cfg := PoolConfig{Clusters: map[codec.ClusterID][]string{codec.Coordinator: {"http://a:1"}, 0: {"http://b:1", "https://c:1"}}}
	if err := cfg.Validate(); err == nil || !strings.HasPrefix(err.Error(), "member cluster shard-0: endpoint") {
		t.Errorf("Validate: %v", err)
	}
	// A pool with such a cluster works for the others, and says what is wrong with this one.
	m := newFakeMember(t, echo)
	e := newPoolEnv(t, []string{m.url()}, func(c *PoolConfig) { c.Clusters[codec.Coordinator] = []string{"https://c:1"} })
	e.connected(0)
	if r := e.begin(codec.Coordinator, codec.MethodRange, nil, time.Second).wait(t); !strings.HasPrefix(r.st.Msg, "coordinator: ") || !strings.Contains(r.st.Msg, "https is not supported yet") {
		t.Errorf("%+v", r)
	}
}
