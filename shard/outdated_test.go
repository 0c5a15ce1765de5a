package shard

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"spindle/codec"
)

// linkedTr is a Transport that says whether the members have connections in use.
type linkedTr struct {
	codec.Transport
	linked bool
}

func (t linkedTr) Connected(codec.ClusterID) bool { return t.linked }

// TestCopyStartsNothingAgain: an endpoint leads to a copy of the shard on which another system has accepted a loss. Beside the shard
// itself it does no harm, and this proxy does not start again for it (it did, again and again). Without another connection it looks as
// the shard would.
func TestCopyStartsNothingAgain(t *testing.T) {
	for _, linked := range []bool{true, false} {
		r := newStreamRig(t, 1)
		c := r.c
		c.tr = linkedTr{c.tr, linked}
		c.state = stateReady
		s := c.shards[0]
		s.known = point{3, 3, 5}
		found := func(kvs ...*mvccpb.KeyValue) *pb.ResponseOp {
			return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: &pb.RangeResponse{Kvs: kvs}}}
		}
		reply := func(resps ...*pb.ResponseOp) []byte {
			return mustMarshal(t, &pb.TxnResponse{Succeeded: true, Responses: resps})
		}
		id := &mvccpb.KeyValue{Key: []byte(KeyID), Value: AppendIdentity(nil, c.m.Shards[0].Identity), ModRevision: 2}
		clock := &mvccpb.KeyValue{Key: []byte(KeyClock), Value: AppendRecord(nil, &Record{First: 999, Last: 1000, Kind: KindFence}), ModRevision: 4}
		compact := &mvccpb.KeyValue{Key: []byte(KeyCompact), Value: AppendCompaction(nil, 1000), ModRevision: 4}
		k := c.NewCheck(s.cluster)
		for i, v := range []Verdict{
			k.Judge(nil, codec.ErrFutureRev),
			k.Judge(reply(found(id), found(clock), found(), found(compact)), codec.Status{}),
		} {
			if v != CheckAgain {
				t.Fatalf("answer %d: verdict %v: %s", i, v, k.Why())
			}
		}
		if v := k.Judge(reply(found(clock)), codec.Status{}); v != CheckRefused {
			t.Fatalf("verdict %v", v)
		}
		if (s.banned == "") != linked || (c.outdated == "") != linked {
			t.Errorf("another connection in use: %v: banned %q, outdated %q", linked, s.banned, c.outdated)
		}
	}
}
