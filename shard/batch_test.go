package shard

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/revclock"
)

// planOf parses a request for a test.
func planOf(t testing.TB, kind OpKind, m proto.Message) *Plan {
	t.Helper()
	msg, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	p := &Plan{}
	if st := p.Parse(kind, msg, &Limits{MaxTxnOps: 128, MaxRequestBytes: 1536 << 10}); st.Code != codec.OK {
		t.Fatalf("%v: %v", m, st)
	}
	return p
}

// randomWrite makes a put or a delete on few keys, sometimes of a range.
func randomWrite(t testing.TB, rng *rand.Rand) *write {
	key := func() []byte { return []byte(fmt.Sprintf("k%02d", rng.IntN(20))) }
	op := &Op{}
	switch rng.IntN(4) {
	case 0:
		a, b := key(), key()
		if bytes.Compare(a, b) > 0 {
			a, b = b, a
		}
		return &write{op: op, plan: planOf(t, OpDeleteRange, &etcdserverpb.DeleteRangeRequest{Key: a, RangeEnd: append(b, 0)})}
	case 1:
		return &write{op: op, plan: planOf(t, OpTxn, &etcdserverpb.TxnRequest{
			Compare: []*etcdserverpb.Compare{{Key: key(), Target: etcdserverpb.Compare_VERSION, TargetUnion: &etcdserverpb.Compare_Version{Version: 1}}},
			Success: []*etcdserverpb.RequestOp{{Request: &etcdserverpb.RequestOp_RequestPut{RequestPut: &etcdserverpb.PutRequest{Key: key()}}}},
			Failure: []*etcdserverpb.RequestOp{{Request: &etcdserverpb.RequestOp_RequestRange{RequestRange: &etcdserverpb.RangeRequest{Key: key()}}}},
		})}
	}
	return &write{op: op, plan: planOf(t, OpPut, &etcdserverpb.PutRequest{Key: key(), Value: []byte("v")})}
}

func overlapAny(a, b []Interval) bool {
	for _, x := range a {
		for _, y := range b {
			if x.Overlaps(y) {
				return true
			}
		}
	}
	return false
}

// TestFormKeepsOrder checks against the definition: within a batch no request may write or read what an
// earlier one may write, and no request overtakes a waiting one that it conflicts with.
func TestFormKeepsOrder(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 1))
	var f former
	for range 300 {
		var queue []*write
		order := map[*write]int{}
		for i := range 1 + rng.IntN(30) {
			w := randomWrite(t, rng)
			w.alone = rng.IntN(20) == 0
			order[w] = i
			queue = append(queue, w)
		}
		n := len(queue)
		batch, rest := f.form(queue, batchLimits{ops: 128, bytes: 1 << 20}, false, nil, func(*write) { t.Fatalf("seed %d: dropped", seed) })
		if len(batch) == 0 || len(batch)+len(rest) != n {
			t.Fatalf("seed %d: %d in the batch, %d waiting, of %d", seed, len(batch), len(rest), n)
		}
		for i, w := range batch {
			if w.alone && len(batch) > 1 {
				t.Fatalf("seed %d: a request that must go alone has company", seed)
			}
			for _, e := range batch[:i] {
				if order[e] > order[w] {
					t.Fatalf("seed %d: order within the batch changed", seed)
				}
				if overlapAny(e.plan.Writes, w.plan.Writes) || overlapAny(e.plan.Writes, w.plan.Reads) {
					t.Fatalf("seed %d: a request meets an earlier write of its batch", seed)
				}
			}
			for _, e := range rest {
				if order[e] < order[w] && (overlapAny(e.plan.Writes, w.plan.Writes) || overlapAny(e.plan.Writes, w.plan.Reads) || overlapAny(e.plan.Reads, w.plan.Writes)) {
					t.Fatalf("seed %d: a request overtook one that it conflicts with", seed)
				}
			}
		}
		for i := 1; i < len(rest); i++ {
			if order[rest[i-1]] > order[rest[i]] {
				t.Fatalf("seed %d: order of the queue changed", seed)
			}
		}
	}
}

// TestFormBounds checks that a batch stays inside what a member accepts, and that one request always
// goes.
func TestFormBounds(t *testing.T) {
	var f former
	var queue []*write
	for i := range 300 {
		queue = append(queue, &write{op: &Op{}, plan: planOf(t, OpPut, &etcdserverpb.PutRequest{Key: fmt.Appendf(nil, "k%d", i), Value: make([]byte, 1000)})})
	}
	batch, rest := f.form(queue, batchLimits{ops: 128, bytes: 1 << 20}, false, nil, nil)
	if n := len(batch); n < 100 || n+1+batch[0].plan.OpCost() > 128 {
		t.Fatalf("%d requests in a batch of at most 128 operations", n)
	}
	batch, _ = f.form(rest, batchLimits{ops: 1024, bytes: 20_000}, false, nil, nil)
	if n := len(batch); n < 15 || n > 20 {
		t.Fatalf("%d requests of 1000 bytes in a batch of 20000 bytes", n)
	}
	batch, _ = f.form(queue[:1], batchLimits{ops: 1, bytes: 1}, false, nil, nil)
	if len(batch) != 1 {
		t.Fatal("a request that is too large by itself must go, to get the member's error")
	}
}

// TestFormCountsDeletesInTheRecord: deletes stand in a batch twice, by themselves and in its record.
func TestFormCountsDeletesInTheRecord(t *testing.T) {
	const limit = 1 << 20
	var f former
	var queue []*write
	for i := range 100 {
		key := append(bytes.Repeat([]byte("k"), 12<<10), byte(i))
		queue = append(queue, &write{op: &Op{}, plan: planOf(t, OpDeleteRange, &etcdserverpb.DeleteRangeRequest{Key: key})})
	}
	batch, _ := f.form(queue, batchLimits{ops: 1024, bytes: limit}, false, nil, nil)
	rec := &Record{First: 6, Kind: KindBatch}
	for i, w := range batch {
		w.rev, rec.Last = int64(6+i), int64(6+i)
		w.plan.RecordDeletes(func(key, end []byte) {
			rec.Deletes = append(rec.Deletes, RecordDelete{Rev: w.rev, Key: key, End: end})
		})
	}
	if n := len(appendBatch(nil, &batchTxn{record: rec, mapMod: 5, floor: 4}, batch)); n > limit || n < limit*9/10 {
		t.Fatalf("%d bytes in a batch of %d deletes; a member takes %d", n, len(batch), limit)
	}
}

// TestBatchBytes reads a batch back with etcd's own protobuf code.
func TestBatchBytes(t *testing.T) {
	w := &write{op: &Op{}, plan: planOf(t, OpPut, &etcdserverpb.PutRequest{Key: []byte("a"), Value: []byte("v")}), rev: 7}
	w.plan.PutSlots[0].Known = true
	w.plan.PutSlots[0].Guard = true
	rec := &Record{First: 6, Last: 7, Spare: true, Kind: KindBatch, Epoch: revclock.ID{1}, Proxy: revclock.ID{2}, Batch: 3}
	body := appendBatch(nil, &batchTxn{record: rec, mapMod: 5, floor: 4}, []*write{w, nil})
	var txn etcdserverpb.TxnRequest
	if err := proto.Unmarshal(body, &txn); err != nil {
		t.Fatal(err)
	}
	if len(txn.Compare) != 3 || len(txn.Success) != 2 || len(txn.Failure) != 2 {
		t.Fatalf("%d compares, %d and %d operations", len(txn.Compare), len(txn.Success), len(txn.Failure))
	}
	guard := txn.Compare[0]
	if guard.Result != etcdserverpb.Compare_LESS || guard.Target != etcdserverpb.Compare_VALUE || string(guard.Key) != KeyClock ||
		!bytes.Equal(guard.GetValue(), []byte{0, 0, 0, 0, 0, 0, 0, 6}) {
		t.Fatalf("guard: %v", guard)
	}
	if f := txn.Compare[1]; f.Result != etcdserverpb.Compare_GREATER || f.Target != etcdserverpb.Compare_VALUE || string(f.Key) != KeyClock ||
		!bytes.Equal(f.GetValue(), []byte{0, 0, 0, 0, 0, 0, 0, 4}) {
		t.Fatalf("floor: %v", f)
	}
	if m := txn.Compare[2]; m.Target != etcdserverpb.Compare_MOD || string(m.Key) != KeyMap || m.GetModRevision() != 5 {
		t.Fatalf("map: %v", m)
	}
	put := txn.Success[1].GetRequestPut()
	got, ok := ParseRecord(put.GetValue())
	if string(put.GetKey()) != KeyClock || !ok || got.First != 6 || got.Last != 7 || !got.Spare || got.Batch != 3 {
		t.Fatalf("record: %v %v", put, got)
	}
	inner := txn.Success[0].GetRequestTxn()
	if inner == nil || len(inner.Compare) != 1 || inner.Compare[0].Target != etcdserverpb.Compare_CREATE {
		t.Fatalf("request: %v", txn.Success[0])
	}
	st, user, ok := ParseStamp(inner.Success[0].GetRequestPut().GetValue())
	if !ok || st.Rev != 7 || st.Create != 7 || string(user) != "v" {
		t.Fatalf("stamp: %v %q", st, user)
	}
}
