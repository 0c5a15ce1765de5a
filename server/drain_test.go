package server

import (
	"io"
	"net"
	"path/filepath"
	"strings"
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
		s := startServer(t, Config{Loops: loops, DrainTimeout: 10 * guard})
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

// The end of a connection loses nothing that the kernel still has to send, although the client goes on sending: neither
// an answer at the drain, nor the GOAWAY that says why the connection ends.
func TestEndLosesNoAnswer(t *testing.T) {
	const size = 100 << 10
	for name, violate := range map[string]bool{"drain": false, "violation": true} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, Config{Loops: 1, DrainTimeout: 10 * guard})
			nc := s.dialTCP(t)
			if err := nc.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
				t.Fatal(err)
			}
			p := newPeer(t, nc)
			p.openWindows()
			p.ping()
			p.goAwayOK = true
			l := s.Loops()[0]
			var c *clientConn
			onLoop(l, func() {
				s.core.data["hold"] = strings.Repeat("x", size)
				for c = range l.conns {
					_ = c.sock.SetWriteBuffer(2 * size) // so that the kernel takes all of it
				}
			})
			p.request(1, "/etcdserverpb.KV/Range", "", marshal(t, &pb.RangeRequest{Key: []byte("hold")}))
			receive(t, "the request arrives", s.core.heldC)
			stopped := make(chan error, 1)
			if violate {
				s.core.release(l)
				p.check(p.fr.WriteRawFrame(http2.FrameData, 0, 0, nil)) // of no stream
				p.check(p.w.Flush())
			} else {
				go func() { stopped <- s.Stop(testContext(t)) }()
				for pinged := false; !pinged; {
					_, pinged = p.read().(*http2.PingFrame)
				}
				s.core.release(l)
			}
			eventually(t, "all is said", func() (over bool) {
				onLoop(l, func() { over = c.closed || c.lingers != 0 })
				return over
			})
			p.check(p.fr.WritePing(false, [8]byte{2}))
			p.check(p.fr.WriteWindowUpdate(0, 1))
			p.check(p.w.Flush())
			if code, msg := p.trailers(1); code != "0" || p.dataBytes < size {
				t.Errorf("%d bytes of %d, %s %s", p.dataBytes, size, code, msg)
			}
			for violate {
				if f, ok := p.read().(*http2.GoAwayFrame); ok {
					if f.ErrCode != http2.ErrCodeProtocol {
						t.Error(f)
					}
					break
				}
			}
			var end error
			for end == nil { // the final GOAWAY may come behind the answer
				_, end = p.fr.ReadFrame()
			}
			if end != io.EOF {
				t.Errorf("the end came as %v", end)
			}
			_ = nc.Close()
			eventually(t, "it is gone", func() bool { return s.conns.Load() == 0 })
			if !violate {
				if err := receive(t, "Stop", stopped); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// A client that does not close its end is not waited for.
func TestLingerEnds(t *testing.T) {
	s := startServer(t, Config{Loops: 1})
	p := newPeer(t, s.dialTCP(t))
	p.goAwayOK = true
	p.ping()
	p.check(p.fr.WriteRawFrame(http2.FrameData, 0, 0, nil))
	p.check(p.w.Flush())
	eventually(t, "it is closed", func() bool { return s.conns.Load() == 0 })
}

// What the core has to say when it is closed reaches clients of all loops.
func TestLastWordsReachAllLoops(t *testing.T) {
	var s *testServer
	sock := filepath.Join(t.TempDir(), "s") // whose clients are spread over the loops
	s = startServer(t, Config{ListenURLs: []string{"unix://" + sock}, Loops: 3, DrainTimeout: 10 * time.Millisecond, BeforeClose: func() {
		for _, l := range s.Loops()[1:] { // which are late, until they are asked or stopped
			stalled := make(chan struct{})
			l.Post(func() {
				close(stalled)
				eventually(t, "the loop is asked", func() bool {
					l.mu.Lock()
					defer l.mu.Unlock()
					n := len(l.letters)
					return l.stopped || n > 0 && l.letters[n-1].kind == letterFunc
				})
			})
			receive(t, "the loop is busy", stalled)
		}
		s.core.release(s.Loops()[0])
	}})
	var peers []*peer
	for range 30 {
		c, err := net.Dial("unix", sock)
		if err != nil {
			t.Fatal(err)
		}
		p := newPeer(t, c)
		p.goAwayOK = true
		p.request(1, "/etcdserverpb.KV/Range", "", marshal(t, &pb.RangeRequest{Key: []byte("hold")}))
		receive(t, "the request arrives", s.core.heldC)
		peers = append(peers, p)
	}
	if err := s.Stop(testContext(t)); err != nil {
		t.Error(err)
	}
	for i, p := range peers {
		for ended := false; !ended; {
			f, err := p.fr.ReadFrame()
			if err != nil {
				t.Fatalf("client %d: %v", i, err)
			}
			h, ok := f.(*http2.MetaHeadersFrame)
			ended = ok && h.StreamEnded()
		}
	}
}

// A client that was accepted just before Stop, and whose loop takes it only after its GOAWAYs, is told to go, too.
func TestStopTellsLateClients(t *testing.T) {
	s := startServer(t, Config{Loops: 1, DrainTimeout: 10 * guard})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	nc, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	old := newPeer(t, s.dialTCP(t)) // which keeps Stop waiting
	old.ping()
	old.goAwayOK, old.holdPings = true, true
	stopped := make(chan error, 1)
	go func() { stopped <- s.Stop(testContext(t)) }()
	for gone := false; !gone; { // goAway has run
		_, gone = old.read().(*http2.GoAwayFrame)
	}
	x, err := newClientConn(s.Loops()[0]).enroll(nc)
	if err != nil {
		t.Fatal(err)
	}
	x.wait()
	p := newPeer(t, c)
	p.goAwayOK = true
	for pinged := false; !pinged; { // behind the GOAWAY
		_, pinged = p.read().(*http2.PingFrame)
	}
	_ = old.c.Close()
	for gone := false; !gone; { // the server ends it, long before its time is over
		_, err := p.fr.ReadFrame()
		gone = err != nil
	}
	if err := receive(t, "Stop", stopped); err != nil {
		t.Error(err)
	}
}
