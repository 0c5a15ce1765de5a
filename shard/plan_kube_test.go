package shard

import (
	"encoding/hex"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"spindle/codec"
)

// What kube-apiserver sends, and what a member answers.
const kubeKey = "/registry/pods/default/web-0"

func kubeTxn(t testing.TB, mod int64, op *pb.RequestOp, get bool) []byte {
	r := &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: []byte(kubeKey), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: mod}}},
		Success: []*pb.RequestOp{op},
	}
	if get {
		r.Failure = []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(kubeKey)}}}}
	}
	return mustMarshal(t, r)
}

func kubePut(value string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(kubeKey), Value: []byte(value)}}}
}

func kubeDelete() *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(kubeKey)}}}
}

func storedValue(rev, create int64, user string) []byte {
	return append(AppendStamp(nil, rev, create), user...)
}

// TestPlanGolden fixes the bytes of an update in member form, with and without a guard.
func TestPlanGolden(t *testing.T) {
	var p Plan
	if st := p.Parse(OpTxn, kubeTxn(t, 5, kubePut("hello"), true), nil); st.Code != codec.OK {
		t.Fatal(st)
	}
	if len(p.PutSlots) != 1 || p.PutSlots[0].Proven != 5 || p.Slow() || p.Ready() {
		t.Fatalf("%+v", p.PutSlots)
	}
	key := hex.EncodeToString([]byte(kubeKey))                                    // 28 bytes
	get := "0a1e 0a1c" + key                                                      // RequestOp.request_range{key}
	put := "0a1c" + key + "120e 0000000000000009 0c 68656c6c6f"                   // be64(9), 9−3 << 1, hello
	flat := strings.ReplaceAll("0a2c 0801 1003 1a1c"+key+"3a08 0000000000000005"+ // VALUE > be64(5)
		"0a2c 0802 1003 1a1c"+key+"3a08 0000000000000006"+ // VALUE < be64(6)
		"1230 122e"+put+"1a20"+get, " ", "")
	guarded := strings.ReplaceAll("0a22 1001 1a1c"+key+"2804"+ // CREATE == 4 (local)
		"12b301 22b001"+flat+"1a20"+get, " ", "")
	for _, c := range []struct {
		guard bool
		body  string
	}{{false, flat}, {true, guarded}} {
		p.PutSlots[0].Create, p.PutSlots[0].Known, p.PutSlots[0].Guard = Create{Local: 4, Meta: 3}, true, c.guard
		body, err := hex.DecodeString(c.body)
		if err != nil {
			t.Fatal(err)
		}
		want := codec.AppendBytes(nil, 4, body)
		if got := p.AppendRequestOp(nil, 9); string(got) != string(want) {
			t.Errorf("guard %v\ngot  %x\nwant %x", c.guard, got, want)
		}
	}
}

// kubeCase is one request of kube-apiserver with a member's answer, ready to be run over and over.
type kubeCase struct {
	name  string
	kind  OpKind
	msg   []byte
	guard bool
	reply []byte
}

func kubeCases(t testing.TB) []kubeCase {
	value := strings.Repeat("v", 512)
	hdr := &pb.ResponseHeader{Revision: 77}
	ok := func(r *pb.ResponseOp) []byte {
		return mustMarshal(t, &pb.TxnResponse{Header: &pb.ResponseHeader{}, Succeeded: true, Responses: []*pb.ResponseOp{r}})
	}
	guarded := func(in []byte) []byte {
		return append(mustMarshal(t, &pb.TxnResponse{Header: &pb.ResponseHeader{}, Succeeded: true}),
			codec.AppendBytes(nil, 3, codec.AppendBytes(nil, 4, in))...)
	}
	rangeResp := &pb.RangeResponse{Header: hdr, Count: 1, Kvs: []*mvccpb.KeyValue{{Key: []byte(kubeKey), CreateRevision: 4, ModRevision: 70,
		Version: 3, Value: storedValue(60, 3, value)}}}
	putOK := ok(&pb.ResponseOp{Response: &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{Header: hdr}}})
	delOK := ok(&pb.ResponseOp{Response: &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: &pb.DeleteRangeResponse{Header: hdr, Deleted: 1}}})
	elseGet := mustMarshal(t, &pb.TxnResponse{Header: &pb.ResponseHeader{}, Responses: []*pb.ResponseOp{{
		Response: &pb.ResponseOp_ResponseRange{ResponseRange: rangeResp}}}})
	return []kubeCase{
		{"T1", OpTxn, kubeTxn(t, 0, kubePut(value), false), false, putOK},
		{"T2", OpTxn, kubeTxn(t, 60, kubePut(value), true), false, putOK},
		{"T2 guarded", OpTxn, kubeTxn(t, 60, kubePut(value), true), true, guarded(putOK)},
		{"T2 conflict", OpTxn, kubeTxn(t, 60, kubePut(value), true), true, guarded(elseGet)},
		{"T3", OpTxn, kubeTxn(t, 60, kubeDelete(), true), false, delOK},
		{"Put", OpPut, mustMarshal(t, &pb.PutRequest{Key: []byte(kubeKey), Value: []byte(value)}), true, putOK},
		{"Get", OpRange, mustMarshal(t, &pb.RangeRequest{Key: []byte(kubeKey), Limit: 1}), false, mustMarshal(t, rangeResp)},
	}
}

// run does everything that is done with a request. out is reused.
func (c *kubeCase) run(p *Plan, out []byte, parts [][]byte, learn Learner) ([]byte, bool) {
	if st := p.Parse(c.kind, c.msg, nil); st.Code != codec.OK {
		return out, false
	}
	if c.kind == OpRange {
		out = p.AppendReadOp(out[:0], 0)
		parts[0] = c.reply
		return p.AnswerRange(out[:0], parts, headerAt(99), learn), true
	}
	for i := range p.PutSlots {
		s := &p.PutSlots[i]
		s.Create, s.Known, s.Guard = Create{4, 3}, true, c.guard
	}
	out = p.AppendRequestOp(out[:0], 99)
	if p.OpCost() == 0 || p.Size() < len(out) {
		return out, false
	}
	out, oc, st := p.Answer(out[:0], c.reply, headerAt(99), learn)
	return out, oc == Answered && st.Code == codec.OK
}

func TestPlanKubeAnswers(t *testing.T) {
	creates := NewCreateCache(64)
	var p Plan
	for _, c := range kubeCases(t) {
		out, ok := c.run(&p, nil, make([][]byte, 1), creates)
		if !ok {
			t.Fatalf("%s failed", c.name)
		}
		if c.kind == OpTxn {
			r := &pb.TxnResponse{}
			unmarshal(t, out, r)
			if r.Header.Revision != 99 || len(r.Responses) != 1 {
				t.Errorf("%s: %v", c.name, r)
			}
			if get := r.Responses[0].GetResponseRange(); get != nil && (get.Kvs[0].ModRevision != 60 || get.Kvs[0].CreateRevision != 3 || len(get.Kvs[0].Value) != 512) {
				t.Errorf("%s: %v", c.name, r)
			}
		}
	}
}

func BenchmarkPlan(b *testing.B) {
	creates := NewCreateCache(64)
	for _, c := range kubeCases(b) {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			var p Plan
			var out []byte
			parts := make([][]byte, 1)
			for b.Loop() {
				out, _ = c.run(&p, out, parts, creates)
			}
		})
	}
}
