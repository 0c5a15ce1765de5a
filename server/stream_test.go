package server

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"spindle/codec"
)

// burstStream answers one message with many, and ends when all were taken.
type burstStream struct {
	rpc    *RPC
	n      int
	msg    []byte
	queued chan int
	t      testing.TB
}

func (b *burstStream) Open(rpc *RPC) { b.rpc = rpc }
func (b *burstStream) Message([]byte) {
	for range b.n {
		b.rpc.Send(b.msg)
	}
	b.queued <- b.rpc.Queued()
}
func (b *burstStream) HalfClose() {}
func (b *burstStream) Cancel()    { b.t.Error("canceled") }
func (b *burstStream) Drained() {
	if q := b.rpc.Queued(); q != 0 {
		b.t.Errorf("drained with %d bytes queued", q)
	}
	if !b.rpc.Open() || b.rpc.HasLeader() || b.rpc.Loop().Index() != 0 {
		b.t.Error("the RPC says wrong things about itself")
	}
	b.rpc.Hold(true)
	b.rpc.Hold(false)
	b.rpc.Finish(codec.Status{})
	// After the end, all of it does nothing.
	b.rpc.Send(b.msg)
	b.rpc.Hold(true)
	b.rpc.Finish(codec.Status{Code: codec.Internal})
	if b.rpc.Open() || b.rpc.Queued() != 0 {
		b.t.Error("the RPC is not over")
	}
}

// TestStreamBackpressure has a client whose windows are shut at first.
func TestStreamBackpressure(t *testing.T) {
	const n, size = 300, 10 << 10
	queued := make(chan int, 1)
	s := startServer(t, Config{Loops: 1, MaxOutbound: 64 << 10}, func(e *Engine) {
		e.HandleStream("/etcdserverpb.Watch/Watch", func(*Loop) StreamHandler {
			return &burstStream{n: n, msg: make([]byte, size), queued: queued, t: t}
		})
	})
	p := newPeer(t, s.dialTCP(t))
	p.request(1, "/etcdserverpb.Watch/Watch", "", []byte("go"))
	if q := receive(t, "the burst", queued); q < n*size/2 {
		t.Errorf("%d bytes queued of %d", q, n*size)
	}
	p.ping()
	if len(p.status) != 0 {
		t.Error("ended before the client took anything")
	}
	p.openWindows()
	if code, msg := p.trailers(1); code != "0" {
		t.Errorf("ended with %s %q", code, msg)
	}
	if p.dataBytes < n*size {
		t.Errorf("got %d bytes of %d", p.dataBytes, n*size)
	}
}

// echoStream sends every message back and ends at the half-close.
type echoStream struct {
	rpc    *RPC
	events chan string
}

func (e *echoStream) Open(rpc *RPC)      { e.rpc = rpc; e.events <- "open" }
func (e *echoStream) Message(msg []byte) { e.rpc.Send(msg) }
func (e *echoStream) HalfClose() {
	e.rpc.Finish(codec.Status{Code: codec.Aborted, Msg: "that was all"})
}
func (e *echoStream) Cancel()  { e.rpc.Send([]byte("to nobody")); e.events <- "cancel" }
func (e *echoStream) Drained() {}

func TestStreams(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		events := make(chan string, 100)
		s := startServer(t, Config{Loops: loops}, func(e *Engine) {
			e.HandleStream("/etcdserverpb.Watch/Watch", func(l *Loop) StreamHandler { return &echoStream{events: events} })
			e.HandleStream("/test.Echo/Echo", func(l *Loop) StreamHandler { return &echoStream{events: events} })
		})
		cc := s.dial(t)
		desc := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
		for _, path := range []string{"/etcdserverpb.Watch/Watch", "/test.Echo/Echo"} {
			st, err := cc.NewStream(testContext(t), desc, path, grpc.ForceCodec(rawBytes{}))
			if err != nil {
				t.Fatal(err)
			}
			for i := range 100 {
				want := strings.Repeat("m", i*100)
				var got []byte
				if err := st.SendMsg([]byte(want)); err != nil {
					t.Fatal(err)
				}
				if err := st.RecvMsg(&got); err != nil || string(got) != want {
					t.Fatalf("got %d bytes, %v", len(got), err)
				}
			}
			_ = st.CloseSend()
			var got []byte
			if err := st.RecvMsg(&got); status.Code(err) != codes.Aborted {
				t.Errorf("end: %v", err)
			}
			receive(t, "open", events)

			ctx, cancel := context.WithCancel(testContext(t))
			st, err = cc.NewStream(ctx, desc, path, grpc.ForceCodec(rawBytes{}))
			if err != nil {
				t.Fatal(err)
			}
			_ = st.SendMsg([]byte("x"))
			receive(t, "open", events)
			cancel()
			if e := receive(t, "cancel", events); e != "cancel" {
				t.Errorf("got %s", e)
			}
		}
	})
}
