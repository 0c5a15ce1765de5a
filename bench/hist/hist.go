// Package hist is a latency histogram in the manner of HdrHistogram: buckets that grow with the value, so that
// every percentile is known to better than one per cent over nine decades, in a fixed amount of memory.
package hist

import (
	"math/bits"
	"time"
)

const (
	// subBits is how many bits of a value are kept: a bucket is at most 1/128 of its value wide.
	subBits = 7
	subs    = 1 << subBits
	// maxBits bounds values: 2^43 ns are two and a half hours. Larger ones count as that.
	maxBits = 43
	buckets = (maxBits - subBits + 1) * subs
)

// Hist counts durations in nanoseconds. The zero value is empty. It belongs to one goroutine.
type Hist struct {
	counts [buckets]uint64
	n      uint64
	sum    int64
	min    int64
	max    int64
}

// index returns the bucket of v, 0 <= v < 1<<maxBits.
func index(v int64) int {
	exp := bits.Len64(uint64(v)) - subBits - 1
	if exp < 0 {
		return int(v)
	}
	return exp<<subBits + int(v>>exp)
}

// upper returns the largest value of bucket i.
func upper(i int) int64 {
	exp := max(i>>subBits-1, 0)
	sub := int64(i - exp<<subBits)
	return (sub+1)<<exp - 1
}

// Record counts d. Negative durations count as 0.
func (h *Hist) Record(d int64) {
	d = min(max(d, 0), 1<<maxBits-1)
	if h.n == 0 || d < h.min {
		h.min = d
	}
	h.max = max(h.max, d)
	h.n++
	h.sum += d
	h.counts[index(d)]++
}

// Add adds what o has counted.
func (h *Hist) Add(o *Hist) {
	if o.n == 0 {
		return
	}
	if h.n == 0 || o.min < h.min {
		h.min = o.min
	}
	h.max = max(h.max, o.max)
	h.n += o.n
	h.sum += o.sum
	for i := index(o.min); i <= index(o.max); i++ {
		h.counts[i] += o.counts[i]
	}
}

// Reset empties h.
func (h *Hist) Reset() {
	if h.n > 0 {
		clear(h.counts[index(h.min) : index(h.max)+1])
		h.n, h.sum, h.min, h.max = 0, 0, 0, 0
	}
}

// Count is how many durations were counted.
func (h *Hist) Count() uint64 { return h.n }

// Mean is their mean, 0 if there are none.
func (h *Hist) Mean() time.Duration {
	if h.n == 0 {
		return 0
	}
	return time.Duration(h.sum / int64(h.n))
}

// Min and Max are the smallest and the largest, exactly.
func (h *Hist) Min() time.Duration { return time.Duration(h.min) }

// Max is the largest, exactly.
func (h *Hist) Max() time.Duration { return time.Duration(h.max) }

// Quantile returns the smallest duration that at least the part q (0 to 1) of all do not exceed, rounded up to the
// end of its bucket; 0 if there are none.
func (h *Hist) Quantile(q float64) time.Duration {
	if h.n == 0 {
		return 0
	}
	rank := uint64(q * float64(h.n))
	if float64(rank) < q*float64(h.n) || rank == 0 {
		rank++
	}
	rank = min(rank, h.n)
	seen := uint64(0)
	for i := index(h.min); i <= index(h.max); i++ {
		if seen += h.counts[i]; seen >= rank {
			return time.Duration(min(max(upper(i), h.min), h.max))
		}
	}
	return time.Duration(h.max)
}
