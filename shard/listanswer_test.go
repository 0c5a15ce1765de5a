package shard

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"spindle/codec"
)

// TestListIsTheMergedAnswer compares a List, taken in pieces of any size, with the answer that is put together at once:
// the same bytes, as many as it said before, and no memory is left.
func TestListIsTheMergedAnswer(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 7))
	for round := range 300 {
		shards, total := 1+rng.IntN(5), rng.IntN(60)
		whole := make([][]byte, shards)
		parts := make([]listPart, shards)
		pages := make([][][]byte, shards)
		for i := range pages {
			pages[i] = [][]byte{nil}
		}
		size := int64(0)
		for i := range total {
			rev := 1 + rng.Int64N(1<<40)
			kv := codec.KV{Key: fmt.Appendf(nil, "k%03d", i), CreateRevision: 1 + rng.Int64N(rev), ModRevision: rev, Version: 1 + rng.Int64N(300)}
			if rng.IntN(4) > 0 {
				kv.Value = bytes.Repeat([]byte{byte(i)}, rng.IntN(1+rng.IntN(3000)))
			}
			if rng.IntN(3) == 0 {
				kv.Lease = rng.Int64()
			}
			size += int64(sizeKVField(&kv))
			stored := kv
			stored.Value = append(AppendStamp(nil, kv.ModRevision, kv.CreateRevision), kv.Value...)
			stored.CreateRevision, stored.ModRevision = 3, 4
			s := rng.IntN(shards)
			whole[s] = appendKVField(whole[s], 2, &stored)
			p := &pages[s]
			if rng.IntN(5) == 0 {
				(*p)[len(*p)-1] = codec.AppendInt((*p)[len(*p)-1], 4, 99) // a page's count
				*p = append(*p, nil)
			}
			last := len(*p) - 1
			(*p)[last] = appendKVField((*p)[last], 2, &stored)
		}
		hdr := codec.Header{ClusterID: 1, MemberID: 2, Revision: 77, RaftTerm: 3}
		want := codec.AppendHeaderField(nil, &hdr)
		var m rangeMerge
		want, _ = m.appendRange(want, &rangeSpec{}, whole, nil)
		want = codec.AppendInt(want, 4, int64(total)) // whole has no counts
		for i := range parts {
			for _, p := range pages[i] {
				sum := sumPage(p)
				if page := clientPage(slices.Clone(p), &sum); len(page) > 0 {
					parts[i].pages = append(parts[i].pages, page)
				}
			}
		}
		l := newList(codec.AppendHeaderField(nil, &hdr), parts, size, codec.AppendInt(nil, 4, int64(total)))
		if l.Len() != len(want) {
			t.Fatalf("seed %d, round %d: %d bytes are announced, want %d", seed, round, l.Len(), len(want))
		}
		var got []byte
		for most := 1 + rng.IntN(5000); l.Len() > 0; {
			n, mem := min(l.Len(), 1+rng.IntN(most)), l.Mem()
			before := len(got)
			if got = l.Next(got, n); len(got) != before+n || l.Mem() > mem {
				t.Fatalf("seed %d, round %d: %d bytes for %d, memory %d, then %d", seed, round, len(got)-before, n, mem, l.Mem())
			}
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("seed %d, round %d: another answer", seed, round)
		}
		l.Drop()
		if l.Mem() != 0 {
			t.Errorf("seed %d, round %d: %d bytes are left", seed, round, l.Mem())
		}
	}
}
