package shard

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
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
