package e2e

import (
	"context"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"spindle/server/node"
)

// watchTalk is one Watch stream of a script that runs on etcd and on Spindle.
type watchTalk struct {
	t      *testing.T
	side   int
	s      *rpc
	stream pb.Watch_WatchClient
	got    chan *pb.WatchResponse
	revs   *revMap
	story  []string
}

func newWatchTalk(t *testing.T, side int, s *rpc, revs *revMap) *watchTalk {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	stream, err := s.w.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	w := &watchTalk{t: t, side: side, s: s, stream: stream, got: make(chan *pb.WatchResponse, 1000), revs: revs}
	go func() {
		defer close(w.got)
		for {
			resp, err := stream.Recv()
			if err != nil {
				return
			}
			w.got <- resp
		}
	}()
	return w
}

func (w *watchTalk) create(c *pb.WatchCreateRequest) {
	w.t.Helper()
	w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: c}})
}

func (w *watchTalk) send(r *pb.WatchRequest) {
	w.t.Helper()
	if err := w.stream.Send(r); err != nil && err != io.EOF {
		w.t.Fatal(err)
	}
}

// next takes the next response into the story.
func (w *watchTalk) next() *pb.WatchResponse {
	w.t.Helper()
	select {
	case r, ok := <-w.got:
		if !ok {
			w.story = append(w.story, "end")
			return nil
		}
		// etcd leaves the revision 0 in the answer that says "compacted".
		if err := checkHeader(r.Header); err != nil && r.CompactRevision == 0 {
			w.t.Fatal(err)
		}
		line := fmt.Sprintf("id %d created %v canceled %v reason %q compact %s", r.WatchId, r.Created, r.Canceled, r.CancelReason, w.revs.name(w.side, r.CompactRevision))
		for _, e := range r.Events {
			line += fmt.Sprintf(" %v %s prev %s", e.Type, w.revs.kv(w.side, e.Kv), w.revs.kv(w.side, e.PrevKv))
		}
		w.story = append(w.story, line)
		return r
	case <-time.After(callTimeout):
		w.t.Fatalf("side %d: nothing comes after:\n%s", w.side, strings.Join(w.story, "\n"))
		return nil
	}
}

// events reads until n events have come. How they are divided into responses is timing.
func (w *watchTalk) events(n int) {
	w.t.Helper()
	var all []*mvccpb.Event
	id := int64(-1)
	mark := len(w.story)
	for len(all) < n {
		r := w.next()
		if r == nil {
			return
		}
		id = r.WatchId
		all = append(all, r.Events...)
	}
	line := fmt.Sprintf("id %d:", id)
	for _, e := range all {
		line += fmt.Sprintf(" %v %s prev %s", e.Type, w.revs.kv(w.side, e.Kv), w.revs.kv(w.side, e.PrevKv))
	}
	w.story = append(w.story[:mark], line)
}

// The Watch API, told to etcd and to Spindle in the same words.
func TestWatchAPI(t *testing.T) {
	t.Parallel()
	sides := []*rpc{dial(t, startEtcd(t)), dial(t, startSpindle(t, 3, 1, nil)[0].ClientURLs()[0])}
	revs := newRevMap()
	ctx := testContext(t)
	write := func(req any) {
		t.Helper()
		var got [2]int64
		for side, s := range sides {
			switch r := req.(type) {
			case *pb.PutRequest:
				resp, err := s.kv.Put(ctx, r)
				if err != nil {
					t.Fatal(err)
				}
				got[side] = resp.Header.Revision
			case *pb.DeleteRangeRequest:
				resp, err := s.kv.DeleteRange(ctx, r)
				if err != nil {
					t.Fatal(err)
				}
				got[side] = resp.Header.Revision
			}
		}
		if err := revs.add(got[0], got[1]); err != nil {
			t.Fatal(err)
		}
	}
	put := func(k, v string) { t.Helper(); write(&pb.PutRequest{Key: []byte(k), Value: []byte(v)}) }
	del := func(k string) { t.Helper(); write(&pb.DeleteRangeRequest{Key: []byte(k)}) }

	put("a", "1")
	put("b", "1")
	put("a", "2")
	put("p/1", "x")
	put("p/2", "x")
	del("a")
	put("p/1", "y")
	put("c", "1")
	key := func(s string) []byte { return []byte(s) }
	rev := func(side, i int) int64 { return revs.revs[side][i] }

	scripts := []struct {
		name string
		run  func(w *watchTalk)
	}{
		{"one key from the start", func(w *watchTalk) {
			w.create(&pb.WatchCreateRequest{Key: key("a"), StartRevision: 1, PrevKv: true})
			w.next()
			w.events(3)
		}},
		{"without prev_kv", func(w *watchTalk) {
			w.create(&pb.WatchCreateRequest{Key: key("a"), StartRevision: 1})
			w.next()
			w.events(3)
		}},
		{"prefix from the middle", func(w *watchTalk) {
			w.create(&pb.WatchCreateRequest{Key: key("p/"), RangeEnd: key("p0"), StartRevision: rev(w.side, 4), PrevKv: true})
			w.next()
			w.events(2)
		}},
		{"everything", func(w *watchTalk) {
			w.create(&pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, StartRevision: 1})
			w.next()
			w.events(8)
		}},
		{"without puts", func(w *watchTalk) {
			w.create(&pb.WatchCreateRequest{Key: key("a"), RangeEnd: []byte{0}, StartRevision: 1, Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT}})
			w.next()
			w.events(1)
		}},
		{"without deletes", func(w *watchTalk) {
			w.create(&pb.WatchCreateRequest{Key: key("a"), StartRevision: 1, Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NODELETE}})
			w.next()
			w.events(2)
		}},
		{"many watches on one stream, IDs", func(w *watchTalk) {
			w.create(&pb.WatchCreateRequest{Key: key("a"), StartRevision: 1})
			w.next()
			w.events(3)
			w.create(&pb.WatchCreateRequest{Key: key("b"), StartRevision: 1, WatchId: 7})
			w.next()
			w.events(1)
			w.create(&pb.WatchCreateRequest{Key: key("b"), StartRevision: 1, WatchId: 7})
			w.next() // the ID is taken
			w.create(&pb.WatchCreateRequest{Key: key("c"), StartRevision: 1})
			w.next()
			w.events(1)
		}},
		{"cancel", func(w *watchTalk) {
			w.create(&pb.WatchCreateRequest{Key: key("zzz")})
			r := w.next()
			w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: r.WatchId}}})
			w.next()
			// An unknown one is ignored: the next answer is that of the next create.
			w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: 99}}})
			w.create(&pb.WatchCreateRequest{Key: key("zzz")})
			w.next()
		}},
		{"progress on demand", func(w *watchTalk) {
			w.create(&pb.WatchCreateRequest{Key: key("zzz")})
			created := w.next()
			w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
			r := w.next()
			if r.Header.Revision < rev(w.side, revs.len()-1) || r.Header.Revision < created.Header.Revision {
				w.t.Errorf("side %d: progress at %d, the last write was %d", w.side, r.Header.Revision, rev(w.side, revs.len()-1))
			}
		}},
		{"empty range", func(w *watchTalk) {
			w.create(&pb.WatchCreateRequest{Key: key("b"), RangeEnd: key("a")})
			w.next()
		}},
		{"start in the future", func(w *watchTalk) {
			w.create(&pb.WatchCreateRequest{Key: key("a"), StartRevision: futureRev})
			w.next()
		}},
		{"negative start", func(w *watchTalk) {
			w.create(&pb.WatchCreateRequest{Key: key("a"), StartRevision: -3})
			w.next()
		}},
	}
	compare := func(name string, run func(w *watchTalk)) {
		t.Run(name, func(t *testing.T) {
			var stories [2]string
			for side, s := range sides {
				w := newWatchTalk(t, side, s, revs)
				run(w)
				stories[side] = strings.Join(w.story, "\n")
			}
			if stories[0] != stories[1] {
				t.Errorf("etcd:\n%s\nspindle:\n%s", stories[0], stories[1])
			}
		})
	}
	for _, s := range scripts {
		compare(s.name, s.run)
	}
	// What comes after the creation, and a start revision that is now+1.
	t.Run("live", func(t *testing.T) {
		var talks [2]*watchTalk
		for side, s := range sides {
			talks[side] = newWatchTalk(t, side, s, revs)
			talks[side].create(&pb.WatchCreateRequest{Key: key("live"), PrevKv: true})
			talks[side].next()
			talks[side].create(&pb.WatchCreateRequest{Key: key("other")})
			talks[side].next()
		}
		put("live", "1")
		put("live", "2")
		del("live")
		for _, w := range talks {
			w.events(3)
		}
		if a, b := strings.Join(talks[0].story, "\n"), strings.Join(talks[1].story, "\n"); a != b {
			t.Errorf("etcd:\n%s\nspindle:\n%s", a, b)
		}
	})
	compact := func(i int) {
		t.Helper()
		for side, s := range sides {
			if _, err := s.kv.Compact(ctx, &pb.CompactionRequest{Revision: rev(side, i)}); err != nil {
				t.Fatal(err)
			}
		}
	}
	compact(5)
	compare("start is compacted", func(w *watchTalk) {
		w.create(&pb.WatchCreateRequest{Key: key("a"), StartRevision: rev(w.side, 2)})
		w.next()
		w.next()
	})
	compare("start at the compaction", func(w *watchTalk) {
		w.create(&pb.WatchCreateRequest{Key: key("p/"), RangeEnd: key("p0"), StartRevision: rev(w.side, 5), PrevKv: true})
		w.next()
		w.events(1)
	})
	compact(6) // what "p/1" was before it cannot be read any more
	compare("prev_kv at the compaction", func(w *watchTalk) {
		w.create(&pb.WatchCreateRequest{Key: key("p/"), RangeEnd: key("p0"), StartRevision: rev(w.side, 6), PrevKv: true})
		w.next()
		w.events(1)
	})
}

// Three proxies that start for the first time at the same moment agree on everything.
func TestProxiesStartAtOnce(t *testing.T) {
	t.Parallel()
	const proxies, writes = 3, 60
	nodes := startSpindle(t, 4, proxies, func(c *node.Config) { c.Loops = 2 })
	conns := make([]*rpc, proxies)
	logs := make([]*eventLog, proxies)
	for i, n := range nodes {
		conns[i] = dial(t, n.ClientURLs()[0])
		logs[i] = openWatch(t, conns[i], "k", 1)
	}
	ctx := testContext(t)
	var last int64
	for i := range writes {
		k := fmt.Sprintf("k%d", i%7)
		r, err := conns[i%proxies].kv.Put(ctx, &pb.PutRequest{Key: []byte(k), Value: fmt.Appendf(nil, "%d", i)})
		if err != nil {
			t.Fatal(err)
		}
		if r.Header.Revision <= last {
			t.Fatalf("write %d got revision %d after %d", i, r.Header.Revision, last)
		}
		last = r.Header.Revision
		// At once visible through the next one.
		g, err := conns[(i+1)%proxies].kv.Range(ctx, &pb.RangeRequest{Key: []byte(k)})
		if err != nil {
			t.Fatal(err)
		}
		if len(g.Kvs) != 1 || g.Kvs[0].ModRevision != last || g.Header.Revision < last {
			t.Fatalf("write %d at %d is read elsewhere as %v", i, last, g)
		}
	}
	first := logs[0].until(t, last)
	if len(first) != writes {
		t.Fatalf("%d events for %d writes", len(first), writes)
	}
	for i, l := range logs[1:] {
		events := l.until(t, last)
		if fmt.Sprint(events) != fmt.Sprint(first) {
			t.Errorf("proxy %d shows other events than proxy 0", i+1)
		}
	}
	header := func(s *rpc) *pb.ResponseHeader {
		r, err := s.kv.Range(ctx, &pb.RangeRequest{Key: []byte("k")})
		if err != nil {
			t.Fatal(err)
		}
		return r.Header
	}
	if a, b := header(conns[0]), header(conns[1]); a.ClusterId != b.ClusterId || a.MemberId == b.MemberId {
		t.Errorf("headers of two proxies: %v, %v", a, b)
	}
}
