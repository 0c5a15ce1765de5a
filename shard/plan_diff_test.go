package shard

import (
	"bytes"
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

const planSeed = 20

func (r *planRig) generator() *planGen {
	return &planGen{rng: r.rng, know: func(key []byte) *mvccpb.KeyValue {
		if len(key) == 0 {
			return nil
		}
		rr, err := r.plain.kv.Range(context.Background(), key, nil, mvcc.RangeOptions{})
		if err != nil || len(rr.KVs) == 0 {
			return nil
		}
		return rr.KVs[0]
	}}
}

// TestPlanAgainstEtcd runs random requests on a plain etcd store and, in member form, on another, and
// compares every answer byte by byte: those of batches, of decided requests, of Evaluate, of ranges.
func TestPlanAgainstEtcd(t *testing.T) {
	n := 30000
	if testing.Short() {
		n = 3000
	}
	for seed := uint64(planSeed); seed < planSeed+3; seed++ {
		t.Run(fmt.Sprintf("seed%d", seed), func(t *testing.T) {
			r := newPlanRig(t, seed)
			g := r.generator()
			for range n / 3 {
				g.rev = r.plain.kv.Rev()
				g.odd = g.one(10)
				r.run(g.request())
			}
			t.Logf("seed %d: %v", seed, r.stats)
			for _, must := range []string{"fast", "slow", "wrong create", "guard failed", "create proven", "changes",
				"no change", "flat", "flat failed", "read txn", "range", "past range", "split range", "error " + codec.ErrKeyNotFound.Msg,
				"refused: " + codec.ErrDuplicateKey.Msg, "lease lost", "lease gone", "doomed", "not doomed after all", "error " + codec.ErrLeaseNotFound.Msg} {
				if r.stats[must] == 0 {
					t.Errorf("%q did not happen", must)
				}
			}
		})
	}
}

// runRange compares a Range, at the present and sometimes at a past revision, in one part and in several.
func (r *planRig) runRange(req *pb.RangeRequest) {
	p := &r.plan
	local := int64(0)
	r.stats["range"]++
	if past := r.rng.Int64N(r.plain.kv.Rev()) + 1; r.rng.IntN(3) == 0 && r.localOf[past] > 0 {
		r.stats["past range"]++
		req.Revision, local = past, r.localOf[past]
		if st := p.Parse(OpRange, mustMarshal(r.t, req), nil); st.Code != codec.OK || p.Revision() != past {
			r.t.Fatal(st, p.Revision())
		}
	}
	want, err := r.plain.do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	hdr := headerAt(r.plain.kv.Rev())
	body, m := codec.BeginMessage(nil, 2)
	body = codec.EndMessage(p.AppendReadOp(body, local), m)
	parts := responsesOf(r.t, r.memberTxn(body))
	r.same("AnswerRange", req, p.AnswerRange(nil, parts, hdr, r.creates), want)
	r.same("AnswerRange of parts", req, p.AnswerRange(nil, r.split(local), hdr, nil), want)
	if !p.Empty() {
		out, _, _ := p.Evaluate(nil, r.snapshot(local), hdr)
		r.same("Evaluate of a range", req, out, want)
	}
}

// split answers the range as several shards would, each with a part of the keys.
func (r *planRig) split(local int64) [][]byte {
	asked := &pb.RangeRequest{}
	if err := proto.Unmarshal(r.plan.AppendRangeRequest(nil, local), asked); err != nil {
		r.t.Fatal(err)
	}
	all, err := r.member.do(&pb.RangeRequest{Key: asked.Key, RangeEnd: asked.RangeEnd, Revision: local, SortOrder: asked.SortOrder})
	if err != nil {
		r.t.Fatal(err)
	}
	resp := &pb.RangeResponse{}
	if err := proto.Unmarshal(all, resp); err != nil {
		r.t.Fatal(err)
	}
	n := 1 + r.rng.IntN(4)
	shards := make([]pb.RangeResponse, n)
	for _, kv := range resp.Kvs {
		h := fnv.New32()
		h.Write(kv.Key)
		s := &shards[int(h.Sum32())%n]
		s.Count++
		switch {
		case asked.CountOnly:
		case asked.Limit > 0 && int64(len(s.Kvs)) >= asked.Limit:
			s.More = true
		default:
			s.Kvs = append(s.Kvs, kv)
		}
	}
	r.stats["split range"]++
	var parts [][]byte
	for i := range shards {
		parts = append(parts, mustMarshal(r.t, &shards[i]))
	}
	return parts
}

// TestMergeAtRevision cuts through batches: what AnswerRange makes of MergeAtRevision is what etcd
// shows at that revision.
func TestMergeAtRevision(t *testing.T) {
	r := newPlanRig(t, planSeed)
	cuts := 0
	for batch := 0; batch < 300; batch++ {
		rec := Record{First: r.plain.kv.Rev() + 1}
		var body []byte
		rev := rec.First
		for _, i := range r.rng.Perm(12)[:1+r.rng.IntN(8)] {
			key := []byte(fmt.Sprintf("k%02d", i))
			var req proto.Message = &pb.PutRequest{Key: key, Value: []byte{byte(batch)}}
			if r.rng.IntN(3) == 0 {
				req = &pb.DeleteRangeRequest{Key: key, RangeEnd: append(key, 0)}
			}
			if r.rng.IntN(3) == 0 && kindOf(req) == OpDeleteRange {
				req.(*pb.DeleteRangeRequest).RangeEnd = nil
			}
			if _, err := r.plain.do(req); err != nil {
				t.Fatal(err)
			}
			if r.plain.kv.Rev() < rev {
				continue // it deleted nothing
			}
			p := &r.plan
			if st := p.Parse(kindOf(req), mustMarshal(t, req), nil); st.Code != codec.OK {
				t.Fatal(st)
			}
			p.LearnCreates(r.snapshot(0))
			p.RecordDeletes(func(key, end []byte) {
				rec.Deletes = append(rec.Deletes, RecordDelete{Rev: rev, Key: bytes.Clone(key), End: bytes.Clone(end)})
			})
			var m int
			body, m = codec.BeginMessage(body, 2)
			body = codec.EndMessage(p.AppendRequestOp(body, rev), m)
			rev++
		}
		if rev == rec.First {
			continue
		}
		rec.Last = rev - 1
		r.memberTxn(appendPutOp(body, txnSuccess, KeyClock, AppendRecord(nil, &rec)))
		local := r.member.kv.Rev()
		whole := func(local int64) []byte {
			b, err := r.member.do(&pb.RangeRequest{Key: []byte{1}, RangeEnd: []byte{0}, Revision: local})
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
		g := r.generator()
		for at := rec.First; at <= rec.Last; at++ {
			req := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: at, Limit: int64(g.n(6)),
				SortTarget: pb.RangeRequest_SortTarget(g.n(5)), SortOrder: pb.RangeRequest_SortOrder(g.n(3))}
			want, err := r.plain.do(req)
			if err != nil {
				t.Fatal(err)
			}
			merged, ok := MergeAtRevision(nil, whole(local), whole(local-1), at, &rec)
			if !ok {
				t.Fatalf("batch %d: no merge at %d", batch, at)
			}
			if st := r.plan.Parse(OpRange, mustMarshal(t, req), nil); st.Code != codec.OK {
				t.Fatal(st)
			}
			r.same("merge", req, r.plan.AnswerRange(nil, [][]byte{merged}, headerAt(r.plain.kv.Rev()), nil), want)
			cuts++
		}
	}
	t.Logf("seed %d: %d cuts", planSeed, cuts)
}

func TestIntervals(t *testing.T) {
	rng := rand.New(rand.NewPCG(planSeed, 2))
	keys := []string{"a", "a\x00", "b", "c", "d", "\x01", "\xff"}
	ends := append([]string{"", "\x00"}, keys...)
	pick := func() Interval {
		iv := Interval{Key: []byte(keys[rng.IntN(len(keys))])}
		if e := ends[rng.IntN(len(ends))]; e != "" {
			iv.End = []byte(e)
		}
		return iv
	}
	for range 5000 {
		a, b := pick(), pick()
		both, inA := false, false
		// The keys and their successors stand for all keys between them.
		for _, k := range keys {
			for _, k := range [][]byte{[]byte(k), []byte(k + "\x00")} {
				both = both || a.Contains(k) && b.Contains(k)
				inA = inA || a.Contains(k)
			}
		}
		if a.Overlaps(b) != both || a.Empty() == inA {
			t.Fatalf("seed %d: %q %q: overlaps %v want %v, empty %v", planSeed, a, b, a.Overlaps(b), both, a.Empty())
		}
	}
}
