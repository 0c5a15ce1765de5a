package shard

import (
	"container/heap"
	"time"
)

// timer is a function to be called at a time. Nothing is ever taken out early: a function looks whether
// it is still wanted.
type timer struct {
	at  int64
	seq uint64 // equal times fire in the order they were set
	f   func()
}

type timerHeap []timer

func (h timerHeap) Len() int { return len(h) }
func (h timerHeap) Less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].seq < h[j].seq
}
func (h timerHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *timerHeap) Push(x any)   { *h = append(*h, x.(timer)) }
func (h *timerHeap) Pop() any {
	old := *h
	t := old[len(old)-1]
	old[len(old)-1] = timer{}
	*h = old[:len(old)-1]
	return t
}

// after calls f on the core's goroutine once d has passed.
func (c *Core) after(d time.Duration, f func()) { c.at(c.cfg.Now()+int64(d), f) }

func (c *Core) at(t int64, f func()) {
	c.timerSeq++
	heap.Push(&c.timers, timer{t, c.timerSeq, f})
}

// Deadline returns when Tick wants to be called, in the nanoseconds of Config.Now; 0 for never.
func (c *Core) Deadline() int64 {
	d := c.clock.Deadline()
	if len(c.timers) > 0 && (d <= 0 || c.timers[0].at < d) {
		d = c.timers[0].at
	}
	return max(d, 0)
}

// Tick runs what is due. The caller flushes afterwards, as after every call.
func (c *Core) Tick() {
	now := c.cfg.Now()
	for len(c.timers) > 0 && c.timers[0].at <= now {
		heap.Pop(&c.timers).(timer).f()
	}
	if d := c.clock.Deadline(); d > 0 && d <= now {
		c.clock.Tick()
	}
}

// jitter returns a random duration in [d/2, d*3/2).
func (c *Core) jitter(d time.Duration) time.Duration {
	return d/2 + time.Duration(c.cfg.Rand.Int64N(int64(d)))
}
