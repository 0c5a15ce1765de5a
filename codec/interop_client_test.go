package codec

import (
	"bytes"
	"crypto/rand"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"golang.org/x/net/http2"
)

// The client's side of a Conn against grpc-go's server.

// rpc collects what a client's Conn reports of one stream; s.User points to it.
type rpc struct {
	s    *Stream
	msgs chan []byte
	end  chan rpcEnd
}

type rpcEnd struct {
	st          Status
	unprocessed bool
}

type clientEvents struct {
	goAway chan struct{}
	pong   chan struct{}
	onMsg  func(s *Stream, msg []byte)
}

func newClientEvents() *clientEvents {
	return &clientEvents{goAway: make(chan struct{}, 1), pong: make(chan struct{}, 16)}
}

func (e *clientEvents) OnMessage(s *Stream, msg []byte) {
	if e.onMsg != nil {
		e.onMsg(s, msg)
	}
	s.User.(*rpc).msgs <- bytes.Clone(msg)
}
func (e *clientEvents) OnEnd(s *Stream, st Status, unprocessed bool) {
	s.User.(*rpc).end <- rpcEnd{st, unprocessed}
}
func (e *clientEvents) OnGoAway() { e.goAway <- struct{}{} }
func (e *clientEvents) OnPong()   { e.pong <- struct{}{} }

type testClient struct {
	*shim
	ev *clientEvents
}

func newTestClient(t testing.TB, addr string, cfg ConnConfig) *testClient {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	ev := newClientEvents()
	c := &testClient{newShim(nc, NewClientConn(cfg, addr, ev)), ev}
	t.Cleanup(c.close)
	return c
}

// open starts an RPC; nil when the Conn refuses.
func (c *testClient) open(path string, hasLeader bool, timeout time.Duration, msgs ...[]byte) (r *rpc) {
	c.call(func() {
		s := c.c.Open(path, hasLeader, timeout)
		if s == nil {
			return
		}
		r = &rpc{s: s, msgs: make(chan []byte, 4096), end: make(chan rpcEnd, 2)}
		s.User = r
		for _, m := range msgs {
			c.c.Send(s, m)
		}
	})
	return r
}

func (c *testClient) unary(path string, msg []byte) ([]byte, rpcEnd) {
	r := c.open(path, false, 0, msg)
	if r == nil {
		return nil, rpcEnd{Status{Unknown, "not opened"}, true}
	}
	c.do(func() { c.c.CloseSend(r.s) })
	end := <-r.end
	select {
	case m := <-r.msgs:
		return m, end
	default:
		return nil, end
	}
}

// grpcServer is grpc-go with the methods of echo.
func grpcServer(t testing.TB, opts ...grpc.ServerOption) (string, *grpc.Server) {
	t.Helper()
	handler := func(_ any, st grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(st)
		var msg []byte
		switch method {
		case "/t/Unary", "/t/Error", "/t/Meta":
			if err := st.RecvMsg(&msg); err != nil {
				return err
			}
			if method == "/t/Error" {
				return status.Error(codes.Code(msg[0]), string(msg[1:]))
			}
			if method == "/t/Meta" {
				md, _ := metadata.FromIncomingContext(st.Context())
				_, has := st.Context().Deadline()
				msg = []byte(strings.Join(md["hasleader"], ",") + " " + strings.Join(md[":authority"], ","))
				if has {
					msg = append(msg, " deadline"...)
				}
			}
			return st.SendMsg(&msg)
		case "/t/Stream":
			for {
				if err := st.RecvMsg(&msg); err == io.EOF {
					return nil
				} else if err != nil {
					return err
				}
				if err := st.SendMsg(&msg); err != nil {
					return err
				}
			}
		case "/t/Hang":
			<-st.Context().Done()
			return st.Context().Err()
		}
		return status.Error(codes.Unimplemented, "unknown method "+method)
	}
	srv := grpc.NewServer(append(opts, grpc.ForceServerCodec(rawCodec{}), grpc.MaxRecvMsgSize(64<<20),
		grpc.UnknownServiceHandler(handler))...)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go srv.Serve(l)
	t.Cleanup(srv.Stop)
	return l.Addr().String(), srv
}

func TestClientUnary(t *testing.T) {
	addr, _ := grpcServer(t)
	c := newTestClient(t, addr, ConnConfig{StreamWindow: 16 << 20, ConnWindow: 64 << 20})
	for _, n := range []int{0, 1, 16379, 16380, 100_000, 1 << 20} {
		msg := make([]byte, n)
		rand.Read(msg)
		out, end := c.unary("/t/Unary", msg)
		if end.st.Code != OK || !bytes.Equal(out, msg) {
			t.Fatalf("%d bytes: %d back, %+v", n, len(out), end)
		}
	}
	out, end := c.unary("/t/Meta", nil)
	if want := " " + addr; string(out) != want || end.st.Code != OK {
		t.Errorf("got %q, want %q (%+v)", out, want, end)
	}
	r := c.open("/t/Meta", true, time.Hour, nil)
	c.do(func() { c.c.CloseSend(r.s) })
	if end := <-r.end; end.st.Code != OK || string(<-r.msgs) != "true "+addr+" deadline" {
		t.Errorf("%+v", end)
	}
}

func TestClientBigMessagesSmallWindows(t *testing.T) {
	addr, _ := grpcServer(t)
	c := newTestClient(t, addr, ConnConfig{StreamWindow: 10_000, ConnWindow: 65_535, MaxMessageBytes: 16 << 20})
	msg := make([]byte, 8<<20)
	rand.Read(msg)
	var rs []*rpc
	for i := 0; i < 3; i++ {
		r := c.open("/t/Unary", false, 0, msg)
		c.do(func() { c.c.CloseSend(r.s) })
		rs = append(rs, r)
	}
	for _, r := range rs {
		if end := <-r.end; end.st.Code != OK || !bytes.Equal(<-r.msgs, msg) {
			t.Fatalf("%+v", end)
		}
	}
	c.call(func() {
		if c.c.Queued() != 0 || c.c.assembling != 0 || c.c.Streams() != 0 {
			t.Errorf("queued %d, assembling %d, streams %d", c.c.Queued(), c.c.assembling, c.c.Streams())
		}
	})
}

func TestClientStreamHoldAndStatuses(t *testing.T) {
	addr, _ := grpcServer(t)
	c := newTestClient(t, addr, ConnConfig{StreamWindow: 65_535, MaxMessageBytes: 2 << 20})
	r := c.open("/t/Stream", true, 0)
	// Held, at most one window arrives; then all.
	c.call(func() { c.c.Hold(r.s, true) })
	msg := bytes.Repeat([]byte("h"), 9_995)
	c.call(func() {
		for i := 0; i < 20; i++ {
			c.c.Send(r.s, msg)
		}
	})
	for i := 0; i < 6; i++ { // six messages of 10,000 bytes fit the window
		<-r.msgs
	}
	if out, end := c.unary("/t/Unary", []byte("beside")); end.st.Code != OK || string(out) != "beside" {
		t.Errorf("a held stream stops others: %+v", end)
	}
	select {
	case <-r.msgs:
		t.Error("a held stream got more than its window")
	default:
	}
	c.call(func() { c.c.Hold(r.s, false) })
	for i := 6; i < 20; i++ {
		if !bytes.Equal(<-r.msgs, msg) {
			t.Fatal("message changed")
		}
	}
	c.do(func() { c.c.CloseSend(r.s) })
	if end := <-r.end; end.st.Code != OK {
		t.Errorf("%+v", end)
	}

	for _, text := range []string{"etcdserver: no leader", "ünï%41\ncode", ""} {
		_, end := c.unary("/t/Error", append([]byte{byte(Unavailable)}, text...))
		if (end != rpcEnd{Status{Unavailable, text}, false}) {
			t.Errorf("got %+v, want %q", end, text)
		}
	}
	if _, end := c.unary("/t/None", nil); (end.st != Status{Unimplemented, "unknown method /t/None"}) {
		t.Errorf("%+v", end)
	}
	if _, end := c.unary("/t/Unary", make([]byte, 2<<20+1)); (end.st != Status{ResourceExhausted,
		"spindle: an answer larger than max (2097153 vs. 2097152)"}) {
		t.Errorf("%+v", end)
	}
	r = c.open("/t/Hang", false, 0, nil)
	c.call(func() { c.c.Reset(r.s) })
	c.do(func() { c.c.Ping() })
	<-c.ev.pong
	select {
	case end := <-r.end:
		t.Errorf("an event after Reset: %+v", end)
	default:
	}
}

func TestClientStreamLimitGoAwayAndClose(t *testing.T) {
	addr, srv := grpcServer(t, grpc.MaxConcurrentStreams(2))
	c := newTestClient(t, addr, ConnConfig{})
	c.unary("/t/Unary", nil) // the SETTINGS are here now
	a, b := c.open("/t/Stream", false, 0), c.open("/t/Hang", false, 0, nil)
	if a == nil || b == nil || c.open("/t/Hang", false, 0) != nil {
		t.Fatal("the server's stream limit is not kept")
	}
	stopped := make(chan struct{})
	go func() { srv.GracefulStop(); close(stopped) }()
	<-c.ev.goAway
	if c.open("/t/Unary", false, 0) != nil {
		t.Error("Open after GOAWAY")
	}
	c.do(func() { c.c.Send(a.s, []byte("still works")) })
	if string(<-a.msgs) != "still works" {
		t.Error("a stream below GOAWAY is broken")
	}
	c.do(func() { c.c.CloseSend(a.s) })
	if end := <-a.end; end.st.Code != OK {
		t.Errorf("%+v", end)
	}
	srv.Stop()
	if end := <-b.end; end.st.Code != Unavailable && end.st.Code != Canceled {
		t.Errorf("%+v", end)
	}
	<-stopped
}

// A server that is not gRPC, or answers oddly: x/net's http2.Server.
func TestClientAgainstPlainHTTP2(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var posts atomic.Int32
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		posts.Add(1)
		switch r.URL.Path {
		case "/404":
			http.Error(w, "no", 404)
		case "/503":
			w.WriteHeader(503)
		case "/notrailers":
			w.Header().Set("Content-Type", "application/grpc")
			w.Write([]byte{0, 0, 0, 0, 1, 'x'})
		case "/cut":
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Trailer", "Grpc-Status")
			w.Write([]byte{0, 0, 0, 0, 9, 'x'})
			w.Header().Set("Grpc-Status", "0")
		case "/badstatus":
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Grpc-Status", "x")
		}
	})
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			go new(http2.Server).ServeConn(nc, &http2.ServeConnOpts{Handler: h})
		}
	}()
	c := newTestClient(t, l.Addr().String(), ConnConfig{})
	tests := []struct {
		path string
		code Code
		text string
	}{
		{"/404", Unimplemented, "unexpected HTTP status code received from server: 404 (Not Found); transport: received unexpected content-type"},
		{"/503", Unavailable, "unexpected HTTP status code received from server: 503 (Service Unavailable); malformed header: missing HTTP content-type"},
		{"/notrailers", Internal, "server closed the stream without sending trailers"},
		{"/cut", Internal, "unexpected EOF"},
		{"/badstatus", Unknown, "transport: malformed grpc-status"},
	}
	for _, tt := range tests {
		if _, end := c.unary(tt.path, []byte("m")); end.st.Code != tt.code || !strings.HasPrefix(end.st.Msg, tt.text) {
			t.Errorf("%s: %+v", tt.path, end)
		}
	}
	if posts.Load() != int32(len(tests)) {
		t.Error(posts.Load())
	}
}
