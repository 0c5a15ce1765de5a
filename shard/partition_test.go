package shard

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestHashPartition(t *testing.T) {
	p := NewPartition(goldenMapValue())
	count := make([]int, 3)
	for i := range 30000 {
		k := fmt.Appendf(nil, "/registry/pods/default/pod-%d", i)
		s := p.ShardOf(k)
		count[s]++
		if one, all := p.ShardsOf(k, nil); one != s || all {
			t.Fatal(one, all)
		}
		if one, all := p.ShardsOf(k, append(bytes.Clone(k), 0)); one != s || all {
			t.Fatal("a key and its successor are one key")
		}
	}
	for _, c := range count {
		if c < 9500 || c > 10500 {
			t.Errorf("keys are spread %v", count)
		}
	}
	// Where a key lies must never change: these come from another implementation of xxHash64.
	for k, slot := range map[string]int{"": 0x999, "/registry/pods/default/a": 0x2e9} {
		if got := Slot([]byte(k)); got != slot {
			t.Errorf("slot of %q is %#x", k, got)
		}
	}
	for _, c := range []struct {
		key, end string
		all      bool
	}{
		{"a", "b", true}, {"a", "\x00", true}, {"\x00", "\x00", true}, {"a", "a\x00\x00", true}, {"a", "a", false}, {"b", "a", false}, {"a", "a\x00", false},
	} {
		_, all := p.ShardsOf([]byte(c.key), []byte(c.end))
		list := p.AppendShards([]int{9}, []byte(c.key), []byte(c.end))
		if all != c.all || all && !slices.Equal(list, []int{9, 0, 1, 2}) || !all && len(list) != 2 {
			t.Errorf("[%q,%q): %v %v", c.key, c.end, all, list)
		}
	}
	single := NewPartition(NewMap(goldenID(1), 1, []MapShard{{goldenID(2), "a"}}))
	if one, all := single.ShardsOf([]byte("a"), []byte{0}); one != 0 || all {
		t.Error("one shard has all")
	}
}

func TestRangePartition(t *testing.T) {
	const seed = 9
	r := rand.New(rand.NewPCG(seed, 0))
	m := &Map{Kind: PartitionRange, Shards: goldenMapValue().Shards,
		Splits: []MapSplit{{nil, 2}, {[]byte("c"), 0}, {[]byte("cc"), 0}, {[]byte("f"), 1}, {[]byte("h"), 2}}}
	if err := m.Validate(); err != nil {
		t.Fatal(err)
	}
	p := NewPartition(m)
	for k, want := range map[string]int{"\x01": 2, "b\xff": 2, "c": 0, "c\x00": 0, "ccc": 0, "f": 1, "g": 1, "h": 2, "z": 2} {
		if got := p.ShardOf([]byte(k)); got != want {
			t.Errorf("%q lies on %d", k, got)
		}
	}
	var keys [][]byte
	for a := byte('a'); a <= 'j'; a++ {
		keys = append(keys, []byte{a}, []byte{a, 0}, []byte{a, a}, []byte{a, a, 'x'})
	}
	for range 5000 {
		key, end := keys[r.IntN(len(keys))], keys[r.IntN(len(keys))]
		if r.IntN(10) == 0 {
			end = []byte{0}
		}
		got := p.AppendShards(nil, key, end)
		one, all := p.ShardsOf(key, end)
		if all != (len(got) > 1) || !all && got[0] != one || !slices.IsSorted(got) {
			t.Fatalf("seed %d: [%q,%q): %v, %d %v", seed, key, end, got, one, all)
		}
		for _, k := range keys {
			in := bytes.Compare(k, key) >= 0 && (infinite(end) || bytes.Compare(k, end) < 0)
			if in && !slices.Contains(got, p.ShardOf(k)) {
				t.Fatalf("seed %d: [%q,%q) lies on %v, %q on %d", seed, key, end, got, k, p.ShardOf(k))
			}
		}
	}
	if got := p.AppendShards(nil, []byte("c"), []byte("f")); !slices.Equal(got, []int{0}) {
		t.Error(got)
	}
	if got := p.AppendShards(nil, []byte("b"), []byte("d")); !slices.Equal(got, []int{0, 2}) {
		t.Error(got)
	}
}

// Every shard is home of its part of the leases, with ranges too; the numbers may never change.
func TestHomeOf(t *testing.T) {
	shards := []MapShard{{goldenID(0x10), "a"}, {goldenID(0x20), "b"}, {goldenID(0x30), "c"}}
	hash := NewPartition(NewMap(goldenID(1), 1, shards))
	ranges := NewPartition(&Map{Epoch: goldenID(1), Coordinator: 1, Kind: PartitionRange, Shards: shards,
		Splits: []MapSplit{{nil, 0}, {[]byte("h"), 1}, {[]byte("p"), 2}}})
	var n [3]int
	for id := int64(-3000); id < 3000; id++ {
		h := hash.HomeOf(id)
		n[h]++
		if r := ranges.HomeOf(id); r != h { // the first map deals out slots as ranges do
			t.Fatalf("home of %d is %d, with ranges %d", id, h, r)
		}
	}
	for i, n := range n {
		if n < 1800 || n > 2200 {
			t.Errorf("shard %d is home of %d leases of 6000", i, n)
		}
	}
	if a, b, c := hash.HomeOf(1), hash.HomeOf(-1), hash.HomeOf(aliasBit|7); [3]int{a, b, c} != [3]int{1, 1, 0} {
		t.Errorf("homes %d %d %d", a, b, c)
	}
}
