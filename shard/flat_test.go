package shard

import (
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/revclock"
)

// flatWrites are creates, updates and deletes as kube-apiserver sends them, and what cannot go flat.
func flatWrites(t *testing.T) []*write {
	var ws []*write
	add := func(kind OpKind, m proto.Message) {
		w := &write{op: &Op{}, plan: planOf(t, kind, m), rev: int64(10 + len(ws))}
		for i := range w.plan.PutSlots {
			w.plan.PutSlots[i].Known = true
		}
		ws = append(ws, w)
	}
	put := func(key string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte("v")}}}
	}
	del := func(key, end string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
	}
	mod := func(key, end string, rev int64) *pb.Compare {
		return &pb.Compare{Target: pb.Compare_MOD, Key: []byte(key), RangeEnd: []byte(end), TargetUnion: &pb.Compare_ModRevision{ModRevision: rev}}
	}
	add(OpTxn, &pb.TxnRequest{Compare: []*pb.Compare{mod("a", "", 0)}, Success: []*pb.RequestOp{put("a")}})
	add(OpTxn, &pb.TxnRequest{Compare: []*pb.Compare{mod("b", "", 5)}, Success: []*pb.RequestOp{put("b")}})
	add(OpTxn, &pb.TxnRequest{Compare: []*pb.Compare{mod("c", "", 5)}, Success: []*pb.RequestOp{del("c", "")}})
	add(OpPut, &pb.PutRequest{Key: []byte("d"), Value: []byte("v")})
	// From here on none may go flat.
	add(OpTxn, &pb.TxnRequest{Success: []*pb.RequestOp{put("e"), put("f")}})
	add(OpTxn, &pb.TxnRequest{Compare: []*pb.Compare{mod("g", "h", 0)}, Success: []*pb.RequestOp{put("g")}})
	add(OpTxn, &pb.TxnRequest{Compare: []*pb.Compare{mod("i", "", -1)}, Success: []*pb.RequestOp{put("i")}})
	add(OpTxn, &pb.TxnRequest{Success: []*pb.RequestOp{del("j", "k")}})
	add(OpDeleteRange, &pb.DeleteRangeRequest{Key: []byte("l"), RangeEnd: []byte("m")})
	return ws
}

// TestFlatForm reads a flat batch back with etcd's own protobuf code.
func TestFlatForm(t *testing.T) {
	ws := flatWrites(t)
	if !flatten(ws, 128) {
		t.Fatal("nothing goes flat")
	}
	for i, w := range ws {
		if w.flat != (i < 4) {
			t.Errorf("request %d: flat %v", i, w.flat)
		}
	}
	b := &batchTxn{record: &Record{First: 10, Last: 20, Kind: KindBatch}, mapMod: 5, floor: 4}
	var txn pb.TxnRequest
	unmarshal(t, appendBatch(nil, b, ws), &txn)
	if len(txn.Compare) != batchCompares+1+2+2 || len(txn.Success) != len(ws)+1 {
		t.Fatalf("%d compares, %d operations", len(txn.Compare), len(txn.Success))
	}
	for i, op := range txn.Success[:len(ws)] {
		if nested := op.GetRequestTxn() != nil; nested != (i >= 4) {
			t.Errorf("operation %d: nested %v", i, nested)
		}
	}
	for _, w := range ws {
		w.flat = false
	}
	unmarshal(t, appendBatch(nil, b, ws), &txn)
	if len(txn.Compare) != batchCompares || len(txn.Success) != len(ws)+1 {
		t.Fatalf("nested: %d compares, %d operations", len(txn.Compare), len(txn.Success))
	}
}

// TestFlatFits counts a flat batch as etcd does: it never has more than the member takes.
func TestFlatFits(t *testing.T) {
	var ws []*write
	for i := range 120 {
		ws = append(ws, &write{op: &Op{}, plan: planOf(t, OpTxn, &pb.TxnRequest{
			Compare: []*pb.Compare{{Target: pb.Compare_MOD, Key: fmt.Appendf(nil, "k%d", i), TargetUnion: &pb.Compare_ModRevision{ModRevision: 5}}},
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: fmt.Appendf(nil, "k%d", i)}}}},
		}), rev: int64(10 + i)})
		ws[i].plan.PutSlots[0].Known = true
	}
	for _, ops := range []int{10, 128, 1024} {
		if flatten(ws, ops) != (ops > 8) {
			t.Fatal("nothing goes flat")
		}
		n := 0
		for _, w := range ws {
			if w.flat {
				n++
			}
		}
		var txn pb.TxnRequest
		unmarshal(t, appendBatch(nil, &batchTxn{record: &Record{First: 10, Last: 200, Kind: KindBatch, Epoch: revclock.ID{1}}}, ws[:min(len(ws), ops-4)]), &txn)
		if cost := costOf(&txn); cost > ops || ops == 1024 && n != len(ws) || ops == 128 && n < 60 {
			t.Errorf("%d of %d requests go flat: costs %d of %d", n, len(ws), cost, ops)
		}
	}
}

// TestFlatPause wants few batches to be sent twice, whatever clients send.
func TestFlatPause(t *testing.T) {
	for _, x := range []struct {
		every int // a batch of so many has a compare that fails
		most  int // of 10,000 batches may be sent twice
	}{{1, 30}, {2, 600}, {1000, 10}} {
		var f flatForm
		flat, twice := 0, 0
		for i := range 10_000 {
			if !f.next() {
				continue
			}
			flat++
			if i%x.every == 0 {
				twice++
				f.failed()
			} else {
				f.held()
			}
		}
		if twice > x.most || x.every == 1000 && flat < 9000 {
			t.Errorf("one of %d fails: %d batches flat, %d sent twice", x.every, flat, twice)
		}
	}
}
