package e2e

import (
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A Txn that writes on one shard and then reads a prefix over all of them: what clientv3's mutex sends, and what may
// stand around it. Contents and the headers of its parts are etcd's.
func TestTxnRangesOverAllShards(t *testing.T) {
	t.Parallel()
	script := func(s *rpc) (out []string) {
		for i := range 6 {
			if _, err := s.kv.Put(callContext(t), &pb.PutRequest{Key: fmt.Appendf(nil, "t/%d", i), Value: []byte("v")}); err != nil {
				t.Fatal(err)
			}
		}
		first := &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{
			Key: []byte("t/"), RangeEnd: prefixEnd("t/"), Limit: 1, SortTarget: pb.RangeRequest_CREATE, SortOrder: pb.RangeRequest_DESCEND}}}
		all := rangeOp("t/", "t0")
		for _, ops := range [][]*pb.RequestOp{
			{putOp("t/0", "a"), first},
			{putOp("t/new", "a"), first, all},
			{all, putOp("u/0", "a"), all, deleteOp("u/0", "u/0")}, // not behind all writes, but its keys are not written later
			{deleteOp("t/1", ""), first, all, rangeOp("t/1", "")},
			{deleteOp("t/nothing", ""), all},
			{rangeOp("t/2", ""), putOp("t/2", "b"), all},
		} {
			for _, version := range []int64{0, 1000} {
				r, err := s.kv.Txn(callContext(t), &pb.TxnRequest{
					Compare: []*pb.Compare{{Key: []byte(keyOfOps(ops)), Target: pb.Compare_VERSION, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_Version{Version: version - 1}}},
					Success: ops, Failure: []*pb.RequestOp{all}})
				line := fmt.Sprint(r.GetSucceeded(), " ", errText(err))
				for _, op := range r.GetResponses() {
					switch m := opResponse(op).(type) {
					case *pb.RangeResponse:
						line += fmt.Sprintf(" range at %d count %d more %v:", m.Header.Revision-r.Header.Revision, m.Count, m.More)
						for _, kv := range m.Kvs {
							line += fmt.Sprintf(" %s=%s version %d", kv.Key, kv.Value, kv.Version)
						}
					case *pb.PutResponse:
						line += fmt.Sprintf(" put at %d", m.Header.Revision-r.Header.Revision)
					case *pb.DeleteRangeResponse:
						line += fmt.Sprintf(" delete at %d: %d", m.Header.Revision-r.Header.Revision, m.Deleted)
					}
				}
				out = append(out, line)
			}
		}
		return out
	}
	spindle := dial(t, startSpindle(t, 3, 1, nil)[0].ClientURLs()[0])
	sameLines(t, "Txns", script(spindle), script(dial(t, startEtcd(t))))

	// What would need the state before a write of the same Txn stays refused.
	for _, ops := range [][]*pb.RequestOp{
		{rangeOp("t/", "t0"), putOp("t/0", "x")},
		{{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Success: []*pb.RequestOp{putOp("t/0", "x"), rangeOp("t/", "t0")}}}}},
	} {
		if _, err := spindle.kv.Txn(callContext(t), &pb.TxnRequest{Success: ops}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v", ops, err)
		}
	}
}

// keyOfOps is the key that the operations write.
func keyOfOps(ops []*pb.RequestOp) string {
	for _, op := range ops {
		if p := op.GetRequestPut(); p != nil {
			return string(p.Key)
		}
		if d := op.GetRequestDeleteRange(); d != nil {
			return string(d.Key)
		}
	}
	return ""
}
