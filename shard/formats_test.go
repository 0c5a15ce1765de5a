package shard

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"spindle/revclock"
)

// goldenBytes reads the notation of docs/formats.md.
func goldenBytes(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.NewReplacer(" ", "", "\n", "", "\t", "").Replace(s))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func goldenID(first byte) (id revclock.ID) {
	for i := range id {
		id[i] = first + byte(i)
	}
	return id
}

// The bytes here stand in docs/formats.md. They must never change: they are in people's clusters.
var (
	goldenStamps = []struct {
		hex  string
		s    Stamp
		user string
	}{
		{"00000000000003e8 00 7631", Stamp{Rev: 1000, Create: 1000}, "v1"},
		{"00000000000003e9 02 7632", Stamp{Rev: 1001, Create: 1000}, "v2"},
		{"0000000000002710 d08c01 ", Stamp{Rev: 10000, Create: 1000}, ""},
		{"0000000000002710 d18c01 02 01 0e 76", Stamp{Rev: 10000, Create: 1000, VersionOffset: 7}, "v"},
		{"0000000000002710 d18c01 03 02 b960 76", Stamp{Rev: 10000, Create: 1000, Lease: 12345}, "v"},
		{"0000000000002710 d18c01 0d 01 0e 02 feffffffffffffffff01 76", Stamp{Rev: 10000, Create: 1000, VersionOffset: 7, Lease: -2}, "v"},
	}
	goldenRecord = `00000000000003eb 01 01 e0e1e2e3e4e5e6e7e8e9eaebecedeeef a0a1a2a3a4a5a6a7a8a9aaabacadaeaf
		2a 07 02
		01 01 61 00
		03 02 6231 02 6239
		00`
	goldenInitial = `0000000000000000 01 02 e0e1e2e3e4e5e6e7e8e9eaebecedeeef 00000000000000000000000000000000 00 00 00 00`
	goldenMap     = `01 e0e1e2e3e4e5e6e7e8e9eaebecedeeef 00000000deadbeef 01 8020
		03
		00 101112131415161718191a1b1c1d1e1f 01 61
		01 202122232425262728292a2b2c2d2e2f 01 62
		02 303132333435363738393a3b3c3d3e3f 01 63
		d60a 00 d50a 01 d50a 02
		00`
	goldenRangeMap = `01 e0e1e2e3e4e5e6e7e8e9eaebecedeeef 00000000deadbeef 02
		02
		00 101112131415161718191a1b1c1d1e1f 01 61
		01 202122232425262728292a2b2c2d2e2f 01 62
		03 00 00 01 68 01 01 70 00
		00`
	goldenIdentity = `01 101112131415161718191a1b1c1d1e1f`
	goldenCompact  = `01 00000000000003e8`
	goldenLoss     = `01 e0e1e2e3e4e5e6e7e8e9eaebecedeeef 00000000000003e8`
	goldenMarker   = `01 878080808080808010 00 03`
)

func goldenRecordValue() *Record {
	return &Record{
		First: 1000, Last: 1003, Spare: true, Kind: KindBatch, Epoch: goldenID(0xe0), Proxy: goldenID(0xa0), Batch: 42,
		Deletes: []RecordDelete{
			{Rev: 1001, Key: []byte("a"), End: []byte{}}, {Rev: 1003, Key: []byte("b1"), End: []byte("b9")},
		},
	}
}

func goldenMapValue() *Map {
	return NewMap(goldenID(0xe0), 0xdeadbeef, []MapShard{{goldenID(0x10), "a"}, {goldenID(0x20), "b"}, {goldenID(0x30), "c"}})
}

func TestGoldenFormats(t *testing.T) {
	check := func(what string, got []byte, want string) {
		t.Helper()
		if w := goldenBytes(t, want); !bytes.Equal(got, w) {
			t.Errorf("%s is\n%x, want\n%x", what, got, w)
		}
	}
	for _, g := range goldenStamps {
		check("stamp", append(g.s.Append(nil), g.user...), g.hex)
		if s, user, ok := ParseStamp(goldenBytes(t, g.hex)); !ok || s != g.s || string(user) != g.user {
			t.Errorf("stamp %s: %+v %q %v", g.hex, s, user, ok)
		}
	}
	check("record", AppendRecord(nil, goldenRecordValue()), goldenRecord)
	if r, ok := ParseRecord(goldenBytes(t, goldenRecord)); !ok || !reflect.DeepEqual(&r, goldenRecordValue()) {
		t.Errorf("record %+v %v", r, ok)
	}
	check("first record", AppendInitialRecord(nil, goldenID(0xe0)), goldenInitial)
	if r, ok := ParseRecord(goldenBytes(t, goldenInitial)); !ok || r.Last != 0 || r.First != 0 || r.Kind != KindFence {
		t.Errorf("first record %+v %v", r, ok)
	}
	check("map", AppendMap(nil, goldenMapValue()), goldenMap)
	if m, err := ParseMap(goldenBytes(t, goldenMap)); err != nil || !m.Equal(goldenMapValue()) {
		t.Errorf("map %+v %v", m, err)
	}
	ranges := &Map{Epoch: goldenID(0xe0), Coordinator: 0xdeadbeef, Kind: PartitionRange, Shards: goldenMapValue().Shards[:2],
		Splits: []MapSplit{{nil, 0}, {[]byte("h"), 1}, {[]byte("p"), 0}}}
	check("range map", AppendMap(nil, ranges), goldenRangeMap)
	if m, err := ParseMap(goldenBytes(t, goldenRangeMap)); err != nil || !m.Equal(ranges) {
		t.Errorf("range map %+v %v", m, err)
	}
	check("identity", AppendIdentity(nil, goldenID(0x10)), goldenIdentity)
	if id, ok := ParseIdentity(goldenBytes(t, goldenIdentity)); !ok || id != goldenID(0x10) {
		t.Errorf("identity %x %v", id, ok)
	}
	check("compaction", AppendCompaction(nil, 1000), goldenCompact)
	if rev, ok := ParseCompaction(goldenBytes(t, goldenCompact)); !ok || rev != 1000 {
		t.Errorf("compaction %d %v", rev, ok)
	}
	loss := LossMark{goldenID(0xe0), 1000}
	check("mark of a loss", AppendLossMark(nil, loss), goldenLoss)
	if m, ok := ParseLossMark(goldenBytes(t, goldenLoss)); !ok || m != loss {
		t.Errorf("mark of a loss %+v %v", m, ok)
	}
	marker := LeaseMarker{Member: 0x1000000000000007, Shards: []int{0, 3}}
	check("marker", AppendLeaseMarker(nil, &marker), goldenMarker)
	var m LeaseMarker
	if !ParseLeaseMarker(&m, goldenBytes(t, goldenMarker)) || !reflect.DeepEqual(m, marker) {
		t.Errorf("marker %+v", m)
	}
	if k := AppendLeaseKey(nil, 0x7587); string(k) != "\x00lease/0000000000007587" {
		t.Errorf("lease key %q", k)
	}
	for _, k := range []string{KeyClock, KeyMap, KeyID, KeyCompact, KeyLoss, KeyLeases, KeyLeaseEnd} {
		if k[0] != 0 || k >= KeyUserFirst {
			t.Errorf("%q is not reserved", k)
		}
	}
	if KeyLeaseEnd <= KeyLeases+strings.Repeat("f", 17) {
		t.Error("lease markers end too early")
	}
}

func TestFormatsRefuse(t *testing.T) {
	for _, s := range []string{
		"", "00000000000003e8", // no age
		"0000000000000000 00",                // revision 0
		"80000000000003e8 00",                // negative
		"0000000000000005 0a",                // created at 0
		"00000000000003e8 8000",              // not minimal
		"00000000000003e8 01",                // extension announced
		"00000000000003e8 01 00",             // and empty
		"00000000000003e8 01 02 03 0e 76",    // unknown tag
		"00000000000003e8 01 02 01 00",       // offset 0
		"00000000000003e8 01 02 02 00",       // lease 0
		"00000000000003e8 01 04 02 0e 01 0e", // not ascending
		"00000000000003e8 01 04 01 0e 01 0e", // twice
		"00000000000003e8 01 05 01 0e 76",    // lying length
		"00000000000003e8 01 03 01 0e 76",    // more than the tag
	} {
		if _, _, ok := ParseStamp(goldenBytes(t, s)); ok {
			t.Errorf("stamp %s was taken", s)
		}
	}
	rec := goldenBytes(t, goldenRecord)
	change := func(i int, b byte) []byte {
		v := bytes.Clone(rec)
		v[i] = b
		return v
	}
	for name, v := range map[string][]byte{
		"cut": rec[:len(rec)-1], "longer": append(bytes.Clone(rec), 0), "format": change(8, 2), "kind 0": change(9, 0),
		"kind 4": change(9, 4), "negative": change(0, 0x80), "too wide": change(44, 0x7f), "extension": change(len(rec)-1, 1),
		"many deletes": change(44, 0x40), "delete above last": change(45, 4), "first 0": AppendRecord(nil, &Record{Last: 5, Kind: KindBatch}),
	} {
		if name == "too wide" {
			v = AppendRecord(nil, &Record{First: -1, Last: 5, Kind: KindBatch})
		}
		if r, ok := ParseRecord(v); ok {
			t.Errorf("record %s was taken: %+v", name, r)
		}
	}
	m := goldenBytes(t, goldenMap)
	for name, change := range map[string]func(m *Map){
		"no shard":       func(m *Map) { m.Shards = nil },
		"identity twice": func(m *Map) { m.Shards[1].Identity = m.Shards[0].Identity },
		"no identity":    func(m *Map) { m.Shards[1].Identity = revclock.ID{} },
		"long name":      func(m *Map) { m.Shards[1].Name = strings.Repeat("x", MaxShardName+1) },
		"unknown shard":  func(m *Map) { m.Table[7] = 3 },
		"few slots":      func(m *Map) { m.Table = m.Table[1:] },
		"partitioner":    func(m *Map) { m.Kind = 3 },
		"splits":         func(m *Map) { m.Kind, m.Table = PartitionRange, nil },
		"splits order": func(m *Map) {
			m.Kind, m.Table, m.Splits = PartitionRange, nil, []MapSplit{{nil, 0}, {[]byte("b"), 0}, {[]byte("b"), 1}}
		},
		"splits shard": func(m *Map) { m.Kind, m.Table, m.Splits = PartitionRange, nil, []MapSplit{{nil, 3}} },
	} {
		bad := goldenMapValue()
		change(bad)
		if bad.Validate() == nil {
			t.Errorf("map with %s is valid", name)
		}
		if _, err := ParseMap(AppendMap(nil, bad)); err == nil {
			t.Errorf("map with %s was read", name)
		}
	}
	if _, err := ParseMap(append([]byte{9}, m[1:]...)); err == nil || !strings.Contains(err.Error(), "format 9") {
		t.Error(err)
	}
	for i := range m {
		if _, err := ParseMap(m[:i]); err == nil {
			t.Errorf("%d bytes of a map were read", i)
		}
	}
	var lm LeaseMarker
	for _, s := range []string{"", "02 07", "01", "01 07 03 03", "01 07 8008", "01 07 80"} {
		if ParseLeaseMarker(&lm, goldenBytes(t, s)) {
			t.Errorf("marker %s was taken", s)
		}
	}
	for _, k := range []string{"", "\x00lease/", "\x00lease/000000000000758", "\x00lease/000000000000758X", "\x00lease/00000000000075870"} {
		if _, ok := ParseLeaseKey([]byte(k)); ok {
			t.Errorf("lease key %q was taken", k)
		}
	}
}

func TestFormatsRoundTrip(t *testing.T) {
	const seed = 5
	r := rand.New(rand.NewPCG(seed, 0))
	rev := func() int64 { return 1 + int64(r.Uint64()>>(1+r.IntN(63)))%(math.MaxInt64-1) }
	text := func(n int) []byte {
		b := make([]byte, r.IntN(n))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	var rec Record
	for range 3000 {
		s := Stamp{Rev: 1 + rev()%maxStampRev}
		s.Create = 1 + r.Int64N(s.Rev)
		if r.IntN(2) == 0 {
			s.VersionOffset = int64(r.Uint64()) >> r.IntN(63)
		}
		if r.IntN(2) == 0 {
			s.Lease = int64(r.Uint64())
		}
		user := text(50)
		v := append(s.Append([]byte("x")), user...)[1:]
		if len(v)-len(user) > MaxStamp {
			t.Fatalf("seed %d: a stamp of %d bytes", seed, len(v)-len(user))
		}
		if got, u, ok := ParseStamp(v); !ok || got != s || !bytes.Equal(u, user) {
			t.Fatalf("seed %d: %+v became %+v", seed, s, got)
		}
		// As a shard compares: the value is above be64(X) from Rev == X on, below be64(X+1) up to there.
		if b := AppendRevBound(nil, uint64(s.Rev)); bytes.Compare(v, b) <= 0 {
			t.Fatal("not above its own bound")
		}
		if b := AppendRevBound(nil, uint64(s.Rev)+1); bytes.Compare(v, b) >= 0 {
			t.Fatal("not below the next bound")
		}

		in := Record{Last: rev(), Kind: RecordKind(1 + r.IntN(3)), Spare: r.IntN(2) == 0, Batch: r.Uint64() >> r.IntN(64), Deletes: []RecordDelete{}}
		in.First = max(1, in.Last-int64(r.IntN(1000)))
		for range r.IntN(4) {
			in.Deletes = append(in.Deletes, RecordDelete{
				Rev: in.First + r.Int64N(in.Last-in.First+1), Key: append([]byte("k"), text(40)...), End: text(4),
			})
		}
		rec.hint = 99
		if rec.Deletes == nil {
			rec.Deletes = []RecordDelete{}
		}
		v = AppendRecord(nil, &in)
		if !rec.Parse(v) || !reflect.DeepEqual(rec, in) {
			t.Fatalf("seed %d:\n%+v became\n%+v", seed, in, rec)
		}
		if last, ok := RecordLast(v); !ok || last != in.Last {
			t.Fatal(last, ok)
		}
		if bytes.Compare(v, AppendRevBound(nil, uint64(in.Last)+1)) >= 0 || bytes.Compare(v, AppendRevBound(nil, uint64(in.Last))) <= 0 {
			t.Fatal("the guard does not hold")
		}
		if l := int64(r.Uint64()); true {
			if got, ok := ParseLeaseKey(AppendLeaseKey(nil, l)); !ok || got != l {
				t.Fatal(l, got)
			}
		}
	}
}

func TestRevOfDelete(t *testing.T) {
	r := Record{Deletes: []RecordDelete{
		{Rev: 10, Key: []byte("a")}, {Rev: 11, Key: []byte("b"), End: []byte("d")}, {Rev: 12, Key: []byte("x"), End: []byte{0}},
		{Rev: 13, Key: []byte("e")},
	}}
	for _, order := range [][]string{{"a", "b", "c", "e", "x", "zz"}, {"zz", "e", "c", "b", "a", "x"}} {
		for _, k := range order {
			want := map[string]int64{"a": 10, "b": 11, "c": 11, "e": 13, "x": 12, "zz": 12}[k]
			if rev, ok := r.RevOfDelete([]byte(k)); !ok || rev != want {
				t.Errorf("%s belongs to %d", k, rev)
			}
			for _, no := range []string{"", "A", "a1", "d", "f"} {
				if rev, ok := r.RevOfDelete([]byte(no)); ok {
					t.Errorf("%q belongs to %d", no, rev)
				}
			}
		}
	}
	if _, ok := new(Record).RevOfDelete([]byte("a")); ok {
		t.Error("an empty record")
	}
}

func TestNewMapIsEven(t *testing.T) {
	for _, n := range []int{1, 2, 3, 5, 7, 16, 100, MaxShards} {
		var shards []MapShard
		for i := range n {
			shards = append(shards, MapShard{revclock.ID{1, byte(i >> 8), byte(i)}, fmt.Sprint("m", i)})
		}
		m := NewMap(revclock.ID{1}, 1, shards)
		count := make([]int, n)
		for _, i := range m.Table {
			count[i]++
		}
		for i, c := range count {
			if c < Slots/n || c > Slots/n+1 {
				t.Errorf("shard %d of %d has %d slots", i, n, c)
			}
		}
		if back, err := ParseMap(AppendMap(nil, m)); err != nil || !back.Equal(m) {
			t.Errorf("%d shards: %v", n, err)
		}
	}
}

func FuzzStoredFormats(f *testing.F) {
	for _, g := range goldenStamps {
		f.Add(goldenBytes(f, g.hex))
	}
	for _, g := range []string{goldenRecord, goldenInitial, goldenMap, goldenRangeMap, goldenIdentity, goldenCompact, goldenMarker} {
		f.Add(goldenBytes(f, g))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		// What is taken is written in the same way: there is one encoding of everything.
		same := func(what string, out []byte) {
			if !bytes.Equal(out, b) {
				t.Fatalf("%s %x became %x", what, b, out)
			}
		}
		if s, user, ok := ParseStamp(b); ok {
			same("stamp", append(s.Append(nil), user...))
		}
		if r, ok := ParseRecord(b); ok {
			same("record", AppendRecord(nil, &r))
			r.RevOfDelete(b)
			if last, ok := RecordLast(b); !ok || last != r.Last {
				t.Fatal("last")
			}
		}
		if m, err := ParseMap(b); err == nil {
			same("map", AppendMap(nil, m))
			p := NewPartition(m)
			p.ShardOf(b)
			p.AppendShards(nil, b[:len(b)/2], b[len(b)/2:])
		}
		if id, ok := ParseIdentity(b); ok {
			same("identity", AppendIdentity(nil, id))
		}
		if rev, ok := ParseCompaction(b); ok {
			same("compaction", AppendCompaction(nil, rev))
		}
		if m, ok := ParseLossMark(b); ok {
			same("mark of a loss", AppendLossMark(nil, m))
		}
		var m LeaseMarker
		if ParseLeaseMarker(&m, b) {
			same("marker", AppendLeaseMarker(nil, &m))
		}
		if l, ok := ParseLeaseKey(b); ok {
			same("lease key", AppendLeaseKey(nil, l))
		}
	})
}
