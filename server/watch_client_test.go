package server

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"spindle/codec"
	"spindle/watchring"
)

// watchFeed stands for the core: it makes revisions on loop 0 and tells the service.
type watchFeed struct {
	t     testing.TB
	home  *Loop
	ring  *watchring.Ring
	front *watchring.Frontier
	svc   *WatchService
	rev   atomic.Int64
}

func newWatchFeed(t testing.TB, ringSize int) *watchFeed {
	f := &watchFeed{t: t, ring: watchring.NewRing(ringSize, 1<<30, 0), front: watchring.NewFrontier(1, 0)}
	return f
}

func (f *watchFeed) setup(e *Engine) {
	f.home = e.Loops()[0]
	f.svc = NewWatchService(e, WatchConfig{
		Ring: f.ring, Frontier: f.front,
		ShardsOf:         func(key, end []byte) int { return 0 },
		Now:              func(done func(int64, codec.Status)) { done(f.rev.Load(), codec.Status{}) },
		Header:           codec.Header{ClusterID: 1, MemberID: 2, RaftTerm: 3},
		ProgressInterval: 50 * time.Millisecond,
	})
}

// put makes a revision of one key, and returns it once the frontier is there.
func (f *watchFeed) put(key string, value []byte) int64 {
	done := make(chan int64)
	f.home.Post(func() {
		rev := f.rev.Load() + 1
		ev := &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(key), Value: value, ModRevision: rev, CreateRevision: 1, Version: rev}}
		body, _ := proto.Marshal(ev)
		n := len(body)
		ev.PrevKv = &mvccpb.KeyValue{Key: []byte(key), Value: []byte("before"), ModRevision: rev - 1}
		body, _ = proto.Marshal(ev)
		f.ring.Publish(&watchring.Entry{Rev: rev, Size: len(body), Events: []watchring.Event{{Key: []byte(key), Body: body, NoPrev: n}}})
		f.rev.Store(rev)
		f.front.Set(0, rev)
		f.svc.FrontierRose()
		done <- rev
	})
	return <-done
}

func (f *watchFeed) client(s *testServer) *clientv3.Client {
	cl, err := clientv3.New(clientv3.Config{Endpoints: []string{s.addr()}, Logger: zap.NewNop()})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = cl.Close() })
	return cl
}

func (f *watchFeed) next(ch clientv3.WatchChan) clientv3.WatchResponse {
	f.t.Helper()
	select {
	case w, ok := <-ch:
		if !ok {
			f.t.Fatal("the watch has ended")
		}
		return w
	case <-time.After(guard):
		f.t.Fatal("nothing comes")
	}
	panic("not reached")
}

func TestWatchClientV3(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		f := newWatchFeed(t, 1024)
		s := startServer(t, Config{Loops: loops}, f.setup)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		first := f.put("a/1", nil)
		for n := range 3 * loops { // some connection lies on each loop
			cl := f.client(s)
			prefix := cl.Watch(ctx, "a/", clientv3.WithPrefix(), clientv3.WithRev(first), clientv3.WithPrevKV())
			now := cl.Watch(ctx, "a/1", clientv3.WithCreatedNotify())
			before := f.rev.Load()
			if w := f.next(now); !w.Created || w.Header.Revision != before {
				t.Fatalf("created at %d: %+v", before, w)
			}
			rev := f.put("a/1", []byte("x"))
			if w := f.next(now); len(w.Events) != 1 || w.Events[0].Kv.ModRevision != rev || w.Header.Revision != rev || w.Events[0].PrevKv != nil {
				t.Fatalf("event at %d: %+v", rev, w)
			}
			for want := first; want <= rev; {
				for _, ev := range f.next(prefix).Events {
					if ev.Kv.ModRevision != want || ev.PrevKv == nil {
						t.Fatalf("client %d: %v, want revision %d", n, ev, want)
					}
					want++
				}
			}
			if err := cl.RequestProgress(ctx); err != nil {
				t.Fatal(err)
			}
			for _, ch := range []clientv3.WatchChan{prefix, now} {
				if w := f.next(ch); !w.IsProgressNotify() || w.Header.Revision != rev {
					t.Fatalf("progress at %d: %+v", rev, w)
				}
			}
		}
		f.front.SetCompacted(3)
		cl := f.client(s)
		if w := f.next(cl.Watch(ctx, "a", clientv3.WithRev(2))); w.Err() != rpctypes.ErrCompacted || w.CompactRevision != 3 {
			t.Errorf("compacted: %+v, %v", w, w.Err())
		}
		if w := f.next(cl.Watch(ctx, "b", clientv3.WithRange("a"))); !w.Canceled || w.Err() == nil {
			t.Errorf("empty range: %+v, %v", w, w.Err())
		}
		quiet := cl.Watch(ctx, "quiet", clientv3.WithProgressNotify())
		if w := f.next(quiet); !w.IsProgressNotify() || w.Header.Revision != f.rev.Load() {
			t.Errorf("progress_notify: %+v", w)
		}
	})
}

// TestWatchClientReadsLate: a client that does not read costs no memory here beyond its high-water mark, and
// gets everything, in order, once it reads.
func TestWatchClientReadsLate(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		f := newWatchFeed(t, 4096)
		s := startServer(t, Config{Loops: loops}, f.setup)
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		defer cancel()
		late, err := pb.NewWatchClient(s.dial(t)).Watch(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := late.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
			Key: []byte("k"), StartRevision: 1, PrevKv: true,
		}}}); err != nil {
			t.Fatal(err)
		}
		if m, err := late.Recv(); err != nil || !m.Created {
			t.Fatalf("%v, %v", m, err)
		}
		quick := f.client(s).Watch(ctx, "k", clientv3.WithRev(1))
		const revs = 2000
		value := make([]byte, 8<<10)
		for i := 0; i < revs; i++ {
			f.put("k", value)
		}
		seen := int64(0)
		for seen < revs { // is not held up by the other
			for _, ev := range f.next(quick).Events {
				if seen++; ev.Kv.ModRevision != seen {
					t.Fatalf("revision %d, want %d", ev.Kv.ModRevision, seen)
				}
			}
		}
		if watchStats.Lagging.Load() == 0 {
			t.Error("nobody lags: the test shows nothing")
		}
		responses := 0
		for seen = 0; seen < revs; responses++ {
			m, err := late.Recv()
			if err != nil {
				t.Fatal(err)
			}
			for _, ev := range m.Events {
				if seen++; ev.Kv.ModRevision != seen {
					t.Fatalf("revision %d, want %d", ev.Kv.ModRevision, seen)
				}
			}
			if m.Header.Revision != seen {
				t.Fatalf("header %d after event %d", m.Header.Revision, seen)
			}
		}
		t.Log(fmt.Sprint(responses, " responses"))
	})
}
