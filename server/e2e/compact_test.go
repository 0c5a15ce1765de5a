package e2e

import (
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"spindle/server/node"
	"spindle/shard"
)

const (
	textCompacted = "etcdserver: mvcc: required revision has been compacted"
	textFuture    = "etcdserver: mvcc: required revision is a future revision"
)

func wantOutOfRange(t testing.TB, what string, err error, text string) {
	t.Helper()
	if st := status.Convert(err); st.Code() != codes.OutOfRange || st.Message() != text {
		t.Errorf("%s: %v, not %q", what, err, text)
	}
}

func compactAt(s *rpc, t testing.TB, rev int64, physical bool) error {
	_, err := s.kv.Compact(callContext(t), &pb.CompactionRequest{Revision: rev, Physical: physical})
	return err
}

func rangeAt(s *rpc, t testing.TB, rev int64) (*pb.RangeResponse, error) {
	return s.kv.Range(callContext(t), &pb.RangeRequest{Key: []byte("c/"), RangeEnd: []byte("c0"), Revision: rev})
}

// putMany writes n keys at the same moment, so that they travel in batches, and returns the revisions.
func putMany(t testing.TB, s *rpc, n, round int) (revs []int64) {
	t.Helper()
	ctx := callContext(t)
	revs = make([]int64, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			r, err := s.kv.Put(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "c/%03d", i), Value: []byte(strconv.Itoa(round))})
			if errs[i] = err; err == nil {
				revs[i] = r.Header.Revision
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
	return revs
}

// A compaction through one proxy holds on every other from the moment it is answered, at every revision
// (batches are cut in the middle), and after a restart.
func TestCompactManyProxies(t *testing.T) {
	t.Parallel()
	s := seed(t)
	r := newRand(s, 0)
	m := startMembers(t, 3)
	proxies := make([]*rpc, 2)
	nodes := make([]*node.Node, 2)
	for i := range proxies {
		nodes[i] = startNode(t, nodeConfig(t, m))
		proxies[i] = dial(t, nodes[i].ClientURLs()[0])
	}
	a, b := proxies[0], proxies[1]
	low := int64(1)
	for round := range scale(30) {
		revs := putMany(t, a, 40, round)
		putMany(t, b, 40, round)
		at := revs[r.IntN(len(revs))]
		if at <= low {
			continue
		}
		before, err := rangeAt(b, t, at)
		if err != nil {
			t.Fatal(err)
		}
		wantOutOfRange(t, "the future", compactAt(b, t, before.Header.Revision+1000, false), textFuture)
		if err := compactAt(a, t, at, r.IntN(3) == 0); err != nil {
			t.Fatal(err)
		}
		low = at
		for i, p := range []*rpc{b, a} {
			_, err := rangeAt(p, t, at-1)
			wantOutOfRange(t, fmt.Sprintf("below the compaction, proxy %d", i), err, textCompacted)
			if _, err = p.kv.Range(callContext(t), &pb.RangeRequest{Key: []byte("c/000"), Revision: at - 1}); err == nil {
				t.Errorf("below the compaction, one key, proxy %d: answered", i)
			}
			_, err = p.kv.Range(callContext(t), &pb.RangeRequest{Key: []byte("c/1"), RangeEnd: []byte("c/1"), Revision: at - 1})
			wantOutOfRange(t, fmt.Sprintf("below the compaction, an empty range, proxy %d", i), err, textCompacted)
			after, err := rangeAt(p, t, at)
			if err != nil || fmt.Sprint(after.Kvs) != fmt.Sprint(before.Kvs) {
				t.Errorf("at the compaction: %v, %v", after, err)
			}
			wantOutOfRange(t, "again", compactAt(p, t, at, false), textCompacted)
			wantOutOfRange(t, "less", compactAt(p, t, at-1, false), textCompacted)
		}
	}
	// Watches: from below canceled with the revision, from there on served.
	for i, p := range proxies {
		openWatchOver(t, p, []byte("c/"), []byte("c0"), low, low).until(t, low)
		stream, err := p.w.Watch(callContext(t))
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("c/"), StartRevision: low - 1}}}); err != nil {
			t.Fatal(err)
		}
		var last *pb.WatchResponse
		for range 2 {
			if last, err = stream.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		if !last.Canceled || last.CompactRevision != low {
			t.Errorf("proxy %d: a watch below the compaction at %d got %v", i, low, last)
		}
	}
	// A compaction that was cut short is on one shard only: the largest record counts, and the others get it.
	now, err := rangeAt(a, t, 0)
	if err != nil {
		t.Fatal(err)
	}
	low = now.Header.Revision - 3
	for _, n := range nodes {
		n.Close()
	}
	if _, err := dial(t, m.Shards[1]).kv.Put(callContext(t), &pb.PutRequest{Key: []byte(shard.KeyCompact), Value: shard.AppendCompaction(nil, low)}); err != nil {
		t.Fatal(err)
	}
	cfg := nodeConfig(t, m)
	cfg.ShardTimeout = 5 * time.Second // within twice that time a record that is missing somewhere is completed
	p := dial(t, startNode(t, cfg).ClientURLs()[0])
	_, err = rangeAt(p, t, low-1)
	wantOutOfRange(t, "below the compaction after a restart", err, textCompacted)
	wantOutOfRange(t, "again after a restart", compactAt(p, t, low, false), textCompacted)
	if _, err := rangeAt(p, t, low); err != nil {
		t.Errorf("at the compaction after a restart: %v", err)
	}
	openWatchOver(t, p, []byte("c/"), []byte("c0"), low, low).until(t, low)
	for i := range m.Shards {
		member := dial(t, m.Shards[i])
		waitUntil(t, "the record is completed", readyTimeout, func() bool {
			r, err := member.kv.Range(callContext(t), &pb.RangeRequest{Key: []byte(shard.KeyCompact)})
			if err != nil || len(r.Kvs) == 0 {
				return false
			}
			rev, ok := shard.ParseCompaction(r.Kvs[0].Value)
			return ok && rev == low
		})
	}
}

// Compactions at the same moment through several proxies: all end well or as compacted, and the largest
// one holds.
func TestCompactAtOnce(t *testing.T) {
	var proxies []*rpc
	for _, n := range startSpindle(t, 3, 2, nil) {
		proxies = append(proxies, dial(t, n.ClientURLs()[0]))
	}
	for round := range scale(20) {
		revs := putMany(t, proxies[0], 20, round)
		top := int64(0)
		var wg sync.WaitGroup
		errs := make([]error, len(revs))
		for i, rev := range revs {
			top = max(top, rev)
			wg.Go(func() { errs[i] = compactAt(proxies[i%2], t, rev, false) })
		}
		wg.Wait()
		ok := 0
		for _, err := range errs {
			if err == nil {
				ok++
			} else {
				wantOutOfRange(t, "one of many", err, textCompacted)
			}
		}
		if ok == 0 {
			t.Error("no compaction was the first")
		}
		for _, p := range proxies {
			_, err := rangeAt(p, t, top-1)
			wantOutOfRange(t, "below the largest", err, textCompacted)
			if _, err := rangeAt(p, t, top); err != nil {
				t.Error(err)
			}
		}
	}
}

// kube-apiserver's compactor, several of them: a compare of compact_rev_key's version elects one each
// time, which compacts at the revision that its election had one turn before.
func TestCompactKube(t *testing.T) {
	t.Parallel()
	const servers = 3
	var proxies []*rpc
	for _, n := range startSpindle(t, 3, 2, nil) {
		proxies = append(proxies, dial(t, n.ClientURLs()[0]))
	}
	key := []byte("compact_rev_key")
	type apiserver struct{ version, rev int64 }
	state := make([]apiserver, servers)
	compactions := 0
	for turn := range scale(60) {
		putMany(t, proxies[turn%2], 5, turn)
		winners := 0
		for i := range state {
			k := (i + turn) % servers
			s, p := &state[k], proxies[k%2]
			resp, err := p.kv.Txn(callContext(t), &pb.TxnRequest{
				Compare: []*pb.Compare{{Key: key, Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{Version: s.version}}},
				Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: []byte(strconv.FormatInt(s.rev, 10))}}}},
				Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: key}}}},
			})
			if err != nil {
				t.Fatal(err)
			}
			if !resp.Succeeded {
				s.version, s.rev = resp.Responses[0].GetResponseRange().Kvs[0].Version, resp.Header.Revision
				continue
			}
			winners++
			at := s.rev
			s.version, s.rev = s.version+1, resp.Header.Revision
			if at == 0 {
				continue
			}
			if err := compactAt(p, t, at, false); err != nil {
				t.Fatalf("turn %d: the elected apiserver compacts at %d: %v", turn, at, err)
			}
			compactions++
			for _, p := range proxies {
				if _, err := rangeAt(p, t, at); err != nil {
					t.Errorf("at the compaction: %v", err)
				}
				_, err := rangeAt(p, t, at-1)
				wantOutOfRange(t, "below it", err, textCompacted)
			}
		}
		if winners != 1 {
			t.Fatalf("turn %d: %d apiservers were elected", turn, winners)
		}
	}
	if compactions == 0 {
		t.Error("nothing was compacted")
	}
}

// --auto-compaction-*, several proxies: history goes, the retention stays, on the members too.
func TestAutoCompaction(t *testing.T) {
	t.Parallel()
	for _, auto := range []shard.AutoCompact{
		{Mode: shard.AutoCompactPeriodic, Period: time.Second},
		{Mode: shard.AutoCompactRevision, Keep: 100, Every: 100 * time.Millisecond},
	} {
		m := startMembers(t, 3)
		var proxies []*rpc
		for range 2 {
			cfg := nodeConfig(t, m)
			cfg.AutoCompact = auto
			proxies = append(proxies, dial(t, startNode(t, cfg).ClientURLs()[0]))
		}
		first := putMany(t, proxies[0], 10, 0)[0]
		var last int64
		waitUntil(t, fmt.Sprintf("%+v compacts", auto), readyTimeout, func() bool {
			for _, rev := range putMany(t, proxies[0], 20, 1) {
				last = max(last, rev)
			}
			_, errA := rangeAt(proxies[0], t, first)
			_, errB := rangeAt(proxies[1], t, first)
			return errA != nil && errB != nil
		})
		if auto.Mode == shard.AutoCompactRevision {
			for _, p := range proxies {
				if _, err := rangeAt(p, t, last-auto.Keep/2); err != nil {
					t.Errorf("what is to be kept: %v", err)
				}
			}
		}
		for i := range m.Shards {
			member := dial(t, m.Shards[i])
			waitUntil(t, fmt.Sprintf("member %d is compacted", i), 3*readyTimeout, // one that was cut short is completed after twice the shard timeout
				func() bool {
					// The compaction seen above may lie below this member's first record, and writes alone raise the next.
					putMany(t, proxies[0], 20, 1)
					_, err := member.kv.Range(callContext(t), &pb.RangeRequest{Key: []byte(shard.KeyClock), Revision: 3})
					return err != nil
				})
		}
	}
}
