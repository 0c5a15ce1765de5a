package sim

import (
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// TestForeignPutTwice: somebody puts a key on a member, and puts it again while the proxy looks at the first value.
// Nothing has failed then, so the second value is taken over at once: a proxy that ends meanwhile leaves it to whoever
// meets it by chance. (Seed 2829 of TestSimulation.)
func TestForeignPutTwice(t *testing.T) {
	const key = "k00"
	foreign := func(c *Cluster, value string) {
		put := &pb.PutRequest{Key: []byte(key), Value: []byte(value)}
		if _, st := c.Txn(&pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: put}}}}); st.Code != codec.OK {
			t.Fatal(st)
		}
	}
	// The first rewrite lasts longer than the jitter after which the second value is looked at.
	w := newScript(t, Config{Seed: 1, Shards: 1, Proxies: 1, Keys: 8, Base: 30 * time.Millisecond, RingSize: 1 << 10, MaxTxnOps: 128,
		MaxRequestBytes: defaultMaxRequestBytes, Window: 250 * time.Millisecond, Timeout: 5 * time.Second, SnapshotEvery: 100})
	p, c := w.proxies[0], w.net.Members[0]
	w.put(p, key)
	var second int64
	w.net.Tamper = func(to codec.ClusterID, m codec.Method, req []byte) []byte {
		q := &pb.RangeRequest{}
		if second == 0 && to >= 0 && m == codec.MethodRange && proto.Unmarshal(req, q) == nil && string(q.Key) == key && q.Revision > 0 {
			foreign(c, "second")
			second = w.net.now
		}
		return req
	}
	foreign(c, "first")
	stamped := func() bool {
		_, _, _, user, err := parseStamp(c.at([]byte(key), c.Rev()).KV.Value)
		return err == nil && string(user) == "second"
	}
	w.wait("the second value", func() bool { return second > 0 && stamped() })
	took := time.Duration(w.net.now - second)
	if took > 500*time.Millisecond {
		t.Errorf("the second value was taken over after %v", took)
	}
}
