package watchring

import "slices"

// HistorySource reads what happened before the ring's tail. The Hub calls it on its own goroutine, from within
// Pump; Close also from within Remove and Stream.Close.
type HistorySource interface {
	// OpenHistory begins to read what happened on a shard (or All) from revision from on.
	OpenHistory(set int, from int64) HistoryReader
}

// HistoryReader is one read of the past.
type HistoryReader interface {
	// Next asks for about max bytes of what follows. done is called once, on the Hub's goroutine, also from within
	// Next; the owner calls Hub.Pump afterwards. It is called when there is something to say: a chunk's UpTo is
	// above the one before it, and never above the set's frontier.
	Next(max int, done func(HistoryChunk))
	// Close ends the read; done is not called any more.
	Close()
}

// HistoryChunk is a piece of the past.
type HistoryChunk struct {
	// Entries are all that happened after the chunk before it, up to revision UpTo, in order.
	Entries []*Entry
	UpTo    int64
	// Compact, if not 0, says that the past is compacted, and from which revision on it can be read.
	Compact int64
	// Err, if not "", says why it cannot be read for good. The reader is at its end after either.
	Err string
}

// Bounds of the reads of the past.
const (
	// historyChunk is how much a reader is asked for at a time, bytes.
	historyChunk = 1 << 20
	// shareSpan is how many revisions a watcher lets a shared reader pass over for others before it asks for
	// one of its own.
	shareSpan = 1 << 15
)

// reader is one read of the past, for the watchers of one group. All of them have what lies below its
// position, or do not want it.
type reader struct {
	src      HistoryReader
	group    *group
	pos      int64 // everything up to here was handed to the watchers
	watchers []*Watcher
	chunk    HistoryChunk
	arrived  bool // chunk is to be handed out
	begun    bool // and was, to all but the first unserved of watchers
	unserved int
	paused   bool // what is left of chunk waits for the only watcher's sink
	closed   bool // and src with it; the next Pump takes it off the list
	onChunk  func(HistoryChunk)
}

// dive makes w, which is in no list and at pos, read the past. Which reader serves it is decided at the end
// of the Pump, when all who need one are known.
func (h *Hub) dive(w *Watcher) {
	w.state = deep
	w.slot = len(h.divers)
	h.divers = append(h.divers, w)
	w.stream.deep++
	h.stats.Deep.Add(1)
}

// surface takes w out of its reader, or of those that wait for one.
func (h *Hub) surface(w *Watcher) {
	list, r := &h.divers, w.reader
	if r != nil {
		list = &r.watchers
	}
	last := len(*list) - 1
	(*list)[w.slot] = (*list)[last]
	(*list)[w.slot].slot = w.slot
	(*list)[last] = nil
	*list = (*list)[:last]
	w.reader = nil
	w.stream.deep--
	h.stats.Deep.Add(-1)
	if r != nil && len(r.watchers) == 0 && !r.closed {
		r.closed = true
		r.src.Close()
	}
}

// readPast hands out what the readers have brought, and gives readers to those who wait for one.
func (h *Hub) readPast() (more bool) {
	h.revs, h.work = 0, 0
	// Each Pump begins with another reader, so that one with many watchers cannot keep the others waiting.
	h.firstReader++
	for i := range h.readers {
		r := h.readers[(h.firstReader+i)%len(h.readers)]
		if r.arrived && !r.closed && !(r.paused && r.waits()) && !h.exhausted() {
			h.takeChunk(r)
		}
	}
	h.sweepReaders()
	h.assign()
	for _, r := range h.readers {
		more = more || r.arrived && !r.paused
	}
	return more
}

func (h *Hub) sweepReaders() {
	h.readers = slices.DeleteFunc(h.readers, func(r *reader) bool { return r.closed })
}

// waits reports whether the reader has one watcher only, whose sink is blocked. Then it stays where it is: to
// begin again costs the members more than to wait, and it holds back nobody else.
func (r *reader) waits() bool { return len(r.watchers) == 1 && r.watchers[0].stream.sink.Blocked() }

// assign gives readers to those who wait for one, the furthest behind first.
func (h *Hub) assign() {
	if len(h.divers) == 0 {
		return
	}
	slices.SortStableFunc(h.divers, func(a, b *Watcher) int {
		switch {
		case a.pos < b.pos:
			return -1
		case a.pos > b.pos:
			return 1
		}
		return 0
	})
	waiting := h.divers
	h.divers = h.divers[:0]
	for _, w := range waiting {
		if r := h.readerFor(w); r != nil {
			w.reader, w.slot = r, len(r.watchers)
			r.watchers = append(r.watchers, w)
			continue
		}
		w.slot = len(h.divers)
		h.divers = append(h.divers, w)
	}
	clear(waiting[len(h.divers):])
	for _, r := range h.readers {
		if r.onChunk == nil {
			r.onChunk = func(c HistoryChunk) {
				if !r.closed {
					r.chunk, r.arrived = c, true
				}
			}
			r.src.Next(historyChunk, r.onChunk)
		}
	}
}

// readerFor returns the reader that serves w: the nearest behind it, or a new one.
func (h *Hub) readerFor(w *Watcher) *reader {
	var best *reader
	none := true // of the group
	for _, r := range h.readers {
		if r.group != w.group || r.closed {
			continue
		}
		none = false
		if r.pos <= w.pos && (best == nil || r.pos > best.pos) {
			best = r
		}
	}
	if best != nil && w.pos-best.pos <= shareSpan {
		return best
	}
	// A group without a reader gets one in any case: the others' may all wait for a shard that is dead.
	if len(h.readers) >= h.maxReaders && !none && (best != nil || !h.evict()) {
		return best
	}
	r := &reader{group: w.group, pos: w.pos, src: h.history.OpenHistory(w.group.set, w.pos+1)}
	h.readers = append(h.readers, r)
	h.stats.Histories.Add(1)
	return r
}

// evict ends a reader that waits for a slow client; the client's watch begins again where it is when its sink
// has drained.
func (h *Hub) evict() bool {
	for _, r := range h.readers {
		if !r.paused || !r.waits() {
			continue
		}
		w := r.watchers[0]
		h.leave(w)
		h.lag(w, w.pos)
		h.sweepReaders()
		return true
	}
	return false
}

// takeChunk hands a chunk to the watchers of a reader, or to some of them: when the Pump has done enough, the
// next one goes on.
func (h *Hub) takeChunk(r *reader) {
	c := r.chunk
	past := c.Compact == 0 && c.Err == ""
	if past && c.UpTo > r.group.cursor {
		return // the group's own scan comes there first: then who is done can join it
	}
	r.paused = false
	if !r.begun {
		r.begun, r.unserved = true, len(r.watchers)
		if past {
			r.pos = c.UpTo
		}
	}
	tail, front := h.ring.Tail(), h.frontier.Get(r.group.set)
	// Half of what the ring holds should be left when they go on there, or they fall out of it again.
	done := r.pos >= tail && (r.pos >= front || r.pos-tail >= (front-tail)/2)
	// Backwards: a watcher that leaves is replaced by one that was served already. Who comes meanwhile is behind
	// the chunk, and stands behind those who wait for it.
	for r.unserved > 0 {
		if past && h.exhausted() {
			return
		}
		r.unserved--
		if r.unserved >= len(r.watchers) {
			continue // others were removed meanwhile
		}
		w := r.watchers[r.unserved]
		if w.closed {
			continue
		}
		switch {
		case c.Err != "":
			h.cancelFailed(w, c.Err)
			continue
		case c.Compact > 0 && w.pos+1 < c.Compact:
			h.cancelCompacted(w, c.Compact)
			continue
		case c.Compact > 0: // it begins behind what is gone: it gets another reader
		default:
			all := h.deliverPast(w, c.Entries, c.UpTo)
			if w.closed || all && !done {
				continue
			}
			if !all && r.waits() {
				r.begun, r.paused = false, true
				return
			}
		}
		h.leave(w)
		h.lag(w, w.pos)
		h.enqueue(w.stream) // does nothing while the sink is blocked
	}
	r.chunk, r.arrived, r.begun = HistoryChunk{}, false, false
	if !r.closed && len(r.watchers) > 0 {
		r.src.Next(historyChunk, r.onChunk)
	}
}

// deliverPast sends w what it wants of entries, which reach up to upTo. It returns false when it stopped
// because the sink is blocked.
func (h *Hub) deliverPast(w *Watcher, entries []*Entry, upTo int64) (all bool) {
	i, _ := slices.BinarySearchFunc(entries, w.pos+1, func(e *Entry, rev int64) int {
		switch {
		case e.Rev < rev:
			return -1
		case e.Rev > rev:
			return 1
		}
		return 0
	})
	if i < len(entries) && w.stream.sink.Blocked() {
		return false
	}
	buf := h.getBuffer()
	defer func() { h.putBuffer(buf) }()
	events, last := 0, int64(0)
	for ; i < len(entries); i++ {
		e := entries[i]
		h.revs++
		size := len(buf)
		prevKV := w.PrevKV && h.hasPrev(e.Rev)
		for k := range e.Events {
			ev := &e.Events[k]
			if ev.Delete && w.NoDelete || !ev.Delete && w.NoPut || !w.holds(ev.Key) {
				continue
			}
			buf = appendEvent(buf, ev, prevKV)
			events++
		}
		if len(buf) > size {
			last = e.Rev
		}
		w.pos = e.Rev
		if len(buf) > h.maxResponse {
			h.deliver(w, buf, last, events)
			buf, events = buf[:0], 0
			if w.closed {
				return true
			}
			if w.stream.sink.Blocked() {
				return false
			}
		}
	}
	w.pos = max(w.pos, upTo)
	if events > 0 {
		h.deliver(w, buf, last, events)
	}
	return true
}
