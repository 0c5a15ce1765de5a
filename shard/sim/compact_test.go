package sim

import (
	"fmt"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/codec"
	"spindle/shard"
	"spindle/watchring"
)

// TestReadBelowUnseenCompaction: a compaction that one proxy has answered holds on another one whose streams
// have not shown it yet, on every road of a read at a revision, also where no key lies in its range. Each
// request has a world of its own, since one that is refused teaches the proxy.
func TestReadBelowUnseenCompaction(t *testing.T) {
	key, end := []byte(keyName(0)), []byte("y")
	for _, q := range []*pb.RangeRequest{
		{Key: key, RangeEnd: key}, // no key can lie in it
		{Key: []byte{0}, RangeEnd: []byte{1}},
		{Key: []byte("kzz"), RangeEnd: []byte("kzzz")}, // none does
		{Key: []byte("kzz")},
		{Key: key},
		{Key: key, RangeEnd: end},
		{Key: key, RangeEnd: end, Limit: 1},
		{Key: key, RangeEnd: end, CountOnly: true},
		{Key: key, RangeEnd: end, MinModRevision: 1000},
		{Key: key, RangeEnd: end, SortOrder: pb.RangeRequest_DESCEND},
	} {
		t.Run(fmt.Sprint(q), func(t *testing.T) {
			w := compactedUnseen(t)
			q.Revision = w.last - 1
			if _, st := w.call(w.b, shard.OpRange, q); st != codec.ErrCompacted {
				t.Errorf("Range: %v %q", st.Code, st.Msg)
			}
			if streams(q) {
				w = compactedUnseen(t)
				if st := w.stream(w.b, q, nil); st != codec.ErrCompacted {
					t.Errorf("RangeStream: %v %q", st.Code, st.Msg)
				}
			}
			if len(q.RangeEnd) > 0 && string(q.RangeEnd) != string(q.Key) && q.RangeEnd[0] != 1 {
				return // it lies on several shards
			}
			w = compactedUnseen(t)
			read := &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: q}}
			if _, st := w.call(w.b, shard.OpTxn, &pb.TxnRequest{Success: []*pb.RequestOp{read}}); st != codec.ErrCompacted {
				t.Errorf("Txn that reads: %v %q", st.Code, st.Msg)
			}
			w = compactedUnseen(t)
			put := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: q.Key, Value: []byte("v")}}}
			if q.Key[0] == 0 {
				return
			}
			if _, st := w.call(w.b, shard.OpTxn, &pb.TxnRequest{Success: []*pb.RequestOp{read, put}}); st != codec.ErrCompacted {
				t.Errorf("Txn that writes: %v %q", st.Code, st.Msg)
			}
		})
	}
}

// unseen is a world in which everything below last is compacted, and b's streams have not shown it.
type unseen struct {
	*script
	b    *proxy
	last int64
}

func compactedUnseen(t *testing.T) *unseen {
	t.Helper()
	s := newScript(t, Config{Seed: 1, Shards: 2, Proxies: 2, Keys: 8, Base: time.Millisecond, RingSize: 1 << 10, MaxTxnOps: 128,
		MaxRequestBytes: defaultMaxRequestBytes, Window: 250 * time.Millisecond, Timeout: 5 * time.Second, SnapshotEvery: 100})
	w := &unseen{script: s, b: s.proxies[1]}
	a := s.proxies[0]
	for i := range 20 {
		rev, st := w.call(a, shard.OpPut, &pb.PutRequest{Key: []byte(keyName(i % s.Keys)), Value: []byte{byte(i)}})
		if st.Code != codec.OK {
			t.Fatal(st)
		}
		w.last = rev
	}
	w.wait("the other proxy's streams", func() bool { return w.b.core.Frontier().Get(watchring.All) >= w.last })
	for i := range s.Shards {
		w.b.host.Link(codec.ClusterID(i)).StreamHole = true
	}
	if _, st := w.call(a, shard.OpCompact, &pb.CompactionRequest{Revision: w.last}); st.Code != codec.OK {
		t.Fatal(st)
	}
	if w.b.core.Frontier().Compacted() > 0 {
		t.Fatal("its streams have shown the compaction")
	}
	return w
}

// TestCompactionRecordOnBusyMembers: a member that has too many requests to take the record of a compaction is asked again. Without it
// the compaction does not hold on other proxies; only one that is out of space goes without. (Seed 7007228 of TestRebuild.)
func TestCompactionRecordOnBusyMembers(t *testing.T) {
	w := newScript(t, Config{Seed: 1, Shards: 3, Proxies: 1, Keys: 8, Base: time.Millisecond, RingSize: 1 << 10, MaxTxnOps: 128,
		MaxRequestBytes: defaultMaxRequestBytes, Window: 250 * time.Millisecond, Timeout: 5 * time.Second, SnapshotEvery: 100})
	p := w.proxies[0]
	for range 10 {
		last := int64(0)
		for i := range w.Keys {
			last = w.put(p, keyName(i))
		}
		w.net.Faults = Faults{Refused: 0.5}
		st := codec.ErrTooManyRequests // the first member's, whose record decides
		for st == codec.ErrTooManyRequests {
			_, st = w.call(p, shard.OpCompact, &pb.CompactionRequest{Revision: last})
		}
		if st.Code != codec.OK {
			t.Fatal(st)
		}
		w.net.Faults = Faults{}
		for _, c := range w.net.Members {
			r := c.at([]byte(shard.KeyCompact), c.Rev())
			if r == nil {
				t.Fatalf("%s has no record of a compaction", c)
			}
			if rev, _ := shard.ParseCompaction(r.KV.Value); rev < last {
				t.Errorf("%s has the record of %d, %d was compacted", c, rev, last)
			}
		}
	}
}
