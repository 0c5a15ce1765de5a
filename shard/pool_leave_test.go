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
	const pingTimeout = 300 * time.Millisecond
	a, b := newFakeMember(t, echo), newFakeMember(t, echo)
	r := newRelay(t, "127.0.0.1:0", a.addr())
	e := newPoolEnv(t, []string{r.url(), b.url()}, func(c *PoolConfig) {
		c.PingInterval, c.PingTimeout = time.Hour, pingTimeout
	})
	both := func() bool { return len(e.pool.clusters[0].ready) == 2 }
	slow := func() (n int) {
		for range 10 {
			if r := e.begin(0, codec.MethodTxn, []byte("x"), 100*time.Millisecond).wait(t); r.st == statusDeadline {
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
	r.freeze(true)
	slow()
	e.until("the silent connection is given up", func() bool { return len(e.pool.clusters[0].ready) == 1 })
	if n := e.counter(metricPoolDeadConns, "shard-1"); n != 1 {
		t.Errorf("%d connections were given up for their silence", n)
	}
}

// A request that had no answer on a connection that brought nothing, while another one did, tells so: that is no slow
// cluster. A stream can ask for the same.
func TestPoolMuteNode(t *testing.T) {
	a, b := newFakeMember(t, echo), newFakeMember(t, echo)
	r := newRelay(t, "127.0.0.1:0", a.addr())
	e := newPoolEnv(t, []string{r.url(), b.url()}, func(c *PoolConfig) { c.PingInterval, c.PingTimeout = time.Hour, time.Hour })
	e.until("both", func() bool { return len(e.pool.clusters[0].ready) == 2 })
	r.freeze(true)
	var calls []chanDone
	for range 6 { // they go by turns: an answer comes after a request that gets none was sent
		calls = append(calls, e.begin(0, codec.MethodTxn, []byte("x"), 500*time.Millisecond))
	}
	got := map[codec.Status]int{}
	for _, c := range calls {
		got[c.wait(t).st]++
	}
	if got[codec.Status{}] != 3 || got[statusMute] == 0 || got[statusMute]+got[statusDeadline] != 3 {
		t.Errorf("%v", got)
	}
	e.loop.do(func() {
		for _, l := range e.pool.links {
			w := &poolWatch{pool: e.pool, link: l}
			if mute := w.Mute(time.Nanosecond); mute != l.silent {
				t.Errorf("%s: mute %v, silent %v", l.ep.url, mute, l.silent)
			}
		}
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
