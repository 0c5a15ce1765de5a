package shard

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"spindle/codec"
)

// TestLocateLyingMember: a member that shows a clock record of a later revision than was asked for must not
// keep the search for ever.
func TestLocateLyingMember(t *testing.T) {
	tr := &cannedTransport{}
	c := NewCore(CoreConfig{Names: []string{"a"}, Now: func() int64 { return 1 }, RingSize: 64, CreateEntries: 64}, tr)
	s := &shardState{c: c, name: "a", rec: point{10, 20, 100}, points: []point{{10, 20, 100}}}
	var got codec.Status
	over := false
	s.locate(5, func(_ located, st codec.Status) { over, got = true, st })
	for i := range 100 {
		if over {
			break
		}
		tr.answer(&tr.shard, mustMarshal(t, &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{{Key: []byte(KeyClock), ModRevision: int64(1000 + i),
			Value: AppendRecord(nil, &Record{First: 8, Last: 9, Kind: KindBatch})}}}))
	}
	if !over || got.Code != codec.Internal {
		t.Fatalf("over %v: %v", over, got)
	}
}
