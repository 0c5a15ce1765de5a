package server

import (
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"spindle/codec"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// stubborn answers each message and never ends; endless does when the server goes away.
type stubborn struct{ rpc *RPC }

func (h *stubborn) Open(rpc *RPC)      { h.rpc = rpc }
func (h *stubborn) Message(msg []byte) { h.rpc.Send(msg) }
func (h *stubborn) HalfClose()         {}
func (h *stubborn) Cancel()            {}
func (h *stubborn) Drained()           {}

type endless struct{ stubborn }

func (h *endless) Drain() { h.rpc.Finish(codec.ErrStopped) }

// A request that was on its way when the server said GOAWAY is answered, and the connection is closed only after it.
func TestStopAnswersRequestsUnderWay(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		s := startServer(t, Config{Loops: loops, DrainTimeout: 10 * time.Second})
		p := newPeer(t, s.dialTCP(t))
		p.ping()
		p.goAwayOK, p.holdPings = true, true
		stopped := make(chan error, 1)
		go func() { stopped <- s.Stop(testContext(t)) }()
		var last uint32
		for last != 1<<31-1 { // announced
			if f, ok := p.read().(*http2.GoAwayFrame); ok {
				last = f.LastStreamID
			}
		}
		select {
		case <-stopped:
			t.Fatal("stopped while the GOAWAY was on its way")
		case <-time.After(3 * drainTouch):
		}
		// The client has not seen it yet: it sends more, and only then answers the PING.
		p.request(1, "/etcdserverpb.Maintenance/Status", "", nil)
		p.request(3, "/etcdserverpb.KV/Range", "", marshal(t, &pb.RangeRequest{Key: []byte("hold")}))
		receive(t, "the request arrives", s.core.heldC)
		p.holdPings = false
		p.answerPings()
		if code, msg := p.trailers(1); code != "0" {
			t.Errorf("%s %s", code, msg)
		}
		select {
		case <-stopped:
			t.Error("stopped with a request under way")
		default:
		}
		s.core.release(s.Loops()[0])
		if code, msg := p.trailers(3); code != "0" {
			t.Errorf("%s %s", code, msg)
		}
		if err := receive(t, "Stop", stopped); err != nil {
			t.Error(err)
		}
	})
}

// Streams that never end by themselves are told to move, the others have the drain time.
func TestStopMovesStreams(t *testing.T) {
	s := startServer(t, Config{DrainTimeout: 300 * time.Millisecond}, func(e *Engine) {
		e.HandleStream("/test/Endless", func(*Loop) StreamHandler { return &endless{} })
		e.HandleStream("/test/Stubborn", func(*Loop) StreamHandler { return &stubborn{} })
	})
	cc := s.dial(t)
	ctx := testContext(t)
	open := func(path string) func() error {
		st, err := cc.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, path, grpc.ForceCodec(rawBytes{}))
		if err != nil {
			t.Fatal(err)
		}
		var got []byte
		if err := st.SendMsg([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := st.RecvMsg(&got); err != nil {
			t.Fatal(err)
		}
		return func() error { return st.RecvMsg(&got) }
	}
	moves, stays := open("/test/Endless"), open("/test/Stubborn")
	start := time.Now()
	stopped := make(chan error, 1)
	go func() { stopped <- s.Stop(ctx) }()
	if err := moves(); status.Code(err) != codes.Unavailable || status.Convert(err).Message() != "etcdserver: server stopped" {
		t.Error(err)
	}
	if err := stays(); status.Code(err) != codes.Unavailable {
		t.Error(err)
	}
	if err := receive(t, "Stop", stopped); err != nil || time.Since(start) < 300*time.Millisecond {
		t.Error(err, time.Since(start))
	}
}

func TestStopWithoutClientsIsQuick(t *testing.T) {
	s := startServer(t, Config{DrainTimeout: time.Hour})
	cc := s.dial(t)
	if _, err := pb.NewMaintenanceClient(cc).Status(testContext(t), &pb.StatusRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(testContext(t)); err != nil { // grpc-go's client leaves by itself
		t.Error(err)
	}
}
