package e2e

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	epb "go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	lpb "go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
)

// twoProxies starts two proxies over three shards.
func twoProxies(t *testing.T) (urls [2]string) {
	for i, n := range startSpindle(t, 3, 2, ringAll) {
		urls[i] = n.ClientURLs()[0]
	}
	return urls
}

// readAddWrite raises a counter in three steps that only a lock can hold together.
func readAddWrite(ctx context.Context, c *clientv3.Client, key string) error {
	r, err := c.Get(ctx, key)
	if err != nil {
		return err
	}
	n := 0
	if len(r.Kvs) > 0 {
		if n, err = strconv.Atoi(string(r.Kvs[0].Value)); err != nil {
			return err
		}
	}
	_, err = c.Put(ctx, key, strconv.Itoa(n+1))
	return err
}

func wantCounter(t *testing.T, c *clientv3.Client, key string, want int) {
	t.Helper()
	r, err := c.Get(callContext(t), key)
	if err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != strconv.Itoa(want) {
		t.Errorf("the counter is %v, %v; %d expected", r, err, want)
	}
}

const (
	lockers    = 8
	lockRounds = 10
)

// together runs f for 0, 1, ... n-1 at once.
func together(t *testing.T, n int, f func(i int) error) {
	t.Helper()
	errs := make(chan error, 1)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if err := f(i); err != nil {
				fatalOnce(errs, "%d: %w", i, err)
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
}

// The mutex of clientv3/concurrency keeps out others, through two proxies; and whose session ends gives it back.
func TestConcurrencyMutex(t *testing.T) {
	t.Parallel()
	urls := twoProxies(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*readyTimeout)
	defer cancel()
	clients := []*clientv3.Client{client(t, urls[0]), client(t, urls[1])}
	together(t, lockers, func(i int) error {
		c := clients[i%2]
		s, err := concurrency.NewSession(c, concurrency.WithTTL(60))
		if err != nil {
			return err
		}
		m := concurrency.NewMutex(s, "mutex")
		for range lockRounds {
			if err := m.Lock(ctx); err != nil {
				return fmt.Errorf("lock: %w", err)
			}
			if err := readAddWrite(ctx, c, "counter"); err != nil {
				return err
			}
			if r, err := c.Txn(ctx).If(m.IsOwner()).Then(clientv3.OpGet(m.Key())).Commit(); err != nil || !r.Succeeded {
				return fmt.Errorf("the owner is not the owner: %v, %w", r, err)
			}
			if err := m.Unlock(ctx); err != nil {
				return fmt.Errorf("unlock: %w", err)
			}
		}
		return s.Close()
	})
	wantCounter(t, clients[0], "counter", lockers*lockRounds)

	// Nobody keeps the first one's session alive: its lease ends, and the second gets the lock.
	dying, err := concurrency.NewSession(clients[0], concurrency.WithTTL(3))
	if err != nil {
		t.Fatal(err)
	}
	if err := concurrency.NewMutex(dying, "mutex").Lock(ctx); err != nil {
		t.Fatal(err)
	}
	s, err := concurrency.NewSession(clients[1], concurrency.WithTTL(60))
	if err != nil {
		t.Fatal(err)
	}
	m := concurrency.NewMutex(s, "mutex")
	if err := m.TryLock(ctx); err != concurrency.ErrLocked {
		t.Errorf("TryLock: %v", err)
	}
	dying.Orphan()
	if err := m.Lock(ctx); err != nil {
		t.Errorf("after the first one's end: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if r, err := clients[0].Get(ctx, "mutex", clientv3.WithPrefix()); err != nil || r.Count != 0 {
		t.Errorf("left behind: %v, %v", r, err)
	}
}

// The election of clientv3/concurrency: one leader at a time, everybody hears of each in order.
func TestConcurrencyElection(t *testing.T) {
	t.Parallel()
	urls := twoProxies(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*readyTimeout)
	defer cancel()
	clients := []*clientv3.Client{client(t, urls[0]), client(t, urls[1])}
	const candidates = 6
	observer, err := concurrency.NewSession(clients[1])
	if err != nil {
		t.Fatal(err)
	}
	seen := concurrency.NewElection(observer, "election").Observe(ctx)
	heard := make(chan string, 100)
	go func() {
		for r := range seen {
			heard <- string(r.Kvs[0].Value)
		}
		close(heard)
	}()
	turns := make(chan string, candidates)
	together(t, candidates, func(i int) error {
		s, err := concurrency.NewSession(clients[i%2], concurrency.WithTTL(60))
		if err != nil {
			return err
		}
		defer s.Close()
		e := concurrency.NewElection(s, "election")
		if err := e.Campaign(ctx, fmt.Sprint("c", i)); err != nil {
			return err
		}
		turns <- fmt.Sprint("c", i)
		if l, err := e.Leader(ctx); err != nil || string(l.Kvs[0].Value) != fmt.Sprint("c", i) {
			return fmt.Errorf("the leader is %v, %w", l, err)
		}
		done := fmt.Sprint("done", i)
		if err := e.Proclaim(ctx, done); err != nil {
			return err
		}
		for {
			select {
			case got := <-heard:
				if got != done {
					continue
				}
			case <-ctx.Done():
				return ctx.Err()
			}
			return e.Resign(ctx)
		}
	})
	if len(turns) != candidates {
		t.Errorf("%d of %d were elected", len(turns), candidates)
	}
}

// The Lock service of two proxies: those who wait get the lock one after the other, in the order of their keys.
func TestLockService(t *testing.T) {
	t.Parallel()
	urls := twoProxies(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*readyTimeout)
	defer cancel()
	conns := []*rpc{dial(t, urls[0]), dial(t, urls[1])}
	c := client(t, urls[0])
	together(t, lockers, func(i int) error {
		lock := lpb.NewLockClient(conns[i%2].conn)
		for range lockRounds {
			// Without a lease of its own: the service grants one.
			got, err := lock.Lock(ctx, &lpb.LockRequest{Name: []byte("service")})
			if err != nil {
				return fmt.Errorf("lock: %w", err)
			}
			if err := checkHeader(got.Header); err != nil {
				return err
			}
			if err := readAddWrite(ctx, c, "counter"); err != nil {
				return err
			}
			if _, err := lock.Unlock(ctx, &lpb.UnlockRequest{Key: got.Key}); err != nil {
				return fmt.Errorf("unlock: %w", err)
			}
		}
		return nil
	})
	wantCounter(t, c, "counter", lockers*lockRounds)

	// One who holds the lock and whose lease is revoked does not hold it any more.
	lease := grantLease(t, conns[0], 600)
	if _, err := lpb.NewLockClient(conns[0].conn).Lock(ctx, &lpb.LockRequest{Name: []byte("service"), Lease: lease}); err != nil {
		t.Fatal(err)
	}
	if _, err := conns[1].l.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: lease}); err != nil {
		t.Fatal(err)
	}
	if _, err := lpb.NewLockClient(conns[1].conn).Lock(ctx, &lpb.LockRequest{Name: []byte("service")}); err != nil {
		t.Errorf("after the holder's lease is gone: %v", err)
	}
}

// The Election service: a campaign through one proxy, seen through the other.
func TestElectionService(t *testing.T) {
	t.Parallel()
	urls := twoProxies(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*readyTimeout)
	defer cancel()
	a, b := dial(t, urls[0]), dial(t, urls[1])
	name := []byte("service")
	obs, err := epb.NewElectionClient(b.conn).Observe(ctx, &epb.LeaderRequest{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	first, err := epb.NewElectionClient(a.conn).Campaign(ctx, &epb.CampaignRequest{Name: name, Lease: grantLease(t, a, 600), Value: []byte("one")})
	if err != nil {
		t.Fatal(err)
	}
	second, lease := make(chan error, 1), grantLease(t, b, 600)
	go func() {
		won, err := epb.NewElectionClient(b.conn).Campaign(ctx, &epb.CampaignRequest{Name: name, Lease: lease, Value: []byte("three")})
		if err == nil && won.Leader.Rev <= first.Leader.Rev {
			err = fmt.Errorf("won with %v after %v", won, first)
		}
		second <- err
	}()
	want := func(value string) {
		t.Helper()
		if got, err := obs.Recv(); err != nil || string(got.Kv.Value) != value {
			t.Errorf("observed %v, %v; %s expected", got, err, value)
		}
	}
	want("one")
	if _, err := epb.NewElectionClient(b.conn).Proclaim(ctx, &epb.ProclaimRequest{Leader: first.Leader, Value: []byte("two")}); err != nil {
		t.Error(err)
	}
	want("two")
	if _, err := epb.NewElectionClient(b.conn).Resign(ctx, &epb.ResignRequest{Leader: first.Leader}); err != nil {
		t.Error(err)
	}
	want("three")
	if err := <-second; err != nil {
		t.Error(err)
	}
	if l, err := epb.NewElectionClient(a.conn).Leader(ctx, &epb.LeaderRequest{Name: name}); err != nil || string(l.Kv.Value) != "three" {
		t.Errorf("the leader is %v, %v", l, err)
	}
}
