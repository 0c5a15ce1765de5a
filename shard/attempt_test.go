package shard

import (
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// One attempt that was not enough doubles the time of the next ones, once for all that were under way; after a while
// the shard is not known to be slow any more.
func TestPatience(t *testing.T) {
	const limit = 5 * time.Second
	var p patience
	now := int64(1000 * time.Second)
	want := func(d time.Duration) {
		t.Helper()
		if got := p.get(now, limit); got != d {
			t.Fatalf("%v, expected %v", got, d)
		}
	}
	want(firstPatience)
	for range 3 { // begun together, they end together
		p.ranOut(now, limit)
	}
	want(2 * firstPatience)
	now += int64(firstPatience) - 1 // this one began before, just now
	p.ranOut(now, limit)
	want(2 * firstPatience)
	now += int64(firstPatience) + 1
	p.ranOut(now, limit)
	want(4 * firstPatience)
	now += int64(4 * firstPatience)
	p.ranOut(now, limit)
	want(limit)
	p.ranOut(now+int64(limit), limit)
	now += int64(limit)
	want(limit)
	now += int64(patienceLasts) + 1
	want(firstPatience)
	if got := (&patience{}).get(now, 300*time.Millisecond); got != 300*time.Millisecond {
		t.Errorf("%v, more than the shard timeout", got)
	}
}

// spanTransport notes how long each call may take. None of them is answered in time.
type spanTransport struct {
	codec.Transport
	spans []time.Duration
	mute  bool
}

func (t *spanTransport) Call(_ codec.ClusterID, _ codec.Method, _ []byte, timeout time.Duration, done codec.Completion) {
	t.spans = append(t.spans, timeout)
	st := statusDeadline
	if t.mute {
		st = statusMute
	}
	done.Complete(nil, st, true)
}

// A node that says nothing while others do makes no attempt longer: the next one to fail would cost the more.
func TestMuteNodeIsNoSlowShard(t *testing.T) {
	tr := &spanTransport{mute: true}
	s := &shardState{c: &Core{tr: tr, cfg: CoreConfig{ShardTimeout: 5 * time.Second, Now: func() int64 { return int64(time.Hour) }}}}
	done := completion(func([]byte, codec.Status, bool) {})
	for range 3 {
		s.call(codec.MethodTxn, nil, done)
		s.callLarge(codec.MethodRange, nil, 0, done)
	}
	for i, d := range tr.spans {
		if d != firstPatience {
			t.Errorf("attempt %d has %v", i, d)
		}
	}
}

// A page that takes long on a busy member says nothing about batches. No attempt but one at a large read that is known to take
// long takes the time of a second one.
func TestPatienceOfLargeReads(t *testing.T) {
	tr := &spanTransport{}
	now := int64(1000 * time.Second)
	s := &shardState{c: &Core{tr: tr, cfg: CoreConfig{ShardTimeout: 5 * time.Second, Now: func() int64 { return now }}}}
	done := completion(func([]byte, codec.Status, bool) {})
	for i, want := range []time.Duration{firstPatience, 2 * firstPatience, 4 * firstPatience, 5 * time.Second, 5 * time.Second} {
		if s.callLarge(codec.MethodRange, nil, 0, done); tr.spans[i] != want {
			t.Errorf("large attempt %d: %v, expected %v", i, tr.spans[i], want)
		}
		now += int64(3 * time.Second)
	}
	// What is known to be large has the time that it takes a busy member, before any attempt has failed.
	tr.spans = nil
	now += int64(time.Minute)
	s.callLarge(codec.MethodRange, nil, 2*largeRate, done)
	now += int64(time.Minute)
	s.callLarge(codec.MethodRange, nil, 1<<62, done)
	if tr.spans[0] != firstPatience+2*time.Second || tr.spans[1] != 5*time.Second {
		t.Errorf("large answers have %v", tr.spans)
	}
	tr.spans = nil
	for i, want := range []time.Duration{firstPatience, 2 * firstPatience, 2500 * time.Millisecond, 2500 * time.Millisecond} {
		if s.call(codec.MethodTxn, nil, done); tr.spans[i] != want {
			t.Errorf("attempt %d: %v, expected %v", i, tr.spans[i], want)
		}
		now += int64(3 * time.Second)
	}
}

// What may have a large answer has the patience of pages: a second look of a read, and what a lost reply was.
func TestPatienceByWhatIsRead(t *testing.T) {
	for _, c := range []struct {
		req  proto.Message
		kind OpKind
		much bool
	}{
		{&pb.RangeRequest{Key: []byte("a")}, OpRange, false},
		{&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("b"), Limit: maxBatchedKeys}, OpRange, false},
		{&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("b"), CountOnly: true}, OpRange, false},
		{&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("b")}, OpRange, true},
		{&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("b"), Limit: 3, SortOrder: pb.RangeRequest_DESCEND, SortTarget: pb.RangeRequest_VALUE}, OpRange, true},
		{&pb.PutRequest{Key: []byte("a")}, OpPut, false},
		{&pb.DeleteRangeRequest{Key: []byte("a"), RangeEnd: []byte("b")}, OpDeleteRange, true},
		{&pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("b")}}}}}, OpTxn, true},
	} {
		tr := &spanTransport{}
		s := &shardState{c: &Core{state: stateFailed, tr: tr, cfg: CoreConfig{ShardTimeout: 5 * time.Second, Now: func() int64 { return int64(time.Hour) }}}}
		s.largePatience = patience{4 * time.Second, int64(time.Hour)}
		want := firstPatience
		if c.much {
			want = 4 * time.Second
		}
		op := &Op{Kind: c.kind, Done: func(*Op) {}}
		if st := op.core.plan.Parse(c.kind, mustMarshal(t, c.req), nil); st.Code != codec.OK {
			t.Fatal(st)
		}
		if c.kind == OpRange {
			s.readAt(&readBatch{s: s, items: []readItem{{op: op}}}, 7)
		} else {
			(&recovery{b: &batch{s: s}, w: &write{op: op, plan: &op.core.plan}}).send()
		}
		if len(tr.spans) != 1 || tr.spans[0] != want {
			t.Errorf("%v: %v, expected %v", c.req, tr.spans, want)
		}
	}
}
