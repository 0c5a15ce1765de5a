package sim

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/codec"
	"spindle/shard"
	"spindle/watchring"
)

// TestRecentGetOfEndedLease: the end of a lease has the first revision of whichever batch comes next, and the filter of
// that batch's tick does not know the key. So a Get at another proxy, whose streams lag, must not be answered from
// the ring. (Seed 39 of TestCalm, 139 of TestSimulation.)
func TestRecentGetOfEndedLease(t *testing.T) {
	w := smallWorld(t, 2, 1<<10)
	a, b := w.proxies[0], w.proxies[1]
	const key = "x02"
	put := w.put(a, key)
	w.wait("the other proxy's stream", func() bool { return b.core.Frontier().Get(watchring.All) >= put })
	get := &pb.RangeRequest{Key: []byte(key)}
	if resp, st := w.ask(b, shard.OpRange, get); st.Code != codec.OK || len(resp.(*pb.RangeResponse).Kvs) != 1 || b.core.Stats().RecentReads != 1 {
		t.Fatalf("%v %v, %d from the ring", resp, st, b.core.Stats().RecentReads)
	}
	b.host.Link(0).StreamHole = true
	w.net.Members[0].Expire(key)
	end := w.put(a, "k00")
	resp, st := w.ask(a, shard.OpRange, get)
	if r := resp.(*pb.RangeResponse); st.Code != codec.OK || r.Header.Revision < end || len(r.Kvs) > 0 {
		t.Fatalf("the proxy that saw the end: %v %v", resp, st)
	}
	resp, st = w.ask(b, shard.OpRange, get)
	if r := resp.(*pb.RangeResponse); st.Code != codec.OK || r.Header.Revision < end || len(r.Kvs) > 0 {
		t.Errorf("the proxy whose stream lags: %v %v, deleted at %d", resp, st, end)
	}
}
