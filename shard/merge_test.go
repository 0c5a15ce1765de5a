package shard

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// TestMergeAgainstSort merges parts of any number of shards and compares with all keys sorted: order, limit,
// more and count.
func TestMergeAgainstSort(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 2))
	for range 500 {
		shards := 1 + rng.IntN(6)
		limit := int64(rng.IntN(3) * rng.IntN(20))
		parts := make([]*pb.RangeResponse, shards)
		for i := range parts {
			parts[i] = &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: 9}}
		}
		var all []*mvccpb.KeyValue
		for i := range rng.IntN(60) {
			rev := int64(2 + rng.IntN(1000))
			create := 1 + rng.Int64N(rev)
			kv := &mvccpb.KeyValue{Key: fmt.Appendf(nil, "k%03d", rng.IntN(1000)), Value: fmt.Appendf(nil, "v%d", i),
				CreateRevision: create, ModRevision: rev, Version: 1 + rng.Int64N(5)}
			if slices.ContainsFunc(all, func(o *mvccpb.KeyValue) bool { return bytes.Equal(o.Key, kv.Key) }) {
				continue
			}
			all = append(all, kv)
			m := proto.Clone(kv).(*mvccpb.KeyValue)
			m.Value = append(AppendStamp(nil, rev, create), kv.Value...)
			m.CreateRevision, m.ModRevision = 3, 4 // the shard's own, which must not show
			p := parts[rng.IntN(shards)]
			p.Kvs = append(p.Kvs, m)
		}
		byKey := func(a, b *mvccpb.KeyValue) int { return bytes.Compare(a.Key, b.Key) }
		encoded := make([][]byte, shards)
		for i, p := range parts {
			slices.SortFunc(p.Kvs, byKey)
			p.Count = int64(len(p.Kvs))
			if limit > 0 && p.Count > limit {
				p.Kvs, p.More = p.Kvs[:limit], true
			}
			encoded[i] = mustMarshal(t, p)
		}
		slices.SortFunc(all, byKey)
		want := &pb.RangeResponse{Header: &pb.ResponseHeader{ClusterId: 1, MemberId: 2, Revision: 77, RaftTerm: 3}, Kvs: all, Count: int64(len(all))}
		if limit > 0 && want.Count > limit {
			want.Kvs, want.More = all[:limit], true
		}
		p := planOf(t, OpRange, &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l"), Limit: limit})
		got := &pb.RangeResponse{}
		out := p.AnswerRange(nil, encoded, codec.Header{ClusterID: 1, MemberID: 2, Revision: 77, RaftTerm: 3}, nil)
		if err := proto.Unmarshal(out, got); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if !proto.Equal(got, want) {
			t.Fatalf("seed %d: %d shards, limit %d\ngot  %v\nwant %v", seed, shards, limit, got, want)
		}
	}
}
