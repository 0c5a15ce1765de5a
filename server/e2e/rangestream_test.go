package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// rangeStream sends a RangeRequest as a RangeStream and puts the chunks together. An error that is not the
// server's is a chunk out of shape.
func rangeStream(ctx context.Context, s *rpc, req proto.Message) (any, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	q := req.(*pb.RangeRequest)
	st, err := s.kv.RangeStream(ctx, q)
	if err != nil {
		return nil, err
	}
	all := &pb.RangeResponse{}
	ended := false
	for {
		m, err := st.Recv()
		switch {
		case errors.Is(err, io.EOF) && ended:
			return all, nil
		case errors.Is(err, io.EOF):
			return nil, errors.New("the stream ended without a last chunk")
		case err != nil:
			return nil, err
		}
		r := m.RangeResponse
		switch {
		case r == nil:
			return nil, errors.New("a chunk without a response")
		case ended:
			return nil, fmt.Errorf("a chunk behind the last one: %v", r)
		case r.Header == nil && (r.More || r.Count != 0):
			return nil, fmt.Errorf("more and count on a chunk without a header: %v %v", r.More, r.Count)
		case r.Header == nil && len(r.Kvs) == 0:
			return nil, errors.New("an empty chunk that is not the last")
		}
		for _, kv := range r.Kvs {
			if n := len(all.Kvs); n > 0 && bytes.Compare(kv.Key, all.Kvs[n-1].Key) <= 0 {
				return nil, fmt.Errorf("key %q behind %q", kv.Key, all.Kvs[n-1].Key)
			}
			all.Kvs = append(all.Kvs, kv)
		}
		all.Header, all.More, all.Count = r.Header, r.More, r.Count
		ended = r.Header != nil
	}
}
