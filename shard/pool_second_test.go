package shard

import (
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"spindle/codec"
)

// untimed has nothing be noticed by pings alone.
func untimed(c *PoolConfig) { c.PingInterval, c.PingTimeout = time.Hour, time.Hour }

// eventMember answers calls, and on Watch streams sends an event now and then.
func eventMember(t testing.TB) *fakeMember {
	return newFakeMember(t, func(path string, s fakeStream) error {
		req, err := s.recv()
		if err != nil || !strings.HasSuffix(path, "/Watch") {
			return errors.Join(err, s.send(req))
		}
		for s.Context().Err() == nil {
			if err := s.send(req); err != nil {
				return err
			}
			<-time.After(5 * time.Millisecond)
		}
		return nil
	})
}

// A connection that stays dead when its network was mended, in one direction or both, is given up as soon as a second one
// beside it works: calls and streams on it are settled as on any lost connection, long before its pings would tell.
func TestPoolSecondConnection(t *testing.T) {
	for _, name := range []string{"nothing comes", "events come"} {
		t.Run(name, func(t *testing.T) {
			deaf := name == "events come"
			m := newFakeMember(t, echo)
			if deaf {
				m = eventMember(t)
			}
			r := newRelay(t, "127.0.0.1:0", m.addr())
			e := newPoolEnv(t, []string{r.url()}, untimed)
			e.connected(0)
			first := e.pool.clusters[0].ready[0]
			sink, _ := e.watch([]byte("event"))
			sink.message(t)
			// What the first connection sends is lost from now on, whatever becomes of the relay; its answers too, but for events.
			r.swallow(true)
			held := e.begin(0, codec.MethodTxn, []byte("held"), testGuard)
			suspected := e.begin(0, codec.MethodTxn, []byte("x"), 50*time.Millisecond)
			if got := suspected.wait(t); got.st != statusDeadline || !got.sent {
				t.Fatalf("%+v", got)
			}
			r.swallow(false)
			e.recovers()
			if got := held.wait(t); got.st.Code != codec.Unavailable || !got.sent || !strings.Contains(got.st.Msg, errMute.Error()) {
				t.Errorf("a call that was under way: %+v", got)
			}
			if st := sink.end(t); st.Code != codec.Unavailable {
				t.Errorf("the stream: %+v", st)
			}
			e.loop.do(func() {
				s := first.slot
				if !first.dead || s.old != nil || s.link == nil || len(e.pool.clusters[0].ready) != 1 {
					t.Errorf("the first one is dead: %v; the slot: %+v; %d connections", first.dead, s, len(e.pool.clusters[0].ready))
				}
			})
			if n := e.counter(metricPoolDeadConns, "shard-1"); n != 1 {
				t.Errorf("%d connections were given up", n)
			}
			if l := e.log.lines("does not answer"); len(l) != 0 {
				t.Errorf("the endpoint was never without a connection: %q", l)
			}
		})
	}
}

// An idle stream notices by its first ping, too.
func TestPoolSecondConnectionOfAnIdleStream(t *testing.T) {
	m := newFakeMember(t, echo, grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Millisecond, PermitWithoutStream: true}))
	r := newRelay(t, "127.0.0.1:0", m.addr())
	e := newPoolEnv(t, []string{r.url()}, func(c *PoolConfig) { c.PingInterval, c.PingTimeout = 50*time.Millisecond, time.Hour })
	e.connected(0)
	first := e.pool.clusters[0].ready[0]
	sink, _ := e.watch([]byte("event"))
	sink.message(t)
	r.swallow(true)
	e.until("it is doubted", first.doubted)
	r.swallow(false)
	if st := sink.end(t); st.Code != codec.Unavailable {
		t.Errorf("%+v", st)
	}
	e.recovers()
}

// A connection that answers after all stays, and the second one goes, be it in use, on its way, or not dialed yet.
func TestPoolSecondConnectionCalledOff(t *testing.T) {
	m := newFakeMember(t, echo)
	e := newPoolEnv(t, []string{m.url()}, untimed)
	e.connected(0)
	cl := e.pool.clusters[0]
	first := cl.ready[0]
	s := first.slot
	sink, _ := e.watch([]byte("one"))
	sink.message(t)
	doubt := func() { // as if a question were open that nobody has sent
		first.deaf.owner = (*deafness)(first)
		e.pool.timers.set(&first.deaf, e.pool.timers.now()+int64(testGuard))
		first.sincePing = replyProgress // a pong stands behind this
		first.challenge(e.pool.timers.now())
	}
	e.loop.do(func() {
		doubt()
		first.challenge(e.pool.timers.now()) // once is enough
		if s.link != nil || s.old != first || s.timer.place == 0 {
			t.Fatalf("not challenged: %+v", s)
		}
		first.answered()
		if s.link != first || s.old != nil || s.timer.place != 0 {
			t.Errorf("before the dial: %+v", s)
		}
		doubt()
		e.pool.timers.cancel(&s.timer)
		s.dial()
		first.answered()
		doubt()
		e.pool.timers.cancel(&s.timer)
		s.dial() // the first one is still under way, and serves
	})
	e.until("both are in use", func() bool { return len(cl.ready) == 2 && !s.dialing })
	second := s.link
	if got := e.call(codec.MethodTxn, []byte("x")); got.st.Code != codec.OK {
		t.Errorf("%+v", got)
	}
	e.loop.do(func() {
		if _, st := cl.openStream(codec.MethodTxn, false, e.pool.timers.now()); st == nil || second.conn.Streams() != 1 {
			t.Errorf("a doubted connection is not used last: %d streams on the second", second.conn.Streams())
		} else {
			second.reset(st)
		}
		first.answered()
	})
	e.until("the second one is closed", func() bool { return second.dead })
	e.loop.do(func() {
		if first.dead || s.link != first || s.old != nil || len(cl.ready) != 1 || s.timer.place != 0 {
			t.Errorf("the slot: %+v", s)
		}
	})
	e.loop.do(func() {
		doubt()
		e.pool.timers.cancel(&s.timer)
		s.dial()
	})
	e.until("the dial has come back", func() bool { return s.link != nil })
	e.loop.do(first.answered)
	e.until("the third one is closed", func() bool { return len(e.pool.links) == 1 && s.link == first })
	if n := len(sink.ends); n != 0 {
		t.Error("the stream ended")
	}
	if n := e.counter(metricPoolDeadConns, "shard-1"); n != 0 {
		t.Errorf("%d connections were given up", n)
	}
}

// What dials into the void is tried again soon beside a connection that is suspected; and one that has used half of its
// streams meanwhile is replaced in any case.
func TestPoolSecondConnectionPauses(t *testing.T) {
	p := &Pool{cfg: PoolConfig{DialTimeout: 3 * time.Second}}
	s := &poolSlot{ep: &poolEndpoint{pool: p}}
	for i, want := range []time.Duration{shortDial, p.cfg.DialTimeout, shortDial} {
		if s.attempts = i; s.patience() != want {
			t.Errorf("attempt %d: %v", i, s.patience())
		}
	}
	p.cfg.BackoffMin, p.cfg.BackoffMax = time.Hour, time.Hour
	p.timers.init(func() {})
	short := 0
	for range 40 {
		if s.patience() == shortDial {
			short++
		}
		s.retry(nil)
	}
	p.timers.stop()
	if short != 20 {
		t.Errorf("%d of 40 attempts are short", short)
	}
	s.old, s.attempts = &poolLink{}, 1
	if s.patience() != shortDial {
		t.Errorf("beside another one: %v", s.patience())
	}

	m := newFakeMember(t, echo)
	e := newPoolEnv(t, []string{m.url()}, untimed)
	e.connected(0)
	first := e.pool.clusters[0].ready[0]
	e.loop.do(func() {
		first.challenge(e.pool.timers.now())
		first.renew()
	})
	e.until("it is replaced", func() bool { return first.dead && len(e.pool.clusters[0].ready) == 1 })
	if got := e.call(codec.MethodTxn, []byte("x")); got.st.Code != codec.OK {
		t.Errorf("%+v", got)
	}
}
