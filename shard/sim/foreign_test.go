package sim

import (
	"fmt"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/shard"
)

// TestForeignPutTwice: somebody puts a key on a member, and puts it again while the proxy looks at the first value.
// Nothing has failed then, so the second value is taken over at once: a proxy that ends meanwhile leaves it to whoever
// meets it by chance. (Seed 2829 of TestSimulation.)
func TestForeignPutTwice(t *testing.T) {
	const key = "k00"
	// The first rewrite lasts longer than the jitter after which the second value is looked at.
	w := newScript(t, Config{Seed: 1, Shards: 1, Proxies: 1, Keys: 8, Base: 30 * time.Millisecond, RingSize: 1 << 10, MaxTxnOps: 128,
		MaxRequestBytes: defaultMaxRequestBytes, Window: 250 * time.Millisecond, Timeout: 5 * time.Second, SnapshotEvery: 100})
	p, c := w.proxies[0], w.net.Members[0]
	w.put(p, key)
	var second int64
	w.net.Tamper = func(to codec.ClusterID, m codec.Method, req []byte) []byte {
		q := &pb.RangeRequest{}
		if second == 0 && to >= 0 && m == codec.MethodRange && proto.Unmarshal(req, q) == nil && string(q.Key) == key && q.Revision > 0 {
			foreignPut(t, c, key, "second")
			second = w.net.now
		}
		return req
	}
	foreignPut(t, c, key, "first")
	w.wait("the second value", func() bool { return second > 0 && tookOver(c, key, "second") })
	took := time.Duration(w.net.now - second)
	if took > 500*time.Millisecond {
		t.Errorf("the second value was taken over after %v", took)
	}
}

// foreignPut puts a key on a member as somebody with etcdctl does.
func foreignPut(t *testing.T, c *Cluster, key, value string) {
	t.Helper()
	put := &pb.PutRequest{Key: []byte(key), Value: []byte(value)}
	if _, st := c.Txn(&pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: put}}}}); st.Code != codec.OK {
		t.Fatal(st)
	}
}

// tookOver says that a member holds the value with a stamp.
func tookOver(c *Cluster, key, value string) bool {
	_, _, _, user, err := parseStamp(c.at([]byte(key), c.Rev()).KV.Value)
	return err == nil && string(user) == value
}

// TestForeignPutWhileNobodyRuns: a start takes over what was put on a member while no proxy ran, also if its stream need
// not go back that far for its watchers: behind the put there are records of proxies that ended before they could do
// it, and those of rebuilds.
func TestForeignPutWhileNobodyRuns(t *testing.T) {
	const ring = 32
	for _, behind := range []string{"nothing", "records", "rebuilds"} {
		t.Run(behind, func(t *testing.T) {
			w := smallWorld(t, 1, ring)
			p, c := w.proxies[0], w.net.Members[0]
			for range 2 * ring {
				w.put(p, "k01")
			}
			if behind != "records" {
				p.crash()
			}
			foreignPut(t, c, "k00", "by hand")
			switch behind {
			case "records":
				// A proxy that sees the put and ends before it could do more about it than look.
				w.net.Tamper = func(to codec.ClusterID, m codec.Method, req []byte) []byte {
					q := &pb.RangeRequest{}
					if to >= 0 && m == codec.MethodRange && proto.Unmarshal(req, q) == nil && string(q.Key) == "k00" {
						q.Revision = 1 << 40
						req, _ = proto.Marshal(q)
					}
					return req
				}
				for range ring {
					w.put(p, "k01")
				}
				p.crash()
				w.net.Tamper = nil
			case "rebuilds":
				for range 3 {
					before := c.Rev()
					w.net.Coord.Wipe(w.net.Coord.ClusterID)
					p.boot(0)
					w.wait("a fence", func() bool { return c.at([]byte(keyClock), c.Rev()).Main > before })
					if p.ready {
						t.Fatal("it was ready before its fence")
					}
					p.crash()
				}
			}
			if tookOver(c, "k00", "by hand") {
				t.Fatal("it was taken over too early for this test")
			}
			p.boot(0)
			w.wait("the value", func() bool { return tookOver(c, "k00", "by hand") })
		})
	}
}

// TestManyForeignPutsWhileNobodyRuns: a start takes over as many values as a proxy remembers; a list finds the others.
func TestManyForeignPutsWhileNobodyRuns(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("long")
	}
	const keys, remembered = 4096 + 300, 4096
	w := smallWorld(t, 1, 1<<12)
	p, c := w.proxies[0], w.net.Members[0]
	w.put(p, "a")
	p.crash()
	name := func(i int) string { return fmt.Sprintf("k%05d", i) }
	for i := 0; i < keys; {
		txn := &pb.TxnRequest{}
		for ; i < keys && len(txn.Success) < 100; i++ {
			put := &pb.PutRequest{Key: []byte(name(i)), Value: []byte("by hand")}
			txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put}})
		}
		if _, st := c.Txn(txn); st.Code != codec.OK {
			t.Fatal(st)
		}
	}
	p.boot(0)
	left := 0 // keys before it are taken over
	tookOverUpTo := func(n int) bool {
		for left < n && tookOver(c, name(left), "by hand") {
			left++
		}
		return left == n
	}
	w.wait("what a proxy remembers", func() bool { return tookOverUpTo(remembered) })
	all := &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l"), KeysOnly: true}
	if _, st := w.ask(p, shard.OpRange, all); st.Code != codec.OK {
		t.Fatal(st)
	}
	w.wait("the others", func() bool { return tookOverUpTo(keys) })
	if resp, st := w.ask(p, shard.OpRange, all); st.Code != codec.OK || len(resp.(*pb.RangeResponse).Kvs) != keys {
		t.Errorf("%d keys, want %d; %v", len(resp.(*pb.RangeResponse).Kvs), keys, st)
	}
}
