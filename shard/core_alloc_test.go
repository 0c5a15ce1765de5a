//go:build !race

package shard

import (
	"log/slog"
	"math/rand/v2"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"spindle/codec"
	"spindle/revclock"
)

// TestCoreGetsAllocateNothing sends rounds of linearizable gets through a Core whose members are canned:
// what is left is a little for each round, nothing for each request.
func TestCoreGetsAllocateNothing(t *testing.T) {
	const gets = 100
	tr := &cannedTransport{}
	clock := int64(1)
	c := NewCore(CoreConfig{
		Proxy: revclock.ID{1}, Names: []string{"a"}, Now: func() int64 { return clock },
		Rand: rand.New(rand.NewPCG(1, 2)), Log: slog.New(slog.DiscardHandler),
	}, tr)
	epoch := revclock.ID{9}
	record := AppendInitialRecord(nil, epoch)
	m := NewMap(epoch, 7, []MapShard{{Identity: revclock.ID{5}, Name: "a"}})
	head := func(rev int64) *pb.ResponseHeader { return &pb.ResponseHeader{ClusterId: 7, Revision: rev} }
	kv := func(key string, value []byte, mod int64) *mvccpb.KeyValue {
		return &mvccpb.KeyValue{Key: []byte(key), Value: value, CreateRevision: mod, ModRevision: mod, Version: 1}
	}
	c.Start()
	tr.answer(&tr.coord, mustMarshal(t, &pb.RangeResponse{Header: head(3)}))
	for range 2 { // the probe, and the look with which the epoch is believed
		tr.answer(&tr.shard, mustMarshal(t, &pb.TxnResponse{Header: head(4), Responses: []*pb.ResponseOp{
			rangeOf(kv(KeyID, AppendIdentity(nil, revclock.ID{5}), 2)), rangeOf(kv(KeyClock, record, 2)),
			rangeOf(kv(KeyMap, AppendMap(nil, m), 3)), rangeOf(), rangeOf()}}))
	}
	c.Flush()
	epochKV := kv(revclock.KeyEpoch, revclock.AppendEpoch(nil, epoch), 2)
	tr.answer(&tr.coord, mustMarshal(t, &pb.TxnResponse{Header: head(3), Succeeded: true, Responses: []*pb.ResponseOp{
		rangeOf(epochKV), rangeOf(kv("s", revclock.AppendSnapshot(nil, &revclock.Snapshot{N: 1, Shards: make([]revclock.SnapshotShard, 1)}), 2)), rangeOf()}}))
	c.Flush()
	tr.answer(&tr.shard, mustMarshal(t, &pb.RangeResponse{Header: head(4)})) // the record where the stream begins: none is older
	c.Flush()
	if ok, why := c.Ready(); !ok {
		t.Fatal(why)
	}

	now := mustMarshal(t, &pb.TxnResponse{Header: head(3), Succeeded: true, Responses: []*pb.ResponseOp{rangeOf(epochKV), rangeOf()}})
	var ops []*pb.ResponseOp
	for range gets {
		ops = append(ops, rangeOf(kv("some/key", append(AppendStamp(nil, 1, 1), "value"...), 2)))
	}
	reply := mustMarshal(t, &pb.TxnResponse{Header: head(2), Succeeded: true, Responses: append(ops, rangeOf(kv(KeyClock, record, 2)))})
	get := mustMarshal(t, &pb.RangeRequest{Key: []byte("some/key")})
	answered := 0
	done := func(op *Op) {
		if op.Status.Code != codec.OK || len(op.Resp) == 0 {
			t.Errorf("%v", op.Status)
		}
		answered++
		ReleaseOp(op)
	}
	rounds := 0
	round := func() {
		rounds++
		clock += 1000
		for range gets {
			op := AcquireOp()
			op.Kind, op.Msg, op.Done = OpRange, append(op.Msg[:0], get...), done
			c.Submit(op)
		}
		c.Flush()
		tr.answer(&tr.shard, reply)
		tr.answer(&tr.coord, now)
		c.Flush()
	}
	for range 10 {
		round()
	}
	if n := testing.AllocsPerRun(200, round); n > gets/10 {
		t.Errorf("%v allocations for a round of %d gets", n, gets)
	} else {
		t.Logf("%v allocations for a round of %d gets", n, gets)
	}
	if answered != rounds*gets {
		t.Fatalf("%d of %d gets answered", answered, rounds*gets)
	}
}
