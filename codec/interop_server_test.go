package codec

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/status"
)

// The server's side of a Conn against grpc-go's client.

// rawCodec makes grpc-go send and receive bytes as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)      { return *(v.(*[]byte)), nil }
func (rawCodec) Unmarshal(data []byte, v any) error { *(v.(*[]byte)) = bytes.Clone(data); return nil }
func (rawCodec) Name() string                       { return "raw" }

func dialEcho(t testing.TB, cfg ConnConfig, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	l, err := listenEcho(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	opts = append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{}), grpc.MaxCallRecvMsgSize(64<<20)))
	cc, err := grpc.NewClient(l.Addr().String(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return cc
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func unary(ctx context.Context, cc *grpc.ClientConn, path string, msg []byte, opts ...grpc.CallOption) ([]byte, error) {
	var out []byte
	err := cc.Invoke(ctx, path, &msg, &out, opts...)
	return out, err
}

func TestServerUnary(t *testing.T) {
	cc := dialEcho(t, ConnConfig{})
	ctx := testContext(t)
	for _, n := range []int{0, 1, 5, 16379, 16380, 100_000, 1 << 20} {
		msg := make([]byte, n)
		rand.Read(msg)
		out, err := unary(ctx, cc, "/t/Unary", msg)
		if err != nil || !bytes.Equal(out, msg) {
			t.Fatalf("%d bytes: %d back, %v", n, len(out), err)
		}
	}
	var wg sync.WaitGroup
	for i := 0; i < 200; i++ {
		wg.Add(1)
		go func() {
			defer wg.Done()
			msg := fmt.Appendf(nil, "message %d", i)
			if out, err := unary(ctx, cc, "/t/Unary", msg); err != nil || !bytes.Equal(out, msg) {
				t.Errorf("%s: %s %v", msg, out, err)
			}
		}()
	}
	wg.Wait()
}

func TestServerBigMessagesSmallWindows(t *testing.T) {
	cc := dialEcho(t, ConnConfig{StreamWindow: 20_000, ConnWindow: 70_000, MaxMessageBytes: 16 << 20},
		grpc.WithInitialWindowSize(64<<10), grpc.WithInitialConnWindowSize(64<<10))
	ctx := testContext(t)
	msg := make([]byte, 8<<20)
	rand.Read(msg)
	var wg sync.WaitGroup
	for i := 0; i < 3; i++ {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if out, err := unary(ctx, cc, "/t/Unary", msg); err != nil || !bytes.Equal(out, msg) {
				t.Errorf("%d bytes back, %v", len(out), err)
			}
		}()
	}
	wg.Wait()
}

func TestServerStreaming(t *testing.T) {
	cc := dialEcho(t, ConnConfig{})
	st, err := cc.NewStream(testContext(t), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/t/Stream")
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < 100; i++ {
		msg := bytes.Repeat([]byte{byte(i)}, i*i*10)
		if err := st.SendMsg(&msg); err != nil {
			t.Fatal(err)
		}
		var out []byte
		if err := st.RecvMsg(&out); err != nil || !bytes.Equal(out, msg) {
			t.Fatalf("message %d: %d bytes, %v", i, len(out), err)
		}
	}
	st.CloseSend()
	var out []byte
	if err := st.RecvMsg(&out); err != io.EOF {
		t.Fatal(err)
	}
}

func TestServerStatuses(t *testing.T) {
	cc := dialEcho(t, ConnConfig{MaxMessageBytes: 100_000})
	ctx := testContext(t)
	for _, text := range []string{"etcdserver: mvcc: required revision has been compacted", "ünï%41\ncode", "",
		strings.Repeat("x", 3000)} {
		_, err := unary(ctx, cc, "/t/Error", append([]byte{byte(codes.OutOfRange)}, text...))
		if st := status.Convert(err); st.Code() != codes.OutOfRange || st.Message() != text {
			t.Errorf("got %v, want %q", st, text)
		}
	}
	expect := func(name string, err error, code codes.Code, text string) {
		t.Helper()
		if st := status.Convert(err); st.Code() != code || !strings.Contains(st.Message(), text) {
			t.Errorf("%s: got %v", name, st)
		}
	}
	_, err := unary(ctx, cc, "/t/None", nil)
	expect("unknown", err, codes.Unimplemented, "unknown method /t/None")
	_, err = unary(ctx, cc, "/t/Unary", make([]byte, 100_001))
	expect("too large", err, codes.ResourceExhausted, "grpc: received message larger than max (100001 vs. 100000)")
	_, err = unary(ctx, cc, "/t/Unary", make([]byte, 1000), grpc.UseCompressor("odd"))
	expect("odd", err, codes.Unimplemented, `grpc: Decompressor is not installed for grpc-encoding "odd"`)
	_, err = unary(ctx, cc, "/t/Unary", make([]byte, 100_001), grpc.UseCompressor("gzip"))
	expect("bomb", err, codes.ResourceExhausted, "grpc: received message after decompression larger than max 100000")
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	_, err = unary(short, cc, "/t/Hang", nil)
	expect("deadline", err, codes.DeadlineExceeded, "")
	if out, err := unary(ctx, cc, "/t/Unary", []byte("still alive")); err != nil || string(out) != "still alive" {
		t.Error(string(out), err)
	}
}

func TestServerSeesTimeoutLeaderAndCancel(t *testing.T) {
	nc1, nc2 := tcpPair(t)
	type seen struct {
		timeout time.Duration
		leader  bool
	}
	got := make(chan seen, 1)
	canceled := make(chan struct{}, 1)
	e := &echo{onReq: func(s *Stream) { got <- seen{s.Timeout, s.HasLeader} },
		onCancel: func(*Stream) { canceled <- struct{}{} }}
	e.c = NewServerConn(ConnConfig{}, e)
	sh := newShim(nc1, e.c)
	defer sh.close()
	cc := dialConn(t, nc2)
	ctx, cancel := context.WithTimeout(testContext(t), 7*time.Second)
	defer cancel()
	ctx = appendMetadata(ctx, "hasleader", "true")
	done := make(chan error, 1)
	go func() { _, err := unary(ctx, cc, "/t/Hang", nil); done <- err }()
	if s := <-got; !s.leader || s.timeout > 7*time.Second || s.timeout < time.Second {
		t.Errorf("%+v", s)
	}
	cancel()
	<-canceled
	if err := <-done; status.Code(err) != codes.Canceled {
		t.Error(err)
	}
	sh.call(func() {
		if n := e.c.Streams(); n != 0 {
			t.Errorf("%d streams left", n)
		}
	})
}

func TestServerStreamLimitAndGoAway(t *testing.T) {
	nc1, nc2 := tcpPair(t)
	arrived := make(chan *Stream, 10)
	e := &echo{onReq: func(s *Stream) { arrived <- s }}
	e.c = NewServerConn(ConnConfig{MaxConcurrentStreams: 2}, e)
	sh := newShim(nc1, e.c)
	defer sh.close()
	cc := dialConn(t, nc2)
	ctx := testContext(t)
	errs := make(chan error, 3)
	for i := 0; i < 3; i++ { // grpc-go waits with the third
		go func() { _, err := unary(ctx, cc, "/t/Hang", nil); errs <- err }()
	}
	a := <-arrived
	b := <-arrived
	sh.call(func() {
		if n := e.c.Streams(); n != 2 {
			t.Errorf("%d streams", n)
		}
		e.c.Finish(a, Status{Aborted, "a"})
	})
	if err := <-errs; status.Code(err) != codes.Aborted {
		t.Error(err)
	}
	c := <-arrived
	sh.call(func() {
		e.c.GoAway()
		e.c.Finish(b, Status{NotFound, "b"})
	})
	if err := <-errs; status.Code(err) != codes.NotFound {
		t.Error(err)
	}
	sh.call(func() { e.c.Finish(c, Status{DataLoss, "c"}) })
	if err := <-errs; status.Code(err) != codes.DataLoss {
		t.Error(err)
	}
}
