package shard

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"spindle/codec"
)

// testPage makes a member's RangeResponse of keys with and without leases and values, and of Spindle's own.
func testPage(rng *rand.Rand, keys int) []byte {
	hdr := codec.Header{ClusterID: 1, MemberID: 2, Revision: 77, RaftTerm: 3}
	page := codec.AppendHeaderField(nil, &hdr)
	for i := range keys {
		rev := 1 + rng.Int64N(1<<20)
		kv := codec.KV{Key: fmt.Appendf(nil, "k%05d", i), CreateRevision: 1 + rng.Int64N(1<<20), Version: 1 + rng.Int64N(300)}
		kv.ModRevision = kv.CreateRevision + rng.Int64N(1<<20)
		kv.Value = append(AppendStamp(nil, rev, 1+rng.Int64N(rev)), make([]byte, rng.IntN(1+rng.IntN(3000)))...)
		switch rng.IntN(10) {
		case 0:
			kv.Key = append([]byte{0}, kv.Key...)
			kv.Value = []byte("a marker")
		case 1, 2:
			kv.Lease = rng.Int64()
		}
		page = appendKVField(page, 2, &kv)
	}
	page = codec.AppendBool(page, 3, keys%2 == 0)
	return codec.AppendInt(page, 4, int64(keys)+rng.Int64N(1<<30))
}

// rewriteAll gives page to w in pieces of any size, none of which stays as it was. The memory grows as the codec's does.
func rewriteAll(rng *rand.Rand, w *pageRewriter, page []byte) []byte {
	var dst []byte
	for got, most := 0, 1+rng.IntN(8000); got < len(page); {
		n := min(len(page)-got, 1+rng.IntN(most))
		piece := bytes.Clone(page[got : got+n])
		if got += n; cap(dst) < got {
			dst = append(make([]byte, 0, min(max(got, 2*cap(dst)), len(page))), dst...)
		}
		dst = w.Rewrite(dst, piece)
		for i := range piece {
			piece[i] = 0xff
		}
	}
	return dst
}

// TestPageRewriter compares a page that was rewritten as it came with one that is walked over when all of it is there.
func TestPageRewriter(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 11))
	for round := range 200 {
		page := testPage(rng, rng.IntN(60))
		want := sumPage(page)
		wantPage := clientPage(bytes.Clone(page), &want)
		w := new(pageRewriter)
		got := rewriteAll(rng, w, page)
		if !w.rewrote() || w.spoiled() {
			t.Fatalf("seed %d, round %d: rewritten %v, spoiled %v", seed, round, w.rewrote(), w.spoiled())
		}
		if !bytes.Equal(got, wantPage) || int64(len(got)) != want.size {
			t.Fatalf("seed %d, round %d: %d bytes, want %d of %d", seed, round, len(got), len(wantPage), want.size)
		}
		s := w.sum
		if !bytes.Equal(s.end.key, want.end.key) {
			t.Fatalf("seed %d, round %d: it ends with %q, want %q", seed, round, s.end.key, want.end.key)
		}
		s.end.key, want.end.key = nil, nil
		if fmt.Sprint(s) != fmt.Sprint(want) {
			t.Fatalf("seed %d, round %d: %+v, want %+v", seed, round, s, want)
		}
	}
}

// TestPageRewriterSpoils: a page with a value that somebody else put, one that is no protobuf, one that ends within a field, and one
// that would become longer than it was, are spoiled; no bytes at all do more harm.
func TestPageRewriterSpoils(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 12))
	page := testPage(rng, 20)
	foreign := codec.KV{Key: []byte("x"), Value: []byte("somebody else's"), CreateRevision: 1, ModRevision: 1, Version: 1}
	long := codec.KV{Key: []byte("x"), Value: AppendStamp(nil, maxStampRev, maxStampRev), CreateRevision: 1, ModRevision: 1, Version: 1}
	large := codec.KV{Key: []byte("x"), Value: AppendStamp(make([]byte, 1<<10), 5, 7), CreateRevision: 1, ModRevision: 1, Version: 1}
	within := appendKVField(bytes.Clone(page), 2, &large)
	for name, bad := range map[string][]byte{
		"foreign":      appendKVField(bytes.Clone(page), 2, &foreign),
		"longer":       appendKVField(nil, 2, &long),
		"cut":          page[:len(page)-1],
		"cut in a key": within[:len(within)-100],
		"group":        append(bytes.Clone(page), 2<<3|3),
		"number":       append(bytes.Clone(page), 2<<3, 1),
		"bad key":      append(bytes.Clone(page), 2<<3|2, 2, 1<<3|2, 9),
		"endless":      append(bytes.Clone(page), bytes.Repeat([]byte{0xff}, 2*maxFieldHead)...),
		"huge":         append(bytes.Clone(page), 2<<3|2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f),
	} {
		w := new(pageRewriter)
		if rewriteAll(rng, w, bad); !w.spoiled() {
			t.Errorf("seed %d: %s: not spoiled", seed, name)
		}
	}
	for round := range 2000 {
		b := bytes.Clone(page)
		for range 1 + rng.IntN(4) {
			b[rng.IntN(len(b))] = byte(rng.Uint32())
		}
		w := new(pageRewriter)
		if got := rewriteAll(rng, w, b); len(got) > len(b) {
			t.Fatalf("seed %d, round %d: %d bytes of %d", seed, round, len(got), len(b))
		} else if sum := sumPage(b); !w.spoiled() && (sum.end.bad || sum.foreign || sum.size != int64(len(got))) {
			t.Fatalf("seed %d, round %d: not spoiled, but %+v", seed, round, sum)
		}
	}
}

// rewriteTransport keeps the calls.
type rewriteTransport struct {
	codec.Transport
	calls []codec.Completion
}

func (tr *rewriteTransport) Call(_ codec.ClusterID, _ codec.Method, _ []byte, _ time.Duration, c codec.Completion) {
	tr.calls = append(tr.calls, c)
}

// TestGatheredPageIsRewritten follows one page from the call on: a reply that can be rewritten is taken as it is then; one that cannot
// is asked for again, and comes as the member has it. A reply that came in one piece is nobody's to rewrite. All make the same page.
func TestGatheredPageIsRewritten(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 13))
	page := testPage(rng, 100)
	sum := sumPage(page)
	want := clientPage(bytes.Clone(page), &sum)
	for _, how := range []string{"rewritten", "spoiled", "whole"} {
		tr := new(rewriteTransport)
		c := &Core{cfg: CoreConfig{PageKeys: firstPageKeys, ShardTimeout: time.Second, Now: func() int64 { return 1 }}, tr: tr}
		// The other part's page is missing, so nothing ends.
		r := &pagedRead{c: c, op: new(Op), gathering: true, latest: true, fixed: true, parts: make([]pagePart, 2)}
		for i := range r.parts {
			r.parts[i] = pagePart{r: r, s: &shardState{c: c}, local: 5, located: true, counted: true, more: true, limit: 1,
				perKey: 1, total: 1000, pages: [][]byte{nil}}
		}
		r.parts[1].inFlight = true
		p := &r.parts[0]
		p.fetch()
		reply := func(rewrite bool) {
			t.Helper()
			if len(tr.calls) == 0 {
				t.Fatalf("seed %d, %s: nothing is asked for", seed, how)
			}
			done := tr.calls[0]
			tr.calls = tr.calls[1:]
			resp := bytes.Clone(page)
			if w := done.(codec.Receiving).Rewriter(); rewrite {
				dst := w.Rewrite(make([]byte, 0, len(page)), page[:500])
				resp = w.Rewrite(dst, page[500:])
				if how == "spoiled" {
					resp = w.Rewrite(resp, []byte{2<<3 | 2})
				}
			}
			done.Complete(resp, codec.Status{}, true)
		}
		if how == "spoiled" {
			reply(true)
			if len(tr.calls) != 1 || tr.calls[0].(codec.Receiving).Rewriter() != nil || len(p.pages) != 1 {
				t.Fatalf("seed %d: a spoiled page is not asked for as it is: %d calls, %d pages", seed, len(tr.calls), len(p.pages))
			}
			reply(false)
		} else {
			reply(how == "rewritten")
		}
		if len(p.pages) != 2 || !bytes.Equal(p.pages[1], want) || p.keys != sum.keys || p.size != sum.size {
			t.Errorf("seed %d, %s: %d pages, %d keys, want %d, of %d bytes, want %d", seed, how, len(p.pages), p.keys, sum.keys, p.size, sum.size)
		}
	}
}

// TestGatheredPageBeginsAnew: a connection dies in the middle of a page, and another one brings it whole: nothing is left of the first.
func TestGatheredPageBeginsAnew(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 13))
	page := testPage(rng, 100)
	sum := sumPage(page)
	want := clientPage(bytes.Clone(page), &sum)
	tr := new(rewriteTransport)
	c := &Core{cfg: CoreConfig{PageKeys: firstPageKeys, ShardTimeout: time.Second, Now: func() int64 { return 1 }}, tr: tr}
	r := &pagedRead{c: c, op: new(Op), gathering: true, latest: true, fixed: true, parts: make([]pagePart, 2)}
	for i := range r.parts {
		r.parts[i] = pagePart{r: r, s: &shardState{c: c}, local: 5, located: true, counted: true, more: true, limit: 1, perKey: 1, total: 1000, pages: [][]byte{nil}}
	}
	r.parts[1].inFlight = true // so that the list is not complete
	p := &r.parts[0]
	p.fetch()
	done := tr.calls[0].(codec.Receiving)
	done.Rewriter().Rewrite(make([]byte, 0, len(page)), page[:len(page)/2])
	w := done.Rewriter()
	resp := w.Rewrite(w.Rewrite(make([]byte, 0, len(page)), page[:500]), page[500:])
	done.Complete(resp, codec.Status{}, true)
	if len(p.pages) != 2 || !bytes.Equal(p.pages[1], want) || p.keys != sum.keys || p.size != sum.size {
		t.Errorf("%d pages, %d keys, want %d, of %d bytes, want %d", len(p.pages), p.keys, sum.keys, p.size, sum.size)
	}
}
