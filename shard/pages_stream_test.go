package shard

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"spindle/codec"
)

// TestStreamOfRewrittenPages: what a stream emits does not depend on which of its pages were rewritten as they came, nor does what it
// counts.
func TestStreamOfRewrittenPages(t *testing.T) {
	seed := rand.Uint64()
	for round := range 100 {
		seed := seed + uint64(round)
		want, wantKeys := streamOfPages(t, seed, 0)
		for _, some := range []int{1, 2} {
			got, keys := streamOfPages(t, seed, some)
			if !bytes.Equal(got, want) {
				t.Fatalf("seed %d, %d: %d bytes, want %d", seed, some, len(got), len(want))
			}
			if keys != wantKeys {
				t.Fatalf("seed %d, %d: %d keys, want %d", seed, some, keys, wantKeys)
			}
		}
	}
}

// streamOfPages runs a stream over two shards of two pages each; some: 0 none of the pages is rewritten, 1 about a half, 2 all.
// It returns the fields that the chunks have together, and the number of keys among them.
func streamOfPages(t *testing.T, seed uint64, some int) (all []byte, keys int) {
	t.Helper()
	rng, choice := rand.New(rand.NewPCG(seed, 14)), rand.New(rand.NewPCG(seed, 15))
	tr := new(rewriteTransport)
	c := &Core{cfg: CoreConfig{PageKeys: firstPageKeys, ChunkBytes: 3000, ShardTimeout: time.Second, Now: func() int64 { return 1 }}, tr: tr}
	done := false
	st := &RangeStream{wanted: true, Done: func(s *RangeStream) {
		if done = true; s.Status.Code != codec.OK {
			t.Fatalf("seed %d: %v", seed, s.Status)
		}
	}}
	st.Chunk = func(_ *RangeStream, chunk []byte) {
		it := codec.Fields{Msg: chunk}
		for it.Next() {
			all = append(all, it.Field.Bytes...)
		}
		st.wanted = true
	}
	st.c, c.rangeStreams = c, 1
	r := &pagedRead{c: c, op: &st.op, stream: st, latest: true, fixed: true, h: 9, parts: make([]pagePart, 2)}
	st.read = r
	var pages [2][2][]byte
	for i := range r.parts {
		total := int64(0)
		for j := range pages[i] {
			n := 1 + rng.IntN(40)
			page, _ := streamPage(rng, i, j, n, j == 0)
			pages[i][j] = page
			total += int64(n)
		}
		r.parts[i] = pagePart{r: r, s: &shardState{c: c}, local: 5, located: true, counted: true, more: true, limit: 1, perKey: 1, total: total}
	}
	for i := range r.parts {
		r.parts[i].fetch()
	}
	for next := [2]int{}; len(tr.calls) > 0; {
		k := choice.IntN(len(tr.calls))
		call := tr.calls[k]
		tr.calls = append(tr.calls[:k], tr.calls[k+1:]...)
		i := 0
		if call.(*attempt).done.(*pageCall).p == &r.parts[1] {
			i = 1
		}
		page := pages[i][next[i]]
		next[i]++
		if some == 2 || some == 1 && choice.IntN(2) == 0 {
			page = rewriteAll(choice, call.(codec.Receiving).Rewriter().(*pageRewriter), page)
		} else {
			page = bytes.Clone(page)
		}
		call.Complete(page, codec.Status{}, true)
	}
	if !done {
		t.Fatalf("seed %d: the stream has not ended", seed)
	}
	it := codec.Fields{Msg: all}
	for it.Next() {
		if it.Field.Num == 2 {
			keys++
		}
	}
	return all, keys
}

// streamPage makes page j of shard i, with keys that lie between those of the other one.
func streamPage(rng *rand.Rand, i, j, n int, more bool) (page, last []byte) {
	page = codec.AppendHeaderField(nil, &codec.Header{ClusterID: 1, Revision: 77})
	for k := range n {
		rev := 1 + rng.Int64N(1<<20)
		last = fmt.Appendf(nil, "k%d%03d%d", j, k, i)
		kv := codec.KV{Key: last, CreateRevision: 5, ModRevision: 6, Version: 1 + rng.Int64N(300), Lease: rng.Int64() & -int64(rng.IntN(2))}
		kv.Value = append(AppendStamp(nil, rev, 1+rng.Int64N(rev)), make([]byte, rng.IntN(500))...)
		page = appendKVField(page, 2, &kv)
	}
	return codec.AppendInt(codec.AppendBool(page, 3, more), 4, int64(n)), last
}
