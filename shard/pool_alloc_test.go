//go:build !race

package shard

import (
	"net"
	"testing"
	"time"

	"spindle/codec"

	"github.com/VictoriaMetrics/metrics"
	"github.com/panjf2000/gnet/v2"
)

// memLoop is a Loop without sockets: the test empties the mailbox and runs the hooks.
type memLoop struct {
	letters []func()
	hooks   []func()
}

func (l *memLoop) Post(f func())                   { l.letters = append(l.letters, f) }
func (l *memLoop) OnTurnEnd(f func())              { l.hooks = append(l.hooks, f) }
func (l *memLoop) Enroll(net.Conn, LoopConn) error { return nil }
func (l *memLoop) turn() {
	for _, f := range l.letters {
		f()
	}
	l.letters = l.letters[:0]
	for _, f := range l.hooks {
		f()
	}
}

// memConn is a socket made of two buffers.
type memConn struct {
	gnet.Conn
	in, out []byte
	writes  int
}

func (c *memConn) Write(p []byte) (int, error) {
	c.out = append(c.out, p...)
	c.writes++
	return len(p), nil
}
func (c *memConn) Peek(int) ([]byte, error) { return c.in, nil }
func (c *memConn) Discard(int) (int, error) { c.in = c.in[:0]; return 0, nil }
func (c *memConn) OutboundBuffered() int    { return 0 }
func (c *memConn) Close() error             { return nil }

// memServer answers every request with the same reply.
type memServer struct {
	conn  *codec.Conn
	reply []byte
}

func (s *memServer) OnRequest(*codec.Stream)         {}
func (s *memServer) OnMessage(*codec.Stream, []byte) {}
func (s *memServer) OnCancel(*codec.Stream)          {}
func (s *memServer) OnDrained(*codec.Stream)         {}
func (s *memServer) OnHalfClose(st *codec.Stream) {
	s.conn.Send(st, s.reply)
	s.conn.Finish(st, codec.Status{})
}

type countDone struct{ ok int }

func (c *countDone) Complete(resp []byte, st codec.Status, sent bool) {
	if st.Code == codec.OK && sent && len(resp) > 0 {
		c.ok++
	}
}

// memLink is a link to a member that answers everything, without sockets.
type memLink struct {
	loop *memLoop
	pool *Pool
	link *poolLink
	gc   *memConn
	srv  *memServer
}

func newMemLink(tb testing.TB) *memLink {
	loop := &memLoop{}
	p := NewPool(PoolConfig{Clusters: map[codec.ClusterID][]string{0: nil}, Metrics: metrics.NewSet()}, loop)
	loop.turn()
	ep := newPoolEndpoint(p, p.clusters[0], "http://127.0.0.1:1")
	m := &memLink{loop: loop, pool: p, link: newPoolLink(ep.slots[0], nil), gc: &memConn{}, srv: &memServer{reply: make([]byte, 300)}}
	m.link.OnOpen(m.gc)
	m.srv.conn = codec.NewServerConn(codec.ConnConfig{}, m.srv)
	m.exchange(tb)
	m.exchange(tb)
	if !p.Connected(0) {
		tb.Fatal("not connected")
	}
	return m
}

// exchange is a turn of the loop, and what the member has to say to what came of it.
func (m *memLink) exchange(tb testing.TB) {
	m.loop.turn()
	if len(m.gc.out) > 0 {
		if err := m.srv.conn.Feed(m.gc.out); err != nil {
			tb.Fatal(err)
		}
		m.gc.out = m.gc.out[:0]
	}
	if out := m.srv.conn.Output(); len(out) > 0 {
		m.gc.in = append(m.gc.in, out...)
		m.srv.conn.Flushed()
		m.link.OnTraffic(m.gc)
	}
}

// TestPoolCallAllocs runs whole calls, server's side of the codec included, and wants no allocation.
func TestPoolCallAllocs(t *testing.T) {
	m := newMemLink(t)
	req := make([]byte, 300)
	done := &countDone{}
	const atOnce = 8
	round := func() {
		for range atOnce {
			m.pool.Call(0, codec.MethodTxn, req, time.Minute, done)
		}
		m.exchange(t)
		m.exchange(t)
	}
	for range 100 {
		round()
	}
	done.ok = 0
	const rounds = 200
	if n := testing.AllocsPerRun(rounds, round); n != 0 {
		t.Errorf("%v allocations for %d calls", n, atOnce)
	}
	if done.ok != (rounds+1)*atOnce { // AllocsPerRun warms up once
		t.Errorf("%d calls were answered", done.ok)
	}
}

// All that one turn has for a member goes out in one write.
func TestPoolOneWriteForATurn(t *testing.T) {
	m := newMemLink(t)
	done := &countDone{}
	m.gc.writes = 0
	for range 8 {
		m.pool.Call(0, codec.MethodTxn, make([]byte, 300), time.Minute, done)
	}
	m.loop.turn()
	if m.gc.writes != 1 || len(m.gc.out) < 8*300 {
		t.Errorf("%d writes of %d bytes together", m.gc.writes, len(m.gc.out))
	}
	m.exchange(t)
	if done.ok != 8 {
		t.Errorf("%d calls were answered", done.ok)
	}
}

func BenchmarkPoolCall(b *testing.B) {
	m := newMemLink(b)
	req := make([]byte, 300)
	done := &countDone{}
	b.ReportAllocs()
	for b.Loop() {
		m.pool.Call(0, codec.MethodTxn, req, time.Minute, done)
		m.exchange(b)
	}
}
