package shard

import (
	"bytes"
	"io"
	"log/slog"
	"math/rand/v2"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/revclock"
	"spindle/watchring"
)

// leaseRig is a Core over members that say what the test lets them say.
type leaseRig struct {
	t     *testing.T
	c     *Core
	now   int64
	calls []*leaseRigCall
	alive []*leaseRigStream
}

type leaseRigCall struct {
	r   *leaseRig
	to  int
	m   codec.Method
	req []byte
	c   codec.Completion
}

type leaseRigStream struct {
	to   int
	sink codec.WatchSink
	sent []int64 // IDs

	closed bool
}

func newLeaseRig(t *testing.T, shards int) *leaseRig {
	r := &leaseRig{t: t, now: 1}
	names := make([]string, shards)
	r.c = NewCore(CoreConfig{Names: names, Now: func() int64 { return r.now }, Rand: rand.New(rand.NewPCG(1, 1)),
		Log: slog.New(slog.NewTextHandler(io.Discard, nil))}, r)
	c := r.c
	c.ring, c.frontier, c.state = watchring.NewRing(16, 1<<20, 0), watchring.NewFrontier(shards, 0), stateReady
	var of []MapShard
	for i := range shards {
		of = append(of, MapShard{Identity: revclock.ID{byte(i + 1)}})
		s := &shardState{c: c, idx: i, cluster: codec.ClusterID(i), rec: point{local: 1}}
		c.shards = append(c.shards, s)
	}
	c.m = NewMap(revclock.ID{9}, 7, of)
	c.part = NewPartition(c.m)
	return r
}

func (r *leaseRig) Call(to codec.ClusterID, m codec.Method, req []byte, _ time.Duration, c codec.Completion) {
	r.calls = append(r.calls, &leaseRigCall{r, int(to), m, bytes.Clone(req), c})
}

func (r *leaseRig) Watch(codec.ClusterID, []byte, codec.WatchSink) codec.WatchHandle {
	return cannedHandle{}
}

func (r *leaseRig) KeepAlive(to codec.ClusterID, sink codec.WatchSink) codec.WatchHandle {
	s := &leaseRigStream{to: int(to), sink: sink}
	r.alive = append(r.alive, s)
	return s
}

func (s *leaseRigStream) Send(req []byte) {
	m := &pb.LeaseKeepAliveRequest{}
	if proto.Unmarshal(req, m) != nil {
		panic("not a LeaseKeepAliveRequest")
	}
	s.sent = append(s.sent, m.ID)
}
func (s *leaseRigStream) Hold(bool) {}
func (s *leaseRigStream) Close()    { s.closed = true }

type cannedHandle struct{}

func (cannedHandle) Send([]byte) {}
func (cannedHandle) Hold(bool)   {}
func (cannedHandle) Close()      {}

// tick lets time pass.
func (r *leaseRig) tick(d time.Duration) {
	for end := r.now + int64(d); ; {
		if len(r.c.timers) == 0 || r.c.timers[0].at > end {
			r.now = end
			return
		}
		r.now = max(r.now, r.c.timers[0].at)
		r.c.Tick()
	}
}

// next takes the oldest call to a member; it must be this one.
func (r *leaseRig) next(to int, m codec.Method) *leaseRigCall {
	r.t.Helper()
	if len(r.calls) == 0 {
		r.t.Fatalf("no call, want one of method %d to %d", m, to)
	}
	q := r.calls[0]
	r.calls = r.calls[1:]
	if q.to != to || q.m != m {
		r.t.Fatalf("a call of method %d to %d, want one of method %d to %d", q.m, q.to, m, to)
	}
	return q
}

func (r *leaseRig) quiet() {
	r.t.Helper()
	if len(r.calls) > 0 {
		r.t.Fatalf("an unexpected call of method %d to %d", r.calls[0].m, r.calls[0].to)
	}
}

func (q *leaseRigCall) ok(m proto.Message) {
	resp := mustMarshal(q.r.t, m)
	q.c.Complete(resp, codec.Status{}, true)
	for i := range resp {
		resp[i] = 0xA5
	}
}

func (q *leaseRigCall) fail(st codec.Status, sent bool) { q.c.Complete(nil, st, sent) }

// id is the lease's ID that a request to a member names.
func (q *leaseRigCall) id() int64 {
	r := leaseRequest{}
	r.parse(map[bool]OpKind{true: OpLeaseGrant, false: OpLeaseRevoke}[q.m == codec.MethodLeaseGrant], q.req)
	return r.id
}

// key answers a read of a lease's key: no markers means that it is not there.
func (q *leaseRigCall) key(mks ...*mvccpb.KeyValue) {
	q.ok(&pb.RangeResponse{Header: &pb.ResponseHeader{Revision: 50}, Kvs: mks, Count: int64(len(mks))})
}

func leaseKey(x, m, create, mod int64, shards ...int) *mvccpb.KeyValue {
	return &mvccpb.KeyValue{Key: AppendLeaseKey(nil, x), Lease: m, CreateRevision: create, ModRevision: mod, Version: 1,
		Value: AppendLeaseMarker(nil, &LeaseMarker{Member: m, Shards: shards})}
}

// txn answers a Txn at a local revision; with keys it did not succeed.
func (q *leaseRigCall) txn(rev int64, kvs ...*mvccpb.KeyValue) {
	resp := &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: rev}, Succeeded: len(kvs) == 0}
	if len(kvs) > 0 {
		resp.Responses = []*pb.ResponseOp{rangeOp(kvs)}
	}
	q.ok(resp)
}

func rangeOp(kvs []*mvccpb.KeyValue) *pb.ResponseOp {
	return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: &pb.RangeResponse{Kvs: kvs, Count: int64(len(kvs))}}}
}

// submit sends a request; the status is there when done is true.
type rigAnswer struct {
	done bool
	st   codec.Status
	resp []byte
}

func (r *leaseRig) submit(kind OpKind, req proto.Message) *rigAnswer {
	a := &rigAnswer{}
	r.c.Submit(&Op{Kind: kind, Msg: mustMarshal(r.t, req), Done: func(op *Op) {
		if a.done {
			r.t.Error("answered twice")
		}
		*a = rigAnswer{true, op.Status, bytes.Clone(op.Resp)}
	}})
	return a
}

// answerNow answers everyone who waits for now.
func (r *leaseRig) answerNow(n int64) {
	(*clockEvents)(r.c).NowDone(1<<60, n, make([]int64, len(r.c.shards)))
}

// keyWith returns a key on a shard.
func (r *leaseRig) keyOn(shard int) []byte {
	for k := []byte("a"); ; k = append(k, 'a') {
		if r.c.part.ShardOf(k) == shard {
			return k
		}
	}
}

// leaseAt returns the n-th ID with a home.
func (r *leaseRig) leaseAt(home, n int) int64 {
	for id := int64(1); ; id++ {
		if r.c.part.HomeOf(id) == home {
			if n--; n < 0 {
				return id
			}
		}
	}
}

func (r *leaseRig) known(x int64, shard int) int64 {
	if e := r.c.leases.table.entries[x]; e != nil {
		return e.create(shard)
	}
	return 0
}

// TestLeaseAttach walks the four steps, with one put more that waits.
func TestLeaseAttach(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(0, 0)
	put := &pb.PutRequest{Key: r.keyOn(1), Lease: x}
	one, two := r.submit(OpPut, put), r.submit(OpPut, put)
	r.next(0, codec.MethodRange).key(leaseKey(x, x, 3, 4))
	hold := r.next(0, codec.MethodTxn)
	if mk := leaseKey(x, x, 3, 4, 1); !bytes.Contains(hold.req, mk.Value) {
		t.Error("the marker does not name the holder")
	}
	hold.txn(5)
	grant := r.next(1, codec.MethodLeaseGrant)
	if grant.id() != x {
		t.Errorf("granted %d", grant.id())
	}
	grant.fail(codec.ErrLeaseExist, true)
	r.next(1, codec.MethodTxn).txn(9)
	if r.known(x, 1) != 0 {
		t.Error("known before the marker was looked at again")
	}
	r.next(0, codec.MethodRange).key(leaseKey(x, x, 3, 5, 1))
	if c := r.known(x, 1); c != 9 {
		t.Errorf("c is %d", c)
	}
	r.quiet()
	if one.done || two.done {
		t.Error("answered before it was written")
	}
	if r.submit(OpPut, put); len(r.c.leases.attaches) > 0 {
		t.Error("attached again")
	}
}

// TestLeaseGoneBehindTheAttach: whoever finds the marker gone ends what was just made.
func TestLeaseGoneBehindTheAttach(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(0, 0)
	a := r.submit(OpPut, &pb.PutRequest{Key: r.keyOn(1), Lease: x})
	r.next(0, codec.MethodRange).key(leaseKey(x, x, 3, 4, 1))
	r.next(1, codec.MethodLeaseGrant).ok(&pb.LeaseGrantResponse{})
	r.next(1, codec.MethodTxn).txn(9)
	r.next(0, codec.MethodRange).key()
	if !a.done || a.st != codec.ErrLeaseNotFound {
		t.Errorf("%+v", a)
	}
	if r.known(x, 1) != 0 {
		t.Error("c counts as known")
	}
	r.tick(2 * vanishJitter)
	if q := r.next(1, codec.MethodLeaseRevoke); q.id() != x {
		t.Errorf("revoked %d", q.id())
	}
}

// TestLeaseAttachMeetsAnOlderCopy: the key on the shard is attached to a lease that once stood for the same ID.
// A guard on it would let puts pass on a lease that is gone.
func TestLeaseAttachMeetsAnOlderCopy(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(0, 0)
	older, newer := r.leaseAt(0, 1), r.leaseAt(0, 2)
	start := func(m int64) {
		r.submit(OpPut, &pb.PutRequest{Key: r.keyOn(1), Lease: x})
		r.next(0, codec.MethodRange).key(leaseKey(x, m, 3, 4, 1))
		r.next(1, codec.MethodLeaseGrant).ok(&pb.LeaseGrantResponse{})
	}
	start(newer)
	r.next(1, codec.MethodTxn).txn(9, leaseKey(x, older, 2, 2))
	r.next(0, codec.MethodRange).key(leaseKey(x, newer, 3, 4, 1))
	if q := r.next(1, codec.MethodLeaseRevoke); q.id() != older {
		t.Errorf("revoked %d", q.id())
	} else {
		q.ok(&pb.LeaseRevokeResponse{})
	}
	r.next(0, codec.MethodRange).key(leaseKey(x, newer, 3, 4, 1))
	r.next(1, codec.MethodLeaseGrant).fail(codec.ErrLeaseExist, true)
	r.next(1, codec.MethodTxn).txn(11)
	r.next(0, codec.MethodRange).key(leaseKey(x, newer, 3, 4, 1))
	if c := r.known(x, 1); c != 11 {
		t.Errorf("c is %d", c)
	}
	// The other way round: it is this proxy that is late, and what it met is alive.
	r.c.leases.table.forget(x)
	start(older)
	r.next(1, codec.MethodTxn).txn(9, leaseKey(x, newer, 11, 11))
	r.next(0, codec.MethodRange).key(leaseKey(x, newer, 10, 10, 1))
	if q := r.next(1, codec.MethodLeaseGrant); q.id() != newer {
		t.Errorf("granted %d", q.id())
	} else {
		q.fail(codec.ErrLeaseExist, true)
	}
	r.next(1, codec.MethodTxn).txn(12, leaseKey(x, newer, 11, 11))
	r.next(0, codec.MethodRange).key(leaseKey(x, newer, 10, 10, 1))
	if c := r.known(x, 1); c != 11 {
		t.Errorf("c is %d", c)
	}
	r.tick(time.Second)
	r.quiet()
}

// TestLeaseGrantSendsNothingTwice: a copy that came late would bring back a lease that was revoked meanwhile.
func TestLeaseGrantSendsNothingTwice(t *testing.T) {
	lost := codec.Status{Code: codec.Unavailable, Msg: "connection lost"}
	for _, x := range []int64{0, 77} {
		r := newLeaseRig(t, 2)
		home := func(id int64) int { return r.c.part.HomeOf(id) }
		a := r.submit(OpLeaseGrant, &pb.LeaseGrantRequest{TTL: 30, ID: x})
		var ids []int64
		grant := func() *leaseRigCall {
			q := r.calls[0]
			r.next(home(q.id()), codec.MethodLeaseGrant)
			for _, id := range ids {
				if id == q.id() {
					t.Errorf("ID %d is used twice", id)
				}
			}
			if (q.id()&aliasBit != 0) != (x != 0) || x != 0 && home(x) != home(q.id()) {
				t.Errorf("%x stands for %x", q.id(), x)
			}
			ids = append(ids, q.id())
			return q
		}
		grant().fail(lost, true)
		r.tick(50 * time.Millisecond)
		q := grant()
		q.fail(lost, false) // certainly not seen by anybody: it may go again
		r.tick(50 * time.Millisecond)
		q = r.next(home(q.id()), codec.MethodLeaseGrant)
		q.ok(&pb.LeaseGrantResponse{ID: q.id(), TTL: 31})
		r.next(home(q.id()), codec.MethodTxn).fail(lost, true)
		r.next(home(q.id()), codec.MethodRange).key()
		if end := r.next(home(q.id()), codec.MethodLeaseRevoke); end.id() != q.id() {
			t.Errorf("%d was ended", end.id())
		} else {
			end.ok(&pb.LeaseRevokeResponse{})
		}
		r.tick(50 * time.Millisecond)
		q = grant()
		q.ok(&pb.LeaseGrantResponse{ID: q.id(), TTL: 31})
		r.next(home(q.id()), codec.MethodTxn).txn(8)
		r.answerNow(44)
		got := unmarshal(t, a.resp, &pb.LeaseGrantResponse{})
		if want := max(x, 0); !a.done || a.st.Code != codec.OK || got.TTL != 31 || got.Header.Revision != 44 || want != 0 && got.ID != want || want == 0 && got.ID != q.id() {
			t.Errorf("%+v: %v", a.st, got)
		}
		if r.known(got.ID, home(got.ID)) != 8 {
			t.Error("home's c is not known after the grant")
		}
	}
}

// TestLeaseKeepAliveIsOneRequest: many who ask at once cost home one request; an ID that is another lease by now is
// looked up.
func TestLeaseKeepAliveIsOneRequest(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(1, 0)
	req := &pb.LeaseKeepAliveRequest{ID: x}
	var as []*rigAnswer
	for range 3 {
		as = append(as, r.submit(OpLeaseKeepAlive, req))
	}
	r.next(1, codec.MethodRange).key(leaseKey(x, 1000, 3, 3))
	r.quiet()
	if len(r.alive) != 1 || r.alive[0].to != 1 || len(r.alive[0].sent) != 1 || r.alive[0].sent[0] != 1000 {
		t.Fatalf("%+v", r.alive)
	}
	s := r.alive[0]
	reply := func(m, ttl int64) { s.sink.OnMessage(mustMarshal(t, &pb.LeaseKeepAliveResponse{ID: m, TTL: ttl})) }
	reply(1000, 30)
	for _, a := range as {
		if got := unmarshal(t, a.resp, &pb.LeaseKeepAliveResponse{}); !a.done || got.ID != x || got.TTL != 30 {
			t.Errorf("%v", got)
		}
	}
	a := r.submit(OpLeaseKeepAlive, req) // from memory, but it is another one now
	if reply(1000, 0); a.done {
		t.Fatal("a lease that was granted again is said to be gone")
	}
	r.next(1, codec.MethodRange).key(leaseKey(x, 1001, 9, 9))
	reply(1001, 20)
	if got := unmarshal(t, a.resp, &pb.LeaseKeepAliveResponse{}); !a.done || got.TTL != 20 {
		t.Errorf("%v", got)
	}
	// The stream ends: what is under way is asked on the next one.
	a = r.submit(OpLeaseKeepAlive, req)
	s.sink.OnEnd(codec.ErrNoLeader)
	r.tick(keeperStall / 2)
	if len(r.alive) != 2 || len(r.alive[1].sent) != 1 {
		t.Fatalf("%+v", r.alive)
	}
	s = r.alive[1]
	reply(1001, 20)
	if !a.done || a.st.Code != codec.OK {
		t.Errorf("%+v", a)
	}
	// Nobody answers.
	a = r.submit(OpLeaseKeepAlive, req)
	if r.tick(2 * r.c.cfg.ShardTimeout); a.st != codec.ErrTimeout || len(r.c.leases.keeping) != 0 {
		t.Errorf("%+v", a)
	}
}

func gone(kv *mvccpb.KeyValue) codec.KV {
	return codec.KV{Key: kv.Key, Value: kv.Value, Lease: kv.Lease, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision}
}

// TestLeaseVanishes: a marker's end makes this proxy revoke the copies, a bounded number at once, unless another
// proxy did.
func TestLeaseVanishes(t *testing.T) {
	r := newLeaseRig(t, 2)
	l := &r.c.leases
	for n := range 3 * maxRevokesInFlight {
		x := r.leaseAt(0, n)
		l.keyGone(r.c.shards[0], x, 10, gone(leaseKey(x, x, 3, 4, 1)))
		if n%3 == 0 {
			l.keyGone(r.c.shards[1], x, 10, gone(leaseKey(x, x, 3, 4)))
		}
	}
	r.quiet()
	r.tick(2 * vanishJitter)
	if len(r.calls) != maxRevokesInFlight {
		t.Fatalf("%d revokes at once", len(r.calls))
	}
	away := codec.Status{Code: codec.Unavailable, Msg: "away"}
	for range maxRevokesInFlight {
		r.next(1, codec.MethodLeaseRevoke).fail(away, true)
	}
	for n := 0; n < 2*maxRevokesInFlight; n++ { // the others, then those again
		if len(r.calls) == 0 {
			r.tick(2 * vanishJitter)
		}
		r.next(1, codec.MethodLeaseRevoke).ok(&pb.LeaseRevokeResponse{})
	}
	r.tick(time.Second)
	r.quiet()
	if s := &r.c.shards[1].lease; len(s.queue)+len(s.queued)+s.ready+s.inFlight != 0 {
		t.Errorf("%+v", s)
	}
}

// TestLeaseRevokeWithoutAHolder: a holder that does not answer costs the client a timeout, and the copy is revoked
// when it is back.
func TestLeaseRevokeWithoutAHolder(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(0, 0)
	a := r.submit(OpLeaseRevoke, &pb.LeaseRevokeRequest{ID: x})
	r.answerNow(40)
	marker := leaseKey(x, x, 3, 4, 1)
	r.next(0, codec.MethodRange).key(marker)
	r.next(0, codec.MethodLeaseRevoke).ok(&pb.LeaseRevokeResponse{Header: &pb.ResponseHeader{Revision: 9}})
	r.quiet()
	// The stream shows it.
	s := r.c.shards[0]
	s.pos = 9
	r.c.leases.keyGone(s, x, 9, gone(marker))
	r.c.leases.streamMoved(s)
	away := codec.Status{Code: codec.Unavailable, Msg: "away"}
	for !a.done {
		r.next(1, codec.MethodLeaseRevoke).fail(away, true)
		r.tick(maxRetryDelay * 2)
	}
	if a.st != codec.ErrTimeout {
		t.Errorf("%+v", a)
	}
	r.tick(2 * vanishJitter)
	if q := r.next(1, codec.MethodLeaseRevoke); q.id() != x {
		t.Errorf("revoked %d", q.id())
	}
}

// TestLeaseRevokeWaitsForTheRecord: the answer comes when all deletes have their revision, and is not below it.
func TestLeaseRevokeWaitsForTheRecord(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(0, 0)
	a := r.submit(OpLeaseRevoke, &pb.LeaseRevokeRequest{ID: x})
	r.answerNow(40)
	marker := leaseKey(x, x, 3, 4, 1)
	r.next(0, codec.MethodRange).key(marker)
	home, holder := r.c.shards[0], r.c.shards[1]
	r.next(0, codec.MethodLeaseRevoke).ok(&pb.LeaseRevokeResponse{Header: &pb.ResponseHeader{Revision: 9}})
	home.pos = 9
	r.c.leases.keyGone(home, x, 9, gone(marker))
	r.c.leases.streamMoved(home)
	r.next(1, codec.MethodLeaseRevoke).ok(&pb.LeaseRevokeResponse{Header: &pb.ResponseHeader{Revision: 7}})
	holder.pos = 7
	holder.pending = append(holder.pending, pendingEvent{local: 7})
	r.c.leases.streamMoved(holder)
	if a.done {
		t.Fatal("answered before a record covers the deletes")
	}
	if !holder.wantFence {
		t.Error("nobody sees to it that there is one")
	}
	holder.pos, holder.rec, holder.pending = 8, point{45, 46, 8}, nil
	r.c.leases.streamMoved(holder)
	if got := unmarshal(t, a.resp, &pb.LeaseRevokeResponse{}); !a.done || a.st.Code != codec.OK || got.Header.Revision != 46 {
		t.Errorf("%+v %v", a, got)
	}
	r.tick(2 * r.c.cfg.ShardTimeout)
	r.quiet()
}

// TestLeaseTable: the table is bounded, forgets what was not used, and believes no older facts.
func TestLeaseTable(t *testing.T) {
	tab := newLeaseTable(3)
	for x := int64(1); x <= 3; x++ {
		tab.learn(x, x+100, 0, x)
	}
	tab.get(1)
	tab.learn(4, 104, 0, 4)
	if tab.get(2) != nil || tab.get(1) == nil || len(tab.entries) != 3 {
		t.Error("the wrong one was forgotten")
	}
	tab.learn(1, 101, 1, 50)
	if tab.gone(1, 1, 40); tab.get(1).create(1) != 50 {
		t.Error("the end of an older copy counts")
	}
	if tab.gone(1, 1, 60); tab.get(1).create(1) != 0 || tab.get(1).create(0) != 1 {
		t.Error("the end of the copy does not count")
	}
	if tab.ended(1, 99); tab.get(1) == nil {
		t.Error("the end of an older lease counts")
	}
	if tab.learn(1, 102, 1, 70); tab.get(1).create(0) != 0 || tab.get(1).m != 102 {
		t.Error("what is known of an older lease is kept")
	}
	for _, x := range []int64{1, 3, 4} {
		tab.forget(x)
	}
	if tab.newest != nil || tab.oldest != nil || len(tab.entries) != 0 {
		t.Error("not empty")
	}
}

// TestLeaseGrantRevokedBeforeItSettles: the marker's reply is lost, and somebody revokes the lease before it is looked
// at. It was granted and revoked, so it is not granted once more.
func TestLeaseGrantRevokedBeforeItSettles(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(1, 0)
	a := r.submit(OpLeaseGrant, &pb.LeaseGrantRequest{TTL: 30, ID: x})
	r.next(1, codec.MethodLeaseGrant).ok(&pb.LeaseGrantResponse{TTL: 31})
	r.next(1, codec.MethodTxn).fail(codec.Status{Code: codec.Unavailable, Msg: "connection lost"}, true)
	r.next(1, codec.MethodRange).key()
	r.next(1, codec.MethodLeaseRevoke).fail(codec.ErrLeaseNotFound, true)
	r.tick(50 * time.Millisecond)
	r.quiet()
	if !a.done || a.st != codec.ErrTimeout {
		t.Errorf("%+v", a)
	}
}

// TestLeaseRevokesWaitForTheShard: many copies on a shard that is away cost one look a second, not all of them.
func TestLeaseRevokesWaitForTheShard(t *testing.T) {
	r := newAwayRig(t, 1)
	s := r.c.shards[1]
	const n = 1000
	for m := range int64(n) {
		r.c.leases.revokeLater(s, m+1)
	}
	r.tick(10 * time.Second)
	r.quiet()
	// Connected, as far as anybody knows, but nothing leaves.
	r.away[1] = false
	tried := 0
	for range 10 {
		r.tick(2 * awayRevokes)
		for len(r.calls) > 0 {
			r.next(1, codec.MethodLeaseRevoke).fail(codec.Status{Code: codec.Unavailable, Msg: "no connection"}, false)
			tried++
		}
	}
	if tried == 0 || tried > 20*maxRevokesInFlight {
		t.Errorf("%d tries in 20 seconds", tried)
	}
	if len(s.lease.queue)+s.lease.inFlight != n {
		t.Errorf("%d wait, %d under way", len(s.lease.queue), s.lease.inFlight)
	}
	for i := 0; len(s.lease.queued) > 0 && i < n; i++ {
		r.tick(2 * awayRevokes)
		for len(r.calls) > 0 {
			r.next(1, codec.MethodLeaseRevoke).ok(&pb.LeaseRevokeResponse{})
		}
	}
	if len(s.lease.queued) > 0 || len(s.lease.queue) > 0 {
		t.Errorf("%d are left", len(s.lease.queued))
	}
}
