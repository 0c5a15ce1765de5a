package shard

import (
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/revclock"
)

// show lets the shard's stream bring a batch, as group does.
func (r *roadTransport) show(first, last int64, what map[int64]string) {
	events := r.batch(0, first, last, what)
	var raw [][]byte
	for _, e := range events {
		raw = append(raw, mustMarshal(r.t, e))
	}
	rec, ok := ParseRecord(events[len(events)-1].Kv.Value)
	if !ok || !r.c.shards[0].publish(&rec, raw) {
		r.t.Fatal("not published")
	}
}

// get submits a Get; now is told as n and a. It returns the answer, nil if a member was asked.
func (r *roadTransport) get(key string, n, a int64) *etcdserverpb.RangeResponse {
	c := r.c
	var got *etcdserverpb.RangeResponse
	msg := mustMarshal(r.t, &etcdserverpb.RangeRequest{Key: []byte(key), Limit: 1})
	c.Submit(&Op{Kind: OpRange, Msg: msg, Done: func(op *Op) {
		if op.Status != (codec.Status{}) {
			r.t.Errorf("%q ends: %v", key, op.Status)
		}
		got = &etcdserverpb.RangeResponse{}
		if err := proto.Unmarshal(op.Resp, got); err != nil {
			r.t.Error(err)
		}
	}})
	r.now1(n, a)
	return got
}

// now1 answers those who wait for a now.
func (r *roadTransport) now1(n, a int64) {
	c := r.c
	c.recentTurn = nil
	q := c.nowQueue
	c.nowQueue = nil
	for _, e := range q {
		e.w.nowDone(n, []int64{a})
	}
}

// A Get whose key was changed a moment ago asks no member: what the stream has shown is exact up to its record.
func TestRecentGetAsksNoMember(t *testing.T) {
	r := newRoads(t)
	s := r.c.shards[0]
	r.show(2, 4, map[int64]string{2: "a", 3: "b", 4: "c"})
	r.show(5, 6, map[int64]string{5: "-b", 6: "c"})
	for _, x := range []struct {
		key    string
		n, a   int64
		mod, h int64 // mod 0: no such key
	}{
		{"a", 9, 6, 2, 9}, // the record covers all that the shard got; other shards are further
		{"b", 9, 6, 0, 9},
		{"c", 4, 4, 6, 6}, // the stream was faster than now
	} {
		got := r.get(x.key, x.n, x.a)
		if got == nil {
			t.Fatalf("%q: a member is asked", x.key)
		}
		if got.Header.Revision != x.h || len(got.Kvs) != int(got.Count) || x.mod > 0 != (got.Count == 1) {
			t.Errorf("%q: %v", x.key, got)
		}
		if got.Count == 1 && (got.Kvs[0].ModRevision != x.mod || string(got.Kvs[0].Value) != "value" || string(got.Kvs[0].Key) != x.key) {
			t.Errorf("%q: %v", x.key, got)
		}
	}
	if len(s.reads) != 0 {
		t.Fatalf("%d reads wait for a member", len(s.reads))
	}
	// A key that was not seen, and one that an open range may write, are the member's.
	if got := r.get("d", 9, 6); got != nil || len(s.reads) != 1 {
		t.Errorf("an unknown key: %v, %d reads", got, len(s.reads))
	}
	var tick revclock.Tick
	tick.Nonce, tick.Items = 1, []revclock.TickItem{{Shard: 0, Count: 5, Filter: revclock.FilterAll}}
	if _, err := r.c.clock.Log().Fold(revclock.AppendTick(nil, &tick), 7, 1, 0); err != nil {
		t.Fatal(err)
	}
	if got := r.get("a", 6, 6); got == nil {
		t.Error("what is written behind now hinders a read at now")
	}
	s.rec.last = 1 // of the range 2 to 6 nothing was seen
	if got := r.get("a", 6, 6); got != nil || len(s.reads) != 2 {
		t.Errorf("a range is open that may write the key: %v, %d reads", got, len(s.reads))
	}
}

// A key that has left the ring is the member's.
func TestRecentGetLapped(t *testing.T) {
	r := newRoads(t)
	r.show(2, 2, map[int64]string{2: "a"})
	if r.get("a", 2, 2) == nil {
		t.Fatal("a member is asked")
	}
	r.c.ring.RaiseTail(2)
	if got := r.get("a", 2, 2); got != nil {
		t.Errorf("a revision that is gone: %v", got)
	}
}

// Two keys in one place of the index: the one changed later has it, and neither is taken for the other.
func TestRecentIndexSharesPlaces(t *testing.T) {
	x := newRecentIndex(1)
	keys := []string{"a", "b", "c", "d", "e"}
	for i, k := range keys {
		x.changed([]byte(k), int64(i+1))
	}
	n := 0
	for i, k := range keys {
		if rev, ok := x.last([]byte(k)); ok {
			if n++; rev != int64(i+1) {
				t.Errorf("%q was changed at %d", k, rev)
			}
		}
	}
	if n == 0 || n > len(x.slots) {
		t.Errorf("%d keys in %d places", n, len(x.slots))
	}
}

// TestRecentGetsAllocateNothing holds for all Gets of a turn together: none for each.
func TestRecentGetsAllocateNothing(t *testing.T) {
	r := newRoads(t)
	r.show(2, 2, map[int64]string{2: "a"})
	op := &Op{Kind: OpRange, Msg: mustMarshal(t, &etcdserverpb.RangeRequest{Key: []byte("a")})}
	answered := 0
	op.Done = func(*Op) { answered++ }
	a := []int64{2}
	waiting := make([]nowEntry, 1)
	round := func() {
		r.c.Submit(op)
		r.c.recentTurn = nil
		copy(waiting, r.c.nowQueue)
		r.c.nowQueue = r.c.nowQueue[:0]
		waiting[0].w.nowDone(2, a)
	}
	round()
	if n := testing.AllocsPerRun(100, round); n > 0 || answered < 100 || len(r.txns) > 0 {
		t.Errorf("%v allocations a Get, %d answered, %d members asked", n, answered, len(r.txns))
	}
}
