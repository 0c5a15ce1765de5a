package server

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"spindle/codec"
	"spindle/shard"
)

// fakeCore answers from a map. Requests for a key with the prefix "hold" wait until they are canceled
// or the test answers them; for the prefix "deaf" even a cancel does not end them.
type fakeCore struct {
	t    testing.TB
	loop *Loop // set once the engine runs; nil: no check of the goroutine

	// Loop 0's:
	data map[string]string
	held map[*shard.Op]string
	back bool // of leaseBack

	// heldC reports a key that was held, cancelC one whose op was canceled.
	heldC, cancelC chan string
	big            []byte // value of keys with the prefix "big"
}

func newFakeCore(t testing.TB) *fakeCore {
	return &fakeCore{
		t:       t,
		data:    map[string]string{},
		held:    map[*shard.Op]string{},
		heldC:   make(chan string, 10000),
		cancelC: make(chan string, 10000),
	}
}

func (f *fakeCore) Submit(op *shard.Op) {
	f.onLoop()
	switch op.Kind {
	case shard.OpPut:
		var req pb.PutRequest
		if err := proto.Unmarshal(op.Msg, &req); err != nil {
			op.Status = codec.Status{Code: codec.Internal, Msg: err.Error()}
			break
		}
		f.data[string(req.Key)] = string(req.Value)
		op.Resp = f.marshal(op.Resp, &pb.PutResponse{Header: &pb.ResponseHeader{Revision: 7}})
	case shard.OpRange:
		var req pb.RangeRequest
		if err := proto.Unmarshal(op.Msg, &req); err != nil {
			op.Status = codec.Status{Code: codec.Internal, Msg: err.Error()}
			break
		}
		if bytes.HasPrefix(req.Key, []byte("hold")) || bytes.HasPrefix(req.Key, []byte("deaf")) {
			f.held[op] = string(req.Key)
			f.heldC <- string(req.Key)
			return
		}
		f.get(op, string(req.Key))
	case shard.OpStatus:
		op.Resp = f.marshal(op.Resp, &pb.StatusResponse{Version: "3.6.0"})
	case shard.OpMemberList:
		op.Resp = f.marshal(op.Resp, &pb.MemberListResponse{Members: []*pb.Member{{Name: "spindle"}}})
	case shard.OpAlarm:
		op.Resp = f.marshal(op.Resp, &pb.AlarmResponse{})
	case shard.OpCompact:
		op.Status = codec.ErrCompacted
	case shard.OpTxn:
		op.Resp = f.marshal(op.Resp, &pb.TxnResponse{Succeeded: true})
	case shard.OpDeleteRange:
		op.Resp = f.marshal(op.Resp, &pb.DeleteRangeResponse{Deleted: 1})
	default:
		if f.lease(op) {
			return
		}
	}
	op.Done(op)
}

func (f *fakeCore) get(op *shard.Op, key string) {
	resp := &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: 7}}
	if v, ok := f.data[key]; ok {
		resp.Kvs, resp.Count = []*mvccpb.KeyValue{{Key: []byte(key), Value: []byte(v)}}, 1
	} else if bytes.HasPrefix([]byte(key), []byte("big")) {
		resp.Kvs, resp.Count = []*mvccpb.KeyValue{{Key: []byte(key), Value: f.big}}, 1
	}
	op.Resp = f.marshal(op.Resp, resp)
}

func (f *fakeCore) marshal(dst []byte, m proto.Message) []byte {
	b, err := proto.MarshalOptions{}.MarshalAppend(dst, m)
	if err != nil {
		f.t.Errorf("marshal: %v", err)
	}
	return b
}

func (f *fakeCore) Cancel(op *shard.Op) {
	f.onLoop()
	key, ok := f.held[op]
	if !ok {
		f.t.Errorf("Cancel of an op that the core does not have: %q", op.Msg)
		return
	}
	f.cancelC <- key
	if bytes.HasPrefix([]byte(key), []byte("deaf")) {
		return
	}
	delete(f.held, op)
	op.Status = codec.Status{Code: codec.Canceled, Msg: "context canceled"}
	op.Done(op)
}

// release answers every held op, on loop 0.
func (f *fakeCore) release(l *Loop) {
	done := make(chan struct{})
	l.Post(func() {
		defer close(done)
		for op, key := range f.held {
			delete(f.held, op)
			if op.Kind == shard.OpLeaseKeepAlive {
				f.keepAlive(op, key)
			} else {
				f.get(op, key)
			}
			op.Done(op)
		}
	})
	<-done
}

// onLoop checks that the core is called within a turn of loop 0.
func (f *fakeCore) onLoop() {
	if f.loop != nil && !f.loop.inTurn {
		f.t.Error("the core was called outside of its loop")
	}
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

type testServer struct {
	*Engine
	core *fakeCore
}

// startServer runs an engine with a fakeCore on 127.0.0.1.
func startServer(t testing.TB, cfg Config, setup ...func(*Engine)) *testServer {
	t.Helper()
	if cfg.ListenURLs == nil {
		cfg.ListenURLs = []string{"http://127.0.0.1:0"}
	}
	cfg.Log = quiet()
	if os.Getenv("SPINDLE_TEST_LOG") != "" {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	cfg.OnPanic = func(err error, _ bool) {
		buf := make([]byte, 1<<16)
		t.Errorf("%v\n%s", err, buf[:runtime.Stack(buf, false)])
	}
	e, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	f := newFakeCore(t)
	f.loop = e.Loops()[0]
	e.SetCore(f)
	for _, s := range setup {
		s(e)
	}
	e.SetReady(true)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), guard)
		defer cancel()
		if err := e.Stop(ctx); err != nil {
			t.Errorf("Stop: %v", err)
		}
	})
	return &testServer{e, f}
}

func (s *testServer) addr() string { return s.Addrs()[0].String() }

func (s *testServer) dial(t testing.TB, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	opts = append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))
	cc, err := grpc.NewClient("passthrough:///"+s.addr(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
}

func (s *testServer) dialTCP(t testing.TB) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", s.addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// onLoop runs f on l and waits for it.
func onLoop(l *Loop, f func()) {
	done := make(chan struct{})
	l.Post(func() { defer close(done); f() })
	<-done
}

// guard is how long a test waits for what must happen: a busy machine stands still for seconds. What must not be waited for has ten times as long.
const guard = time.Minute

// eventually waits until cond holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	within(t, guard, what, cond)
}

func within(t testing.TB, d time.Duration, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	late := time.After(d)
	for !cond() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("did not happen: %s", what)
		}
	}
}

func receive[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(guard):
		t.Fatalf("did not happen: %s", what)
		panic("unreachable")
	}
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), guard)
	t.Cleanup(cancel)
	return ctx
}

// forLoops runs a test with one loop and with three.
func forLoops(t *testing.T, f func(t *testing.T, loops int)) {
	for _, n := range []int{1, 3} {
		t.Run(map[int]string{1: "1loop", 3: "3loops"}[n], func(t *testing.T) { f(t, n) })
	}
}
