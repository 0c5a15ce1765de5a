package server

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"spindle/codec"
)

func TestClientV3(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		s := startServer(t, Config{Loops: loops})
		if n := len(s.Loops()); n != loops {
			t.Fatalf("%d loops, want %d", n, loops)
		}
		for range 2 * loops { // some connection lies on each loop
			cl, err := clientv3.New(clientv3.Config{Endpoints: []string{s.addr()}, Logger: zap.NewNop()})
			if err != nil {
				t.Fatal(err)
			}
			defer cl.Close()
			ctx := testContext(t)
			if put, err := cl.Put(ctx, "a", "b"); err != nil || put.Header.Revision != 7 {
				t.Fatalf("Put: %v, %v", put, err)
			}
			if get, err := cl.Get(ctx, "a"); err != nil || get.Count != 1 || string(get.Kvs[0].Value) != "b" {
				t.Fatalf("Get: %v, %v", get, err)
			}
			if del, err := cl.Delete(ctx, "a"); err != nil || del.Deleted != 1 {
				t.Fatalf("Delete: %v, %v", del, err)
			}
			if txn, err := cl.Txn(ctx).Then(clientv3.OpPut("x", "y")).Commit(); err != nil || !txn.Succeeded {
				t.Fatalf("Txn: %v, %v", txn, err)
			}
			if _, err := cl.Compact(ctx, 3); err != rpctypes.ErrCompacted {
				t.Fatalf("Compact: %v", err)
			}
			if st, err := cl.Status(ctx, s.addr()); err != nil || st.Version != "3.6.0" {
				t.Fatalf("Status: %v, %v", st, err)
			}
			if _, err := cl.AlarmList(ctx); err != nil {
				t.Fatalf("AlarmList: %v", err)
			}
			if ml, err := cl.MemberList(ctx); err != nil || ml.Members[0].Name != "spindle" {
				t.Fatalf("MemberList: %v, %v", ml, err)
			}
			_, err = cl.MoveLeader(ctx, 10)
			if st, _ := status.FromError(err); st.Code() != codes.Unimplemented ||
				st.Message() != "spindle: etcdserverpb.Maintenance/MoveLeader is not built yet" {
				t.Fatalf("MoveLeader: %v", err)
			}
		}
	})
}

func TestConcurrentRequests(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		s := startServer(t, Config{Loops: loops})
		const conns, requests = 8, 2000
		ctx := testContext(t)
		var wg sync.WaitGroup
		for c := range conns {
			kv := pb.NewKVClient(s.dial(t))
			for i := range requests / conns {
				wg.Add(1)
				go func() {
					defer wg.Done()
					key := fmt.Sprintf("key-%d-%d", c, i)
					value := strings.Repeat(key, 1+i%200)
					if _, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)}); err != nil {
						t.Errorf("Put: %v", err)
						return
					}
					resp, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
					if err != nil || len(resp.Kvs) != 1 || string(resp.Kvs[0].Value) != value {
						t.Errorf("Range %s: %v", key, err)
					}
				}()
			}
		}
		wg.Wait()
		for _, l := range s.Loops() {
			eventually(t, "nothing in flight", func() bool { return l.inflight.Load() == 0 })
			onLoop(l, func() {
				if l.timers.count != 0 || len(l.dirty) != 0 || len(l.blocked) != 0 {
					t.Errorf("left behind: %d timers, %d dirty, %d blocked", l.timers.count, len(l.dirty), len(l.blocked))
				}
			})
		}
	})
}

// rawBytes is a grpc-go codec that sends bytes as they are.
type rawBytes struct{}

func (rawBytes) Marshal(v any) ([]byte, error) { return v.([]byte), nil }
func (rawBytes) Unmarshal(b []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), b...)
	return nil
}
func (rawBytes) Name() string { return "proto" }
func callErr(cc *grpc.ClientConn, ctx context.Context, path string) error {
	var out []byte
	return cc.Invoke(ctx, path, []byte{}, &out, grpc.ForceCodec(rawBytes{}))
}

// TestRefusals compares the answers to what is not there with grpc-go's own.
func TestRefusals(t *testing.T) {
	s := startServer(t, Config{Loops: 1})
	ours := s.dial(t)

	ref := grpc.NewServer()
	pb.RegisterKVServer(ref, pb.UnimplementedKVServer{})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = ref.Serve(ln) }()
	defer ref.Stop()
	theirs, err := grpc.NewClient("passthrough:///"+ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()

	ctx := testContext(t)
	for _, path := range []string{
		"/etcdserverpb.KV/Nothing", "/nothing.Here/At", "/a/b/c", "/", "/x", "//", "/etcdserverpb.KV/",
		"/etcdserverpb.KV/Range/", "/with \"quotes\"",
	} {
		got, want := callErr(ours, ctx, path), callErr(theirs, ctx, path)
		if status.Code(want) != codes.Unimplemented {
			t.Fatalf("%s: reference says %v", path, want)
		}
		if got == nil || got.Error() != want.Error() {
			t.Errorf("%s: %v, want %v", path, got, want)
		}
	}

	// Without a message: half-closed at once.
	half := func(cc *grpc.ClientConn) error {
		st, err := cc.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, "/etcdserverpb.KV/Range")
		if err != nil {
			return err
		}
		if err := st.CloseSend(); err != nil {
			return err
		}
		return st.RecvMsg(&pb.RangeResponse{})
	}
	if got, want := half(ours), half(theirs); got == nil || got.Error() != want.Error() {
		t.Errorf("no message: %v, want %v", got, want)
	}

	// All that etcd has and Spindle has not answers, and by name.
	for _, sv := range services {
		for _, m := range sv.methods {
			if m.op != nil || sv.name == healthService.name {
				continue
			}
			path := "/" + sv.name + "/" + m.name
			if s.routes.find(path).kind != routeRefused {
				continue // a stream
			}
			st, err := ours.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, path)
			if err != nil {
				t.Fatal(err)
			}
			err = st.RecvMsg(&pb.RangeResponse{})
			if m.refusal.Code != codec.OK {
				if status.Code(err) != codes.Code(m.refusal.Code) || status.Convert(err).Message() != m.refusal.Msg {
					t.Errorf("%s: %v, want %v", path, err, m.refusal)
				}
				continue
			}
			if status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), sv.name+"/"+m.name) {
				t.Errorf("%s: %v", path, err)
			}
		}
	}
}

// TestRoutesComplete compares the list of methods with etcd's own.
func TestRoutesComplete(t *testing.T) {
	routes := newRoutes()
	for _, desc := range []grpc.ServiceDesc{
		pb.KV_ServiceDesc, pb.Watch_ServiceDesc, pb.Lease_ServiceDesc, pb.Cluster_ServiceDesc,
		pb.Maintenance_ServiceDesc, pb.Auth_ServiceDesc,
	} {
		n := 0
		for _, m := range desc.Methods {
			n++
			if routes.byPath["/"+desc.ServiceName+"/"+m.MethodName] == nil {
				t.Errorf("%s/%s is missing", desc.ServiceName, m.MethodName)
			}
		}
		for _, m := range desc.Streams {
			n++
			if routes.byPath["/"+desc.ServiceName+"/"+m.StreamName] == nil {
				t.Errorf("%s/%s is missing", desc.ServiceName, m.StreamName)
			}
		}
		for _, s := range services {
			if s.name == desc.ServiceName && len(s.methods) != n {
				t.Errorf("%s: %d methods, etcd has %d", s.name, len(s.methods), n)
			}
		}
	}
}

func TestCancelReachesTheCore(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		s := startServer(t, Config{Loops: loops})
		for range 2 * loops {
			kv := pb.NewKVClient(s.dial(t))
			ctx, cancel := context.WithCancel(testContext(t))
			failed := make(chan error, 1)
			go func() {
				_, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("hold")})
				failed <- err
			}()
			receive(t, "the request", s.core.heldC)
			cancel()
			receive(t, "core.Cancel", s.core.cancelC)
			if err := receive(t, "the client's error", failed); status.Code(err) != codes.Canceled {
				t.Errorf("client got %v", err)
			}
			if _, err := kv.Range(testContext(t), &pb.RangeRequest{Key: []byte("x")}); err != nil {
				t.Errorf("the connection does not work any more: %v", err)
			}
		}
	})
}

// TestDeadline sends grpc-timeout but goes on listening, so that the server's own answer is seen.
func TestDeadline(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		s := startServer(t, Config{Loops: loops})
		for range 2 * loops {
			p := newPeer(t, s.dialTCP(t))
			started := time.Now()
			p.request(1, "/etcdserverpb.KV/Range", "60m", marshal(t, &pb.RangeRequest{Key: []byte("hold")}))
			receive(t, "the request", s.core.heldC)
			code, msg := p.trailers(1)
			if code != "4" || msg != "context deadline exceeded" {
				t.Errorf("got %s %q", code, msg)
			}
			if d := time.Since(started); d < 50*time.Millisecond {
				t.Errorf("answered after %v", d)
			}
			receive(t, "core.Cancel", s.core.cancelC)
			p.request(3, "/etcdserverpb.KV/Range", "60S", marshal(t, &pb.RangeRequest{Key: []byte("x")}))
			if code, msg := p.trailers(3); code != "0" {
				t.Errorf("in time: %s %q", code, msg)
			}
		}
	})
}

// TestReplyAfterClose lets the core finish a request long after its connection is gone, when another
// client has got the file descriptor. That one must not see a byte of it.
func TestReplyAfterClose(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		s := startServer(t, Config{Loops: loops})
		for range 2 * loops {
			victim := s.dialTCP(t)
			p := newPeer(t, victim)
			p.request(1, "/etcdserverpb.KV/Range", "", marshal(t, &pb.RangeRequest{Key: []byte("deaf-secret")}))
			receive(t, "the request", s.core.heldC)
			eventually(t, "those of the last turn are gone", func() bool { return s.conns.Load() == 1 })
			_ = victim.Close()
			receive(t, "core.Cancel", s.core.cancelC)
			eventually(t, "the connection is gone", func() bool { return s.conns.Load() == 0 })

			others := make([]*peer, 4) // one of them has the descriptor
			for i := range others {
				others[i] = newPeer(t, s.dialTCP(t))
				others[i].ping()
			}
			s.core.release(s.Loops()[0])
			for _, l := range s.Loops() {
				onLoop(l, func() {})
			}
			for i, o := range others {
				o.ping()
				if o.streamFrames > 0 {
					t.Errorf("client %d got another client's answer", i)
				}
				_ = o.c.Close()
			}
			for _, l := range s.Loops() {
				eventually(t, "nothing in flight", func() bool { return l.inflight.Load() == 0 })
			}
		}
	})
}

func TestManyClosedInFlight(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		s := startServer(t, Config{Loops: loops})
		const conns, requests = 6, 50
		for i := range conns {
			p := newPeer(t, s.dialTCP(t))
			for r := range requests {
				key := "hold"
				if r%2 == 0 {
					key = "deaf"
				}
				p.request(uint32(1+2*r), "/etcdserverpb.KV/Range", "30S", marshal(t, &pb.RangeRequest{Key: []byte(key)}))
			}
			for range requests {
				receive(t, "request", s.core.heldC)
			}
			if i%2 == 0 {
				_ = p.c.(*net.TCPConn).SetLinger(0) // a reset
			}
			_ = p.c.Close()
			for range requests {
				receive(t, "cancel", s.core.cancelC)
			}
		}
		s.core.release(s.Loops()[0])
		for _, l := range s.Loops() {
			onLoop(l, func() {})
			onLoop(l, func() {
				if l.timers.count != 0 || l.inflight.Load() != 0 {
					t.Errorf("%d timers, %d in flight", l.timers.count, l.inflight.Load())
				}
			})
		}
	})
}

// TestClientThatDoesNotRead asks for far more than it reads, with the largest windows.
func TestClientThatDoesNotRead(t *testing.T) {
	const maxOutbound = 256 << 10
	forLoops(t, func(t *testing.T, loops int) {
		s := startServer(t, Config{Loops: loops, MaxOutbound: maxOutbound, StallTimeout: time.Second}) // in which it is seen to be blocked
		onLoop(s.Loops()[0], func() { s.core.big = make([]byte, 64<<10) })
		dropped := metricConnsDropped.Get()
		p := newPeer(t, s.dialTCP(t))
		p.openWindows()
		const requests = 200 // 12.8 MB of answers: more than any socket buffer takes
		for r := range requests {
			p.request(uint32(1+2*r), "/etcdserverpb.KV/Range", "", marshal(t, &pb.RangeRequest{Key: []byte("big")}))
		}
		sawBlocked, most := false, 0
		eventually(t, "the client is dropped", func() bool {
			for _, l := range s.Loops() {
				onLoop(l, func() {
					for c := range l.conns {
						sawBlocked = sawBlocked || c.blocked
						most = max(most, c.sock.OutboundBuffered())
					}
				})
			}
			return metricConnsDropped.Get() > dropped
		})
		// One answer more than the bound, because a message is framed whole once it is begun... twice.
		if limit := 2*maxOutbound + 2*len(s.core.big); most > limit {
			t.Errorf("%d bytes waited for the socket, want at most %d", most, limit)
		}
		if !sawBlocked {
			t.Error("the connection was never blocked")
		}
		eventually(t, "the connection is gone", func() bool { return s.conns.Load() == 0 })
		for _, l := range s.Loops() {
			onLoop(l, func() {
				if len(l.blocked) != 0 {
					t.Errorf("%d still blocked", len(l.blocked))
				}
			})
		}
	})
}

// TestSlowReader reads late, but reads: it gets everything.
func TestSlowReader(t *testing.T) {
	s := startServer(t, Config{Loops: 1, MaxOutbound: 64 << 10})
	onLoop(s.Loops()[0], func() { s.core.big = make([]byte, 100<<10) })
	p := newPeer(t, s.dialTCP(t))
	p.openWindows()
	const requests = 150
	for r := range requests {
		p.request(uint32(1+2*r), "/etcdserverpb.KV/Range", "", marshal(t, &pb.RangeRequest{Key: []byte("big")}))
	}
	l := s.Loops()[0]
	eventually(t, "blocked", func() (blocked bool) {
		onLoop(l, func() { blocked = len(l.blocked) > 0 })
		return blocked
	})
	for r := range requests {
		if code, msg := p.trailers(uint32(1 + 2*r)); code != "0" {
			t.Fatalf("answer %d: %s %q", r, code, msg)
		}
	}
	if p.dataBytes < requests*len(s.core.big) {
		t.Errorf("got %d bytes", p.dataBytes)
	}
	eventually(t, "not blocked", func() (free bool) {
		onLoop(l, func() { free = len(l.blocked) == 0 })
		return free
	})
}

func TestTooManyRequests(t *testing.T) {
	s := startServer(t, Config{Loops: 1, Codec: codec.ConnConfig{MaxConcurrentStreams: 4 * maxOpsPerConn}})
	p := newPeer(t, s.dialTCP(t))
	msg := marshal(t, &pb.RangeRequest{Key: []byte("hold")})
	for i := range maxOpsPerConn + 1 {
		p.request(uint32(1+2*i), "/etcdserverpb.KV/Range", "", msg)
	}
	if code, msg := p.trailers(1 + 2*maxOpsPerConn); code != "8" || msg != "etcdserver: too many requests" {
		t.Errorf("got %s %q", code, msg)
	}
}

func TestNotReady(t *testing.T) {
	s := startServer(t, Config{Loops: 2})
	s.SetReady(false)
	c := s.dialTCP(t)
	_ = c.SetReadDeadline(time.Now().Add(guard))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
		t.Errorf("read %d, %v", n, err)
	}
	s.SetReady(true)
	newPeer(t, s.dialTCP(t)).ping()
}

func TestMaxConns(t *testing.T) {
	s := startServer(t, Config{Loops: 1, MaxConns: 2})
	for range 2 {
		newPeer(t, s.dialTCP(t)).ping()
	}
	c := s.dialTCP(t)
	_ = c.SetReadDeadline(time.Now().Add(guard))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
		t.Errorf("read %d, %v", n, err)
	}
}

// TestStop has a request under way that is answered while the engine drains, another that never is, and
// a stream.
func TestStop(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		events := make(chan string, 100)
		s := startServer(t, Config{Loops: loops, DrainTimeout: time.Second}, func(e *Engine) { // "hold" is answered in this time
			e.HandleStream("/etcdserverpb.Watch/Watch", func(*Loop) StreamHandler { return &echoStream{events: events} })
		})
		cc := s.dial(t)
		kv := pb.NewKVClient(cc)
		failed := make(chan error, 2)
		for _, key := range []string{"hold", "deaf"} {
			go func() {
				_, err := kv.Range(testContext(t), &pb.RangeRequest{Key: []byte(key)})
				failed <- err
			}()
			receive(t, "the request", s.core.heldC)
		}
		st, err := cc.NewStream(testContext(t), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/etcdserverpb.Watch/Watch", grpc.ForceCodec(rawBytes{}))
		if err != nil {
			t.Fatal(err)
		}
		_ = st.SendMsg([]byte("x"))
		receive(t, "open", events)

		home := s.Loops()[0]
		go func() { // once Stop waits
			for !s.draining.Load() {
				runtime.Gosched()
			}
			home.Post(func() {
				for op, key := range s.core.held {
					if key == "hold" {
						delete(s.core.held, op)
						s.core.get(op, key)
						op.Done(op)
					}
				}
			})
		}()
		started := time.Now()
		if err := s.Stop(context.Background()); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(started); d > guard/2 {
			t.Errorf("Stop took %v", d)
		}
		var codesSeen []codes.Code
		for range 2 {
			codesSeen = append(codesSeen, status.Code(receive(t, "an answer", failed)))
		}
		slices.Sort(codesSeen)
		if !(codesSeen[0] == codes.OK && codesSeen[1] == codes.Unavailable) {
			t.Errorf("requests under way ended with %v", codesSeen)
		}
		if e := receive(t, "the stream's end", events); e != "cancel" {
			t.Errorf("stream: %s", e)
		}
		if _, err := net.Dial("tcp", s.addr()); err == nil {
			t.Error("somebody still listens")
		}
		s.Loops()[0].Post(func() { t.Error("posted after the end") })
		select {
		case <-s.Done():
		default:
			t.Error("not done")
		}
		if s.Err() != nil {
			t.Errorf("Err: %v", s.Err())
		}
		eventually(t, "no goroutine is left", func() bool {
			return goroutines("gnet/v2.(*eventloop)", "gnet.(*engine)", "spindle/server.(*Engine)", "spindle/server.(*Loop)") == ""
		})
	})
}

// goroutines returns the stacks that contain one of the names.
func goroutines(names ...string) string {
	buf := make([]byte, 4<<20)
	var found []string
	for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		for _, n := range names {
			if strings.Contains(g, n) && !strings.Contains(g, "server.goroutines") {
				found = append(found, g)
			}
		}
	}
	return strings.Join(found, "\n\n")
}

// A core that answers late must not see the op of a call that has been used again: every op that is
// canceled at the same time as it is answered is released exactly once.
func TestCancelRacesWithDone(t *testing.T) {
	s := startServer(t, Config{Loops: 3})
	home := s.Loops()[0]
	stop := make(chan struct{})
	var releaser sync.WaitGroup
	releaser.Add(1)
	go func() {
		defer releaser.Done()
		for {
			select {
			case <-stop:
				return
			default:
				s.core.release(home)
			}
		}
	}()
	var wg sync.WaitGroup
	for range 6 {
		kv := pb.NewKVClient(s.dial(t))
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 200 {
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i%10)*100*time.Microsecond)
				_, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("hold")})
				cancel()
				if c := status.Code(err); c != codes.OK && c != codes.DeadlineExceeded {
					t.Errorf("got %v", err)
				}
			}
		}()
	}
	wg.Wait()
	close(stop)
	releaser.Wait()
	s.core.release(home)
	for _, l := range s.Loops() {
		eventually(t, "nothing in flight", func() bool { return l.inflight.Load() == 0 })
	}
}

var _ Core = (*fakeCore)(nil)
