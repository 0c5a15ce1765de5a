package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"spindle/server/node"
	"spindle/shard/embedded"
)

// grantLease grants a lease with an ID of the server's choice.
func grantLease(t testing.TB, s *rpc, ttl int64) int64 {
	t.Helper()
	r, err := s.l.LeaseGrant(callContext(t), &pb.LeaseGrantRequest{TTL: ttl})
	if err != nil {
		t.Fatal(err)
	}
	return r.ID
}

// putLeased puts n keys of a prefix on a lease and returns the last revision.
func putLeased(t testing.TB, s *rpc, prefix string, n int, lease int64) (rev int64) {
	t.Helper()
	for i := range n {
		r, err := s.kv.Put(callContext(t), &pb.PutRequest{Key: fmt.Appendf(nil, "%s%03d", prefix, i), Value: []byte("v"), Lease: lease})
		if err != nil {
			t.Fatal(err)
		}
		rev = r.Header.Revision
	}
	return rev
}

func list(t testing.TB, s *rpc, prefix string, rev int64) *pb.RangeResponse {
	t.Helper()
	r, err := s.kv.Range(callContext(t), &pb.RangeRequest{Key: []byte(prefix), RangeEnd: prefixEnd(prefix), Revision: rev})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// awaitDeletes waits until the watch has brought n deletes, and checks that they are one for each key, with prev_kv
// of the lease.
func awaitDeletes(t testing.TB, w *eventLog, n int, lease int64) []*mvccpb.Event {
	t.Helper()
	deletes := func() (out []*mvccpb.Event) {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, e := range w.events {
			if e.Type == mvccpb.Event_DELETE {
				out = append(out, e)
			}
		}
		return out
	}
	waitUntil(t, fmt.Sprintf("%d deletes", n), readyTimeout, func() bool { return len(deletes()) >= n })
	all := deletes()
	seen := map[string]bool{}
	for _, e := range all {
		if k := string(e.Kv.Key); seen[k] || e.PrevKv.GetLease() != lease {
			t.Errorf("%s deleted twice, or not of lease %x: %v", k, lease, e)
		}
		seen[string(e.Kv.Key)] = true
	}
	if len(all) != n {
		t.Errorf("%d deletes, %d expected", len(all), n)
	}
	return all
}

// A lease outlives the proxy that granted it, and all members: its time, its keys, its end.
func TestLeaseSurvivesRestarts(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "members")
	start := func() (*embedded.Members, *node.Node, *rpc) {
		m, err := embedded.Start(embedded.Config{Dir: dir, Shards: 3, NoFsync: true, Log: testLog(t)})
		if err != nil {
			t.Fatal(err)
		}
		n := startNode(t, nodeConfig(t, m))
		return m, n, dial(t, n.ClientURLs()[0])
	}
	m, n, s := start()
	const keys = 20
	lease := grantLease(t, s, 500)
	if _, err := s.l.LeaseGrant(callContext(t), &pb.LeaseGrantRequest{ID: chosen, TTL: 500}); err != nil {
		t.Fatal(err)
	}
	putLeased(t, s, "r/own/", keys, lease)
	putLeased(t, s, "r/chosen/", keys, chosen)

	check := func(when string, have int) {
		t.Helper()
		for id, prefix := range map[int64]string{lease: "r/own/", chosen: "r/chosen/"} {
			r, err := s.l.LeaseTimeToLive(callContext(t), &pb.LeaseTimeToLiveRequest{ID: id, Keys: true})
			if err != nil || r.GrantedTTL != 500 || r.TTL < 300 || len(r.Keys) != have {
				t.Errorf("%s: lease %x: %v, %v", when, id, r, err)
			}
			kvs := list(t, s, prefix, 0).Kvs
			if len(kvs) != have {
				t.Errorf("%s: %d keys of lease %x", when, len(kvs), id)
			}
			for _, kv := range kvs {
				if kv.Lease != id {
					t.Errorf("%s: %v is not on lease %x", when, kv, id)
				}
			}
		}
		if r, err := s.l.LeaseLeases(callContext(t), &pb.LeaseLeasesRequest{}); err != nil || len(r.Leases) != 2 {
			t.Errorf("%s: %v, %v", when, r, err)
		}
		if _, err := s.l.LeaseGrant(callContext(t), &pb.LeaseGrantRequest{ID: chosen, TTL: 500}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%s: granted again: %v", when, err)
		}
	}
	check("at first", keys)
	n.Close()
	n = startNode(t, nodeConfig(t, m))
	s = dial(t, n.ClientURLs()[0])
	check("after the proxy's restart", keys)
	putLeased(t, s, "r/own/", keys+5, lease)
	putLeased(t, s, "r/chosen/", keys+5, chosen)
	check("with more keys", keys+5)
	n.Close()
	m.Close()
	m, n, s = start()
	defer m.Close()
	defer n.Close()
	check("after the members' restart", keys+5)
	putLeased(t, s, "r/own/", keys+10, lease)
	putLeased(t, s, "r/chosen/", keys+10, chosen)
	check("with still more keys", keys+10)
	rev := list(t, s, "r/", 0).Header.Revision
	w := openWatch(t, s, "r/", rev+1)
	for _, id := range []int64{lease, chosen} {
		if _, err := s.l.LeaseRevoke(callContext(t), &pb.LeaseRevokeRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	after := list(t, s, "r/", 0)
	if len(after.Kvs) != 0 {
		t.Errorf("%d keys after the revokes", len(after.Kvs))
	}
	if n := len(w.until(t, after.Header.Revision)); n != 2*(keys+10) {
		t.Errorf("%d events, %d keys had a lease", n, 2*(keys+10))
	}
}

// Keys whose lease ends while no proxy runs are deleted with a revision when one does; a watch from before sees
// it, every old revision reads as it was, and all proxies agree.
func TestLeaseExpiresWithoutProxies(t *testing.T) {
	t.Parallel()
	m := startMembers(t, 3)
	n := startNode(t, nodeConfig(t, m))
	s := dial(t, n.ClientURLs()[0])
	const keys = 20
	lease := grantLease(t, s, 8) // the proxy is to end before it
	putLeased(t, s, "d/", keys, lease)
	r, err := s.kv.Put(callContext(t), &pb.PutRequest{Key: []byte("d/stays"), Value: []byte("v")})
	if err != nil {
		t.Fatal(err)
	}
	rev := r.Header.Revision
	n.Close()

	// The home shard's own keys vanish by themselves.
	left := func() (n int64) {
		for _, u := range m.Shards {
			r, err := client(t, u).Get(callContext(t), "d/", clientv3.WithPrefix(), clientv3.WithCountOnly())
			if err != nil {
				t.Fatal(err)
			}
			n += r.Count
		}
		return n
	}
	waitUntil(t, "the lease has ended on its home", readyTimeout, func() bool { return left() < keys+1 })

	var words [][]string
	for range 2 {
		s := dial(t, startNode(t, nodeConfig(t, m)).ClientURLs()[0])
		events := awaitDeletes(t, openWatch(t, s, "d/", rev+1), keys, lease)
		if at := list(t, s, "d/", 0); len(at.Kvs) != 1 || at.Header.Revision < events[len(events)-1].Kv.ModRevision {
			t.Errorf("%d keys at %d are left", len(at.Kvs), at.Header.Revision)
		}
		if at := list(t, s, "d/", rev); len(at.Kvs) != keys+1 {
			t.Errorf("%d keys at revision %d", len(at.Kvs), rev)
		}
		alive := keys + 1
		for i, e := range events {
			alive--
			if i+1 < len(events) && events[i+1].Kv.ModRevision == e.Kv.ModRevision {
				continue
			}
			if at := list(t, s, "d/", e.Kv.ModRevision); len(at.Kvs) != alive {
				t.Errorf("%d keys at revision %d, %d were left", len(at.Kvs), e.Kv.ModRevision, alive)
			}
		}
		var w []string
		for _, e := range events {
			w = append(w, fmt.Sprintf("%d %s", e.Kv.ModRevision, e.Kv.Key))
		}
		words = append(words, w)
	}
	if a, b := strings.Join(words[0], "\n"), strings.Join(words[1], "\n"); a != b {
		t.Errorf("two proxies differ:\n%s\nand\n%s", a, b)
	}
}

const (
	// raceLeases is how many leases TestLeaseRevokeRacesAttach revokes; SPINDLE_RACES overrides it.
	raceLeases  = 1500
	raceWorkers = 16
)

// A revoke through one proxy races with the first puts on other shards, through both: when all were answered there
// is no key that outlives its lease, and no put that began after the revoke's answer succeeds.
func TestLeaseRevokeRacesAttach(t *testing.T) {
	t.Parallel()
	sd := seed(t)
	nodes := startSpindle(t, 3, 2, ringAll)
	var conns [][2]*rpc
	for range 4 {
		conns = append(conns, [2]*rpc{dial(t, nodes[0].ClientURLs()[0]), dial(t, nodes[1].ClientURLs()[0])})
	}
	watches := []*eventLog{openWatch(t, conns[0][0], "x/", 1), openWatch(t, conns[0][1], "x/", 1)}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	var next, put, refused, last atomic.Int64
	errs := make(chan error, 1)
	n := int64(numberFrom(t, "SPINDLE_RACES", scale(raceLeases)))
	var wg sync.WaitGroup
	begun := time.Now()
	for w := range raceWorkers {
		r := newRand(sd, w)
		wg.Go(func() {
			for {
				i := next.Add(1)
				if i > n || len(errs) > 0 {
					return
				}
				if err := raceOnce(ctx, r, conns[w%len(conns)], i, &put, &refused, &last); err != nil {
					fatalOnce(errs, "lease %d: %w", i, err)
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
	t.Logf("%d leases in %v: %d puts came before the revoke, %d were refused", n, time.Since(begun).Round(time.Millisecond), put.Load(), refused.Load())
	if put.Load() == 0 || refused.Load() == 0 {
		t.Error("there was no race")
	}
	end := max(list(t, conns[0][0], "x/", 0).Header.Revision, list(t, conns[0][1], "x/", 0).Header.Revision, last.Load())
	a, b := watches[0].until(t, end), watches[1].until(t, end)
	sameEvents(t, a, b)
	if len(a) != 2*int(put.Load()) {
		t.Errorf("%d events for %d puts", len(a), put.Load())
	}
	if kvs := list(t, conns[0][0], "x/", 0).Kvs; len(kvs) > 0 {
		t.Errorf("%d keys have outlived their leases, the first is %v", len(kvs), kvs[0])
	}
}

func raceOnce(ctx context.Context, r *rand.Rand, c [2]*rpc, i int64, put, refused, last *atomic.Int64) error {
	req := &pb.LeaseGrantRequest{TTL: 600}
	if i%3 == 0 {
		req.ID = 1_000_000 + i
	}
	g, err := c[r.IntN(2)].l.LeaseGrant(ctx, req)
	if err != nil {
		return err
	}
	attach := func(s *rpc, k int) error {
		resp, err := s.kv.Put(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "x/%06d/%d", i, k), Lease: g.ID})
		switch {
		case err == nil:
			raise(last, resp.Header.Revision)
			put.Add(1)
		case status.Code(err) == codes.NotFound:
			refused.Add(1)
			return nil
		}
		return err
	}
	pause := time.Duration(r.IntN(3000)) * time.Microsecond << (2 * r.IntN(4)) // up to 3, 12, 48, 192 ms
	const puts = 3
	results := make(chan error, puts+1)
	for k := range puts {
		s := c[r.IntN(2)]
		go func() { results <- attach(s, k) }()
	}
	revoker := c[r.IntN(2)]
	go func() {
		<-time.After(pause) // where in the puts' way the revoke comes
		_, err := revoker.l.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: g.ID})
		results <- err
	}()
	for range puts + 1 {
		err = errors.Join(err, <-results)
	}
	if err != nil {
		return err
	}
	key := fmt.Appendf(nil, "x/%06d/", i)
	for k, s := range c {
		if _, err := s.kv.Put(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "x/%06d/late%d", i, k), Lease: g.ID}); status.Code(err) != codes.NotFound {
			return fmt.Errorf("a put after the revoke's answer: %w", err)
		}
		resp, err := s.kv.Range(ctx, &pb.RangeRequest{Key: key, RangeEnd: prefixEnd(string(key))})
		if err != nil {
			return err
		}
		if len(resp.Kvs) > 0 {
			return fmt.Errorf("all was answered, and %v is there", resp.Kvs)
		}
	}
	return nil
}
