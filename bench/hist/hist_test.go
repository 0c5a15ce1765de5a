package hist

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// Every value lies in its bucket, and the buckets are in order and without gaps.
func TestBuckets(t *testing.T) {
	for v := int64(0); v < 1<<maxBits; v += 1 + v/997 {
		i := index(v)
		if i < 0 || i >= buckets || upper(i) < v || i > 0 && upper(i-1) >= v {
			t.Fatalf("%d: bucket %d from %d to %d", v, i, upper(max(i-1, 0))+1, upper(i))
		}
		if over := upper(i) - v; over*subs > max(v, 1) && over > 0 {
			t.Fatalf("%d: its bucket ends %d higher", v, over)
		}
	}
	if got := index(1<<maxBits - 1); got != buckets-1 {
		t.Errorf("the largest value is in bucket %d of %d", got, buckets)
	}
}

func TestQuantiles(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for round := range 50 {
		var h, a, b Hist
		n := 1 + r.IntN(3000)
		all := make([]int64, n)
		sum := int64(0)
		for i := range all {
			all[i] = int64(r.ExpFloat64() * 1e6)
			sum += all[i]
			h.Record(all[i])
			if i%3 == 0 {
				a.Record(all[i])
			} else {
				b.Record(all[i])
			}
		}
		a.Add(&b)
		slices.Sort(all)
		if a != h {
			t.Fatalf("seed %d round %d: the sum of two parts is not the whole", seed, round)
		}
		if h.Count() != uint64(n) || h.Min() != time.Duration(all[0]) || h.Max() != time.Duration(all[n-1]) || h.Mean() != time.Duration(sum/int64(n)) {
			t.Fatalf("seed %d round %d: count, min, max or mean", seed, round)
		}
		for _, q := range []float64{0, 0.01, 0.5, 0.9, 0.99, 0.999, 1} {
			i := int(q * float64(n))
			if float64(i) < q*float64(n) {
				i++
			}
			want := all[min(max(i-1, 0), n-1)]
			got := int64(h.Quantile(q))
			if got < want || got-want > want/subs+1 {
				t.Fatalf("seed %d round %d: quantile %v of %d values is %d, got %d", seed, round, q, n, want, got)
			}
		}
		h.Reset()
		if h != (Hist{}) {
			t.Fatalf("seed %d: not empty after Reset", seed)
		}
	}
}

func TestOutOfRange(t *testing.T) {
	var h Hist
	h.Record(-5)
	h.Record(1 << 62)
	if h.Min() != 0 || h.Max() != 1<<maxBits-1 || h.Quantile(0.5) != 0 || h.Quantile(1) != h.Max() {
		t.Error(h.Min(), h.Max(), h.Quantile(0.5), h.Quantile(1))
	}
	if n := testing.AllocsPerRun(100, func() { h.Record(12345); h.Quantile(0.9) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
