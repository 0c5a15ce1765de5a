package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"spindle/codec"
	"spindle/shard"
)

// Leases of the fakeCore. Keep-alives of [leaseHeld, leaseHeld+100000) wait like Ranges of "hold", those from leaseDeaf
// on like Ranges of "deaf"; leaseGone has expired; the home of [leaseDark, leaseDark+leasesDark) does not answer, and
// that of leaseBack does once back is set: the lease has expired.
const (
	leaseGone  = 404
	leaseBack  = 405
	leaseDark  = 503
	leasesDark = 2000
	leaseHeld  = 100_000
	leaseDeaf  = 200_000
)

// lease answers op, or reports that it is held.
func (f *fakeCore) lease(op *shard.Op) (held bool) {
	var m proto.Message
	switch op.Kind {
	case shard.OpLeaseGrant:
		var req pb.LeaseGrantRequest
		_ = proto.Unmarshal(op.Msg, &req)
		m = &pb.LeaseGrantResponse{ID: req.ID + 1, TTL: req.TTL}
	case shard.OpLeaseRevoke:
		op.Status = codec.ErrLeaseNotFound
		return false
	case shard.OpLeaseTimeToLive:
		var req pb.LeaseTimeToLiveRequest
		_ = proto.Unmarshal(op.Msg, &req)
		m = &pb.LeaseTimeToLiveResponse{ID: req.ID, TTL: -1}
	case shard.OpLeaseLeases:
		m = &pb.LeaseLeasesResponse{Leases: []*pb.LeaseStatus{{ID: 7}}}
	case shard.OpLeaseKeepAlive:
		var req pb.LeaseKeepAliveRequest
		if err := proto.Unmarshal(op.Msg, &req); err != nil {
			f.t.Error(err)
		}
		key := strconv.FormatInt(req.ID, 10)
		if req.ID >= leaseHeld {
			if key = "hold" + key; req.ID >= leaseDeaf {
				key = "deaf" + key[len("hold"):]
			}
			f.held[op] = key
			f.heldC <- key
			return true
		}
		f.keepAlive(op, "hold"+key)
		return false
	default:
		f.t.Errorf("the fake core knows no op %d", op.Kind)
		return false
	}
	op.Resp = f.marshal(op.Resp, m)
	return false
}

func (f *fakeCore) keepAlive(op *shard.Op, key string) {
	id, _ := strconv.ParseInt(key[len("hold"):], 10, 64)
	resp := &pb.LeaseKeepAliveResponse{ID: id, TTL: 10}
	switch {
	case id == leaseBack:
		if f.back {
			resp.TTL = 0
			break
		}
		fallthrough
	case id >= leaseDark && id < leaseDark+leasesDark:
		op.Status = codec.ErrTimeout
		return
	case id == leaseGone:
		resp.TTL = 0
	}
	op.Resp = f.marshal(op.Resp, resp)
}

func TestLeaseUnary(t *testing.T) {
	s := startServer(t, Config{})
	c, ctx := pb.NewLeaseClient(s.dial(t)), testContext(t)
	if r, err := c.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: 5, TTL: 9}); err != nil || r.ID != 6 || r.TTL != 9 {
		t.Errorf("LeaseGrant: %v, %v", r, err)
	}
	if _, err := c.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: 5}); status.Code(err) != codes.NotFound {
		t.Errorf("LeaseRevoke: %v", err)
	}
	if r, err := c.LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: 5}); err != nil || r.ID != 5 || r.TTL != -1 {
		t.Errorf("LeaseTimeToLive: %v, %v", r, err)
	}
	if r, err := c.LeaseLeases(ctx, &pb.LeaseLeasesRequest{}); err != nil || len(r.Leases) != 1 {
		t.Errorf("LeaseLeases: %v, %v", r, err)
	}
}

type keepAliveClient = grpc.BidiStreamingClient[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]

func openKeepAlive(t testing.TB, ctx context.Context, s *testServer) keepAliveClient {
	t.Helper()
	st, err := pb.NewLeaseClient(s.dial(t)).LeaseKeepAlive(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func sendKeepAlive(t testing.TB, st keepAliveClient, ids ...int64) {
	t.Helper()
	for _, id := range ids {
		if err := st.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
	}
}

// One stream for many leases: a lease that is gone has TTL 0, one whose home is dark gets no answer and does
// not disturb the others, and a half-close is answered when everything else was.
func TestKeepAliveManyLeases(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		s := startServer(t, Config{Loops: loops, KeepAlivePatience: 1})
		st := openKeepAlive(t, testContext(t), s)
		sendKeepAlive(t, st, 1, leaseDark, 2, leaseGone, leaseHeld, leaseDark, 3)
		if err := st.CloseSend(); err != nil {
			t.Fatal(err)
		}
		var got []string
		for range 4 {
			r, err := st.Recv()
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, fmt.Sprint(r.ID, " ", r.TTL))
		}
		slices.Sort(got)
		if want := []string{"1 10", "2 10", "3 10", "404 0"}; !slices.Equal(got, want) {
			t.Errorf("got %q, expected %q", got, want)
		}
		receive(t, "the held one", s.core.heldC)
		s.core.release(s.Loops()[0])
		if r, err := st.Recv(); err != nil || r.ID != leaseHeld {
			t.Fatalf("the last answer: %v, %v", r, err)
		}
		if _, err := st.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("end: %v", err)
		}
	})
}

// A stream that carries one lease alone ends with that lease's error, which is what clientv3's
// KeepAliveOnce waits for.
func TestKeepAliveOneLease(t *testing.T) {
	s := startServer(t, Config{Loops: 1, KeepAlivePatience: 1})
	st := openKeepAlive(t, testContext(t), s)
	sendKeepAlive(t, st, leaseDark, leaseDark)
	if _, err := st.Recv(); status.Code(err) != codes.Unavailable || status.Convert(err).Message() != codec.ErrTimeout.Msg {
		t.Errorf("one dark lease: %v", err)
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{s.addr()}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if r, err := c.KeepAliveOnce(testContext(t), 5); err != nil || r.TTL != 10 {
		t.Errorf("KeepAliveOnce: %v, %v", r, err)
	}
	if _, err := c.KeepAliveOnce(testContext(t), leaseGone); err == nil || err.Error() != codec.ErrLeaseNotFound.Msg {
		t.Errorf("KeepAliveOnce of a lease that is gone: %v", err)
	}
}

// More messages than the core gets at a time: they wait, the client's window is withheld, all are answered.
func TestKeepAliveInFlight(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		const n = 5 * maxKeepAlivesInFlight
		s := startServer(t, Config{Loops: loops})
		st := openKeepAlive(t, testContext(t), s)
		for i := range int64(n) {
			sendKeepAlive(t, st, leaseHeld+i)
		}
		seen := make(map[int64]bool)
		for round := range n / maxKeepAlivesInFlight {
			for range maxKeepAlivesInFlight {
				receive(t, "a keep-alive at the core", s.core.heldC)
			}
			for _, l := range s.Loops() {
				onLoop(l, func() {
					for c := range l.conns {
						if c.ops > maxKeepAlivesInFlight {
							t.Errorf("round %d: the core has %d", round, c.ops)
						}
					}
				})
			}
			s.core.release(s.Loops()[0])
			for range maxKeepAlivesInFlight {
				r, err := st.Recv()
				if err != nil || seen[r.ID] {
					t.Fatalf("answer %d: %v, %v", len(seen), r, err)
				}
				seen[r.ID] = true
			}
		}
		if len(s.core.heldC) > 0 {
			t.Errorf("the core got more than was sent")
		}
		eventually(t, "nothing is counted any more", func() (none bool) {
			none = true
			for _, l := range s.Loops() {
				onLoop(l, func() {
					for c := range l.conns {
						none = none && c.ops == 0 && c.keepAlives == 0
					}
				})
			}
			return none
		})
	})
}

// A client that waits too much of the server gets etcd's answer.
func TestKeepAliveWaitingBound(t *testing.T) {
	s := startServer(t, Config{Loops: 1})
	l := s.Loops()[0]
	st := openKeepAlive(t, testContext(t), s)
	sendKeepAlive(t, st, leaseHeld)
	receive(t, "the first", s.core.heldC)
	onLoop(l, func() {
		for c := range l.conns {
			c.keepAlives += maxKeepAlivesWaiting
		}
	})
	sendKeepAlive(t, st, leaseHeld)
	if _, err := st.Recv(); status.Code(err) != codes.ResourceExhausted || status.Convert(err).Message() != codec.ErrTooManyRequests.Msg {
		t.Errorf("got %v", err)
	}
	receive(t, "the cancel of the first", s.core.cancelC)
}

// Streams that end with keep-alives under way: the core is told of each, and whatever it says later
// goes to nobody.
func TestKeepAliveCancel(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		s := startServer(t, Config{Loops: loops})
		for i := range int64(3 * loops) {
			ctx, cancel := context.WithCancel(testContext(t))
			st := openKeepAlive(t, ctx, s)
			sendKeepAlive(t, st, leaseHeld+i, leaseDeaf+i)
			for range 2 {
				receive(t, "a keep-alive at the core", s.core.heldC)
			}
			cancel()
			for range 2 {
				receive(t, "core.Cancel", s.core.cancelC)
			}
		}
		works := func() (n int) {
			for _, l := range s.Loops() {
				onLoop(l, func() {
					for c := range l.conns {
						n += c.ops
					}
				})
			}
			return n
		}
		eventually(t, "only what is deaf counts", func() bool { return works() == 3*loops })
		s.core.release(s.Loops()[0])
		eventually(t, "nothing counts", func() bool { return works() == 0 })
	})
}

func TestKeepAliveBadMessage(t *testing.T) {
	s := startServer(t, Config{Loops: 1})
	desc := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
	st, err := s.dial(t).NewStream(testContext(t), desc, leaseKeepAlivePath, grpc.ForceCodec(rawBytes{}))
	if err != nil {
		t.Fatal(err)
	}
	_ = st.SendMsg([]byte{0xff})
	var got []byte
	if err := st.RecvMsg(&got); status.Code(err) != codes.Internal {
		t.Errorf("got %v", err)
	}
}

// Answers, cancels and new messages at the same time: nothing is lost, and no Op is used twice.
func TestKeepAliveRaces(t *testing.T) {
	s := startServer(t, Config{Loops: 3})
	home := s.Loops()[0]
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-s.core.heldC:
				s.core.release(home)
			case <-s.core.cancelC:
			}
		}
	}()
	ends := make(chan error, 12)
	for i := range int64(12) {
		st := openKeepAlive(t, testContext(t), s)
		go func() {
			ends <- func() error {
				for k := range int64(200) {
					id := leaseHeld + i*1000 + k
					if err := st.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
						return err
					}
					if i%2 == 0 {
						if r, err := st.Recv(); err != nil || r.ID != id {
							return fmt.Errorf("%v, %w", r, err)
						}
					}
				}
				return st.CloseSend()
			}()
		}()
	}
	for range 12 {
		if err := receive(t, "the end of a client", ends); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	<-stopped
	s.core.release(home)
}

// A lease that hangs takes one place, however often it is asked for, and each of these messages is answered.
func TestKeepAliveAskedAgain(t *testing.T) {
	s := startServer(t, Config{Loops: 1})
	l := s.Loops()[0]
	st := openKeepAlive(t, testContext(t), s)
	const again = maxKeepAliveTwins
	for range 1 + again {
		sendKeepAlive(t, st, leaseHeld)
	}
	sendKeepAlive(t, st, 7) // behind all of them
	if r, err := st.Recv(); err != nil || r.ID != 7 {
		t.Fatalf("behind a lease that hangs: %v, %v", r, err)
	}
	onLoop(l, func() {
		for c := range l.conns {
			if c.ops != 1 || l.eng.working() != 1 {
				t.Errorf("the core has %d of the client's requests, %d of all", c.ops, l.eng.working())
			}
		}
	})
	s.core.release(l)
	for range 1 + again {
		if r, err := st.Recv(); err != nil || r.ID != leaseHeld {
			t.Fatalf("%v, %v", r, err)
		}
	}
	if n := len(s.core.heldC); n != 1 {
		t.Errorf("the core was asked %d times", n)
	}
}

// When clients have too much with the core, keep-alives wait, and go on when there is room.
func TestKeepAliveWaitsForRoom(t *testing.T) {
	s := startServer(t, Config{Loops: 1})
	l := s.Loops()[0]
	cc := s.dial(t)
	st, err := pb.NewLeaseClient(cc).LeaseKeepAlive(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	sendKeepAlive(t, st, leaseHeld)
	receive(t, "the first", s.core.heldC)
	busy := func(n int) {
		onLoop(l, func() {
			for c := range l.conns {
				c.ops += n
			}
			l.working.Add(int64(n))
		})
	}
	busy(maxOpsPerConn)
	sendKeepAlive(t, st, leaseHeld+1)
	eventually(t, "it waits", func() (waits bool) {
		onLoop(l, func() {
			for c := range l.conns {
				waits = c.keepAlives == 1 && c.ops == maxOpsPerConn+1
			}
		})
		return waits
	})
	busy(-maxOpsPerConn)
	// An answer to any request of the client lets it go on.
	if _, err := pb.NewLeaseClient(cc).LeaseLeases(testContext(t), &pb.LeaseLeasesRequest{}); err != nil {
		t.Fatal(err)
	}
	receive(t, "the second", s.core.heldC)
	s.core.release(l)
	for range 2 {
		if _, err := st.Recv(); err != nil {
			t.Fatal(err)
		}
	}
}

// A server that ends does not wait for clients' sessions: what is under way is answered, then the stream ends.
func TestKeepAliveDrains(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		s := startServer(t, Config{Loops: loops, DrainTimeout: time.Hour})
		idle, busy := openKeepAlive(t, testContext(t), s), openKeepAlive(t, testContext(t), s)
		sendKeepAlive(t, idle, 1)
		if _, err := idle.Recv(); err != nil {
			t.Fatal(err)
		}
		sendKeepAlive(t, busy, leaseHeld)
		receive(t, "the other's", s.core.heldC)
		stopped := make(chan error, 1)
		go func() { stopped <- s.Stop(testContext(t)) }()
		if _, err := idle.Recv(); status.Code(err) != codes.Unavailable || status.Convert(err).Message() != codec.ErrStopped.Msg {
			t.Errorf("the idle one: %v", err)
		}
		s.core.release(s.Loops()[0])
		if r, err := busy.Recv(); err != nil || r.ID != leaseHeld {
			t.Errorf("the busy one: %v, %v", r, err)
		}
		if _, err := busy.Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("the busy one's end: %v", err)
		}
		if err := receive(t, "Stop", stopped); err != nil {
			t.Error(err)
		}
	})
}

// Leases that cannot be answered for now are put aside, many more than have a place with the core: others are answered,
// nothing is withheld from the client, and what is put aside is asked for again, by the client or without it.
func TestKeepAlivePutAside(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		s := startServer(t, Config{Loops: loops, KeepAlivePatience: time.Hour})
		st := openKeepAlive(t, testContext(t), s)
		sendKeepAlive(t, st, leaseBack)
		for i := range int64(leasesDark) {
			sendKeepAlive(t, st, leaseDark+i)
		}
		sendKeepAlive(t, st, leaseDark, 7)
		if r, err := st.Recv(); err != nil || r.ID != 7 {
			t.Fatalf("behind leases whose home says nothing: %v, %v", r, err)
		}
		counts := func() (put, msgs, counted, ops int) {
			for _, l := range s.Loops() {
				onLoop(l, func() {
					for c := range l.conns {
						counted, ops = counted+c.keepAlives, ops+c.ops
						for k := range c.streaming {
							for _, p := range k.handler.(*keepAliveStream).put {
								put, msgs = put+1, msgs+p.msgs
							}
						}
					}
				})
			}
			return put, msgs, counted, ops
		}
		eventually(t, "all are put aside", func() bool {
			put, msgs, counted, ops := counts()
			return put == leasesDark+1 && msgs == leasesDark+2 && counted == put && ops == 0
		})
		sendKeepAlive(t, st, leaseBack)
		onLoop(s.Loops()[0], func() { s.core.back = true })
		for range 2 { // without a further question
			if r, err := st.Recv(); err != nil || r.ID != leaseBack || r.TTL != 0 {
				t.Fatalf("the home is back: %v, %v", r, err)
			}
		}
		eventually(t, "the others are still put aside", func() bool {
			put, _, counted, _ := counts()
			return put == leasesDark && counted >= put
		})
	})
}

// What is put aside is bounded, and so is the time: then it gets no answer, and the stream ends with the client's half.
func TestKeepAlivePutAsideBound(t *testing.T) {
	s := startServer(t, Config{Loops: 1, KeepAlivePatience: 50 * time.Millisecond})
	l := s.Loops()[0]
	st := openKeepAlive(t, testContext(t), s)
	sendKeepAlive(t, st, leaseDark, leaseDark+1, leaseDark+2, leaseDark)
	if err := st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if r, err := st.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("got %v, %v", r, err)
	}
	st = openKeepAlive(t, testContext(t), s)
	sendKeepAlive(t, st, 7)
	if _, err := st.Recv(); err != nil {
		t.Fatal(err)
	}
	bump := func(n int) {
		onLoop(l, func() {
			for c := range l.conns {
				if len(c.streaming) > 0 {
					c.keepAlives += n
				}
			}
		})
	}
	bump(maxKeepAlivesPut)
	lost := metricKeepAlivesLost.Get()
	sendKeepAlive(t, st, leaseDark, 8)
	if r, err := st.Recv(); err != nil || r.ID != 8 {
		t.Errorf("got %v, %v", r, err)
	}
	if n := metricKeepAlivesLost.Get() - lost; n != 1 {
		t.Errorf("%d are lost", n)
	}
	bump(-maxKeepAlivesPut)
}
