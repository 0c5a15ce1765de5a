package shard

import (
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// The gate by itself: order, cancellation, time, and the end of the Core. What passes it ends at once here, since
// the Core is not ready.
func TestListGate(t *testing.T) {
	now := int64(0)
	c := &Core{cfg: CoreConfig{ShardTimeout: time.Second, Now: func() int64 { return now }}, shards: []*shardState{{idx: 0}, {idx: 1}}}
	c.part = NewPartition(NewMap(goldenID(1), 1, []MapShard{{goldenID(2), "a"}, {goldenID(3), "b"}}))
	var ended []codec.Status
	list := func() *Op {
		op := &Op{Kind: OpRange, Done: func(op *Op) { ended = append(ended, op.Status) }}
		op.Msg = protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "a")
		one := op.core.plan.Parse(OpRange, op.Msg, &Limits{})
		if one.Code != codec.OK || !c.enterList(op) {
			t.Fatal("a single key has to wait")
		}
		op.Msg = protowire.AppendString(protowire.AppendTag(op.Msg, 2, protowire.BytesType), "b")
		op.core.plan.Reset()
		if st := op.core.plan.Parse(OpRange, op.Msg, &Limits{}); st.Code != codec.OK || c.enterList(op) {
			t.Fatal("a list does not wait for the end of the turn", st)
		}
		return op
	}
	c.gates = []*listGate{newListGate(gateKey{first: 7}), newListGate(gateKey{first: 8}), newListGate(gateKey{first: 0, last: 1})}
	c.gates[2].out = maxLists
	a, b := list(), list()
	if c.gatesOpen {
		t.Error("there is no room")
	}
	b.canceled = true
	list()
	busy := &Op{Done: func(*Op) {}}
	busy.core.gate = 3
	c.finish(busy, codec.Status{})
	if !c.gatesOpen || c.gates[2].out != maxLists-1 {
		t.Fatal("room is not seen")
	}
	now = int64(time.Second) + 1 // too late for all that waited
	c.startLists()
	if len(ended) != 3 || ended[0] != codec.ErrTimeout || ended[1] != statusCanceled || ended[2] != codec.ErrTimeout || c.gates[2].out != maxLists-1 {
		t.Errorf("%v, %d under way", ended, c.gates[2].out)
	}
	ended = nil
	list()
	c.stopLists(codec.ErrStopped)
	if len(ended) != 1 || ended[0] != codec.ErrStopped || a.core.gate != 0 {
		t.Errorf("%v", ended)
	}
	for range maxListsWaiting {
		list()
	}
	ended = nil
	if list(); len(ended) != 1 || ended[0] != codec.ErrTooManyRequests {
		t.Errorf("%v", ended)
	}
}

// gateRig is a Core with a list gate that is full: lists of all shards.
func gateRig(t *testing.T, shards int) *leaseRig {
	r := newLeaseRig(t, shards)
	for range maxLists + 1 {
		r.submit(OpRange, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Limit: 1})
	}
	r.c.Flush()
	if g := r.c.gates[0]; g.out != maxLists || g.n != 1 {
		t.Fatalf("%d under way, %d wait", g.out, g.n)
	}
	return r
}

// TestListGateSerializable: lists that wait for a dead coordinator do not stop those that need none.
func TestListGateSerializable(t *testing.T) {
	r := gateRig(t, 2)
	before := len(r.calls)
	r.submit(OpRange, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Limit: 1, Serializable: true})
	r.c.Flush()
	if len(r.calls) != before+2 {
		t.Errorf("%d calls", len(r.calls)-before)
	}
}

// TestListGateOfOtherShards: with ranges, lists over a dead shard and another do not stop those over others.
func TestListGateOfOtherShards(t *testing.T) {
	r := newLeaseRig(t, 3)
	r.c.m.Kind, r.c.m.Splits = PartitionRange, []MapSplit{{Shard: 0}, {Start: []byte("f"), Shard: 1}, {Start: []byte("p"), Shard: 2}}
	r.c.part = NewPartition(r.c.m)
	for range maxLists + 1 {
		r.submit(OpRange, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("g"), Limit: 1})
	}
	r.c.Flush()
	before := len(r.calls)
	r.submit(OpRange, &pb.RangeRequest{Key: []byte("g"), RangeEnd: []byte("z"), Limit: 1})
	r.c.Flush()
	if len(r.calls) != before+2 {
		t.Errorf("%d calls", len(r.calls)-before)
	}
}

// TestListGateDeadline: who waits at a gate is answered when its time is over, also if no list ends.
func TestListGateDeadline(t *testing.T) {
	r := newLeaseRig(t, 2)
	r.c.gates = []*listGate{newListGate(gateKey{first: 0, last: 1})}
	r.c.gates[0].out = maxLists // lists that do not end
	list := func() *rigAnswer {
		return r.submit(OpRange, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")})
	}
	one := list()
	r.tick(r.c.cfg.ShardTimeout / 2)
	two := list()
	r.tick(r.c.cfg.ShardTimeout / 2)
	if !one.done || one.st != codec.ErrTimeout || two.done {
		t.Errorf("%+v, %+v", one, two)
	}
	r.tick(r.c.cfg.ShardTimeout / 2)
	if !two.done || two.st != codec.ErrTimeout {
		t.Errorf("%+v", two)
	}
}

// TestListGateDeadlineOfDoomed: a Txn that is found to be doomed has waited for a batch before it comes to the gate, so its time is over
// before that of lists which came there earlier, its own client's and others'. (It was answered with them: up to 1.9 timeouts after it
// arrived.)
func TestListGateDeadlineOfDoomed(t *testing.T) {
	r := newLeaseRig(t, 1)
	timeout := r.c.cfg.ShardTimeout
	r.c.creates.Learn([]byte("a"), 2, 2, 2)
	r.c.gates = []*listGate{newListGate(gateKey{})}
	r.c.gates[0].out = maxLists // lists that do not end
	swap := swapIf("a", 2)
	swap.Failure = append(swap.Failure, requestRange("a", "z"))
	doomed := r.submit(OpTxn, swap)
	r.tick(timeout * 9 / 10)
	list := r.submit(OpRange, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")})
	r.c.gates[0].moved = r.now // lists wait for others; who may write has a time of its own
	r.c.creates.Learn([]byte("a"), 2, 2, 8)
	r.c.shards[0].divertDoomed()
	if g := r.c.gates[0]; g.n != 2 {
		t.Fatalf("%d wait at the gate", g.n)
	}
	r.tick(timeout / 10)
	if !doomed.done || doomed.st != codec.ErrTimeout || list.done {
		t.Errorf("the Txn: %+v, the list: %+v", doomed, list)
	}
	r.tick(timeout * 9 / 10)
	if !list.done || list.st != codec.ErrTimeout {
		t.Errorf("the list: %+v", list)
	}
}

// TestListsWaitForEachOther: as long as lists of a gate end, others wait for their turn, for longer than the shard timeout, too; once none has
// ended for that time nobody waits any more. (Of eight lists of 100 MB at once some had waited for too long.) Those that end without
// success, as all do when a shard is dead, keep nobody waiting.
func TestListsWaitForEachOther(t *testing.T) {
	for _, st := range []codec.Status{{}, codec.ErrTimeout} {
		r := newLeaseRig(t, 1)
		timeout := r.c.cfg.ShardTimeout
		r.c.gates = []*listGate{newListGate(gateKey{})}
		r.c.gates[0].out = maxLists + 3
		list := r.submit(OpRange, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")})
		ends := r.now + int64(timeout)
		for range 3 {
			r.tick(timeout * 2 / 3)
			op := &Op{Done: func(*Op) {}}
			op.core.gate = 1
			r.c.finish(op, st)
			if st.Code == codec.OK {
				ends = r.now + int64(timeout)
			}
		}
		r.tick(time.Duration(ends - r.now - 1))
		if list.done && st.Code == codec.OK {
			t.Errorf("%v: it does not wait for others", list.st)
		}
		r.tick(1 + gateLook)
		if !list.done || list.st != codec.ErrTimeout {
			t.Errorf("others end with %v: it waits for what is dead: %+v", st, list)
		}
	}
}

// TestCanceledListLeavesTheGate: nobody waits for its answer, so it does not wait for its turn either, however long others get on.
func TestCanceledListLeavesTheGate(t *testing.T) {
	r := newLeaseRig(t, 1)
	r.c.gates = []*listGate{newListGate(gateKey{})}
	r.c.gates[0].out = maxLists
	var ended []codec.Status
	op := &Op{Kind: OpRange, Msg: mustMarshal(t, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")}), Done: func(op *Op) { ended = append(ended, op.Status) }}
	r.c.Submit(op)
	r.c.Cancel(op)
	r.c.gates[0].moved = r.now + int64(r.c.cfg.ShardTimeout)
	r.tick(r.c.cfg.ShardTimeout)
	if len(ended) != 1 || ended[0] != statusCanceled || r.c.gates[0].n != 0 {
		t.Errorf("%v, %d wait", ended, r.c.gates[0].n)
	}
}

// TestListThatWaitsForMemoryLeavesTheGate: others may be small.
func TestListThatWaitsForMemoryLeavesTheGate(t *testing.T) {
	r := gateRig(t, 1)
	m := NewMemory(1)
	m.Add(2)
	r.c.cfg.Memory = m
	op := &Op{Kind: OpRange, Done: func(*Op) {}, Msg: mustMarshal(t, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")})}
	if st := op.core.plan.Parse(OpRange, op.Msg, &r.c.cfg.Limits); st.Code != codec.OK {
		t.Fatal(st)
	}
	op.core.gate = 1
	p := r.c.newPagedRead(op, nil)
	p.parts[0].total, p.parts[0].perKey = 1<<10, 1<<10
	out := r.c.gates[0].out
	if p.admit() || op.core.gate != 0 || r.c.gates[0].out != out-1 || !r.c.gatesOpen {
		t.Errorf("gate %d, %d of %d under way", op.core.gate, r.c.gates[0].out, out)
	}
}

// TestReadTxnPassesTheGate: a Txn that lists is as much work as a list.
func TestReadTxnPassesTheGate(t *testing.T) {
	r := newLeaseRig(t, 1)
	for range maxLists + 3 {
		r.submit(OpTxn, &pb.TxnRequest{Success: []*pb.RequestOp{requestRange("a", "z")}})
	}
	r.submit(OpTxn, &pb.TxnRequest{Success: []*pb.RequestOp{requestRange("a", "")}})
	r.c.Flush()
	if g := r.c.gates[0]; g.out != maxLists || g.n != 3 {
		t.Errorf("%d under way, %d wait", g.out, g.n)
	}
}
