package recipes

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	clientv3 "go.etcd.io/etcd/client/v3"
	epb "go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	lpb "go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"

	"spindle/codec"
	"spindle/server"
	"spindle/shard"
	"spindle/shard/embedded"
)

// noCore is the core of an engine that serves nothing but these services.
type noCore struct{}

func (noCore) Submit(op *shard.Op) {
	op.Status = codec.ErrNotCapable
	op.Done(op)
}
func (noCore) Cancel(*shard.Op) {}

// rig is a Service whose client talks to a plain etcd, and both servers as clients see them.
type rig struct {
	svc          *Service
	ours, theirs *grpc.ClientConn
	etcd         *clientv3.Client
	dials        chan struct{}
}

func newRig(t *testing.T) *rig {
	t.Helper()
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	m, err := embedded.Start(embedded.Config{
		Dir: filepath.Join(t.TempDir(), "etcd"), Shards: 1, NoFsync: true, DefaultLimits: true, Log: quiet,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	e, err := server.Start(server.Config{ListenURLs: []string{"http://127.0.0.1:0"}, Loops: 2, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), guard)
		defer cancel()
		if err := e.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	e.SetCore(noCore{})
	r := &rig{svc: Serve(e, quiet), dials: make(chan struct{}, 100)}
	etcd := strings.TrimPrefix(m.Shards[0], "http://")
	r.svc.dial = func() (net.Conn, error) {
		r.dials <- struct{}{}
		return net.Dial("tcp", etcd)
	}
	t.Cleanup(r.svc.Close)
	e.SetReady(true)
	dial := func(addr string) *grpc.ClientConn {
		cc, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cc.Close() })
		return cc
	}
	r.ours, r.theirs = dial(e.Addrs()[0].String()), dial(etcd)
	r.etcd, err = clientv3.New(clientv3.Config{Endpoints: []string{etcd}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.etcd.Close() })
	// The count of watches is the process's: what the last test's etcd had may still be going.
	r.poll(t, "no watches are left", func() bool { return r.watchers(t) == 0 })
	return r
}

// poll looks again and again until f holds.
func (r *rig) poll(t *testing.T, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(guard); !f(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long: %s", what)
		}
	}
}

func (r *rig) lease(t *testing.T) int64 {
	t.Helper()
	l, err := r.etcd.Grant(testContext(t), 600)
	if err != nil {
		t.Fatal(err)
	}
	return int64(l.ID)
}

// guard is how long a test waits for what must happen.
const guard = time.Minute

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), guard)
	t.Cleanup(cancel)
	return ctx
}

func receive[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(guard):
		t.Fatalf("did not happen: %s", what)
		panic("unreachable")
	}
}

func outcome(m proto.Message, err error) string {
	if status.Code(err) == codes.DeadlineExceeded {
		return "too late" // the text says whether the client's timer or the server's reset was first
	}
	if err != nil {
		return fmt.Sprintf("%v %q", status.Code(err), status.Convert(err).Message())
	}
	return "fine"
}

// Every method, fine and with what can be wrong with its request: the same answers as from etcd.
func TestAnswersAreEtcds(t *testing.T) {
	r := newRig(t)
	if len(r.dials) > 0 {
		t.Error("connected before the first call")
	}
	type side struct {
		lock lpb.LockClient
		elec epb.ElectionClient
	}
	sides := []side{{lpb.NewLockClient(r.theirs), epb.NewElectionClient(r.theirs)}, {lpb.NewLockClient(r.ours), epb.NewElectionClient(r.ours)}}
	var got [2][]string
	for i, c := range sides {
		say := func(m proto.Message, err error) { got[i] = append(got[i], outcome(m, err)) }
		ctx := testContext(t)
		lease := r.lease(t)
		name := []byte(fmt.Sprint("name", i))

		locked, err := c.lock.Lock(ctx, &lpb.LockRequest{Name: name, Lease: lease})
		say(locked, err)
		if want := fmt.Sprintf("%s/%x", name, lease); string(locked.GetKey()) != want || locked.GetHeader().GetRevision() == 0 {
			t.Errorf("side %d: Lock: %v, expected the key %s", i, locked, want)
		}
		say(c.lock.Lock(ctx, &lpb.LockRequest{Name: name, Lease: lease})) // holds it already
		say(c.lock.Lock(ctx, &lpb.LockRequest{Name: name, Lease: 12345}))
		say(c.lock.Unlock(ctx, &lpb.UnlockRequest{Key: locked.GetKey()}))
		say(c.lock.Unlock(ctx, &lpb.UnlockRequest{Key: locked.GetKey()}))
		say(c.lock.Unlock(ctx, &lpb.UnlockRequest{}))

		say(c.elec.Leader(ctx, &epb.LeaderRequest{Name: name}))
		say(c.elec.Campaign(ctx, &epb.CampaignRequest{Name: name, Lease: 12345, Value: []byte("v")}))
		won, err := c.elec.Campaign(ctx, &epb.CampaignRequest{Name: name, Lease: lease, Value: []byte("v")})
		say(won, err)
		leader, err := c.elec.Leader(ctx, &epb.LeaderRequest{Name: name})
		say(leader, err)
		if string(leader.GetKv().GetValue()) != "v" || won.GetLeader().GetRev() != leader.GetKv().GetCreateRevision() {
			t.Errorf("side %d: won with %v, the leader is %v", i, won, leader)
		}
		say(c.elec.Proclaim(ctx, &epb.ProclaimRequest{Leader: won.GetLeader(), Value: []byte("w")}))
		say(c.elec.Proclaim(ctx, &epb.ProclaimRequest{Value: []byte("w")}))
		say(c.elec.Resign(ctx, &epb.ResignRequest{}))
		say(c.elec.Resign(ctx, &epb.ResignRequest{Leader: won.GetLeader()}))
		say(c.elec.Proclaim(ctx, &epb.ProclaimRequest{Leader: won.GetLeader(), Value: []byte("x")}))
		late, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		defer cancel()
		if obs, err := c.elec.Observe(late, &epb.LeaderRequest{Name: name}); err != nil {
			say(nil, err) // the time was over before the stream began
		} else {
			say(obs.Recv()) // there is no leader
		}
	}
	for k := range got[0] {
		if got[0][k] != got[1][k] {
			t.Errorf("call %d: etcd says %s, ours %s", k, got[0][k], got[1][k])
		}
	}
	if n := len(r.dials); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// Observe brings each proclamation and ends with its client.
func TestObserve(t *testing.T) {
	r := newRig(t)
	elec := epb.NewElectionClient(r.ours)
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	obs, err := elec.Observe(ctx, &epb.LeaderRequest{Name: []byte("e")})
	if err != nil {
		t.Fatal(err)
	}
	won, err := elec.Campaign(ctx, &epb.CampaignRequest{Name: []byte("e"), Lease: r.lease(t), Value: []byte("0")})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		got, err := obs.Recv()
		if err != nil || string(got.Kv.Value) != fmt.Sprint(i) {
			t.Fatalf("proclamation %d: %v, %v", i, got, err)
		}
		if _, err := elec.Proclaim(ctx, &epb.ProclaimRequest{Leader: won.Leader, Value: fmt.Append(nil, i+1)}); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	r.awaitCalls(t, 0)
}

func (r *rig) awaitCalls(t *testing.T, n int) {
	t.Helper()
	r.poll(t, fmt.Sprintf("%d calls", n), func() bool {
		r.svc.mu.Lock()
		defer r.svc.mu.Unlock()
		return r.svc.calls == n
	})
}

// One who waits for a lock and goes leaves no key behind.
func TestCancelLeavesTheQueue(t *testing.T) {
	r := newRig(t)
	lock := lpb.NewLockClient(r.ours)
	if _, err := lock.Lock(testContext(t), &lpb.LockRequest{Name: []byte("l"), Lease: r.lease(t)}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(testContext(t))
	w := r.etcd.Watch(testContext(t), "l/", clientv3.WithPrefix())
	before := r.watchers(t)
	failed := make(chan error, 1)
	lease := r.lease(t)
	go func() {
		_, err := lock.Lock(ctx, &lpb.LockRequest{Name: []byte("l"), Lease: lease})
		failed <- err
	}()
	if e := receive(t, "the waiter's key", w).Events; len(e) != 1 || !e[0].IsCreate() {
		t.Fatalf("events %v", e)
	}
	r.awaitWatcher(t, before)
	cancel()
	if err := receive(t, "the end", failed); status.Code(err) != codes.Canceled {
		t.Errorf("got %v", err)
	}
	if e := receive(t, "the key is gone", w).Events; len(e) != 1 || e[0].Type != clientv3.EventTypeDelete {
		t.Errorf("events %v", e)
	}
	r.awaitCalls(t, 0)
}

// watchers counts the watches of the etcds in this process.
func (r *rig) watchers(t *testing.T) (n int) {
	t.Helper()
	resp, err := http.Get("http://" + r.etcd.Endpoints()[0] + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if v, ok := strings.CutPrefix(lines.Text(), "etcd_debugging_mvcc_watcher_total "); ok {
			n, err = strconv.Atoi(v)
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	return n
}

// awaitWatcher waits for one watch more than before: who waits for a lock has learned by then that its key is
// there, and only who knows it can take it back (etcd leaves a key whose answer was cut off to its lease).
func (r *rig) awaitWatcher(t *testing.T, before int) {
	t.Helper()
	r.poll(t, "somebody watches the key before", func() bool { return r.watchers(t) > before })
}

// Close ends who waits, with etcd's text, and takes their keys back.
func TestCloseLeavesTheQueue(t *testing.T) {
	r := newRig(t)
	lock := lpb.NewLockClient(r.ours)
	if _, err := lock.Lock(testContext(t), &lpb.LockRequest{Name: []byte("l"), Lease: r.lease(t)}); err != nil {
		t.Fatal(err)
	}
	w := r.etcd.Watch(testContext(t), "l/", clientv3.WithPrefix())
	before := r.watchers(t)
	failed := make(chan error, 1)
	lease := r.lease(t)
	go func() {
		_, err := lock.Lock(testContext(t), &lpb.LockRequest{Name: []byte("l"), Lease: lease})
		failed <- err
	}()
	receive(t, "the waiter's key", w)
	r.awaitWatcher(t, before)
	r.svc.Close()
	if e := receive(t, "the key is gone", w).Events; len(e) != 1 || e[0].Type != clientv3.EventTypeDelete {
		t.Errorf("events %v", e)
	}
	if err := receive(t, "the end", failed); status.Code(err) != codes.Unavailable || status.Convert(err).Message() != codec.ErrStopped.Msg {
		t.Errorf("got %v", err)
	}
	if _, err := lock.Lock(testContext(t), &lpb.LockRequest{Name: []byte("l")}); status.Convert(err).Message() != codec.ErrStopped.Msg {
		t.Errorf("after Close: %v", err)
	}
}

func TestTooManyCalls(t *testing.T) {
	r := newRig(t)
	lock := lpb.NewLockClient(r.ours)
	refused := func(what string) {
		t.Helper()
		_, err := lock.Lock(testContext(t), &lpb.LockRequest{Name: []byte("l")})
		if status.Code(err) != codes.ResourceExhausted || status.Convert(err).Message() != codec.ErrTooManyRequests.Msg {
			t.Errorf("%s: %v", what, err)
		}
	}
	for range maxCalls {
		if st := r.svc.begin(1); st.Code != codec.OK {
			t.Fatal(st)
		}
	}
	refused("one call too many")
	r.svc.end(1)
	if _, err := lock.Lock(testContext(t), &lpb.LockRequest{Name: []byte("l"), Lease: r.lease(t)}); err != nil {
		t.Errorf("in the last place: %v", err)
	}
	for range maxCalls - 1 {
		r.svc.end(1)
	}
	if st := r.svc.begin(maxCallBytes); st.Code != codec.OK {
		t.Fatal(st)
	}
	refused("one byte too many")
	r.svc.end(maxCallBytes)
}

// A panic in a recipe is that call's end, not the proxy's.
func TestPanicIsAnAnswer(t *testing.T) {
	r := newRig(t)
	if st := r.svc.begin(0); st.Code != codec.OK {
		t.Fatal(st)
	}
	boom := func(context.Context, *backend, []byte, *call) error { panic("boom") }
	if st := r.svc.perform(context.Background(), boom, nil, nil); st.Code != codec.Internal {
		t.Errorf("got %v", st)
	}
	r.awaitCalls(t, 0)
}

// A client that keeps no lease alive any more is replaced.
func TestHaltedClientIsReplaced(t *testing.T) {
	r := newRig(t)
	elec := epb.NewElectionClient(r.ours)
	use := func() *backend {
		if _, err := elec.Resign(testContext(t), &epb.ResignRequest{Leader: &epb.LeaderKey{Lease: r.lease(t), Key: []byte("k")}}); err != nil {
			t.Fatal(err)
		}
		r.awaitCalls(t, 0)
		return r.svc.now
	}
	first := use()
	if use() != first {
		t.Error("a client for each call")
	}
	halted := func(context.Context, *backend, []byte, *call) error {
		return clientv3.ErrKeepAliveHalted{Reason: errors.New("test")}
	}
	if st := r.svc.begin(0); st.Code != codec.OK {
		t.Fatal(st)
	}
	r.svc.perform(context.Background(), halted, nil, nil)
	if use() == first {
		t.Error("the same client after it has halted")
	}
	<-first.client.Ctx().Done()
}

func TestBadRequests(t *testing.T) {
	r := newRig(t)
	for _, m := range methods {
		st, err := r.ours.NewStream(testContext(t), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, m.path)
		if err != nil {
			t.Fatal(err)
		}
		_ = st.CloseSend()
		if err := st.RecvMsg(new(lpb.LockResponse)); status.Code(err) != codes.Unknown || status.Convert(err).Message() != "EOF" {
			t.Errorf("%s without a message: %v", m.path, err)
		}
		err = r.ours.Invoke(testContext(t), m.path, &lpb.UnlockResponse{}, new(lpb.LockResponse), grpc.ForceCodec(garbage{}))
		if status.Code(err) != codes.Internal {
			t.Errorf("%s with garbage: %v", m.path, err)
		}
	}
}

// garbage sends what is not protobuf.
type garbage struct{}

func (garbage) Marshal(any) ([]byte, error)     { return []byte{0xff}, nil }
func (garbage) Unmarshal(_ []byte, v any) error { return nil }
func (garbage) Name() string                    { return "proto" }
