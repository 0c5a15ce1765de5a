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

func (s *leaseRigStream) Close() { s.closed = true }

type cannedHandle struct{}

func (cannedHandle) Send([]byte) {}

func (cannedHandle) Hold(bool) {}

func (cannedHandle) Close() {}

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
