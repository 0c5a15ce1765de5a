package shard

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

func requestRange(key, end string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
}

func requestPut(key []byte) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: []byte("v")}}}
}

// TestWideTxnWrongWireType: fields of the branches' numbers that are no operations are not counted as such.
func TestWideTxnWrongWireType(t *testing.T) {
	key := newLeaseRig(t, 2).keyOn(1)
	msg := mustMarshal(t, &pb.TxnRequest{
		Success: []*pb.RequestOp{requestPut(key), requestRange("\x01", "\x00")},
		Failure: []*pb.RequestOp{requestPut(key), requestRange("\x01", "\x00")},
	})
	for _, num := range []protowire.Number{2, 3} {
		wrong := protowire.AppendVarint(protowire.AppendTag(nil, num, protowire.VarintType), 7)
		for _, msg := range [][]byte{append(append([]byte(nil), wrong...), msg...), append(append([]byte(nil), msg...), wrong...)} {
			r := newLeaseRig(t, 2)
			op := &Op{Kind: OpTxn, Msg: msg, Done: func(op *Op) { t.Errorf("answered: %v", op.Status) }}
			r.c.Submit(op)
			r.c.Flush()
			if len(r.calls) == 0 {
				t.Errorf("field %d: nothing is written", num)
			}
			w := &wideTxn{then: []bool{false, true}, els: []bool{false, true}}
			var got pb.TxnRequest
			if err := proto.Unmarshal(w.appendInner(nil, msg), &got); err != nil || len(got.Success) != 1 || len(got.Failure) != 1 ||
				got.Success[0].GetRequestPut() == nil || got.Failure[0].GetRequestPut() == nil {
				t.Errorf("field %d: what is written is %v, %v", num, &got, err)
			}
		}
	}
}

// TestWideTxnRangesAreCounted: the ranges of a wide Txn are read one after the other, what they brought is counted, and
// there is an end of it when memory is over.
func TestWideTxnRangesAreCounted(t *testing.T) {
	for _, c := range []struct {
		limit int64
		want  codec.Status
		asked int
	}{{1 << 20, codec.Status{}, 3}, {100, codec.ErrTimeout, 2}} {
		r := newLeaseRig(t, 2)
		m := NewMemory(c.limit)
		r.c.cfg.Memory = m
		var got codec.Status
		var resp []byte
		op := &Op{Kind: OpTxn, Done: func(op *Op) { got, resp = op.Status, op.Resp }}
		op.Msg = mustMarshal(t, &pb.TxnRequest{Success: []*pb.RequestOp{
			requestPut(r.keyOn(1)), requestRange("\x01", "\x00"), requestRange("a", "z"), requestRange("b", "c")}})
		if st := op.core.plan.Parse(OpTxn, op.Msg, &r.c.cfg.Limits); st.Code != codec.OK {
			t.Fatal(st)
		}
		inner := AcquireOp()
		inner.Resp = mustMarshal(t, &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: 7}, Succeeded: true,
			Responses: []*pb.ResponseOp{{Response: &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{}}}}})
		w := &wideTxn{c: r.c, op: op, then: []bool{false, true, true, true}, inner: inner}
		// The ranges wait at their gate; the test answers them.
		w.written(inner)
		asked := 0
		for g := r.c.gates[len(r.c.gates)-1]; g.n > 0; asked++ {
			if g.n > 1 {
				t.Fatal("two ranges at a time")
			}
			if asked > 0 && m.Used() < int64(60*asked) {
				t.Errorf("%d ranges are kept, %d bytes are counted", asked, m.Used())
			}
			in := g.take(r.c.mayList)
			in.Resp = mustMarshal(t, &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: 7}, Kvs: []*mvccpb.KeyValue{{Key: []byte("k"), Value: make([]byte, 60)}}})
			r.c.finish(in, codec.Status{})
		}
		if got != c.want || asked != c.asked || m.Used() != 0 {
			t.Errorf("limit %d: %v, %d ranges asked for, %d bytes counted at the end", c.limit, got, asked, m.Used())
		}
		var a pb.TxnResponse
		if err := proto.Unmarshal(resp, &a); got.Code == codec.OK && (err != nil || len(a.Responses) != 4 || len(a.Responses[3].GetResponseRange().GetKvs()) != 1) {
			t.Errorf("%v, %v", err, &a)
		}
	}
}

// TestWideTxnCanceled: whoever gave up between the writing and the reading is told that, not that something took too long. (Seed
// 7001841 of the simulation: an error although nothing went wrong.)
func TestWideTxnCanceled(t *testing.T) {
	r := newLeaseRig(t, 2)
	var got codec.Status
	op := &Op{Kind: OpTxn, Done: func(op *Op) { got = op.Status }}
	op.Msg = mustMarshal(t, &pb.TxnRequest{Success: []*pb.RequestOp{requestPut(r.keyOn(1)), requestRange("\x01", "\x00")}})
	if st := op.core.plan.Parse(OpTxn, op.Msg, &r.c.cfg.Limits); st.Code != codec.OK {
		t.Fatal(st)
	}
	inner := AcquireOp()
	inner.Resp = mustMarshal(t, &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: 7}, Succeeded: true,
		Responses: []*pb.ResponseOp{{Response: &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{}}}}})
	w := &wideTxn{c: r.c, op: op, then: []bool{false, true}, inner: inner}
	r.c.Cancel(op)
	if w.written(inner); got != statusCanceled {
		t.Errorf("%v", got)
	}
}
