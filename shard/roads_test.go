package shard

import (
	"math"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// roadTransport notes the Txns that go to a member.
type roadTransport struct {
	*pastRig
	txns []*etcdserverpb.TxnRequest
}

func (r *roadTransport) Call(_ codec.ClusterID, m codec.Method, req []byte, _ time.Duration, _ codec.Completion) {
	q := &etcdserverpb.TxnRequest{}
	if m != codec.MethodTxn || proto.Unmarshal(req, q) != nil {
		r.t.Fatalf("an unexpected call of method %d", m)
	}
	r.txns = append(r.txns, q)
}

func newRoads(t *testing.T) *roadTransport {
	r := &roadTransport{pastRig: newPastRig(t, 1)}
	r.c.tr = r
	r.c.part = NewPartition(&Map{Shards: make([]MapShard, 1), Table: make([]uint16, Slots)})
	return r
}

func (r *roadTransport) submit(q *etcdserverpb.RangeRequest) *Op {
	msg, err := proto.Marshal(q)
	if err != nil {
		r.t.Fatal(err)
	}
	op := &Op{Kind: OpRange, Msg: msg, Done: func(op *Op) { r.t.Errorf("%v ends: %v", q, op.Status) }}
	r.c.Submit(op)
	r.c.startLists() // what the end of the turn does
	return op
}

// A list inside one shard that may be of any size does not stand in the way of its other reads.
func TestListOfOneShardIsPaged(t *testing.T) {
	r := newRoads(t)
	for i, limit := range []int64{0, 0, maxBatchedKeys + 1} {
		r.submit(&etcdserverpb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Limit: limit})
		if n := len(r.c.shards[0].reads); n != 0 || len(r.txns) != i+1 {
			t.Fatalf("limit %d: %d reads wait with the others, %d pages are asked for", limit, n, len(r.txns))
		}
		if l := r.txns[i].Success[0].GetRequestRange().GetLimit(); l <= 0 || l > wholePageKeys {
			t.Errorf("limit %d: a page of %d", limit, l)
		}
	}
	for i, q := range []*etcdserverpb.RangeRequest{
		{Key: []byte("a")}, {Key: []byte("a"), RangeEnd: []byte("z"), Limit: maxBatchedKeys}, {Key: []byte("a"), RangeEnd: []byte("z"), CountOnly: true},
	} {
		r.submit(q)
		if n := len(r.c.shards[0].reads); n != i+1 {
			t.Errorf("%v does not travel with the others", q)
		}
	}
}

// A serializable read at a revision that was seen here does without the coordinator.
func TestSerializableRevisionAsksNobody(t *testing.T) {
	r := newRoads(t)
	for rev := int64(1); rev <= 5; rev++ {
		r.batch(0, rev, rev, map[int64]string{rev: "k"})
	}
	r.submit(&etcdserverpb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Revision: 3, Serializable: true})
	if len(r.txns) != 1 || len(r.c.nowQueue) != 0 {
		t.Fatalf("%d pages, %d wait for the coordinator", len(r.txns), len(r.c.nowQueue))
	}
	if q := r.txns[0].Success[0].GetRequestRange(); q.Revision != 4 {
		t.Errorf("it reads at %d", q.Revision)
	}
	s := &RangeStream{Done: func(s *RangeStream) { t.Errorf("the stream ends: %v", s.Status) }}
	s.Msg, _ = proto.Marshal(&etcdserverpb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Revision: 3, Serializable: true})
	r.c.OpenRange(s)
	if len(r.txns) != 2 || len(r.c.nowQueue) != 0 {
		t.Errorf("a stream: %d pages, %d wait for the coordinator", len(r.txns), len(r.c.nowQueue))
	}
	for _, q := range []*etcdserverpb.RangeRequest{{Revision: 6, Serializable: true}, {Revision: 3}} {
		q.Key = []byte("a")
		n := len(r.c.nowQueue)
		if r.submit(q); len(r.c.nowQueue) != n+1 {
			t.Errorf("%v did not ask", q)
		}
	}
}

func TestShareOfHugeLimit(t *testing.T) {
	c := &Core{cfg: CoreConfig{PageKeys: firstPageKeys}}
	for _, limit := range []int64{math.MaxInt64, math.MaxInt64 - 1, math.MaxInt64 / 2} {
		for n := 1; n <= 3; n++ {
			if share := c.shareOf(limit, n); share < limit/int64(n) || share > limit {
				t.Errorf("limit %d over %d: a share of %d", limit, n, share)
			}
		}
	}
}

// Pages bring values also for a list without them: no room is made for those.
func TestReserveKeysOnly(t *testing.T) {
	for _, keysOnly := range []bool{false, true} {
		r := &pagedRead{spec: rangeSpec{keysOnly: keysOnly}, parts: []pagePart{{total: 1000, perKey: 10000}}}
		r.reserve()
		if large := cap(r.out) > 1<<20; large == keysOnly {
			t.Errorf("keys only %v: room for %d bytes", keysOnly, cap(r.out))
		}
	}
}
