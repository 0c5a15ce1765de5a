package shard

import (
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"spindle/codec"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

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

func TestPoolBlackHole(t *testing.T) {
	m := newFakeMember(t, echo)
	r := newRelay(t, "127.0.0.1:0", m.addr())
	e := newPoolEnv(t, []string{r.url()}, func(c *PoolConfig) {
		c.PingInterval, c.PingTimeout = 50*time.Millisecond, time.Second // a busy machine answers late
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
	if d := time.Since(begin); d > testGuard/2 {
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

// A connection on which requests vanish while events go on coming is given up.
func TestPoolDeafPeer(t *testing.T) {
	m := eventMember(t)
	r := newRelay(t, "127.0.0.1:0", m.addr())
	e := newPoolEnv(t, []string{r.url()}, func(c *PoolConfig) {
		c.PingInterval, c.PingTimeout = 50*time.Millisecond, time.Second // a busy machine answers late
	})
	e.connected(0)
	e.watch([]byte("event"))
	if got := e.call(codec.MethodTxn, []byte("x")); got.st.Code != codec.OK {
		t.Fatalf("%+v", got)
	}
	// A member that is merely slow keeps its connection: it answers the ping.
	l := e.pool.clusters[0].ready[0]
	e.loop.do(func() { l.unanswered(e.pool.timers.now()) })
	e.until("the pong", func() bool { return l.deaf.place == 0 })
	e.loop.do(func() {
		if l.dead {
			t.Error("given up, though it answers pings")
		}
	})
	r.swallow(true)
	done := e.begin(0, codec.MethodTxn, []byte("x"), 100*time.Millisecond)
	if got := done.wait(t); got.st.Code == codec.OK {
		t.Fatalf("%+v", got)
	}
	e.until("the connection is given up", func() bool { return l.dead })
	r.swallow(false)
	e.recovers()
}

// A loop that stalled reads its sockets before it takes a ping for unanswered; one that did not stall does not wait.
func TestPoolStalledLoopKeepsLinks(t *testing.T) {
	m := newFakeMember(t, echo)
	e := newPoolEnv(t, []string{m.url()})
	e.connected(0)
	l := e.pool.clusters[0].ready[0]
	e.loop.do(func() {
		now, timeout := e.pool.timers.now(), int64(e.pool.cfg.PingTimeout)
		e.pool.timers.cancel(&l.timer)
		l.pinged, l.timer.at = now-2*timeout, now-timeout
		l.due(now)
		if l.dead || l.timer.place == 0 {
			t.Errorf("late: dead %v, timer %v", l.dead, l.timer)
		}
		e.pool.timers.cancel(&l.timer)
		l.timer.at = now
		l.due(now)
		if !l.dead {
			t.Error("not given up in time")
		}
	})
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
