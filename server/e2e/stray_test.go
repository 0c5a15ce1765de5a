package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/server/node"
	"spindle/shard/embedded/embeddedtest"
)

// One of the endpoints of a proxy's only member leads to another etcd, and answers first. That does not end the start: the right
// one is waited for. The stray is named in the log, and nothing is written to it.
func TestStrayEndpointAtStart(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"somebody else's", "another system's", "empty"} {
		t.Run(kind, func(t *testing.T) {
			m, other := startMembers(t, 1), startMembers(t, 1)
			n := startNode(t, nodeConfig(t, m))
			put := func(n *node.Node, key string) {
				t.Helper()
				if _, err := dial(t, n.ClientURLs()[0]).kv.Put(callContext(t), &pb.PutRequest{Key: []byte(key), Value: []byte("v")}); err != nil {
					t.Fatal(err)
				}
			}
			put(n, "key")
			n.Close()
			direct := dial(t, other.Shards[0]).kv
			switch kind {
			case "another system's":
				startNode(t, nodeConfig(t, other)).Close()
			case "somebody else's":
				if _, err := direct.Put(callContext(t), &pb.PutRequest{Key: []byte("theirs")}); err != nil {
					t.Fatal(err)
				}
			}
			rev := func() int64 {
				r, err := direct.Range(callContext(t), &pb.RangeRequest{Key: []byte("x")})
				if err != nil {
					t.Fatal(err)
				}
				return r.Header.Revision
			}
			before := rev()
			relay := embeddedtest.NewRelay(t)
			relay.SetTarget(strings.TrimPrefix(m.Shards[0], "http://"))
			for _, delay := range []time.Duration{0, 50 * time.Millisecond} {
				relay.Delay(delay)
				cfg := nodeConfig(t, m)
				cfg.Shards[0].URLs = []string{other.Shards[0], relay.URL()}
				n := startNode(t, cfg)
				relay.Delay(0)
				r, err := dial(t, n.ClientURLs()[0]).kv.Range(callContext(t), &pb.RangeRequest{Key: []byte("key")})
				if err != nil || len(r.Kvs) != 1 {
					t.Fatal(delay, err, r)
				}
				put(n, "key")
				n.Close()
			}
			if now := rev(); now != before {
				t.Errorf("the stray was written to: revision %d, was %d", now, before)
			}
		})
	}
}

// One of the endpoints of a member whose loss is accepted leads to an empty etcd, and answers first. It does not become the member, whose data
// is there.
func TestEmptyStrayEndpointWithAcceptedLoss(t *testing.T) {
	t.Parallel()
	const keys = 20
	m, other := startMembers(t, 2), startMembers(t, 1)
	n := startNode(t, nodeConfig(t, m))
	kv := dial(t, n.ClientURLs()[0]).kv
	for i := range keys {
		if _, err := kv.Put(callContext(t), &pb.PutRequest{Key: fmt.Appendf(nil, "k%d", i), Value: []byte("v")}); err != nil {
			t.Fatal(err)
		}
	}
	n.Close()
	direct := dial(t, other.Shards[0]).kv
	rev := func() int64 {
		r, err := direct.Range(callContext(t), &pb.RangeRequest{Key: []byte("x")})
		if err != nil {
			t.Fatal(err)
		}
		return r.Header.Revision
	}
	before := rev()
	relay := embeddedtest.NewRelay(t)
	relay.SetTarget(strings.TrimPrefix(m.Shards[1], "http://"))
	relay.Delay(50 * time.Millisecond)
	cfg := nodeConfig(t, m)
	cfg.Shards[1].URLs = []string{other.Shards[0], relay.URL()}
	cfg.AcceptDataLoss = []string{cfg.Shards[1].Name}
	n = startNode(t, cfg)
	relay.Delay(0)
	r, err := dial(t, n.ClientURLs()[0]).kv.Range(callContext(t), &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l")})
	if err != nil || r.Count != keys {
		t.Errorf("%d of %d keys: %v", r.GetCount(), keys, err)
	}
	if now := rev(); now != before {
		t.Errorf("the stray was written to: revision %d, was %d", now, before)
	}
}
