package shard

import (
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"spindle/codec"
)

// cannedTransport keeps calls until the test answers them.
type cannedTransport struct {
	shard, coord []codec.Completion
}

func (t *cannedTransport) Call(to codec.ClusterID, m codec.Method, req []byte, timeout time.Duration, c codec.Completion) {
	if to == codec.Coordinator {
		t.coord = append(t.coord, c)
	} else {
		t.shard = append(t.shard, c)
	}
}

func (t *cannedTransport) Watch(codec.ClusterID, []byte, codec.WatchSink) codec.WatchHandle {
	return cannedWatch{}
}

func (t *cannedTransport) KeepAlive(codec.ClusterID, codec.WatchSink) codec.WatchHandle {
	return cannedWatch{}
}

type cannedWatch struct{}

func (cannedWatch) Send([]byte) {}
func (cannedWatch) Hold(bool)   {}
func (cannedWatch) Close()      {}

// answer completes every call that waits.
func (t *cannedTransport) answer(list *[]codec.Completion, resp []byte) {
	calls := *list
	*list = nil
	for _, c := range calls {
		c.Complete(resp, codec.Status{}, true)
	}
	clear(calls)
	*list = append(calls[:0], *list...)
}

func rangeOf(kvs ...*mvccpb.KeyValue) *pb.ResponseOp {
	return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: &pb.RangeResponse{Kvs: kvs, Count: int64(len(kvs))}}}
}
