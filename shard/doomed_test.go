package shard

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// runDoomed reads for a Txn that can only fail, and compares the answer with what etcd says to the Txn. It returns false if req is none, or
// could be written after all.
func (r *planRig) runDoomed(req proto.Message) bool {
	p := &r.plan
	cmp := p.doomed(r.creates, r.rng.IntN(8) == 0)
	if cmp < 0 || r.rng.IntN(4) == 0 {
		return false
	}
	p.expectElse(cmp)
	snap := r.snapshot(0)
	if p.holdsAfterAll(snap) {
		r.stats["not doomed after all"]++
		if st := p.Parse(OpTxn, mustMarshal(r.t, req), nil); st.Code != codec.OK {
			r.t.Fatal(st)
		}
		return false
	}
	r.stats["doomed"]++
	before := r.plain.kv.Rev()
	want, err := r.plain.do(req)
	out, wrote, st := p.Evaluate(nil, snap, headerAt(before))
	r.sameError(req, st, err)
	if wrote || r.plain.kv.Rev() != before {
		r.t.Fatalf("a doomed Txn wrote: %v, %v, %d is %d", req, wrote, before, r.plain.kv.Rev())
	}
	r.same("the else-branch of a doomed Txn", req, out, want)
	return true
}

func swapIf(key string, mod int64) *pb.TxnRequest {
	return &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: []byte(key), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: mod}}},
		Success: []*pb.RequestOp{putOp(key, "new")},
		Failure: []*pb.RequestOp{getOp(key)},
	}
}

func putOp(key, value string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}
}

func getOp(key string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}}}
}

// A Txn that can only fail is read, at once or as soon as that is known; any other waits for its batch.
func TestDoomedTxnIsRead(t *testing.T) {
	r := newRoads(t)
	s := r.c.shards[0]
	r.show(2, 4, map[int64]string{2: "a", 3: "b", 4: "c"})
	r.show(5, 6, map[int64]string{5: "a", 6: "-c"})
	edit := func(q *pb.TxnRequest, f func(*pb.TxnRequest)) *pb.TxnRequest { f(q); return q }
	for _, x := range []struct {
		name  string
		q     *pb.TxnRequest
		read  bool
		later bool // when a has changed again
	}{
		{"overtaken", swapIf("a", 2), true, false},
		{"deleted since", swapIf("c", 4), true, false},
		{"deleted there", swapIf("c", 6), false, false},
		{"nothing to do else", edit(swapIf("a", 4), func(q *pb.TxnRequest) { q.Failure = nil }), true, false},
		{"of another key besides", edit(swapIf("b", 3), func(q *pb.TxnRequest) { q.Compare = append(q.Compare, swapIf("a", 3).Compare...) }), true, false},
		{"up to date", swapIf("a", 5), false, true},
		{"future", swapIf("a", 100), false, false},
		{"create", swapIf("a", 0), false, false},
		{"negative", edit(swapIf("a", 2), func(q *pb.TxnRequest) { q.Compare[0].TargetUnion = &pb.Compare_ModRevision{ModRevision: -1} }), false, false},
		{"greater", edit(swapIf("a", 2), func(q *pb.TxnRequest) { q.Compare[0].Result = pb.Compare_GREATER }), false, false},
		{"of a version", edit(swapIf("a", 2), func(q *pb.TxnRequest) {
			q.Compare[0].Target, q.Compare[0].TargetUnion = pb.Compare_VERSION, &pb.Compare_Version{Version: 2}
		}), false, false},
		{"of a range", edit(swapIf("a", 2), func(q *pb.TxnRequest) { q.Compare[0].RangeEnd = []byte("b") }), false, false},
		{"writes else", edit(swapIf("a", 2), func(q *pb.TxnRequest) { q.Failure = append(q.Failure, putOp("b", "v")) }), false, false},
		{"deletes else", edit(swapIf("a", 2), func(q *pb.TxnRequest) {
			q.Failure = []*pb.RequestOp{{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("a")}}}}
		}), false, false},
		{"nested else", edit(swapIf("a", 2), func(q *pb.TxnRequest) {
			q.Failure = []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Success: []*pb.RequestOp{getOp("a")}}}}}
		}), false, false},
		{"reads the past", edit(swapIf("a", 2), func(q *pb.TxnRequest) { q.Failure[0].GetRequestRange().Revision = 3 }), false, false},
		{"a key that nobody knows", swapIf("d", 2), false, false},
	} {
		s.queue, s.reads = nil, nil
		op := &Op{Kind: OpTxn, Msg: mustMarshal(t, x.q), Done: func(op *Op) { t.Errorf("%s: ends: %v", x.name, op.Status) }}
		r.c.Submit(op)
		read := len(s.queue) == 0 && len(s.reads) == 1 && s.reads[0].op == op
		if read != x.read {
			t.Errorf("%s: read %v", x.name, read)
		}
		if len(s.queue) == 0 {
			continue // it is read, or looked up first
		}
		// The same knowledge when the batch is formed; then a has changed, as far as a stream, a reply or a read may tell.
		s.divertDoomed()
		if len(s.queue) != 1 {
			t.Errorf("%s: it leaves the queue", x.name)
		}
		creates := *r.c.creates
		creates.sets = append([]createSet(nil), creates.sets...)
		was := r.c.creates
		r.c.creates = &creates
		creates.Learn([]byte("a"), 2, 2, 8)
		s.divertDoomed()
		r.c.creates = was
		if later := len(s.queue) == 0 && len(s.reads) == 1; later != x.later {
			t.Errorf("%s: read later %v", x.name, later)
		}
	}
}

// A Txn that is thought to be doomed keeps the deadline of its arrival on each of its roads: the queue, a gate of lists, the read, and the
// queue again. (It had the whole shard timeout on each.)
func TestDoomedKeepsItsDeadline(t *testing.T) {
	r := newRoads(t)
	s := r.c.shards[0]
	r.show(2, 4, map[int64]string{2: "a", 3: "b", 4: "c"})
	list := swapIf("a", 2)
	list.Failure = append(list.Failure, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")}}})
	for _, q := range []*pb.TxnRequest{swapIf("a", 2), list} {
		s.queue, s.reads = nil, nil
		r.now++
		until := r.now + int64(r.c.cfg.ShardTimeout)
		op := &Op{Kind: OpTxn, Msg: mustMarshal(t, q), Done: func(op *Op) { t.Errorf("it ends: %v", op.Status) }}
		r.c.Submit(op)
		if len(s.queue) != 1 {
			t.Fatal("it does not wait for a batch")
		}
		r.now += int64(r.c.cfg.ShardTimeout) / 3
		r.c.creates.Learn([]byte("a"), 2, 2, 8)
		s.divertDoomed()
		if len(s.reads) == 0 {
			if op.core.gateUntil != until {
				t.Errorf("at the gate until %d, not %d", op.core.gateUntil, until)
			}
			r.now += int64(r.c.cfg.ShardTimeout) / 3
			r.c.startLists()
		}
		if len(s.queue) != 0 || len(s.reads) != 1 || s.reads[0].deadline != until {
			t.Fatalf("%d in the queue, read: %+v, not until %d", len(s.queue), s.reads, until)
		}
		s.reads = nil
		r.c.writeAfterAll(op)
		if len(s.queue) != 1 || s.queue[0].since+int64(r.c.cfg.ShardTimeout) != until {
			t.Fatalf("in the queue: %+v, not until %d", s.queue, until)
		}
		// A request that comes with the same Op has a time of its own.
		s.queue = nil
		r.c.Submit(op)
		if len(s.reads) != 1 || s.reads[0].deadline != r.c.deadline() {
			r.c.startLists()
			if len(s.reads) != 1 || s.reads[0].deadline != r.c.deadline() {
				t.Fatalf("again: %+v", s.reads)
			}
		}
		r.c.leaveList(op)
		r.c.creates = NewCreateCache(1 << 10)
		r.c.creates.Learn([]byte("a"), 2, 2, 2)
	}
}

// What looks for doomed Txns is on the road of every write.
func TestDoomedAllocatesNothing(t *testing.T) {
	r := newRoads(t)
	s := r.c.shards[0]
	r.show(2, 3, map[int64]string{2: "a", 3: "b"})
	for _, x := range []struct {
		key string
		mod int64
	}{{"a", 2}, {"b", 3}, {"b", 0}} {
		r.c.Submit(&Op{Kind: OpTxn, Msg: mustMarshal(t, swapIf(x.key, x.mod)), Done: func(*Op) { t.Error("it ends") }})
	}
	if len(s.queue) != 3 {
		t.Fatalf("%d wait", len(s.queue))
	}
	if n := testing.AllocsPerRun(100, s.divertDoomed); n > 0 {
		t.Errorf("%v allocations", n)
	}
	// One that leaves: its plan is the only thing that changes.
	p := s.queue[0].plan
	msg := mustMarshal(t, swapIf("a", 1))
	if n := testing.AllocsPerRun(100, func() {
		if st := p.Parse(OpTxn, msg, &r.c.cfg.Limits); st.Code != codec.OK {
			t.Fatal(st)
		}
		cmp := p.doomed(r.c.creates, false)
		if cmp < 0 {
			t.Fatal("it is not doomed")
		}
		p.expectElse(cmp)
	}); n > 0 {
		t.Errorf("%v allocations for one that is doomed", n)
	}
}
