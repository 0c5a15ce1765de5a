package server

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/storage/mvcc"

	"spindle/codec"
	"spindle/watchring"
)

// watchRig is a WatchService without an engine: one loop whose mailbox the test empties.
type watchRig struct {
	t     *testing.T
	svc   *WatchService
	loop  *watchLoop
	ring  *watchring.Ring
	front *watchring.Frontier
	rev   int64
	mail  []func()
	asks  []func(int64, codec.Status) // calls of Now without an answer
}

func newWatchRig(t *testing.T, change ...func(*WatchConfig)) *watchRig {
	r := &watchRig{t: t, ring: watchring.NewRing(256, 1<<20, 10), front: watchring.NewFrontier(1, 10), rev: 10}
	cfg := WatchConfig{
		Ring: r.ring, Frontier: r.front,
		ShardsOf: func(key, end []byte) int { return 0 },
		Now:      func(done func(int64, codec.Status)) { r.asks = append(r.asks, done) },
		Header:   codec.Header{ClusterID: 1, MemberID: 2, RaftTerm: 3},
	}
	for _, f := range change {
		f(&cfg)
	}
	r.svc = newWatchService(cfg)
	post := func(f func()) { r.mail = append(r.mail, f) }
	r.loop = r.svc.addLoop(post, post)
	return r
}

// turn lets the loop run until its mailbox is empty.
func (r *watchRig) turn() {
	r.loop.turnEnd()
	for len(r.mail) > 0 {
		mail := r.mail
		r.mail = nil
		for _, f := range mail {
			f()
		}
		r.loop.turnEnd()
	}
}

// now answers every question for now.
func (r *watchRig) now(rev int64, st codec.Status) {
	for _, done := range r.asks {
		done(rev, st)
	}
	r.asks = nil
	r.turn()
}

// put makes one revision with an event per key.
func (r *watchRig) put(keys ...string) {
	r.rev++
	e := &watchring.Entry{Rev: r.rev}
	for _, k := range keys {
		body, err := proto.Marshal(&mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(k), ModRevision: r.rev, CreateRevision: r.rev, Version: 1}})
		if err != nil {
			r.t.Fatal(err)
		}
		e.Events = append(e.Events, watchring.Event{Key: []byte(k), Create: true, Body: body, NoPrev: len(body)})
		e.Size += len(body)
	}
	r.ring.Publish(e)
	r.front.Set(0, r.rev)
	r.svc.FrontierRose()
	r.turn()
}

// fakeRPC is the client's side of a Watch RPC.
type fakeRPC struct {
	r      *watchRig
	s      *watchStream
	got    []string
	status *codec.Status
	queued int
	held   bool
	onSend func()
}

func (r *watchRig) open(conn any) *fakeRPC {
	f := &fakeRPC{r: r, s: &watchStream{loop: r.loop}}
	f.s.open(f, conn)
	return f
}

func (f *fakeRPC) Send(msg []byte) {
	var m pb.WatchResponse
	if err := proto.Unmarshal(msg, &m); err != nil {
		f.r.t.Fatal(err)
	}
	if m.Header.GetClusterId() != 1 || m.Header.MemberId != 2 || m.Header.RaftTerm != 3 {
		f.r.t.Errorf("header %v", m.Header)
	}
	s := fmt.Sprintf("%d@%d", m.WatchId, m.Header.Revision)
	if m.Created {
		s += " created"
	}
	if m.Canceled {
		s += " canceled"
	}
	if m.CompactRevision != 0 {
		s += fmt.Sprint(" compact=", m.CompactRevision)
	}
	if m.CancelReason != "" {
		s += " " + m.CancelReason
	}
	for _, ev := range m.Events {
		s += fmt.Sprintf(" %s", ev.Kv.Key)
	}
	f.got = append(f.got, s)
	if f.onSend != nil {
		f.onSend()
	}
}

func (f *fakeRPC) Push(head, events []byte, shared bool) (kept bool) {
	f.Send(slices.Concat(head, events))
	return false
}

func (f *fakeRPC) Finish(st codec.Status) { f.status = &st }
func (f *fakeRPC) Queued() int            { return f.queued }
func (f *fakeRPC) Hold(h bool)            { f.held = h }

func (f *fakeRPC) request(m *pb.WatchRequest) {
	f.r.t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		f.r.t.Fatal(err)
	}
	f.s.Message(b)
}

func (f *fakeRPC) create(c *pb.WatchCreateRequest) {
	f.request(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: c}})
}

func (f *fakeRPC) cancel(id int64) {
	f.request(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: id}}})
}

func (f *fakeRPC) progress() {
	f.request(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
}

// expect runs a turn and compares what was sent since the last time.
func (f *fakeRPC) expect(want ...string) {
	f.r.t.Helper()
	f.r.turn()
	if !slices.Equal(f.got, want) {
		f.r.t.Fatalf("got\n  %s\nwant\n  %s", strings.Join(f.got, "\n  "), strings.Join(want, "\n  "))
	}
	f.got = nil
}

func (r *watchRig) expectNothingLeft() {
	r.t.Helper()
	r.turn()
	if n := r.loop.streams.Load(); n != 0 || len(r.loop.conns) != 0 || len(r.loop.waiting.s) != 0 || len(r.loop.asked.s) != 0 {
		r.t.Errorf("left: %d streams, %d connections, %d + %d waiting", n, len(r.loop.conns), len(r.loop.waiting.s), len(r.loop.asked.s))
	}
}

func TestWatchLife(t *testing.T) {
	r := newWatchRig(t)
	f := r.open("c")
	f.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 11})
	f.create(&pb.WatchCreateRequest{Key: []byte("a"), RangeEnd: []byte("c"), StartRevision: 11})
	f.expect("0@10 created", "1@10 created")
	r.put("b")
	f.expect("1@11 b")
	f.cancel(1)
	f.cancel(1)
	f.cancel(77)
	f.expect("1@11 canceled")
	r.put("a", "b")
	f.expect("0@12 a")
	// Ids are not used again; chosen ones are skipped.
	f.create(&pb.WatchCreateRequest{Key: []byte("x"), StartRevision: 13, WatchId: 2})
	f.create(&pb.WatchCreateRequest{Key: []byte("x"), StartRevision: 13})
	f.expect("2@12 created", "3@12 created")
	f.s.HalfClose()
	r.put("a")
	f.expect("0@13 a")
	f.s.Cancel()
	r.put("a")
	f.expect()
	r.expectNothingLeft()
}

func TestWatchRefused(t *testing.T) {
	r := newWatchRig(t)
	f := r.open("c")
	f.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 11, WatchId: 5})
	for _, c := range []struct {
		req    *pb.WatchCreateRequest
		reason string
	}{
		{&pb.WatchCreateRequest{Key: []byte("a"), WatchId: 5}, mvcc.ErrWatcherDuplicateID.Error()},
		{&pb.WatchCreateRequest{Key: []byte("b"), RangeEnd: []byte("a")}, mvcc.ErrEmptyWatcherRange.Error()},
		{&pb.WatchCreateRequest{Key: []byte("b"), RangeEnd: []byte("b")}, mvcc.ErrEmptyWatcherRange.Error()},
		{&pb.WatchCreateRequest{Key: []byte("b"), StartRevision: -1}, rpctypes.ErrCompacted.Error()},
		{&pb.WatchCreateRequest{}, reasonReserved},
		{&pb.WatchCreateRequest{Key: []byte("\x00clock")}, reasonReserved},
		{&pb.WatchCreateRequest{Key: []byte("\x00a"), RangeEnd: []byte("\x00b")}, reasonReserved},
		{&pb.WatchCreateRequest{RangeEnd: []byte("\x01")}, reasonReserved},
	} {
		f.got = nil
		f.create(c.req)
		f.expect("-1@10 created canceled " + c.reason)
	}
	if len(f.s.watches) != 1 {
		t.Errorf("%d watches", len(f.s.watches))
	}
}

// TestWatchReservedClamped: ranges that begin in Spindle's own keys see only the clients'.
func TestWatchReservedClamped(t *testing.T) {
	r := newWatchRig(t)
	f := r.open("c")
	f.create(&pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, StartRevision: 11})
	f.create(&pb.WatchCreateRequest{RangeEnd: []byte("b"), StartRevision: 11})
	f.expect("0@10 created", "1@10 created")
	r.put("\x00clock")
	f.expect()
	r.put("\x01", "z")
	slices.Sort(f.got)
	f.expect("0@12 \x01 z", "1@12 \x01")
}

// TestWatchFromNow: a create without a start revision begins after a `now`; what comes behind it on the
// stream waits for its turn.
func TestWatchFromNow(t *testing.T) {
	r := newWatchRig(t)
	f := r.open("c")
	f.create(&pb.WatchCreateRequest{Key: []byte("a")})
	f.create(&pb.WatchCreateRequest{Key: []byte("b"), StartRevision: 11})
	f.cancel(1)
	f.progress()
	f.expect()
	if len(r.asks) != 1 {
		t.Fatalf("%d questions", len(r.asks))
	}
	f.create(&pb.WatchCreateRequest{Key: []byte("c")}) // needs a later now than the one under way
	r.now(12, codec.Status{})
	f.expect("0@12 created", "1@10 created", "1@10 canceled")
	if len(r.asks) != 1 {
		t.Fatalf("%d questions", len(r.asks))
	}
	r.now(13, codec.Status{})
	f.expect("2@13 created")
	if len(r.asks) != 1 { // for the progress request
		t.Fatalf("%d questions", len(r.asks))
	}
	r.now(14, codec.Status{})
	for i := 0; i < 3; i++ {
		r.put("a", "c")
	}
	f.expect("0@13 a")
	r.put("a", "c")
	slices.Sort(f.got)
	f.expect("-1@14", "0@14 a", "2@14 c")
}

func TestWatchNowFails(t *testing.T) {
	r := newWatchRig(t)
	f, g, h := r.open("c"), r.open("d"), r.open("e")
	f.create(&pb.WatchCreateRequest{Key: []byte("a")})
	g.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 11})
	g.progress()
	h.create(&pb.WatchCreateRequest{Key: []byte("a")})
	r.turn()
	h.s.Cancel() // while the question is under way
	r.now(0, codec.ErrTimeout)
	f.expect()
	if f.status == nil || *f.status != codec.ErrTimeout {
		t.Errorf("status %v", f.status)
	}
	g.expect("0@10 created")
	if g.status != nil || h.status != nil {
		t.Errorf("status %v, %v", g.status, h.status)
	}
	g.progress()
	r.turn()
	r.now(10, codec.Status{})
	g.expect("-1@10")
	g.s.Cancel()
	r.expectNothingLeft()
}

func TestWatchCompacted(t *testing.T) {
	r := newWatchRig(t)
	for i := 0; i < 5; i++ {
		r.put("a")
	}
	r.front.SetCompacted(13)
	f := r.open("c")
	f.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 12})
	f.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 13})
	f.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 5})
	f.expect("0@15 created", "1@15 created", "2@15 created",
		"0@11 canceled compact=13", "1@15 a a a", "2@4 canceled compact=13")
	if len(f.s.watches) != 1 || f.s.conn.watches != 1 {
		t.Errorf("%d watches, %d on the connection", len(f.s.watches), f.s.conn.watches)
	}
	f.cancel(0) // is gone
	f.expect()
}

func TestWatchProgressNotify(t *testing.T) {
	r := newWatchRig(t)
	f := r.open("c")
	f.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 11, ProgressNotify: true})
	f.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 11})
	f.expect("0@10 created", "1@10 created")
	r.loop.notifyFn()
	f.expect("0@10")
	r.put("b")
	r.loop.notifyFn()
	f.expect("0@11")
	f.queued = watchHighWater
	r.loop.notifyFn()
	f.expect()
}

func TestWatchSlowClient(t *testing.T) {
	r := newWatchRig(t)
	f := r.open("c")
	f.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 11})
	f.expect("0@10 created")
	f.queued = watchHighWater
	r.put("a")
	r.put("a")
	f.expect()
	f.queued = watchHoldBytes + 1
	f.cancel(9)
	if !f.held {
		t.Error("requests are still read")
	}
	f.queued = 0
	f.s.Drained()
	f.expect("0@12 a a")
	if f.held {
		t.Error("requests are not read any more")
	}
}

func TestWatchLimits(t *testing.T) {
	r := newWatchRig(t, func(c *WatchConfig) { c.WatchesPerStream, c.WatchesPerConn = 2, 3 })
	f, g, other := r.open("c"), r.open("c"), r.open("d")
	for _, x := range []*fakeRPC{f, g, other} {
		x.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 11})
		x.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 11})
		x.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 11})
	}
	refused := "-1@10 created canceled " + rpctypes.ErrTooManyRequests.Error()
	f.expect("0@10 created", "1@10 created", refused)
	g.expect("0@10 created", refused, refused)
	other.expect("0@10 created", "1@10 created", refused)
	f.cancel(0)
	f.got = nil
	g.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 11})
	g.expect("1@10 created")
	// Creates that wait for now are bounded too.
	g.cancel(1)
	f.create(&pb.WatchCreateRequest{Key: []byte("a")})
	for i := 0; i < maxPendingCreates && f.status == nil; i++ {
		f.create(&pb.WatchCreateRequest{Key: []byte("a")})
	}
	if f.status == nil || *f.status != codec.ErrTooManyRequests {
		t.Errorf("status %v", f.status)
	}
	g.s.Cancel()
	other.s.Cancel()
	r.expectNothingLeft()
}

// TestWatchKeyBytes: the keys of one client's watches are bounded together, and free places come back by every end
// that a watch may have.
func TestWatchKeyBytes(t *testing.T) {
	r := newWatchRig(t, func(c *WatchConfig) { c.KeyBytesPerConn = 100 })
	f, g, other := r.open("c"), r.open("c"), r.open("d")
	key := func(n int) *pb.WatchCreateRequest {
		return &pb.WatchCreateRequest{Key: []byte(strings.Repeat("k", n)), RangeEnd: []byte(strings.Repeat("l", n)), StartRevision: 11}
	}
	refused := "-1@10 created canceled " + rpctypes.ErrTooManyRequests.Error()
	f.create(key(40))
	g.create(key(11))
	other.create(key(11))
	g.create(key(10))
	f.expect("0@10 created")
	g.expect(refused, "0@10 created")
	other.expect("0@10 created")
	f.cancel(0)
	f.cancel(0)
	f.got = nil
	f.create(key(40))
	f.expect("1@10 created")
	f.s.Cancel()
	f = r.open("c")
	f.create(key(40))
	f.expect("0@10 created")
	// Compacted: the Hub ends it.
	f.cancel(0)
	f.got = nil
	r.front.SetCompacted(9)
	compacted := key(40)
	compacted.StartRevision = 5
	f.create(compacted)
	f.expect("1@10 created", "1@4 canceled compact=11")
	if n := f.s.conn.keyBytes; n != 20 {
		t.Errorf("%d bytes are counted", n)
	}
	// Canceled before it was created.
	now := key(40)
	now.StartRevision = 0
	f.create(now)
	f.cancel(2)
	r.turn()
	r.now(10, codec.Status{})
	f.expect("2@10 created", "2@10 canceled")
	if n := f.s.conn.keyBytes; n != 20 {
		t.Errorf("%d bytes are counted", n)
	}
	g.s.Cancel()
	if n := f.s.conn.keyBytes; n != 0 {
		t.Errorf("%d bytes are left", n)
	}
	f.s.Cancel()
	other.s.Cancel()
	r.expectNothingLeft()
}

// TestWatchClosedWithinSend: sending may find out that the connection is gone.
func TestWatchClosedWithinSend(t *testing.T) {
	r := newWatchRig(t)
	for n := 1; n < 8; n++ {
		f := r.open(n)
		left := n
		f.onSend = func() {
			if left--; left == 0 {
				f.s.Cancel()
			}
		}
		f.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: r.rev - 1})
		f.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: r.rev + 1, ProgressNotify: true})
		f.cancel(0)
		f.create(&pb.WatchCreateRequest{Key: []byte("a"), RangeEnd: []byte("b")})
		f.progress()
		r.turn()
		r.now(r.rev, codec.Status{})
		r.put("a")
		r.loop.notifyFn()
		r.loop.notifyFn()
		if len(f.got) != n && left > 0 {
			f.s.Cancel()
		} else if left < 0 {
			t.Errorf("%d messages after the end: %q", -left, f.got)
		}
	}
	r.expectNothingLeft()
}

// TestParseWatchRequest compares the decoder with etcd's types.
func TestParseWatchRequest(t *testing.T) {
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := 0; i < 2000; i++ {
		var m pb.WatchRequest
		c := &pb.WatchCreateRequest{
			Key: []byte(strings.Repeat("k", rng.IntN(3))), RangeEnd: []byte(strings.Repeat("e", rng.IntN(3))),
			StartRevision: rng.Int64N(5) - 2, WatchId: rng.Int64N(5) - 2,
			ProgressNotify: rng.IntN(2) == 0, PrevKv: rng.IntN(2) == 0, Fragment: rng.IntN(2) == 0,
		}
		for n := rng.IntN(4); n > 0; n-- {
			c.Filters = append(c.Filters, pb.WatchCreateRequest_FilterType(rng.IntN(4)))
		}
		want := watchRequest{}
		switch rng.IntN(4) {
		case 0:
			m.RequestUnion = &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: c.WatchId}}
			want = watchRequest{kind: watchCancel, id: c.WatchId}
		case 1:
			m.RequestUnion = &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}
			want = watchRequest{kind: watchProgress}
		case 2:
		default:
			m.RequestUnion = &pb.WatchRequest_CreateRequest{CreateRequest: c}
			want = watchRequest{kind: watchCreate, key: c.Key, end: c.RangeEnd, start: c.StartRevision, id: c.WatchId,
				progress: c.ProgressNotify, prevKV: c.PrevKv, fragment: c.Fragment,
				noPut:    slices.Contains(c.Filters, pb.WatchCreateRequest_NOPUT),
				noDelete: slices.Contains(c.Filters, pb.WatchCreateRequest_NODELETE)}
		}
		b, err := proto.Marshal(&m)
		if err != nil {
			t.Fatal(err)
		}
		b = protowire.AppendVarint(protowire.AppendTag(b, 1, protowire.VarintType), 7) // not what field 1 is
		got, ok := parseWatchRequest(b)
		if !ok || fmt.Sprintf("%+q", []any{got}) != fmt.Sprintf("%+q", []any{want}) {
			t.Fatalf("%v:\n got %+v %v\nwant %+v", &m, got, ok, want)
		}
	}
	// Unpacked filters, as older encoders write them.
	if got, ok := parseWatchRequest([]byte{0x0a, 4, 0x28, 0, 0x28, 1}); !ok || !got.noPut || !got.noDelete {
		t.Errorf("unpacked filters: %+v %v", got, ok)
	}
}

func FuzzWatchRequest(f *testing.F) {
	f.Add([]byte{0x0a, 4, 0x28, 0, 0x28, 1})
	f.Add([]byte{0x12, 2, 0x08, 1})
	f.Add([]byte{0x1a, 0})
	f.Add([]byte{0x0a, 3, 0x2a, 1, 0xff})
	f.Fuzz(func(t *testing.T, msg []byte) {
		r := newWatchRig(t)
		x := r.open("c")
		x.s.Message(msg)
		x.s.Message(msg)
		r.turn()
		r.now(10, codec.Status{})
		r.put("a")
		var want pb.WatchRequest
		if _, ok := parseWatchRequest(msg); !ok && proto.Unmarshal(msg, &want) == nil {
			t.Errorf("refused %x, which is %v", msg, &want)
		}
		x.s.Cancel()
		r.expectNothingLeft()
	})
}

// brokenPast is a past that cannot be read.
type brokenPast struct{}

func (brokenPast) Next(_ int, done func([]*watchring.Entry, int64, int64, codec.Status)) {
	done(nil, 0, 0, codec.Status{Code: codec.Internal, Msg: "unreadable"})
}
func (brokenPast) Close() {}

// A watch whose past cannot be read ends its RPC with an error: clientv3 closes the channel of one that is canceled
// without a compact revision as if all had gone well.
func TestWatchFailedPastEndsRPC(t *testing.T) {
	r := newWatchRig(t, func(c *WatchConfig) { c.OpenHistory = func(int, int64) History { return brokenPast{} } })
	f := r.open("c")
	f.create(&pb.WatchCreateRequest{Key: []byte("a"), StartRevision: 3})
	f.create(&pb.WatchCreateRequest{Key: []byte("b"), StartRevision: 4})
	r.turn()
	if f.status == nil || f.status.Code != codec.Unavailable || f.status.Msg != "unreadable" {
		t.Errorf("the RPC ends with %v", f.status)
	}
	r.expectNothingLeft()
}
