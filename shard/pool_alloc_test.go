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
}

func (c *memConn) Write(p []byte) (int, error) { c.out = append(c.out, p...); return len(p), nil }
func (c *memConn) Peek(int) ([]byte, error)    { return c.in, nil }
func (c *memConn) Discard(int) (int, error)    { c.in = c.in[:0]; return 0, nil }
func (c *memConn) OutboundBuffered() int       { return 0 }
func (c *memConn) Close() error                { return nil }

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

// TestPoolCallAllocs runs whole calls, server's side of the codec included, and wants no allocation.
func TestPoolCallAllocs(t *testing.T) {
	loop := &memLoop{}
	p := NewPool(PoolConfig{Clusters: map[codec.ClusterID][]string{0: nil}, Metrics: metrics.NewSet()}, loop)
	loop.turn()
	cl := p.clusters[0]
	ep := newPoolEndpoint(p, cl, "http://127.0.0.1:1")
	gc := &memConn{}
	l := newPoolLink(ep.slots[0], nil)
	l.OnOpen(gc)
	srv := &memServer{reply: make([]byte, 300)}
	srv.conn = codec.NewServerConn(codec.ConnConfig{}, srv)
	exchange := func() {
		loop.turn()
		if len(gc.out) > 0 {
			if err := srv.conn.Feed(gc.out); err != nil {
				t.Fatal(err)
			}
			gc.out = gc.out[:0]
		}
		if out := srv.conn.Output(); len(out) > 0 {
			gc.in = append(gc.in, out...)
			srv.conn.Flushed()
			l.OnTraffic(gc)
		}
	}
	exchange()
	exchange()
	if !p.Connected(0) {
		t.Fatal("not connected")
	}
	req := make([]byte, 300)
	done := &countDone{}
	const atOnce = 8
	round := func() {
		for range atOnce {
			p.Call(0, codec.MethodTxn, req, time.Minute, done)
		}
		exchange()
		exchange()
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

func BenchmarkPoolCall(b *testing.B) {
	loop := &memLoop{}
	p := NewPool(PoolConfig{Clusters: map[codec.ClusterID][]string{0: nil}, Metrics: metrics.NewSet()}, loop)
	loop.turn()
	ep := newPoolEndpoint(p, p.clusters[0], "http://127.0.0.1:1")
	gc := &memConn{}
	l := newPoolLink(ep.slots[0], nil)
	l.OnOpen(gc)
	srv := &memServer{reply: make([]byte, 300)}
	srv.conn = codec.NewServerConn(codec.ConnConfig{}, srv)
	exchange := func() {
		loop.turn()
		_ = srv.conn.Feed(gc.out)
		gc.out = gc.out[:0]
		gc.in = append(gc.in, srv.conn.Output()...)
		srv.conn.Flushed()
		l.OnTraffic(gc)
	}
	exchange()
	req := make([]byte, 300)
	done := &countDone{}
	b.ReportAllocs()
	for b.Loop() {
		p.Call(0, codec.MethodTxn, req, time.Minute, done)
		exchange()
	}
}
