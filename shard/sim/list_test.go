package sim

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/shard"
)

// TestLongListIsLinear adds up what etcd goes over for a long list: for every page all keys from its start to the
// end that it names. That must be a small multiple of the list's length, not of its square.
func TestLongListIsLinear(t *testing.T) {
	const keys, most = 4000, 16
	visits, pages := 0, 0
	name := func(i int) []byte { return fmt.Appendf(nil, "m/%05d", i) }
	visit := func(q *pb.RangeRequest) {
		if q == nil || !bytes.HasPrefix(q.Key, []byte("m/")) || len(q.RangeEnd) == 0 {
			return
		}
		pages++
		for i := range keys {
			if k := name(i); bytes.Compare(k, q.Key) >= 0 && bytes.Compare(k, q.RangeEnd) < 0 {
				visits++
			}
		}
	}
	w := newScript(t, Config{Seed: 1, Shards: 1, Proxies: 1, Keys: 8, Base: time.Millisecond, RingSize: 1 << 10, MaxTxnOps: 128,
		MaxRequestBytes: defaultMaxRequestBytes, Window: 250 * time.Millisecond, Timeout: 5 * time.Second, SnapshotEvery: 100,
		Tamper: func(_ codec.ClusterID, m codec.Method, req []byte) []byte {
			switch q, x := (&pb.RangeRequest{}), (&pb.TxnRequest{}); {
			case m == codec.MethodRange && proto.Unmarshal(req, q) == nil:
				visit(q)
			case m == codec.MethodTxn && proto.Unmarshal(req, x) == nil:
				for _, o := range x.Success {
					visit(o.GetRequestRange())
				}
			}
			return req
		}})
	p := w.proxies[0]
	value := bytes.Repeat([]byte("v"), 8<<10)
	for i := 0; i < keys; {
		q := &pb.TxnRequest{}
		for range 50 {
			q.Success = append(q.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: name(i), Value: value}}})
			i++
		}
		if _, st := w.call(p, shard.OpTxn, q); st.Code != codec.OK {
			t.Fatal(st)
		}
	}
	visits, pages = 0, 0
	n := 0
	st := w.stream(p, &pb.RangeRequest{Key: []byte("m/"), RangeEnd: []byte("m0")}, func(c *pb.RangeResponse) {
		for _, kv := range c.Kvs {
			if !bytes.Equal(kv.Key, name(n)) {
				t.Fatalf("key %d is %q", n, kv.Key)
			}
			n++
		}
		if c.Header != nil && (c.Count != keys || c.More) {
			t.Errorf("count %d, more %v", c.Count, c.More)
		}
	})
	if st.Code != codec.OK || n != keys {
		t.Fatalf("%d keys, %v %q", n, st.Code, st.Msg)
	}
	t.Logf("%d keys in %d reads, which went over %d keys", keys, pages, visits)
	if visits > most*keys {
		t.Errorf("%d reads went over %d keys, for a list of %d", pages, visits, keys)
	}
}
