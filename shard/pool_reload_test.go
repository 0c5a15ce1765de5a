package shard

import (
	"bytes"
	"strings"
	"sync/atomic"
	"testing"

	"spindle/codec"
)

// countedMember is a member behind a relay that counts what it is asked. Streams stay open, and so does the call that says
// "wait", until the test lets go of it.
type countedMember struct {
	*relay
	asked   atomic.Int32
	waiting chan struct{}
	release chan struct{}
}

func newCountedMember(t *testing.T) *countedMember {
	c := &countedMember{waiting: make(chan struct{}, 1), release: make(chan struct{})}
	m := newFakeMember(t, func(path string, s fakeStream) error {
		c.asked.Add(1)
		if path == codec.MethodPath(codec.MethodWatch) {
			return echo(path, s)
		}
		return unary(func(req []byte) ([]byte, error) {
			if string(req) == "wait" {
				c.waiting <- struct{}{}
				<-c.release
			}
			return req, nil
		})(path, s)
	})
	c.relay = newRelay(t, "127.0.0.1:0", m.addr())
	return c
}

// Endpoints are replaced without a gap: the old ones are used until a new one answers, then what was sent on them is
// finished, their streams end, and they are closed and forgotten.
func TestPoolSetEndpoints(t *testing.T) {
	a, b := newCountedMember(t), newCountedMember(t)
	nobody := "http://" + freePort(t)
	e := newPoolEnv(t, []string{a.url()})
	e.connected(0)
	set := func(want bool, urls ...string) {
		t.Helper()
		e.loop.do(func() {
			if got := e.pool.SetEndpoints(0, urls); got != want {
				t.Errorf("SetEndpoints(%q): %v", urls, got)
			}
		})
	}
	works := func() {
		t.Helper()
		for range 10 {
			if r := e.call(codec.MethodTxn, []byte("x")); r.st.Code != codec.OK {
				t.Fatal(r.st)
			}
		}
	}
	set(false, a.url())
	set(false, a.url(), "ftp://127.0.0.1:1")
	set(false)

	sink, h := e.watch([]byte("w"))
	sink.message(t)
	set(true, nobody) // nothing answers there: a goes on
	works()
	e.loop.do(func() {
		if s := e.pool.Endpoints(0); len(s) != 1 || s[0].URL != nobody || !e.pool.Connected(0) {
			t.Errorf("%+v", s)
		}
	})
	held := e.begin(0, codec.MethodTxn, []byte("wait"), testGuard)
	<-a.waiting
	set(true, nobody, b.url())
	if st := sink.end(t); st.Code != codec.Unavailable || !strings.Contains(st.Msg, "removed") {
		t.Errorf("the stream on the removed endpoint: %+v", st)
	}
	e.loop.do(func() { h.Send([]byte("late")); h.Close() })
	before := a.asked.Load()
	works()
	sink, _ = e.watch([]byte("w"))
	sink.message(t)
	if n := a.asked.Load(); n != before {
		t.Errorf("the removed endpoint was asked %d times", n-before)
	}
	close(a.release)
	if r := held.wait(t); r.st.Code != codec.OK {
		t.Errorf("the call that was under way: %+v", r.st)
	}
	e.until("the connection is closed", func() bool { return len(e.pool.links) == 1 })
	var page bytes.Buffer
	e.set.WritePrometheus(&page)
	if strings.Contains(page.String(), a.url()) || !strings.Contains(page.String(), b.url()) {
		t.Errorf("metrics:\n%s", page.String())
	}

	// It may come back, and the others may go.
	set(true, a.url(), b.url())
	e.until("both", func() bool { return len(e.pool.clusters[0].ready) == 2 })
	set(true, a.url())
	sink.end(t)
	works()
	e.until("only one", func() bool { return len(e.pool.links) == 1 && e.pool.links[0].ep.url == a.url() })
}

// A removed endpoint is not dialed any more, neither by a dial that waits nor after its connection is lost.
func TestPoolRemovedIsNotDialed(t *testing.T) {
	a, b := newCountedMember(t), newCountedMember(t)
	down := "http://" + freePort(t)
	e := newPoolEnv(t, []string{down, a.url()})
	e.connected(0)
	gone := func(url string) (ep *poolEndpoint) {
		e.loop.do(func() { ep = e.pool.clusters[0].endpoint(url) })
		return ep
	}
	d, up := gone(down), gone(a.url())
	e.loop.do(func() { e.pool.SetEndpoints(0, []string{b.url()}) })
	e.until("moved", func() bool {
		return len(e.pool.links) == 1 && len(e.pool.clusters[0].ready) == 1 && e.pool.clusters[0].ready[0].ep.url == b.url()
	})
	var attempts int
	e.loop.do(func() { attempts = d.slots[0].attempts })
	b.kill()
	e.until("b is back", func() bool { return len(e.pool.clusters[0].ready) == 1 && e.pool.clusters[0].ready[0].ep.ready == 1 })
	e.loop.do(func() {
		for _, ep := range []*poolEndpoint{d, up} {
			if s := ep.slots[0]; s.link != nil || s.timer.place != 0 {
				t.Errorf("%s is dialed again", ep.url)
			}
		}
		if n := d.slots[0].attempts; n != attempts {
			t.Errorf("%d attempts, %d before", n, attempts)
		}
	})
}
