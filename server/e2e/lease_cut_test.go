package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"spindle/shard/embedded/embeddedtest"
)

// relayTo returns a relay to the server of a URL.
func relayTo(t testing.TB, url string) *embeddedtest.Relay {
	r := embeddedtest.NewRelay(t)
	r.SetTarget(strings.TrimPrefix(url, "http://"))
	return r
}

// Proxies are killed between the end of a lease, which they have seen and whose copies they have revoked, and the record that
// gives the deletes their revision: the coordinator is out of reach meanwhile. The one that is left makes the record, or, if
// there is none, the next one that starts.
func TestLeaseEndWithoutRecord(t *testing.T) {
	builtWithoutRace(t)
	t.Parallel()
	if testing.Short() {
		t.Skip("starts processes")
	}
	m := startMembers(t, 3)
	coordinator := relayTo(t, m.Coordinator)
	urls := []string{freeURL(t), freeURL(t)}
	args := []string{"--listen-metrics-urls=", "--coordinator", coordinator.URL(), "--shard-max-txn-ops", "1024", "--shard-max-request-bytes", "1638400",
		"--shard-timeout", "30s"}
	for i, u := range m.Shards {
		args = append(args, "--shard", m.Names[i]+"="+u)
	}
	start := func(i int) *process {
		p := startProcess(t, t.TempDir(), append([]string{"--listen-client-urls", urls[i]}, args...)...)
		p.awaitReady(t)
		return p
	}
	kill := func(p *process) {
		p.signal(t, syscall.SIGKILL)
		<-p.done
	}
	var members []*clientv3.Client
	for _, u := range m.Shards {
		members = append(members, client(t, u))
	}
	const keys = 20
	run := func(name string, procs []*process, end func() []*process) []*process {
		t.Helper()
		prefix := name + "/"
		s := dial(t, urls[1])
		// It must not end before the coordinator is out of reach.
		lease := grantLease(t, s, 6)
		rev := putLeased(t, s, prefix, keys, lease)
		early := openWatch(t, s, prefix, rev+1)
		coordinator.Mute()
		waitUntil(t, "the keys are gone on all members", readyTimeout, func() bool {
			left := int64(0)
			for _, c := range members {
				r, err := c.Get(callContext(t), prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
				if err != nil {
					t.Fatal(err)
				}
				left += r.Count
			}
			return left == 0
		})
		early.mu.Lock()
		if n := len(early.events); n > 0 {
			t.Errorf("%s: %d deletes are visible without a record", name, n)
		}
		early.mu.Unlock()
		procs = end()
		var words []string
		for i, p := range procs {
			if p == nil {
				continue
			}
			s := dial(t, urls[i])
			events := awaitDeletes(t, openWatch(t, s, prefix, rev+1), keys, lease)
			var w []string
			for _, e := range events {
				w = append(w, fmt.Sprintf("%d %s", e.Kv.ModRevision, e.Kv.Key))
			}
			words = append(words, strings.Join(w, "\n"))
			if n := len(list(t, s, prefix, rev).Kvs); n != keys {
				t.Errorf("%s: %d keys at revision %d", name, n, rev)
			}
			if n := len(list(t, s, prefix, 0).Kvs); n != 0 {
				t.Errorf("%s: %d keys are left", name, n)
			}
		}
		if len(words) == 0 || words[0] != words[len(words)-1] {
			t.Errorf("%s: the proxies differ:\n%s", name, strings.Join(words, "\nand\n"))
		}
		return procs
	}
	procs := []*process{start(0), start(1)}
	procs = run("one", procs, func() []*process {
		kill(procs[0])
		coordinator.Pass()
		s := dial(t, urls[1])
		waitUntil(t, "the other one has made the record", readyTimeout, func() bool { return len(list(t, s, "one/", 0).Kvs) == 0 })
		return []*process{start(0), procs[1]}
	})
	run("both", procs, func() []*process {
		kill(procs[0])
		kill(procs[1])
		coordinator.Pass()
		return []*process{start(0), start(1)}
	})
}

// awayLeases is how many leases one stream keeps alive in TestLeaseHomeAway: more on each home than a stream
// has places.
const awayLeases = 1100

// One member cluster says nothing, or is gone. Leases that do not need it are granted, kept alive on the same stream as those
// that do, attached, revoked, and end in time; the others live on when it is back.
func TestLeaseHomeAway(t *testing.T) {
	t.Parallel()
	m := startMembers(t, 3)
	cfg := nodeConfig(t, m)
	away := relayTo(t, m.Shards[0])
	cfg.Shards[0].URLs = []string{away.URL()}
	url := startNode(t, cfg).ClientURLs()[0]
	s := dial(t, url)
	const ttl = 600
	leases := make([]int64, awayLeases)
	together(t, 16, func(w int) error {
		for i := w; i < len(leases); i += 16 {
			r, err := s.l.LeaseGrant(callContext(t), &pb.LeaseGrantRequest{TTL: ttl})
			if err != nil {
				return err
			}
			leases[i] = r.ID
		}
		return nil
	})
	var members []*rpc
	for _, u := range m.Shards {
		members = append(members, dial(t, u))
	}
	var there, here []int64
	for _, id := range leases { // a home knows the client's TTL, a copy does not
		r, err := members[0].l.LeaseTimeToLive(callContext(t), &pb.LeaseTimeToLiveRequest{ID: id})
		if err == nil && r.GrantedTTL == ttl {
			there = append(there, id)
		} else {
			here = append(here, id)
		}
	}
	if len(there) < 300 || len(here) < 300 {
		t.Fatalf("%d leases are at home there, %d are not", len(there), len(here))
	}
	revoked := here[len(here)-1]
	here = here[:len(here)-1]
	kept := slices.Concat(there, here) // those of the home that will be away come first
	var keys []string                  // that lie elsewhere
	put := func(key string, lease int64) {
		t.Helper()
		if _, err := s.kv.Put(callContext(t), &pb.PutRequest{Key: []byte(key), Lease: lease}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 30 {
		key := fmt.Sprintf("away/%02d", i)
		put(key, here[0])
		r, err := members[0].kv.Range(callContext(t), &pb.RangeRequest{Key: []byte(key)})
		if err != nil {
			t.Fatal(err)
		}
		if r.Count == 0 {
			keys = append(keys, key)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	k := keepOnStream(t, ctx, s, kept)
	k.awaitRound(t, "at first", kept)
	back := func() {
		away.Pass()
		away.SetTarget(strings.TrimPrefix(m.Shards[0], "http://"))
		k.awaitRound(t, "afterwards", kept)
	}

	rounds := func(when string) time.Duration {
		begin := time.Now()
		for range 3 {
			k.awaitRound(t, when, here)
		}
		return time.Since(begin)
	}
	usual := rounds("all answer")
	away.Mute()
	if d := rounds("the member says nothing"); d > cfg.ShardTimeout/2+3*usual { // none waits for the end of a request to that member
		t.Errorf("three rounds of the other leases took %v, %v before", d, usual)
	}
	put(keys[0], here[1]) // a holder more
	if _, err := s.l.LeaseRevoke(callContext(t), &pb.LeaseRevokeRequest{ID: revoked}); err != nil {
		t.Errorf("the member says nothing: revoke: %v", err)
	}
	back()

	away.SetTarget("")
	k.awaitRound(t, "the member is gone", here)
	put(keys[1], grantLease(t, s, 6))
	waitUntil(t, "the member is gone: a lease ends", readyTimeout, func() bool {
		r, err := s.kv.Range(callContext(t), &pb.RangeRequest{Key: []byte(keys[1])})
		return err == nil && len(r.Kvs) == 0
	})
	back()
	cancel()
	if n := len(list(t, s, "away/", 0).Kvs); n != 29 {
		t.Errorf("%d keys are left", n)
	}
}
