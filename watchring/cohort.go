package watchring

// target is one key, or one range of keys, that some watchers of a group watch.
type target struct {
	key, end string // end is "" for a single key, and for a range without end
	single   bool
	cohorts  []*cohort // at most one per variant, so at most 16
}

// variant is what, besides its keys, decides which bytes a watcher gets.
type variant struct {
	prevKV, noPut, noDelete, fragment bool
}

// cohort is the watchers that get exactly the same bytes, but for the watch id: same keys, same variant,
// all of them up to date with their group. Their events are collected once.
type cohort struct {
	target  *target
	variant variant
	members []*Watcher

	// What was collected since the last flush; buf is nil if nothing was.
	buf         []byte // encoded events
	first, last int64  // revisions of the first and the last event in buf
	events      int
}

// collect keeps ev for the members of c if the variant lets it pass. Events come in order, each once. hasPrev
// says that what lies before rev can still be read (see hasPrev).
func (h *Hub) collect(c *cohort, rev int64, ev *Event, hasPrev bool) {
	if ev.Delete && c.variant.noDelete || !ev.Delete && c.variant.noPut {
		return
	}
	if c.buf == nil {
		c.buf = h.getBuffer()
		c.first, c.events = rev, 0
		h.dirty = append(h.dirty, c)
	}
	size := len(c.buf)
	c.buf = appendEvent(c.buf, ev, c.variant.prevKV && hasPrev)
	h.collected += len(c.buf) - size
	c.last = rev
	c.events++
	if size <= h.maxResponse && len(c.buf) > h.maxResponse {
		h.full = append(h.full, c)
	}
}

// flush sends what was collected to the members. Those whose sink is blocked leave the cohort and stay
// where they were before the first event of it.
func (h *Hub) flush(c *cohort) {
	if c.buf == nil {
		return
	}
	header := h.encodeHeader(c.last)
	sent, kept := 0, false
	// Backwards: a member that leaves is replaced by one that was served already.
	for i := len(c.members) - 1; i >= 0; i-- {
		w := c.members[i]
		if w.closed {
			continue
		}
		if w.stream.sink.Blocked() {
			h.leave(w)
			h.lag(w, c.first-1)
			continue
		}
		w.quiet = false
		w.stream.shown = max(w.stream.shown, c.last)
		if h.sendEvents(w, header, c.buf, true) {
			kept = true
		}
		sent++
	}
	h.stats.Events.Add(uint64(sent * c.events))
	h.stats.Responses.Add(uint64(sent))
	h.work += sent * len(c.buf)
	h.collected -= len(c.buf)
	if !kept {
		h.putBuffer(c.buf)
	}
	c.buf = nil
}

// flushAll flushes every cohort that has collected something.
func (h *Hub) flushAll() {
	for i, c := range h.dirty {
		h.dirty[i] = nil
		h.flush(c)
	}
	h.dirty = h.dirty[:0]
}

// Buffers are kept for the next flush as long as they are few and not outsized.
const (
	firstBuffer   = 4 << 10 // capacity of a new buffer, bytes
	maxKeptBuffer = 2 << 20 // a larger one is left to the garbage collector
	maxKeptBytes  = 8 << 20 // all that are kept together
)

func (h *Hub) getBuffer() []byte {
	if n := len(h.free); n > 0 {
		b := h.free[n-1]
		h.free[n-1] = nil
		h.free = h.free[:n-1]
		h.freeBytes -= cap(b)
		return b[:0]
	}
	return make([]byte, 0, firstBuffer)
}

func (h *Hub) putBuffer(b []byte) {
	if cap(b) > maxKeptBuffer || h.freeBytes+cap(b) > maxKeptBytes {
		return
	}
	h.freeBytes += cap(b)
	h.free = append(h.free, b)
}
