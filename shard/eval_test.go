package shard

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/codec"
)

// TestDecideGuards decides a Txn on a state, lets somebody else write, and sees whether the guards let
// the decision through: exactly when it is still right, but for changes of the key that stands for it.
func TestDecideGuards(t *testing.T) {
	type writes map[string]string // "" deletes
	valueIs := func(v string, result pb.Compare_CompareResult, end string) *pb.Compare {
		c := &pb.Compare{Key: []byte("b"), Target: pb.Compare_VALUE, Result: result, TargetUnion: &pb.Compare_Value{Value: []byte(v)}}
		if end != "" {
			c.RangeEnd = []byte(end)
		}
		return c
	}
	eq, ne := pb.Compare_EQUAL, pb.Compare_NOT_EQUAL
	for name, c := range map[string]struct {
		before writes
		cmp    *pb.Compare
		other  writes
		want   Outcome
	}{
		"key, unchanged":                    {writes{"b": "1"}, valueIs("1", eq, ""), writes{"a": "2"}, Answered},
		"key, changed":                      {writes{"b": "1"}, valueIs("1", eq, ""), writes{"b": "2"}, GuardFailed},
		"key, deleted":                      {writes{"b": "1"}, valueIs("2", eq, ""), writes{"b": ""}, GuardFailed},
		"key, absent":                       {writes{"a": "1"}, valueIs("1", eq, ""), writes{"c": "1"}, Answered},
		"key, appeared":                     {writes{"a": "1"}, valueIs("1", eq, ""), writes{"b": "1"}, GuardFailed},
		"range held, unchanged":             {writes{"b": "1", "c": "1"}, valueIs("1", eq, "x"), writes{"z": "2"}, Answered},
		"range held, one new":               {writes{"b": "1", "c": "1"}, valueIs("1", eq, "x"), writes{"d": "2"}, GuardFailed},
		"range held, one changed":           {writes{"b": "1", "c": "1"}, valueIs("1", eq, "x"), writes{"c": "2"}, GuardFailed},
		"range held, one of two deleted":    {writes{"b": "1", "c": "1"}, valueIs("1", eq, "x"), writes{"c": ""}, Answered},
		"range held, all deleted":           {writes{"b": "1"}, valueIs("1", eq, "x"), writes{"b": ""}, GuardFailed},
		"range failed, another key changed": {writes{"b": "1", "c": "1"}, valueIs("1", ne, "x"), writes{"c": "2"}, Answered},
		"range failed, that key changed":    {writes{"b": "1", "c": "2"}, valueIs("2", eq, "x"), writes{"b": "2"}, GuardFailed},
		"range failed, one new":             {writes{"b": "1"}, valueIs("2", eq, "x"), writes{"c": "2"}, Answered},
		"range empty, still empty":          {writes{"z": "1"}, valueIs("1", eq, "x"), writes{"a": "1"}, Answered},
		"range empty, one new":              {writes{"z": "1"}, valueIs("1", eq, "x"), writes{"b": "1"}, GuardFailed},
		"range to infinity, one new":        {writes{"b": "1"}, valueIs("1", eq, "\x00"), writes{"zz": "3"}, GuardFailed},
	} {
		t.Run(name, func(t *testing.T) {
			r := newPlanRig(t, planSeed)
			write := func(w writes) {
				for k, v := range w {
					if v == "" {
						r.run(&pb.DeleteRangeRequest{Key: []byte(k)})
					} else {
						r.run(&pb.PutRequest{Key: []byte(k), Value: []byte(v)})
					}
				}
			}
			put := func(k string) []*pb.RequestOp {
				return []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(k)}}}}
			}
			req := &pb.TxnRequest{Compare: []*pb.Compare{c.cmp}, Success: put("yes"), Failure: put("no")}
			write(c.before)
			var p Plan
			if st := p.Parse(OpTxn, mustMarshal(t, req), nil); st.Code != codec.OK || !p.Slow() || p.Decided() {
				t.Fatal(st, p.Slow(), p.Decided())
			}
			ops, _ := p.AppendSnapshotOps(nil, 0)
			if st := p.Decide(NewSnapshot(responsesOf(t, r.memberTxn(ops))), r.member.kv.Rev()); st.Code != codec.OK {
				t.Fatal(st)
			}
			write(c.other)
			rev := r.plain.kv.Rev() + 1
			want, err := r.plain.do(req)
			if err != nil {
				t.Fatal(err)
			}
			body, m := codec.BeginMessage(nil, 2)
			body = codec.EndMessage(p.AppendRequestOp(body, rev), m)
			out, oc, st := p.Answer(nil, responsesOf(t, r.memberTxn(body))[0], headerAt(rev), nil)
			if oc != c.want || st.Code != codec.OK {
				t.Fatalf("outcome %v, want %v (%v)", oc, c.want, st)
			}
			if oc == Answered {
				r.same("Answer", req, out, want)
			}
		})
	}
}
