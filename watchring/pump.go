package watchring

import "spindle/codec"

// Pump hands out what has come: new revisions to the groups, old ones to the watchers that catch up, then
// the progress answers that are due. It is to be called when a frontier or the compact revision rose,
// and after Add, Drained and Progress. It returns true when it stopped before all was done, so as
// not to hold up the loop: then it is to be called again soon.
func (h *Hub) Pump() (more bool) {
	if h.working {
		return true
	}
	h.working = true
	defer h.finish() // also when a Sink panics: a Hub that seems at work for ever would send nothing more
	h.revs, h.work = 0, 0
	// Each Pump begins with another group, so that a busy one cannot keep the others waiting.
	h.first = (h.first + 1) % len(h.groups)
	for i := range h.groups {
		g := h.groups[(h.first+i)%len(h.groups)]
		if g != nil && g.size > 0 && h.scan(g) {
			more = true
		}
	}
	h.revs, h.work = 0, 0
	if h.catchUpAll() {
		more = true
	}
	if len(h.readers)+len(h.divers) > 0 && h.readPast() {
		more = true
	}
	if len(h.ready) > 0 {
		more = true
	}
	h.answer()
	return more
}

// finish ends the Hub's work and takes out what was removed meanwhile.
func (h *Hub) finish() {
	h.working = false
	for i, w := range h.dead {
		h.dead[i] = nil
		h.bury(w)
	}
	h.dead = h.dead[:0]
}

// exhausted says that this Pump has done enough for the groups, or for those that catch up.
func (h *Hub) exhausted() bool { return h.revs >= h.pumpRevs || h.work >= h.pumpBytes }

// scan moves a group's cursor towards its frontier. At its end nothing is left collected.
func (h *Hub) scan(g *group) (more bool) {
	limit := h.frontier.Get(g.set)
	for g.cursor < limit {
		if h.exhausted() {
			more = true
			break
		}
		if g.members > 0 {
			h.step(g, limit)
		} else {
			// Nobody here reads: on to where somebody will.
			g.cursor = limit
			if len(g.future) > 0 {
				g.cursor = min(limit, g.future[0].Start-1)
			}
		}
		if len(g.future) > 0 && g.future[0].Start <= g.cursor+1 {
			h.wake(g)
		}
	}
	h.flushAll()
	return more
}

// step reads the revision after the cursor.
func (h *Hub) step(g *group, limit int64) {
	h.revs++
	rev := g.cursor + 1
	e, lapped := h.ring.Load(rev)
	switch {
	case lapped:
		h.lapped(g, limit)
		return
	case e == nil:
		g.cursor = h.ring.Skip(rev, limit)
		return
	case g.set == All || e.Shard == g.set:
		h.match(g, e)
	}
	g.cursor = rev
	if len(h.full) > 0 {
		h.flushFull()
	}
	if h.collected >= h.maxCollected {
		h.flushAll()
	}
}

// match collects the events of e for all cohorts that want them.
func (h *Hub) match(g *group, e *Entry) {
	hasPrev := h.hasPrev(e.Rev)
	for i := range e.Events {
		ev := &e.Events[i]
		if t := g.exact[string(ev.Key)]; t != nil {
			for _, c := range t.cohorts {
				h.collect(c, e.Rev, ev, hasPrev)
			}
		}
		if g.ranges.root == nil {
			continue
		}
		h.hits = g.ranges.find(h.hits[:0], ev.Key)
		for _, t := range h.hits {
			for _, c := range t.cohorts {
				h.collect(c, e.Rev, ev, hasPrev)
			}
		}
	}
}

// flushFull sends what is enough for a response. The cohorts stay in h.dirty, where an empty one does no
// harm; one that collects again is there twice, and its second flush finds nothing.
func (h *Hub) flushFull() {
	for i, c := range h.full {
		h.full[i] = nil
		h.flush(c)
	}
	h.full = h.full[:0]
}

// wake lets those watchers join that start at the next revision. One that starts below (the cursor has
// passed its start in one step) reads the ring on its own, which finds out what it has missed. So
// every watcher that is left in the future starts above the next revision.
func (h *Hub) wake(g *group) {
	h.flushAll() // a cohort must not have collected anything when somebody joins
	for len(g.future) > 0 && g.future[0].Start <= g.cursor+1 {
		w := g.future[0]
		h.leave(w)
		switch {
		case w.closed:
		case w.Start == g.cursor+1:
			h.join(w)
		default:
			h.lag(w, w.Start-1)
			h.enqueue(w.stream)
		}
	}
}

// lapped handles a group whose next revision is gone: it goes on behind the ring's tail. Its members are
// left where they are, and canceled when it is their turn to read.
func (h *Hub) lapped(g *group, limit int64) {
	h.flushAll()
	h.lost = h.lost[:0]
	for _, t := range g.exact {
		for _, c := range t.cohorts {
			h.lost = append(h.lost, c.members...)
		}
	}
	g.ranges.each(func(t *target) {
		for _, c := range t.cohorts {
			h.lost = append(h.lost, c.members...)
		}
	})
	for i, w := range h.lost {
		h.lost[i] = nil
		h.leave(w)
		if !w.closed {
			h.lag(w, g.cursor)
			h.enqueue(w.stream)
		}
	}
	g.cursor = min(limit, max(g.cursor+1, h.ring.Tail()))
}

// catchUpAll gives the streams with lagging watchers their turns.
func (h *Hub) catchUpAll() (more bool) {
	// A stream whose watcher is not done goes to the end of the line.
	for i := 0; i < len(h.ready); i++ {
		if h.exhausted() {
			n := copy(h.ready, h.ready[i:])
			clear(h.ready[n:])
			h.ready = h.ready[:n]
			return true
		}
		s := h.ready[i]
		h.ready[i] = nil
		s.ready = false
		if !h.turn(s) && !s.closed {
			h.enqueue(s)
		}
	}
	h.ready = h.ready[:0]
	return false
}

// turn lets one watcher of s read the ring. It returns true when no watcher of s can read on now.
func (h *Hub) turn(s *Stream) (done bool) {
	n := len(s.lagging)
	if s.closed || n == 0 || s.sink.Blocked() {
		return true
	}
	if s.next >= n {
		s.next = 0
	}
	w := s.lagging[s.next]
	s.next++
	h.catchUp(w)
	return false
}

// catchUp lets w read the ring up to its group's cursor, or until its turn ends. Then it joins the
// group, stays where it is, or is canceled.
func (h *Hub) catchUp(w *Watcher) {
	g := w.group
	v := variant{w.PrevKV, w.NoPut, w.NoDelete, w.Fragment}
	buf := h.getBuffer()
	events, last := 0, int64(0)
	revs, sent := 0, 0
	gone := false
	for w.pos < g.cursor && revs < h.turnRevisions && sent+len(buf) < h.turnBytes {
		rev := w.pos + 1
		if rev < h.frontier.Compacted() {
			gone = true
			break
		}
		revs++
		e, lapped := h.ring.Load(rev)
		if lapped {
			gone = true
			break
		}
		if e == nil {
			w.pos = h.ring.Skip(rev, g.cursor)
			continue
		}
		if g.set == All || e.Shard == g.set {
			prevKV := v.prevKV && h.hasPrev(rev)
			for i := range e.Events {
				ev := &e.Events[i]
				if ev.Delete && v.noDelete || !ev.Delete && v.noPut || !w.holds(ev.Key) {
					continue
				}
				buf = appendEvent(buf, ev, prevKV)
				events++
				last = rev
			}
		}
		w.pos = rev
		if len(buf) > h.maxResponse {
			sent += len(buf)
			h.deliver(w, buf, last, events)
			buf, events = buf[:0], 0
			if w.closed || w.stream.sink.Blocked() {
				break
			}
		}
	}
	h.revs += revs
	if events > 0 && !w.closed {
		h.deliver(w, buf, last, events)
	}
	h.putBuffer(buf)
	switch {
	case w.closed:
	case gone || w.pos >= g.cursor && h.isGone(w):
		if h.history == nil || w.pos+1 < h.frontier.Compacted() {
			h.cancelCompacted(w, 0)
			return
		}
		h.leave(w)
		h.dive(w)
	case w.pos >= g.cursor:
		h.leave(w)
		h.join(w)
	}
}

// hasPrev says that an event of rev is sent with its prev_kv to who wants it. etcd reads that at rev-1 when it
// sends the event, and leaves it out where that revision is compacted by then (server/etcdserver/api/v3rpc/watch.go,
// sendLoop). kube-apiserver relies on it: such an event tells it that it came too late.
func (h *Hub) hasPrev(rev int64) bool { return rev > h.frontier.Compacted() }

// isGone says that w wants a revision that it cannot get any more.
func (h *Hub) isGone(w *Watcher) bool {
	next := w.pos + 1
	return next <= h.ring.Tail() || next < h.frontier.Compacted()
}

// deliver sends collected events to a watcher that catches up.
func (h *Hub) deliver(w *Watcher, buf []byte, last int64, events int) {
	w.quiet = false
	w.stream.shown = max(w.stream.shown, last)
	h.work += len(buf)
	h.sendEvents(w, h.encodeHeader(last), buf, false)
	h.stats.Events.Add(uint64(events))
	h.stats.Responses.Add(1)
}

// cancelCompacted ends a watcher as etcd ends one whose next revision is compacted. compact is what a reader
// of the past has found, 0 for nothing. compact_revision
// is the first revision at which a new watch would be accepted, so it is never 0: clients take a
// cancel with 0 for a graceful end.
func (h *Hub) cancelCompacted(w *Watcher, compact int64) {
	s := w.stream
	compact = max(compact, h.frontier.Compacted())
	if h.history == nil {
		compact = max(compact, h.ring.Tail()+1)
	}
	h.stats.Compacted.Add(1)
	h.Remove(w)
	h.sendControl(s, &Response{
		// A promise like any other: no more than was delivered.
		Header:          codec.Header{Revision: w.pos},
		WatchID:         w.ID,
		Canceled:        true,
		CompactRevision: compact,
		// No CancelReason: etcd gives none here, the compact revision says it all.
	})
	if !s.closed {
		s.sink.Ended(w)
	}
}

// cancelFailed ends a watcher whose past cannot be read, and its RPC with it: clients take a cancel without a
// compact revision for a graceful end, and would miss what follows.
func (h *Hub) cancelFailed(w *Watcher, reason string) {
	s := w.stream
	h.Remove(w)
	if !s.closed {
		s.sink.Failed(reason)
	}
}
