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
//   - lists that are larger than largeAnswer wait for room below listRoom of it, as long as others get on (waitForRoom);
//   - over it, reads of some size are answered with that, too, and streams whose pages are;
//   - near the limit (Pressed) a client that already holds much is refused further requests, watches get no more events
//     than their clients take, messages in parts have to fit into little, and of the clients that take little
//     the one that holds most is dropped. While lists wait for room, those are dropped that take little for longer.
//
// A nil Memory has no limit. All methods may be called on any goroutine.
type Memory struct {
	limit int64
	used  atomic.Int64
	waits atomic.Int64 // lists that wait for room
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

// Await says that n lists more wait for room, or fewer.
func (m *Memory) Await(n int64) { m.waits.Add(n) }

// Awaited says that lists wait for room.
func (m *Memory) Awaited() bool { return m != nil && m.waits.Load() > 0 }

// Over says that more than the limit is used.
func (m *Memory) Over() bool { return m != nil && m.used.Load() > m.limit }

// fits says that a list of n bytes may begin.
func (m *Memory) fits(n int64) bool { return m.used.Load()+n <= m.limit/listRoomDen*listRoomNum }

// half says that less than half of it is used: one answer that is larger than the limit may begin.
func (m *Memory) half() bool { return m.used.Load() <= m.limit/2 }

// Bounds of large answers.
const (
	// largeAnswer is the size from which on a list needs room in Memory before it is put together.
	largeAnswer = 256 << 10
	// listRoomNum/listRoomDen is the part of the limit that may be used when such lists begin: what else comes meanwhile must not
	// press (Pressed), or clients who take their answers as fast as they can would be refused requests for it.
	listRoomNum, listRoomDen = 3, 4
	// maxLargeWaiting is how many lists may wait for room; further ones get "too many requests" at once. A
	// list that waits holds nothing: it is read anew.
	maxLargeWaiting = 1024
	// largeRetry is how often the first of them looks for room.
	largeRetry = 20 * time.Millisecond
	// roomStep is the part of the limit by which what is used has to fall to count as getting on.
	roomStep = 64
	// maxEstimate bounds what a list is expected to become: more than a gRPC message can be.
	maxEstimate = 4 << 30
)

// largeReads is the Core's part of Memory.
type largeReads struct {
	waiting []*pagedRead
	out     int // lists that hold room
	armed   bool
	moved   int64 // ns; when one of those got a page behind its first ones or ended well, or clients took answers, last
	used    int64 // of Memory, at the highest since then
}

// admit says that r may put its answer together: it is small, or has room. Else it waits, and is begun anew
// when its turn comes.
func (r *pagedRead) admit() bool {
	m := r.c.cfg.Memory
	if m == nil || r.held > 0 {
		r.admitted, r.op.admitted = true, true
		return true
	}
	size := r.estimate()
	if size <= largeAnswer {
		r.admitted = true
		return true
	}
	if r.long() {
		size += size / 8 // buffers are larger than what is in them
		for i := range r.parts {
			size += int64(cap(r.parts[i].page) - len(r.parts[i].page))
		}
	} else {
		size += min(size, 2*int64(len(r.parts))*wholePageBytes) // the pages, as long as it is put together
	}
	if len(r.c.large.waiting) == 0 && r.c.roomFor(size) {
		r.hold(size)
		return true
	}
	r.waitForRoom(size)
	return false
}

// waitForRoom lets go of all that r has read. It is read anew when there is room for size bytes, and all who waited before it have
// had their turn. When that takes longer than its patience it ends: "too many requests".
func (r *pagedRead) waitForRoom(size int64) {
	c := r.c
	if len(c.large.waiting) >= maxLargeWaiting {
		c.stats.LargeRefused++
		r.end(codec.ErrTooManyRequests)
		return
	}
	c.stats.LargeWaited++
	r.release()
	r.expected, r.sent, r.admitted, r.op.admitted = size, 0, false, false
	r.roomUntil = c.deadline()
	r.await(true)
	h, rev := r.h, r.rev
	for i := range r.parts {
		for _, page := range r.parts[i].pages {
			codec.Recycle(page)
		}
	}
	r.restart()
	r.h, r.rev = h, rev
	for i := range r.parts {
		p := &r.parts[i]
		p.page, p.ahead = nil, nil
	}
	r.out = nil
	c.leaveList(r.op) // it waits for memory, not for what its gate is for
	c.large.waiting = append(c.large.waiting, r)
	c.armLarge()
}

func (c *Core) roomFor(size int64) bool {
	m := c.cfg.Memory
	return m.fits(size) || c.large.out == 0 && m.half()
}

// await says whether r waits for room.
func (r *pagedRead) await(waits bool) {
	if waits == r.waiting {
		return
	}
	n := -1
	if waits {
		n = 1
	}
	if r.waiting = waits; r.op.Client != nil {
		r.op.Client.room += n
	}
	r.c.cfg.Memory.Await(int64(n))
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

// grown sees to an answer that became larger than it was expected to be. false: there is no room for that, and it waits.
func (r *pagedRead) grown() bool {
	n := int64(len(r.out))
	return r.grownTo(n, n/4) // so much more does append take
}

// grownTo is grown for n bytes, and spare more that are counted with them.
func (r *pagedRead) grownTo(n, spare int64) bool {
	m := r.c.cfg.Memory
	switch more := n + spare - r.held; {
	case m == nil || r.stream != nil || n <= max(r.held, largeAnswer):
	case r.held == 0:
		r.hold(more)
	case !m.fits(more) && r.c.large.out > 1:
		r.waitForRoom(2 * n) // or it might be read anew for each page
		return false
	default:
		r.keep(more)
	}
	return true
}

// countPages brings up to date what Memory counts of a stream: its pages, beside those that are on their way (pageCall), and its chunk.
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
	}
	r.keep(n - r.held)
	return n <= largeAnswer || !m.Over()
}

// release gives back what r held.
func (r *pagedRead) release() {
	if r.op != nil && r.waiting {
		r.await(false)
	}
	for i := range r.parts {
		if q := r.parts[i].call; q != nil {
			q.setAside()
		}
	}
	if r.held > 0 {
		r.c.large.used -= r.held // no client has taken that
		r.keep(-r.held)
		if r.stream == nil {
			r.c.large.out--
		}
	}
}

// lookAtRoom sees whether clients take their answers, for those who wait for that.
func (c *Core) lookAtRoom() {
	l, used := &c.large, c.cfg.Memory.Used()
	if used < l.used-c.cfg.Memory.limit/roomStep {
		l.moved, l.used = c.cfg.Now(), used
	}
	l.used = max(l.used, used)
}

func (c *Core) armLarge() {
	if !c.large.armed {
		c.large.armed = true
		c.after(largeRetry, c.retryLarge)
	}
}

// retryLarge begins the lists that have room now, in their order, and ends those for which nobody makes any.
func (c *Core) retryLarge() {
	l := &c.large
	l.armed = false
	c.lookAtRoom()
	now := c.cfg.Now()
	waiting := l.waiting
	l.waiting = nil // who is answered may come with the next one
	var left []*pagedRead
	for _, r := range waiting {
		switch {
		case r.over:
		case r.op.canceled:
			r.end(statusCanceled)
		case c.state != stateReady:
			r.end(codec.ErrStopped)
		case len(left) == 0 && c.roomFor(r.expected):
			r.await(false)
			r.hold(r.expected)
			r.rise()
		case now >= c.patience(r.op, r.roomUntil, l.moved):
			c.stats.LargeRefused++
			r.end(codec.ErrTooManyRequests)
		default:
			left = append(left, r)
		}
	}
	l.waiting = append(left, l.waiting...)
	if len(l.waiting) > 0 {
		c.armLarge()
	}
}

// rise begins a list anew that has waited.
func (r *pagedRead) rise() {
	r.watchStart()
	switch {
	case !r.latest: // whoever names a revision, serializable or not
		r.lookAt(r.rev, r.h)
	case r.op.core.plan.Serializable():
		f := r.c.frontierOf(r.shards)
		r.lookAt(f, f)
	default:
		r.begin()
	}
}
