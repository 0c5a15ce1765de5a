package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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

// Streams and lists with a limit while batches of many keys are written: each must be what a Range shows at
// its revision, and so must streams and lists at revisions in the middle of batches.
func TestRangeStreamUnderWrites(t *testing.T) {
	t.Parallel()
	const keys, writers = 3000, 32
	seed := seed(t)
	s := dial(t, startSpindle(t, 3, 1, nil)[0].ClientURLs()[0])
	ctx, cancel := context.WithCancel(testContext(t))
	var newest atomic.Int64
	var stop atomic.Bool
	var wg sync.WaitGroup
	errs := make(chan error, 1)
	for w := range writers {
		wg.Go(func() {
			rng := newRand(seed, w)
			value := bytes.Repeat([]byte("x"), 300)
			for i := 0; !stop.Load(); i++ {
				key := fmt.Appendf(nil, "s/%05d", rng.IntN(keys))
				var rev int64
				if i > keys/writers && rng.IntN(4) == 0 {
					r, err := s.kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: key})
					if err != nil {
						fatalOnce(errs, "%w", err)
						return
					}
					rev = r.Header.Revision
				} else {
					r, err := s.kv.Put(ctx, &pb.PutRequest{Key: key, Value: value})
					if err != nil {
						fatalOnce(errs, "%w", err)
						return
					}
					rev = r.Header.Revision
				}
				newest.Store(rev)
			}
		})
	}
	rng := newRand(seed, writers)
	for i := range scale(150) {
		q := &pb.RangeRequest{Key: []byte("s/"), RangeEnd: []byte("s0"), KeysOnly: rng.IntN(8) == 0}
		if rng.IntN(3) > 0 {
			q.Limit = 1 + rng.Int64N(keys)
		}
		if rng.IntN(2) == 0 {
			q.Key = fmt.Appendf(nil, "s/%05d", rng.IntN(keys))
		}
		if n := newest.Load(); n > 0 && rng.IntN(2) == 0 {
			q.Revision = n - rng.Int64N(min(n, 20))
		}
		send := rangeStream
		if rng.IntN(3) == 0 {
			send = call
		}
		got, err := send(ctx, s, q)
		if err != nil {
			t.Fatalf("%d: %v: %v", i, q, err)
		}
		g := got.(*pb.RangeResponse)
		// The same again, by another road: no limit, and sorted, so that it is read whole.
		again := proto.Clone(q).(*pb.RangeRequest)
		again.Limit, again.SortOrder, again.SortTarget = 0, pb.RangeRequest_ASCEND, pb.RangeRequest_CREATE
		again.MinModRevision = 1
		if again.Revision == 0 {
			again.Revision = g.Header.Revision
		}
		want, err := s.kv.Range(ctx, again)
		if err != nil {
			t.Fatal(err)
		}
		sortByKey(want.Kvs)
		if g.Count != want.Count || g.More != (q.Limit > 0 && q.Limit < want.Count) {
			t.Fatalf("%d: %v: count %d more %v, want count %d", i, q, g.Count, g.More, want.Count)
		}
		n := len(want.Kvs)
		if q.Limit > 0 {
			n = min(n, int(q.Limit))
		}
		if len(g.Kvs) != n {
			t.Fatalf("%d: %v: %d keys, want %d", i, q, len(g.Kvs), n)
		}
		for k := range n {
			if !proto.Equal(g.Kvs[k], want.Kvs[k]) {
				t.Fatalf("%d: %v: {%v}, want {%v}", i, q, g.Kvs[k], want.Kvs[k])
			}
		}
	}
	stop.Store(true)
	wg.Wait()
	cancel()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
}

func sortByKey(kvs []*mvccpb.KeyValue) {
	slices.SortFunc(kvs, func(a, b *mvccpb.KeyValue) int { return bytes.Compare(a.Key, b.Key) })
}

// A client that reads slowly, and a compaction past its revision meanwhile: the stream ends with etcd's
// error, or it is complete. One that is given up leaves nothing behind that others would notice.
func TestRangeStreamCompacted(t *testing.T) {
	t.Parallel()
	// 6 MiB on each shard: a stream has two pages of 1.9 MiB at most in hand, so that it needs more behind the compaction.
	const keys = 18000
	s := dial(t, startSpindle(t, 3, 1, nil)[0].ClientURLs()[0])
	fill(t, "http://"+s.conn.Target()[len("passthrough:///"):], keys)
	q := &pb.RangeRequest{Key: []byte("m/"), RangeEnd: []byte("m0")}
	compacted := 0
	for range 4 {
		ctx := callContext(t)
		st, err := s.kv.RangeStream(ctx, q)
		if err != nil {
			t.Fatal(err)
		}
		given, err := s.kv.RangeStream(ctx, q)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := given.Recv(); err != nil {
			t.Fatal(err)
		}
		n, ended := 0, false
		for first := true; ; first = false {
			m, err := st.Recv()
			if err == io.EOF {
				break
			}
			if err != nil {
				if status.Code(err) != codes.OutOfRange || status.Convert(err).Message() != "etcdserver: mvcc: required revision has been compacted" {
					t.Fatal(err)
				}
				compacted++
				ended = true
				break
			}
			n += len(m.RangeResponse.Kvs)
			ended = m.RangeResponse.Header != nil
			if first {
				// Something newer on every shard, and all before it is gone.
				var rev int64
				for i := range 32 {
					r, err := s.kv.Put(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "m/%08d", i)})
					if err != nil {
						t.Fatal(err)
					}
					rev = r.Header.Revision
				}
				if _, err := s.kv.Compact(ctx, &pb.CompactionRequest{Revision: rev, Physical: true}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if !ended {
			t.Fatalf("the stream ended after %d keys without a word", n)
		}
	}
	t.Logf("%d of 4 streams met the compaction", compacted)
	if compacted == 0 {
		t.Error("no stream met the compaction")
	}
}
