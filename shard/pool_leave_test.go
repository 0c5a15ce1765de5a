package shard

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"spindle/codec"
)

// A node without a leader is asked to say so at once instead of keeping a request for seconds, and one such answer is
// enough to leave it for a while. What needs no leader is served by any node.
func TestPoolUnaryNoLeader(t *testing.T) {
	var asked [2]atomic.Int32
	var urls []string
	for i := range asked {
		m := newFakeMember(t, func(path string, s fakeStream) error {
			asked[i].Add(1)
			md, _ := metadata.FromIncomingContext(s.Context())
			needs := len(md["hasleader"]) == 1 && md["hasleader"][0] == "true"
			if want := path != codec.MethodPath(codec.MethodStatus); needs != want {
				return status.Error(codes.Internal, fmt.Sprintf("%s: hasleader %v", path, md["hasleader"]))
			}
			if i == 0 && needs {
				return status.Error(codes.Unavailable, "etcdserver: no leader")
			}
			return echo(path, s)
		})
		urls = append(urls, m.url())
	}
	e := newPoolEnv(t, urls)
	e.until("both", func() bool { return len(e.pool.clusters[0].ready) == 2 })
	refused := 0
	for range 20 {
		switch r := e.call(codec.MethodTxn, nil); r.st {
		case codec.Status{}:
		case codec.ErrNoLeader:
			refused++
		default:
			t.Fatal(r.st)
		}
	}
	if refused != 1 || asked[0].Load() != 1 {
		t.Errorf("%d of 20 calls were refused; the node without a leader was asked %d times", refused, asked[0].Load())
	}
	if r := e.call(codec.MethodStatus, nil); r.st.Code != codec.OK {
		t.Error(r.st)
	}
}

// A connection on which a request was not answered, nor anything else came, is used last from then on. It is asked for
// a sign of life at once: that brings it back, or ends it much sooner than its silence alone would.
func TestPoolSilentConnection(t *testing.T) {
	// Long enough for a busy machine: the node that is well answers within the span of a call, and all calls end before the
	// other one is given up.
	const span, pingTimeout = 750 * time.Millisecond, 4 * time.Second
	a, b := newFakeMember(t, echo), newFakeMember(t, echo)
	r := newRelay(t, "127.0.0.1:0", a.addr())
	e := newPoolEnv(t, []string{r.url(), b.url()}, func(c *PoolConfig) {
		c.PingInterval, c.PingTimeout = time.Hour, pingTimeout
	})
	both := func() bool { return len(e.pool.clusters[0].ready) == 2 }
	slow := func() (n int) {
		for range 10 {
			if r := e.begin(0, codec.MethodTxn, []byte("x"), span).wait(t); r.st == statusDeadline || r.st == statusMute {
				n++
			} else if r.st.Code != codec.OK {
				t.Fatal(r.st)
			}
		}
		return n
	}
	e.until("both", both)
	r.freeze(true)
	if n := slow(); n != 1 {
		t.Errorf("%d of 10 calls went to the node that is silent", n)
	}
	r.freeze(false)
	e.until("it has answered the ping", func() bool {
		for _, l := range e.pool.links {
			if l.silent {
				return false
			}
		}
		return both()
	})
	if n := slow(); n != 0 {
		t.Errorf("%d of 10 calls had no answer afterwards", n)
	}
	e.loop.do(func() { // as if the last ping were long ago
		for _, l := range e.pool.links {
			l.lastPing = 0
			l.lastPing -= int64(2 * time.Hour)
		}
	})
	before := e.counter(metricPoolDeadConns, "shard-1") // a second connection may have been quicker than the first one's answer
	r.freeze(true)
	slow()
	e.until("the silent connection is given up", func() bool { return len(e.pool.clusters[0].ready) == 1 })
	if n := e.counter(metricPoolDeadConns, "shard-1") - before; n == 0 {
		t.Error("none was given up for its silence")
	}
}

// A request that had no answer on a connection that brought nothing, while another one did, tells so: that is no slow
// cluster. A stream can ask for the same; then the connection has to answer a ping first.
func TestPoolMuteNode(t *testing.T) {
	a, b := newFakeMember(t, echo), newFakeMember(t, echo)
	r := newRelay(t, "127.0.0.1:0", a.addr())
	e := newPoolEnv(t, []string{r.url(), b.url()}, func(c *PoolConfig) { c.PingInterval, c.PingTimeout = time.Hour, time.Hour })
	e.until("both", func() bool { return len(e.pool.clusters[0].ready) == 2 })
	r.freeze(true)
	const span = time.Second
	// They go to one and the other by turns, so the first that is not answered waits while one is.
	var calls []chanDone
	for range 3 {
		calls = append(calls, e.begin(0, codec.MethodTxn, []byte("x"), span))
	}
	answered, mute := 0, false
	for _, c := range calls {
		switch st := c.wait(t).st; {
		case st.Code == codec.OK:
			answered++
		case !mute && st != statusMute:
			t.Error(st)
		default:
			mute = true
		}
	}
	if answered == 0 || !mute {
		t.Errorf("%d of 3 calls were answered, one was mute: %v", answered, mute)
	}
	e.until("the connection that has not answered a ping is mute", func() bool {
		for _, l := range e.pool.links {
			isMute := (&poolWatch{pool: e.pool, link: l}).Mute(time.Nanosecond)
			if isMute && (l.ep.url != r.url() || l.pinged == 0 || e.pool.timers.now()-l.pinged < int64(stallLook)) {
				t.Errorf("%s: mute, pinged at %d", l.ep.url, l.pinged)
			}
			if l.lastPing == 0 {
				l.lastPing = -int64(2 * time.Hour) // so that it may be asked
			}
			if isMute {
				return true
			}
		}
		return false
	})
}

// A connection that had nothing to say for a while is not mute, though others had: it is asked, and answers.
func TestPoolIdleConnectionIsNotMute(t *testing.T) {
	m := newFakeMember(t, echo)
	e := newPoolEnv(t, []string{m.url()}, func(c *PoolConfig) { c.PingInterval, c.PingTimeout = time.Hour, time.Hour })
	e.connected(0)
	e.until("it was asked, and has answered", func() bool {
		l := e.pool.clusters[0].ready[0]
		if l.lastPing > 0 || l.silent {
			return l.pinged == 0 && !l.silent
		}
		// Again if something else came before it could be asked: the member acknowledges settings when it likes.
		l.lastPing = -int64(2 * time.Hour)
		l.lastRecv -= int64(time.Minute)
		e.pool.clusters[0].ready = append(e.pool.clusters[0].ready, &poolLink{lastRecv: e.pool.timers.now()})
		if (&poolWatch{pool: e.pool, link: l}).Mute(time.Second) {
			t.Error("mute at once")
		}
		e.pool.clusters[0].ready = e.pool.clusters[0].ready[:1]
		return false
	})
}

// Down tells for how long nothing has been connected.
func TestPoolDown(t *testing.T) {
	m := newFakeMember(t, echo)
	addr := freePort(t)
	e := newPoolEnv(t, []string{"http://" + addr})
	down := func() (why string, since time.Duration) {
		e.loop.do(func() { why, since = e.pool.Down(0) })
		return
	}
	e.until("it is down for a while", func() bool { _, since := e.pool.Down(0); return since > 20*time.Millisecond })
	if why, _ := down(); why == "" {
		t.Error("it does not say why")
	}
	r := newRelay(t, addr, m.addr())
	e.connected(0)
	if why, since := down(); why != "" || since != 0 {
		t.Errorf("connected: %q, %v", why, since)
	}
	begun := time.Now()
	r.stop()
	e.until("down again", func() bool { return !e.pool.Connected(0) })
	if why, since := down(); why == "" || since > time.Since(begun) {
		t.Errorf("down again: %q, for %v", why, since)
	}
}
