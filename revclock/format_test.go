package revclock

import (
	"bytes"
	"encoding/hex"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// unhex reads the notation of docs/formats.md.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.NewReplacer(" ", "", "\n", "", "\t", "").Replace(s))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var (
	proxyA = ID{0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf}
	epochE = ID{0xe0, 0xe1, 0xe2, 0xe3, 0xe4, 0xe5, 0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xeb, 0xec, 0xed, 0xee, 0xef}
)

// The bytes here stand in docs/formats.md. They must never change: they are in people's clusters.
const (
	goldenTick = `01 a0a1a2a3a4a5a6a7a8a9aaabacadaeaf 07 02
		00 06 e807 10 00000000100000080000040000020000
		02 81 01 00 01 ff`
	goldenSnapshot = `01 b960 00000000000003ed
		eb07 a0a1a2a3a4a5a6a7a8a9aaabacadaeaf e807
		00 00000000000000000000000000000000 00`
	goldenEpoch = `01 e0e1e2e3e4e5e6e7e8e9eaebecedeeef`
)

func goldenTickValue() *Tick {
	f := NewFilter(nil, 1)
	FilterAdd(f, []byte("/registry/pods/default/a"))
	return &Tick{Proxy: proxyA, Nonce: 7, Items: []TickItem{
		{Shard: 0, Count: 3, Committed: 1000, Filter: f},
		{Shard: 2, Count: 64, Turn: true, Filter: FilterAll},
	}}
}

func TestGolden(t *testing.T) {
	tick := goldenTickValue()
	if got := AppendTick(nil, tick); !bytes.Equal(got, unhex(t, goldenTick)) {
		t.Errorf("tick %x", got)
	}
	var back Tick
	if err := back.Parse(unhex(t, goldenTick)); err != nil || !reflect.DeepEqual(&back, tick) {
		t.Errorf("tick %+v %v", back, err)
	}
	snap := &Snapshot{Rev: 12345, N: 1005, Shards: []SnapshotShard{{A: 1003, Holder: proxyA, C: 1000}, {}}}
	if got := AppendSnapshot(nil, snap); !bytes.Equal(got, unhex(t, goldenSnapshot)) {
		t.Errorf("snapshot %x", got)
	}
	var sback Snapshot
	if err := sback.Parse(unhex(t, goldenSnapshot)); err != nil || !reflect.DeepEqual(&sback, snap) {
		t.Errorf("snapshot %+v %v", sback, err)
	}
	if got := AppendEpoch(nil, epochE); !bytes.Equal(got, unhex(t, goldenEpoch)) {
		t.Errorf("epoch %x", got)
	}
	if e, err := ParseEpoch(unhex(t, goldenEpoch)); err != nil || e != epochE {
		t.Errorf("epoch %x %v", e, err)
	}
}

func TestParseRefuses(t *testing.T) {
	tick := unhex(t, goldenTick)
	for name, bad := range map[string][]byte{
		"empty":          {},
		"format":         append([]byte{2}, tick[1:]...),
		"cut":            tick[:len(tick)-1],
		"longer":         append(bytes.Clone(tick), 0),
		"no shard":       AppendTick(nil, &Tick{Nonce: 1}),
		"no nonce":       AppendTick(nil, &Tick{Items: []TickItem{{Count: 1}}}),
		"no count":       AppendTick(nil, &Tick{Nonce: 1, Items: []TickItem{{Count: 0}}}),
		"only a turn":    AppendTick(nil, &Tick{Nonce: 1, Items: []TickItem{{Turn: true, Committed: 1}}}),
		"only a filter":  AppendTick(nil, &Tick{Nonce: 1, Items: []TickItem{{Committed: 1, Filter: []byte{1}}}}),
		"large count":    AppendTick(nil, &Tick{Nonce: 1, Items: []TickItem{{Count: MaxCount + 1}}}),
		"large filter":   AppendTick(nil, &Tick{Nonce: 1, Items: []TickItem{{Count: 1, Filter: make([]byte, MaxFilter+1)}}}),
		"shard twice":    AppendTick(nil, &Tick{Nonce: 1, Items: []TickItem{{Shard: 1, Count: 1}, {Shard: 1, Count: 1}}}),
		"large shard":    AppendTick(nil, &Tick{Nonce: 1, Items: []TickItem{{Shard: maxShards, Count: 1}}}),
		"long uvarint":   append(append([]byte{1}, proxyA[:]...), 0x87, 0x00, 1, 0, 2, 0, 0),
		"lying n":        append(append([]byte{1}, proxyA[:]...), 7, 0xff, 0x07),
		"negative clock": AppendTick(nil, &Tick{Nonce: 1, Items: []TickItem{{Count: 1, Committed: -1}}}),
	} {
		var x Tick
		if x.Parse(bad) == nil {
			t.Errorf("tick %s: taken", name)
		}
	}
	snap := unhex(t, goldenSnapshot)
	for name, bad := range map[string][]byte{
		"empty": {}, "format": append([]byte{0}, snap[1:]...), "cut": snap[:len(snap)-1], "longer": append(bytes.Clone(snap), 0),
		"A above N": AppendSnapshot(nil, &Snapshot{N: 1, Shards: []SnapshotShard{{A: 2}}}),
		"C above A": AppendSnapshot(nil, &Snapshot{N: 3, Shards: []SnapshotShard{{A: 2, C: 3}}}),
		"N":         AppendSnapshot(nil, &Snapshot{N: -1}),
	} {
		var x Snapshot
		if x.Parse(bad) == nil {
			t.Errorf("snapshot %s: taken", name)
		}
	}
	for _, bad := range []string{"", "01", "02" + goldenEpoch[2:], goldenEpoch + "00"} {
		if _, err := ParseEpoch(unhex(t, bad)); err == nil {
			t.Errorf("epoch %s: taken", bad)
		}
	}
}

func randomID(r *rand.Rand) (id ID) {
	for i := range id {
		id[i] = byte(r.Uint32())
	}
	return id
}

func TestRoundTrip(t *testing.T) {
	const seed = 11
	r := rand.New(rand.NewPCG(seed, 0))
	rev := func() int64 { return int64(r.Uint64() >> (1 + r.IntN(63))) }
	var tick Tick // reused
	var snap Snapshot
	for range 3000 {
		in := Tick{Proxy: randomID(r), Nonce: 1 + r.Uint64()>>r.IntN(64)}
		if in.Nonce == 0 {
			in.Nonce = 1
		}
		shard := -1
		for range 1 + r.IntN(5) {
			shard += 1 + r.IntN(3)
			it := TickItem{Shard: shard, Count: 1 + r.IntN(MaxCount), Turn: r.IntN(2) == 0, Committed: rev(), Filter: []byte{}}
			if r.IntN(4) == 0 {
				in.Items = append(in.Items, TickItem{Shard: shard, Committed: 1 + rev()/2, Filter: []byte{}})
				continue
			}
			for range r.IntN(20) {
				it.Filter = append(it.Filter, byte(r.Uint32()))
			}
			in.Items = append(in.Items, it)
		}
		if err := tick.Parse(AppendTick(nil, &in)); err != nil || !reflect.DeepEqual(tick, in) {
			t.Fatalf("seed %d: %v\n%+v\n%+v", seed, err, in, tick)
		}
		s := Snapshot{Rev: rev(), N: rev(), Shards: []SnapshotShard{}}
		for range r.IntN(5) {
			a := r.Int64N(max(s.N, 1))
			s.Shards = append(s.Shards, SnapshotShard{A: a, Holder: randomID(r), C: r.Int64N(a + 1)})
		}
		if snap.Shards == nil {
			snap.Shards = []SnapshotShard{}
		}
		if err := snap.Parse(AppendSnapshot(nil, &s)); err != nil || !reflect.DeepEqual(snap, s) {
			t.Fatalf("seed %d: %v\n%+v\n%+v", seed, err, s, snap)
		}
	}
}

func TestFilter(t *testing.T) {
	const seed = 3
	r := rand.New(rand.NewPCG(seed, 0))
	key := func(i int) []byte {
		return []byte("/registry/pods/default/pod-" + hex.EncodeToString([]byte{byte(i >> 8), byte(i)}))
	}
	for _, n := range []int{1, 2, 8, 9, 100, 1000, MaxFilter, MaxFilter + 1} {
		f := NewFilter([]byte{1, 2, 3}, n)
		for i := range n {
			FilterAdd(f, key(i))
		}
		for i := range n {
			if !FilterMayContain(f, key(i)) {
				t.Fatalf("key %d of %d is not in its filter", i, n)
			}
		}
		wrong := 0
		for range 4000 {
			if FilterMayContain(f, key(10000+r.IntN(50000))) {
				wrong++
			}
		}
		if n <= MaxFilter && wrong > 200 {
			t.Errorf("seed %d: %d of 4000 other keys seem to be in a filter of %d", seed, wrong, n)
		}
	}
	if len(NewFilter(nil, 0)) != 0 || FilterMayContain(nil, key(1)) || FilterMayContainRange(nil) {
		t.Error("a batch that writes nothing")
	}
	FilterAdd(nil, key(1))
	if !FilterMayContain(FilterAll, key(1)) || !FilterMayContainRange(FilterAll) || !FilterMayContainRange(NewFilter(nil, 1)) {
		t.Error("a batch that may write anything")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(unhex(f, goldenTick))
	f.Add(unhex(f, goldenSnapshot))
	f.Add(unhex(f, goldenEpoch))
	f.Fuzz(func(t *testing.T, b []byte) {
		// What is taken is written in the same way: there is one encoding of everything.
		var tick Tick
		if tick.Parse(b) == nil {
			if out := AppendTick(nil, &tick); !bytes.Equal(out, b) {
				t.Fatalf("tick %x became %x", b, out)
			}
			l := NewLog(proxyA, 3)
			l.Fold(b, 5, 1, 0)
		}
		var snap Snapshot
		if snap.Parse(b) == nil {
			if out := AppendSnapshot(nil, &snap); !bytes.Equal(out, b) {
				t.Fatalf("snapshot %x became %x", b, out)
			}
			l := NewLog(proxyA, len(snap.Shards))
			if err := l.Load(b, 1); err != nil || !bytes.Equal(l.AppendSnapshot(nil), b) {
				t.Fatal(err)
			}
		}
		if e, err := ParseEpoch(b); err == nil && !bytes.Equal(AppendEpoch(nil, e), b) {
			t.Fatal("epoch")
		}
		if len(b) > 0 && len(b) <= MaxFilter {
			FilterMayContain(b, b)
		}
	})
}

// FuzzReply feeds what a coordinator might answer: what is read of it is what etcd's own types show.
func FuzzReply(f *testing.F) {
	f.Add([]byte("\x0a\x02\x18\x05\x10\x01\x1a\x04\x22\x02\x10\x01"))
	kv := &mvccpb.KeyValue{Key: []byte(KeyEpoch), Value: unhex(f, goldenEpoch), ModRevision: 3}
	for _, m := range []proto.Message{
		&etcdserverpb.TxnResponse{Header: &etcdserverpb.ResponseHeader{ClusterId: 7, Revision: 5}, Succeeded: true, Responses: []*etcdserverpb.ResponseOp{
			{Response: &etcdserverpb.ResponseOp_ResponseRange{ResponseRange: &etcdserverpb.RangeResponse{Kvs: []*mvccpb.KeyValue{kv}, Count: 1}}},
			{Response: &etcdserverpb.ResponseOp_ResponseTxn{ResponseTxn: &etcdserverpb.TxnResponse{Succeeded: true}}}}},
		&mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: kv, PrevKv: kv},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, ok := parseReply(b, 0)
		var want etcdserverpb.TxnResponse
		// Only what protobuf writes itself is compared: a field of another type than etcd's, or a message
		// twice, is nothing that a coordinator sends.
		if err := proto.Unmarshal(b, &want); err == nil && isWhatProtobufWrites(b, &want) && len(want.Responses) <= len(r.ops) {
			if ok != (want.Header.GetRevision() > 0) {
				t.Fatalf("%x: %v, which is %v", b, ok, &want)
			}
			for i, op := range want.Responses {
				kvs := op.GetResponseRange().GetKvs()
				if r.ops[i].found != (len(kvs) > 0) || r.ops[i].succeeded != op.GetResponseTxn().GetSucceeded() ||
					len(kvs) > 0 && (!bytes.Equal(r.ops[i].kv.Value, kvs[0].Value) || r.ops[i].kv.ModRevision != kvs[0].ModRevision) {
					t.Fatalf("%x: %+v, want %v", b, r.ops[i], op)
				}
			}
			if r.succeeded != want.Succeeded || r.rev != want.Header.GetRevision() || r.cluster != want.Header.GetClusterId() {
				t.Fatalf("%x: %+v, want %v", b, r, &want)
			}
		}
		kv, del, ok := parseEvent(b)
		var ev mvccpb.Event
		if err := proto.Unmarshal(b, &ev); err == nil && isWhatProtobufWrites(b, &ev) && ev.Kv != nil {
			if !ok || del != (ev.Type == mvccpb.Event_DELETE) || !bytes.Equal(kv.Key, ev.Kv.Key) || kv.ModRevision != ev.Kv.ModRevision {
				t.Fatalf("%x: %+v %v %v, want %v", b, kv, del, ok, &ev)
			}
		}
	})
}

func isWhatProtobufWrites(b []byte, m proto.Message) bool {
	if (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, m) != nil {
		return false
	}
	out, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	return err == nil && bytes.Equal(out, b)
}

func TestOverflow(t *testing.T) {
	l := NewLog(proxyA, 1)
	if err := l.Load(AppendSnapshot(nil, &Snapshot{Rev: 1, N: math.MaxInt64, Shards: []SnapshotShard{{}}}), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Fold(AppendTick(nil, &Tick{Nonce: 1, Items: []TickItem{{Count: 1}}}), 2, 0, 0); err != errOverflow {
		t.Fatal(err)
	}
}
