package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"spindle/server/node"
	"spindle/shard/embedded"
	"spindle/shard/embedded/embeddedtest"
)

const (
	// leaderLeases are kept alive while leaders change; their TTL is short, so that one that is not kept ends before
	// the test does, and long enough for an election on a busy machine.
	leaderLeases   = 8
	leaderLeaseTTL = 6 // seconds
)

// keptStream asks for leases on one LeaseKeepAlive stream, again and again, and counts what is answered.
type keptStream struct {
	mu       sync.Mutex
	answered map[int64]int
	gone     []int64
	err      error // that ended the stream
}

// keepOnStream opens a stream; it is closed with ctx.
func keepOnStream(t testing.TB, ctx context.Context, s *rpc, leases []int64) *keptStream {
	t.Helper()
	stream, err := s.l.LeaseKeepAlive(ctx)
	if err != nil {
		t.Fatal(err)
	}
	k := &keptStream{answered: map[int64]int{}}
	go func() {
		tick := time.NewTicker(500 * time.Millisecond) // as clientv3 does
		defer tick.Stop()
		for ctx.Err() == nil {
			for _, id := range leases {
				if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
					return // Recv tells why
				}
			}
			<-tick.C
		}
	}()
	go func() {
		for {
			r, err := stream.Recv()
			k.mu.Lock()
			switch {
			case err != nil:
				if ctx.Err() == nil && !errors.Is(err, io.EOF) {
					k.err = err
				}
			case r.TTL <= 0:
				k.gone = append(k.gone, r.ID)
			default:
				k.answered[r.ID]++
			}
			k.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return k
}

// awaitRound waits until every lease was answered twice more: the second one was asked for from now on.
func (k *keptStream) awaitRound(t testing.TB, when string, leases []int64) {
	t.Helper()
	k.mu.Lock()
	before := make(map[int64]int)
	for id, n := range k.answered {
		before[id] = n
	}
	k.mu.Unlock()
	waitUntil(t, when+": every lease is kept alive", readyTimeout, func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.err != nil || len(k.gone) > 0 {
			t.Fatalf("%s: the stream ended with %v; gone: %v", when, k.err, k.gone)
		}
		for _, id := range leases {
			if k.answered[id] < before[id]+2 {
				return false
			}
		}
		return true
	})
}

// Leases outlive the leaders of their homes and of the shards that have copies. Whoever keeps them alive notices
// nothing; afterwards they end once, and not much later than they should. (SPINDLE_LEADERS=1: every change on every shard.)
func TestLeaseLeaderChanges(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("long")
	}
	clusters := []*embeddedtest.Cluster{embeddedtest.Start(t, 3, nil), embeddedtest.Start(t, 3, nil)}
	coordinator := embeddedtest.Start(t, 1, nil)
	cfg := node.Config{
		ShardTimeout: 30 * time.Second, ListenClientURLs: []string{"http://127.0.0.1:0"}, Coordinator: coordinator.URLs(),
		ShardMaxTxnOps: embedded.MaxTxnOps, ShardMaxRequestBytes: embedded.MaxRequestBytes, Log: testLog(t),
	}
	for i, c := range clusters {
		cfg.Shards = append(cfg.Shards, node.Shard{Name: fmt.Sprint("shard-", i), URLs: c.URLs()})
	}
	url := startNode(t, cfg).ClientURLs()[0]
	s, cl := dial(t, url), client(t, url)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	w := openWatch(t, s, "led/", 1)
	var leases []int64
	for range leaderLeases {
		leases = append(leases, grantLease(t, s, leaderLeaseTTL))
	}
	keys := 0
	put := func() { // on both shards
		t.Helper()
		for range 4 {
			for _, id := range leases {
				keys++
				if _, err := s.kv.Put(callContext(t), &pb.PutRequest{Key: fmt.Appendf(nil, "led/%x/%03d", id, keys), Lease: id}); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	many, one := keepOnStream(t, ctx, s, leases), keepOnStream(t, ctx, dial(t, url), leases[:1])
	var closed atomic.Int32 // of clientv3's channels
	var last atomic.Int64   // its last answer, UnixNano
	var wg sync.WaitGroup
	for _, id := range leases {
		ch, err := cl.KeepAlive(ctx, clientv3.LeaseID(id))
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for range ch {
				raise(&last, time.Now().UnixNano())
			}
			if ctx.Err() == nil {
				closed.Add(1)
			}
		})
	}
	check := func(when string) {
		t.Helper()
		put()
		many.awaitRound(t, when, leases)
		one.awaitRound(t, when, leases[:1])
		for _, id := range leases {
			r, err := s.l.LeaseTimeToLive(callContext(t), &pb.LeaseTimeToLiveRequest{ID: id, Keys: true})
			if err != nil || r.TTL <= 0 || r.GrantedTTL != leaderLeaseTTL || len(r.Keys) != keys/leaderLeases {
				t.Fatalf("%s: lease %x with %d keys: %v, %v", when, id, keys/leaderLeases, r, err)
			}
		}
		if closed.Load() > 0 {
			t.Fatalf("%s: clientv3 gave up %d leases", when, closed.Load())
		}
	}
	check("at first")
	all := os.Getenv("SPINDLE_LEADERS") != ""
	for i, c := range clusters {
		if all || i == 1 { // every shard is a home and has copies
			c.MoveLeader(c.Follower())
			check(fmt.Sprintf("the leader of shard %d has moved", i))
		}
		if !all && i == 1 {
			break
		}
		old := c.AwaitLeader(-1)
		c.Kill(old)
		put()
		c.AwaitLeader(old)
		check(fmt.Sprintf("the leader of shard %d was killed", i))
		c.Restart(old)
		c.AwaitHealthy()
	}
	check("in the end")

	// Nobody keeps them alive any more. A leader that changes now gives them their whole time once more.
	cancel()
	wg.Wait()
	kept := time.Unix(0, last.Load())
	clusters[0].MoveLeader(clusters[0].Follower())
	moved := time.Now()
	deletes := func() (n int) {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, e := range w.events {
			if e.Type == mvccpb.Event_DELETE {
				n++
			}
		}
		return n
	}
	waitUntil(t, "the first lease ends", readyTimeout, func() bool { return deletes() > 0 })
	if d := time.Since(kept); d < (leaderLeaseTTL-2)*time.Second { // the answer was some time on its way
		t.Errorf("a lease of %d s ended %v after it was kept alive", leaderLeaseTTL, d)
	}
	waitUntil(t, "all have ended", readyTimeout, func() bool { return deletes() >= keys })
	t.Logf("the leases of %d s have ended %v after they were kept alive, %v after a leader moved", leaderLeaseTTL,
		time.Since(kept).Round(time.Millisecond), time.Since(moved).Round(time.Millisecond))
	end := list(t, s, "led/", 0)
	if len(end.Kvs) != 0 {
		t.Errorf("%d keys are left", len(end.Kvs))
	}
	seen := map[string]int{}
	for _, e := range w.until(t, end.Header.Revision) {
		if k := string(e.Kv.Key); e.Type == mvccpb.Event_DELETE {
			if seen[k]++; seen[k] != 1 || !slices.Contains(leases, e.PrevKv.GetLease()) {
				t.Errorf("%s: delete %d, of %v", k, seen[k], e.PrevKv)
			}
		}
	}
	if len(seen) != keys {
		t.Errorf("%d keys of %d were deleted", len(seen), keys)
	}
	for _, id := range leases {
		if r, err := s.l.LeaseTimeToLive(callContext(t), &pb.LeaseTimeToLiveRequest{ID: id}); err != nil || r.TTL != -1 {
			t.Errorf("lease %x: %v, %v", id, r, err)
		}
	}
}
