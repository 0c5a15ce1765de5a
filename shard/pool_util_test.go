package shard

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"spindle/codec"
	"spindle/shard/embedded/embeddedtest"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
)

// poolEnv is a Pool on a loop of its own.
type poolEnv struct {
	t    testing.TB
	loop *testLoop
	pool *Pool
	set  *metrics.Set
	log  *syncBuffer
}

// newPoolEnv starts a pool whose member cluster 0 has the given endpoints; tune may change the configuration.
func newPoolEnv(t testing.TB, endpoints []string, tune ...func(*PoolConfig)) *poolEnv {
	t.Helper()
	e := &poolEnv{t: t, loop: newTestLoop(t), set: metrics.NewSet(), log: &syncBuffer{}}
	cfg := PoolConfig{
		Clusters:   map[codec.ClusterID][]string{0: endpoints},
		Names:      map[codec.ClusterID]string{0: "shard-1"},
		Log:        slog.New(slog.NewTextHandler(e.log, nil)),
		Metrics:    e.set,
		BackoffMin: 10 * time.Millisecond,
		BackoffMax: 50 * time.Millisecond,
	}
	for _, f := range tune {
		f(&cfg)
	}
	e.pool = NewPool(cfg, e.loop)
	t.Cleanup(func() { e.loop.do(e.pool.Close) })
	return e
}

// connected waits for the cluster.
func (e *poolEnv) connected(id codec.ClusterID) {
	e.t.Helper()
	ch := make(chan struct{}, 16)
	e.loop.do(func() {
		if e.pool.Connected(id) {
			ch <- struct{}{}
			return
		}
		e.pool.OnConnected(func(c codec.ClusterID) {
			if c == id {
				select {
				case ch <- struct{}{}:
				default:
				}
			}
		})
	})
	select {
	case <-ch:
	case <-time.After(testGuard):
		e.loop.do(func() { e.t.Errorf("%v", e.pool.Unreachable(id)) })
		e.t.Fatal(errTestGuard)
	}
}

// until posts f to the loop again and again until it is true.
func (e *poolEnv) until(what string, f func() bool) {
	e.t.Helper()
	ticker := time.NewTicker(2 * time.Millisecond)
	defer ticker.Stop()
	for deadline := time.Now().Add(testGuard); ; <-ticker.C {
		var ok bool
		e.loop.do(func() { ok = f() })
		if ok {
			return
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("waited too long: %s", what)
		}
	}
}

type callResult struct {
	resp []byte
	st   codec.Status
	sent bool
}

// chanDone is a Completion that hands its outcome to the test.
type chanDone chan callResult

func (c chanDone) Complete(resp []byte, st codec.Status, sent bool) {
	c <- callResult{bytes.Clone(resp), st, sent}
}

func (c chanDone) wait(t testing.TB) callResult {
	t.Helper()
	select {
	case r := <-c:
		return r
	case <-time.After(testGuard):
		t.Fatal("the call was never completed")
		panic("not reached")
	}
}

// begin starts a call, and checks that it is not completed from within.
func (e *poolEnv) begin(to codec.ClusterID, m codec.Method, req []byte, timeout time.Duration) chanDone {
	done := make(chanDone, 1)
	e.loop.do(func() {
		e.pool.Call(to, m, req, timeout, done)
		if len(done) > 0 {
			e.t.Error("completed from within Call")
		}
	})
	return done
}

func (e *poolEnv) call(m codec.Method, req []byte) callResult {
	e.t.Helper()
	return e.begin(0, m, req, testGuard).wait(e.t)
}

// recovers asks until there is an answer, giving each call a moment: long enough that a busy machine does not make the new
// connection a suspect, too.
func (e *poolEnv) recovers() {
	e.t.Helper()
	for deadline := time.Now().Add(testGuard); ; {
		r := e.begin(0, codec.MethodTxn, []byte("x"), time.Second).wait(e.t)
		if r.st.Code == codec.OK {
			return
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("no answer any more: %v", r.st)
		}
	}
}

func (e *poolEnv) counter(format string, labels ...any) uint64 {
	return e.set.GetOrCreateCounter(fmt.Sprintf(format, labels...)).Get()
}

// testSink is a WatchSink that hands what comes to the test.
type testSink struct {
	messages chan []byte
	ends     chan codec.Status
}

func newTestSink() *testSink {
	return &testSink{make(chan []byte, 1<<14), make(chan codec.Status, 4)}
}

func (s *testSink) OnMessage(msg []byte)  { s.messages <- bytes.Clone(msg) }
func (s *testSink) OnEnd(st codec.Status) { s.ends <- st }

func (s *testSink) end(t testing.TB) codec.Status {
	t.Helper()
	select {
	case st := <-s.ends:
		return st
	case <-time.After(testGuard):
		t.Fatal("the stream never ended")
		panic("not reached")
	}
}

func (s *testSink) message(t testing.TB) []byte {
	t.Helper()
	select {
	case m := <-s.messages:
		return m
	case st := <-s.ends:
		t.Fatalf("the stream ended: %v", st)
	case <-time.After(testGuard):
		t.Fatal("no message came")
	}
	panic("not reached")
}

func (e *poolEnv) watch(req []byte) (*testSink, codec.WatchHandle) {
	sink := newTestSink()
	var h codec.WatchHandle
	e.loop.do(func() {
		h = e.pool.Watch(0, req, sink)
		if len(sink.ends) > 0 {
			e.t.Error("ended from within Watch")
		}
	})
	return sink, h
}

// relay is a TCP relay that can be killed and frozen.
type relay struct {
	ln     net.Listener
	mu     sync.Mutex // guards what follows
	cond   *sync.Cond
	target string
	frozen bool
	deaf   bool // what the pool sends vanishes, for good on the connections that have lost something
	conns  []net.Conn
	wg     sync.WaitGroup
}

// newRelay listens on addr ("127.0.0.1:0" for any port).
func newRelay(t testing.TB, addr, target string) *relay {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{ln: ln, target: target}
	r.cond = sync.NewCond(&r.mu)
	r.wg.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			r.mu.Lock()
			target := r.target
			r.mu.Unlock()
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			r.mu.Lock()
			r.conns = append(r.conns, in, out)
			r.mu.Unlock()
			r.wg.Go(func() { r.copy(in, out, false) })
			r.wg.Go(func() { r.copy(out, in, true) })
		}
	})
	t.Cleanup(r.stop)
	return r
}

func (r *relay) copy(dst, src net.Conn, requests bool) {
	defer dst.Close()
	defer src.Close()
	buf := make([]byte, 16<<10)
	lost := false
	for {
		n, err := src.Read(buf)
		r.mu.Lock()
		for r.frozen {
			r.cond.Wait()
		}
		lost = lost || n > 0 && requests && r.deaf
		r.mu.Unlock()
		if n > 0 && !lost {
			if _, err := dst.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (r *relay) url() string { return "http://" + r.ln.Addr().String() }

func (r *relay) freeze(on bool) {
	r.mu.Lock()
	r.frozen = on
	r.cond.Broadcast()
	r.mu.Unlock()
}

// swallow lets what the pool sends vanish from now on, and what the member sends through.
func (r *relay) swallow(on bool) {
	r.mu.Lock()
	r.deaf = on
	r.mu.Unlock()
}

// kill closes all connections; new ones are taken.
func (r *relay) kill() {
	r.mu.Lock()
	conns := r.conns
	r.conns = nil
	r.mu.Unlock()
	for _, c := range conns {
		if tc, ok := c.(*net.TCPConn); ok {
			_ = tc.SetLinger(0)
		}
		c.Close()
	}
}

func (r *relay) stop() {
	r.ln.Close()
	r.freeze(false)
	r.kill()
	r.wg.Wait()
}

// fakeMember is a gRPC server without protobuf: handle gets each stream with its path.
type fakeMember struct {
	ln  net.Listener
	srv *grpc.Server
}

// rawBytes is a codec of messages that are []byte.
type rawBytes struct{}

func (rawBytes) Marshal(v any) ([]byte, error)   { return *v.(*[]byte), nil }
func (rawBytes) Unmarshal(b []byte, v any) error { *v.(*[]byte) = bytes.Clone(b); return nil }
func (rawBytes) Name() string                    { return "raw" }

type fakeStream struct{ grpc.ServerStream }

func (s fakeStream) recv() ([]byte, error) {
	var b []byte
	err := s.RecvMsg(&b)
	return b, err
}

func (s fakeStream) send(b []byte) error { return s.SendMsg(&b) }

func newFakeMember(t testing.TB, handle func(path string, s fakeStream) error, opts ...grpc.ServerOption) *fakeMember {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	opts = append(opts, grpc.ForceServerCodec(rawBytes{}), grpc.MaxRecvMsgSize(64<<20), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		path, _ := grpc.MethodFromServerStream(s)
		return handle(path, fakeStream{s})
	}))
	f := &fakeMember{ln, grpc.NewServer(opts...)}
	served := make(chan struct{})
	go func() { defer close(served); _ = f.srv.Serve(ln) }()
	t.Cleanup(func() { f.srv.Stop(); <-served })
	return f
}

func (f *fakeMember) url() string  { return "http://" + f.addr() }
func (f *fakeMember) addr() string { return f.ln.Addr().String() }

// echo answers every message with itself.
func echo(_ string, s fakeStream) error {
	for {
		b, err := s.recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.send(b); err != nil {
			return err
		}
	}
}

// unary answers one message by f.
func unary(f func(req []byte) ([]byte, error)) func(string, fakeStream) error {
	return func(_ string, s fakeStream) error {
		b, err := s.recv()
		if err != nil {
			return err
		}
		if b, err = f(b); err != nil {
			return err
		}
		return s.send(b)
	}
}

// freePort returns an address where nobody listens.
func freePort(t testing.TB) string {
	t.Helper()
	return embeddedtest.FreeAddr(t)
}

// syncBuffer is a log's writer.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// lines returns the lines that contain s.
func (b *syncBuffer) lines(s string) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.DeleteFunc(strings.Split(b.buf.String(), "\n"), func(l string) bool { return !strings.Contains(l, s) })
}
