package shard

import (
	"sync/atomic"
	"time"

	"spindle/codec"
)

// Memory counts the bytes that clients make this process hold: answers that are being put together or wait to be
// read, messages received in part, requests under way. All loops share one. Its limit is not a wall: what is
// counted may pass it by what one turn of a loop brings. What it decides is what comes next:
//
//   - lists that are larger than largeAnswer wait for room, then get etcd's "too many requests";
//   - over it, reads of some size are answered with that, too, and streams whose pages are;
//   - near the limit (Pressed) a client that already holds much is refused further requests, watches get no more events
//     than their clients take, messages in parts have to fit into little, and of the clients that take little
//     the one that holds most is dropped.
//
// A nil Memory has no limit. All methods may be called on any goroutine.
type Memory struct {
	limit int64
	used  atomic.Int64
}

// NewMemory makes a Memory of limit bytes; 0 or less: no limit.
func NewMemory(limit int64) *Memory {
	if limit <= 0 {
		return nil
	}
	return &Memory{limit: limit}
}

// Add counts n bytes more, or fewer.
func (m *Memory) Add(n int64) {
	if m != nil && n != 0 {
		m.used.Add(n)
	}
}

// Used returns the bytes that are counted now.
func (m *Memory) Used() int64 {
	if m == nil {
		return 0
	}
	return m.used.Load()
}

// Pressed says that more than seven eighths of the limit are used.
func (m *Memory) Pressed() bool { return m != nil && m.used.Load() > m.limit-m.limit/8 }

// Above says that more than num/den of the limit are used.
func (m *Memory) Above(num, den int64) bool { return m != nil && m.used.Load() > m.limit/den*num }

// Over says that more than the limit is used.
func (m *Memory) Over() bool { return m != nil && m.used.Load() > m.limit }

// fits says that n bytes more stay below the limit.
func (m *Memory) fits(n int64) bool { return m.used.Load()+n <= m.limit }

// half says that less than half of it is used: one answer that is larger than the limit may begin.
func (m *Memory) half() bool { return m.used.Load() <= m.limit/2 }

// Bounds of large answers.
const (
	// largeAnswer is the size from which on a list needs room in Memory before it is put together.
	largeAnswer = 256 << 10
	// maxLargeWaiting is how many lists may wait for that; further ones get "too many requests" at once. A
	// list that waits holds nothing: it is read anew.
	maxLargeWaiting = 1024
	// largeRetry is how often the first of them looks for room.
	largeRetry = 20 * time.Millisecond
	// maxEstimate bounds what a list is expected to become: more than a gRPC message can be.
	maxEstimate = 4 << 30
)

// largeReads is the Core's part of Memory.
type largeReads struct {
	waiting []*pagedRead
	out     int // lists that hold room
	armed   bool
}

// admit says that r may put its answer together: it is small, or has room. Else it waits, and is begun anew
// when its turn comes; within the time that a list has to begin.
func (r *pagedRead) admit() bool {
	m := r.c.cfg.Memory
	if m == nil || r.held > 0 {
		r.admitted = true
		return true
	}
	size := r.estimate()
	if size <= largeAnswer {
		r.admitted = true
		return true
	}
	if !r.long() {
		size += min(size, 2*int64(len(r.parts))*wholePageBytes) // the pages, as long as it is put together
	}
	c := r.c
	if len(c.large.waiting) == 0 && c.roomFor(size) {
		r.hold(size)
		return true
	}
	if len(c.large.waiting) >= maxLargeWaiting {
		c.stats.LargeRefused++
		r.end(codec.ErrTooManyRequests)
		return false
	}
	c.stats.LargeWaited++
	r.expected = size
	r.await(true)
	h, rev := r.h, r.rev
	r.restart()
	r.h, r.rev = h, rev
	for i := range r.parts {
		p := &r.parts[i]
		p.page, p.ahead = nil, nil
	}
	r.out = nil
	if r.stream == nil {
		c.leaveList(r.op) // it waits for memory, not for what its gate is for
	}
	c.large.waiting = append(c.large.waiting, r)
	c.armLarge()
	c.at(c.deadline(), func() {
		if !r.over && r.waiting {
			c.stats.LargeRefused++
			r.end(codec.ErrTooManyRequests)
		}
	})
	return false
}

func (c *Core) roomFor(size int64) bool {
	m := c.cfg.Memory
	return m.fits(size) || c.large.out == 0 && m.half()
}

// await says whether r waits for room.
func (r *pagedRead) await(waits bool) {
	if cl := r.op.Client; cl != nil && waits != r.waiting {
		if waits {
			cl.room++
		} else {
			cl.room--
		}
	}
	r.waiting = waits
}

func (r *pagedRead) hold(size int64) {
	r.admitted = true
	if r.op != nil {
		r.op.admitted = true
	}
	r.c.large.out++
	r.keep(size)
}

// keep counts size bytes more that r holds.
func (r *pagedRead) keep(size int64) {
	r.held += size
	r.c.cfg.Memory.Add(size)
	if r.op != nil && r.op.Client != nil {
		r.op.Client.granted += size
	}
}

// grown sees to an answer that became larger than it was expected to be. false: it may not, and was ended.
func (r *pagedRead) grown() bool { return r.grownTo(int64(len(r.out))) }

func (r *pagedRead) grownTo(n int64) bool {
	m := r.c.cfg.Memory
	switch more := n + n/4 - r.held; {
	case m == nil || r.stream != nil || n <= max(r.held, largeAnswer):
	case r.held == 0:
		r.hold(more)
	case !m.fits(more) && r.c.large.out > 1:
		r.c.stats.LargeRefused++
		r.end(codec.ErrTooManyRequests)
		return false
	default:
		r.keep(more)
	}
	return true
}

// countPages brings up to date what Memory counts of a stream: its pages, those that are on their way as they are expected, and its chunk.
// false: there is no room for that.
func (r *pagedRead) countPages() bool {
	m := r.c.cfg.Memory
	if m == nil || r.stream == nil {
		return true
	}
	n := int64(cap(r.out))
	for i := range r.parts {
		p := &r.parts[i]
		n += int64(cap(p.page) + cap(p.ahead))
		if p.inFlight {
			n += p.expected()
		}
	}
	r.keep(n - r.held)
	return n <= largeAnswer || !m.Over()
}

// release gives back what r held.
func (r *pagedRead) release() {
	if r.op != nil && r.waiting {
		r.await(false)
	}
	if r.held > 0 {
		r.keep(-r.held)
		if r.stream == nil {
			r.c.large.out--
		}
	}
}

func (c *Core) armLarge() {
	if !c.large.armed {
		c.large.armed = true
		c.after(largeRetry, c.retryLarge)
	}
}

// retryLarge begins the lists that have room now, in their order.
func (c *Core) retryLarge() {
	c.large.armed = false
	for len(c.large.waiting) > 0 {
		r := c.large.waiting[0]
		if !r.over && r.op.canceled {
			r.end(statusCanceled)
		}
		if !r.over {
			if !c.roomFor(r.expected) {
				break
			}
			r.await(false)
			r.hold(r.expected)
			r.rise()
		}
		c.large.waiting[0] = nil
		c.large.waiting = c.large.waiting[1:]
	}
	if len(c.large.waiting) > 0 {
		c.armLarge()
	}
}

// rise begins a list anew that has waited.
func (r *pagedRead) rise() {
	r.watchStart()
	switch {
	case r.op.core.plan.Serializable():
		f := r.c.frontierOf(r.shards)
		r.lookAt(f, f)
	case r.latest:
		r.begin()
	default:
		r.lookAt(r.rev, r.h)
	}
}
