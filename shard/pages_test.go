package shard

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"spindle/codec"
)

// TestShares: what the shards are asked for together stays near the limit, and with keys spread by a hash
// hardly any page needs a second look.
func TestShares(t *testing.T) {
	const seed = 4
	rng := rand.New(rand.NewPCG(seed, 0))
	c := &Core{cfg: CoreConfig{PageKeys: firstPageKeys}}
	for _, limit := range []int64{1, 7, 100, 500, 10000} {
		for _, n := range []int{1, 2, 3, 8, 64} {
			share := c.shareOf(limit, n)
			if share < 1 || share > limit || share*int64(n) < limit {
				t.Fatalf("limit %d over %d: a share of %d", limit, n, share)
			}
			if limit >= 500 && n <= 8 && share*int64(n) > limit*17/10 {
				t.Errorf("limit %d over %d: %d keys are asked for", limit, n, share*int64(n))
			}
			short := 0
			for range 200 {
				parts := make([]int64, n)
				for range limit {
					parts[rng.IntN(n)]++
				}
				for _, k := range parts {
					if k > share {
						short++
						break
					}
				}
			}
			if short > 20 {
				t.Errorf("seed %d, limit %d over %d, a share of %d: %d of 200 pages need a second look", seed, limit, n, share, short)
			}
		}
	}
	if s := c.shareOf(1<<62, 3); s <= 0 {
		t.Errorf("a huge limit gives %d", s)
	}
}

// TestEndsAreShared: the ends that one part has found serve the others, each from where it is; none ends where it
// begins, and the part that is beyond all of them, or was told of none, goes on.
func TestEndsAreShared(t *testing.T) {
	c := &Core{cfg: CoreConfig{PageKeys: firstPageKeys}}
	r := &pagedRead{c: c, stream: &RangeStream{}, parts: make([]pagePart, 4)}
	for i := range r.parts {
		r.parts[i] = pagePart{r: r, counted: true, total: 1_000_000, fetched: 1000, limit: 500, perKey: 1 << 10, from: []byte("k0001000\x00")}
	}
	looker, other := &r.parts[2], &r.parts[0]
	if !looker.needsEnds() || !other.needsEnds() {
		t.Fatal("a long part does without ends")
	}
	_, pages := r.segments()
	every := int(pages * looker.sparse())
	var resp []byte
	for i := 1001; i <= 1000+4*every; i++ {
		kv, m := codec.BeginMessage(resp, 2)
		resp = codec.EndMessage(codec.AppendBytes(kv, 1, fmt.Appendf(nil, "k%07d", i)), m)
	}
	looker.divide(resp)
	if len(r.ends) != 4 {
		t.Fatalf("%d ends, want 4", len(r.ends))
	}
	if other.needsEnds() || string(other.nextEnd()) != string(r.ends[0]) {
		t.Errorf("another part has the end %q", other.nextEnd())
	}
	for i, end := range r.ends {
		other.from = end
		want := ""
		if i+1 < len(r.ends) {
			want = string(r.ends[i+1])
		}
		if got := string(other.nextEnd()); got != want {
			t.Errorf("at the end %d the next one is %q, want %q", i, got, want)
		}
	}
	if !other.needsEnds() {
		t.Error("a part beyond all ends does not look")
	}
	// A look from where a part begins shows that key, which is the last end.
	n := len(r.ends)
	c.cfg.PageKeys, other.limit = 1, 1
	kv, m := codec.BeginMessage(nil, 2)
	other.divide(codec.EndMessage(codec.AppendBytes(kv, 1, other.from), m))
	if len(r.ends) != n {
		t.Error("a page would end where it begins")
	}
	other.total = other.fetched + other.limit
	if other.needsEnds() {
		t.Error("a look for the last page")
	}
}

// TestGatheredPages: the first page that is gathered is no larger beside the one before than any other, since the values behind may be
// large; from then on they grow faster. The gate hears of all of them.
func TestGatheredPages(t *testing.T) {
	const keys, size = 10, 1 << 20
	op := new(Op)
	op.core.gate = 1
	g := newListGate(gateKey{})
	c := &Core{cfg: CoreConfig{PageKeys: firstPageKeys}, gates: []*listGate{g}}
	r := &pagedRead{c: c, op: op, gathering: true, latest: true, parts: make([]pagePart, 1)}
	p := &r.parts[0]
	*p = pagePart{r: r, local: 1, counted: true, total: 1 << 30, limit: keys, perKey: 1, pages: [][]byte{nil}}
	if n := p.pageLimit(); n != pageGrowth*keys {
		t.Errorf("the first page that is gathered has %d keys, after %d", n, keys)
	}
	p.pages = append(p.pages, nil)
	if n := p.pageLimit(); n != gatherGrowth*keys {
		t.Errorf("the next one has %d keys", n)
	}
	for range 50 {
		if !p.take(make([]byte, size), pageSum{}) {
			t.Fatal("not taken")
		}
	}
	if n := g.width(); n != gatePages/size {
		t.Errorf("%d lists with pages of %d bytes, which the gate takes for %d", n, size, g.page)
	}
}
