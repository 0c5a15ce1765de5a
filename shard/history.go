package shard

import (
	"slices"
	"time"

	"spindle/codec"
	"spindle/watchring"
)

// Bounds of reads of the past.
const (
	// maxHistories is how many Histories of one set (a shard, or all of them) read at a time; further ones wait in
	// order. Those that wait for a dead shard do not keep others waiting for theirs.
	maxHistories = 16
	// idleHistory is how long a History may keep its place without being asked, if others wait for one: its
	// client reads slowly, or not at all. It begins again where it is when it is asked and has a place again.
	idleHistory = 5 * time.Second
	// defaultHistoryBytes is how much a History keeps of one shard before it holds that shard's stream back.
	// What is on its way then still arrives: at most one stream window. Deletes of ended leases that no record covers
	// yet come on top: as many as ended between two records of the shard.
	defaultHistoryBytes = 1 << 20
)

// History reads what happened from a revision on out of the shards' own histories, for watchers that need
// what the ring does not hold any more. Each shard's stream is read once more, from where the revision lies
// on it, and they are merged by revision. It has no end of its own: it goes as far as the frontier, and
// further as that rises, until it is closed.
//
// A History belongs to the core's goroutine. What it keeps is bounded by the shards it reads, not by how much
// happened: a shard that is ahead of the others is held back.
type History struct {
	c       *Core
	set     int // shard index, or watchring.All
	pos     int64
	parts   []*historyPart
	active  bool  // has its place among maxHistories
	idle    int64 // ns; nobody has asked since then
	started bool
	closed  bool
	stall   bool // a timer looks for stalled streams

	// Next's, until it is answered; done is nil when nobody asks.
	max     int
	done    func(entries []*watchring.Entry, upTo, compact int64, st codec.Status)
	failure codec.Status
	compact int64
}

// OpenHistory begins to read what happened on a shard, or on all of them (watchring.All), from revision
// from on, which may lie inside a batch. It must be closed.
func (c *Core) OpenHistory(set int, from int64) *History {
	h := &History{c: c, set: set, pos: max(from, 1) - 1, idle: c.cfg.Now()}
	h.begin()
	c.histories = append(c.histories, h)
	c.admitHistories()
	return h
}

// begin makes its parts, which know nothing yet.
func (h *History) begin() {
	h.parts, h.started = nil, false
	for i, s := range h.c.shards {
		if h.set == watchring.All || h.set == i {
			h.parts = append(h.parts, &historyPart{h: h, s: s})
		}
	}
}

// admitHistories gives free places to those that have waited longest. While somebody waits, it looks now and then
// who does not need his.
func (c *Core) admitHistories() {
	waits := false
	active := make(map[int]int)
	for _, h := range c.histories {
		if h.active {
			active[h.set]++
		}
	}
	for _, h := range c.histories {
		switch {
		case h.active:
		case active[h.set] < maxHistories:
			h.active = true
			active[h.set]++
			c.frontierRose = c.frontierRose || h.done != nil // it begins at the end of the turn
		default:
			waits = true
		}
	}
	if waits && !c.historyTimer && c.state == stateReady {
		c.historyTimer = true
		c.after(idleHistory/4, func() {
			c.historyTimer = false
			c.yieldHistories()
		})
	}
}

// yieldHistories takes the places of those that were not asked for long, for those of their sets that wait. They
// go to the end of the line.
func (c *Core) yieldHistories() {
	now := c.cfg.Now()
	waiting := make(map[int]int)
	for _, h := range c.histories {
		if !h.active && h.done != nil {
			waiting[h.set]++
		}
	}
	for _, h := range slices.Clone(c.histories) {
		if !h.active || h.done != nil || h.failure.Code != codec.OK || waiting[h.set] == 0 || now-h.idle < int64(idleHistory) {
			continue
		}
		waiting[h.set]--
		for _, p := range h.parts {
			p.close()
			p.over = true
		}
		h.begin()
		h.active = false
		i := slices.Index(c.histories, h)
		c.histories = append(slices.Delete(c.histories, i, i+1), h)
	}
	c.admitHistories()
}

// Next asks for the entries that follow, about max bytes of them. done is called once, perhaps from within
// Next, as soon as there is anything to say: entries, in order, are all that happened up to revision upTo, which
// is above the one of the time before. Entries are shared and must not be changed.
//
// ErrCompacted says that the past is gone, and from which revision on it is not. The History is at its end
// after an error.
func (h *History) Next(max int, done func(entries []*watchring.Entry, upTo, compact int64, st codec.Status)) {
	h.max, h.done = max, done
	h.try()
}

// Close ends the read. done is not called any more.
func (h *History) Close() {
	if h.closed {
		return
	}
	h.closed, h.done = true, nil
	for _, p := range h.parts {
		p.close()
	}
	h.parts = nil
	c := h.c
	for i, o := range c.histories {
		if o == h {
			c.histories = append(c.histories[:i], c.histories[i+1:]...)
			break
		}
	}
	c.admitHistories()
	if c.state == stateReady {
		c.frontierRose = true // who has a place now begins at the end of the turn
	}
}

// tryHistories looks who can go on, when a frontier or the compact revision rose.
func (c *Core) tryHistories() {
	if len(c.histories) == 0 {
		return
	}
	for _, h := range append([]*History(nil), c.histories...) {
		h.try()
	}
}

// fail ends the read with st, for who asks or will ask.
func (h *History) fail(st codec.Status, compact int64) {
	if h.closed || h.failure.Code != codec.OK {
		return
	}
	h.failure, h.compact = st, compact
	for _, p := range h.parts {
		p.close()
	}
	h.try()
}

func (h *History) answer(entries []*watchring.Entry, st codec.Status) {
	done := h.done
	h.done, h.idle = nil, h.c.cfg.Now()
	done(entries, h.pos, h.compact, st)
}

// try answers Next if there is something to say.
func (h *History) try() {
	c := h.c
	if h.done == nil || !h.active || h.closed || c.state != stateReady {
		return
	}
	if compacted := c.frontier.Compacted(); h.failure.Code == codec.OK && h.pos+1 < compacted {
		h.fail(codec.ErrCompacted, compacted)
		return
	}
	if h.failure.Code != codec.OK {
		h.answer(nil, h.failure)
		return
	}
	f := c.frontier.Get(h.set)
	if !h.started {
		if f < h.pos {
			return // where it begins on the shards is not certain yet
		}
		h.started = true
		for _, p := range h.parts {
			p.locate()
		}
	}
	// Everything up to the frontier lies at or below the last record that the shard's own stream has shown.
	upTo := f
	for _, p := range h.parts {
		if h.failure.Code != codec.OK || h.closed {
			return // locate has found out that it is compacted
		}
		switch {
		case !p.located:
			upTo = h.pos
		case p.seen < p.s.rec.local:
			p.open()
			if !c.cfg.Sabotage.HistoryAhead {
				upTo = min(upTo, p.clock)
			}
		}
	}
	if upTo <= h.pos {
		h.watchStall()
		return
	}
	entries, size := []*watchring.Entry(nil), 0
	for {
		var first *historyPart
		for _, p := range h.parts {
			if len(p.queue) > 0 && p.queue[0].Rev <= upTo && (first == nil || p.queue[0].Rev < first.queue[0].Rev) {
				first = p
			}
		}
		if first == nil {
			break
		}
		e := first.take()
		if e.Rev <= h.pos {
			continue // before the start, inside its batch
		}
		entries = append(entries, e)
		if size += e.Size; size >= h.max {
			upTo = e.Rev
			break
		}
	}
	h.pos = upTo
	for _, p := range h.parts {
		p.resume()
	}
	h.answer(entries, codec.Status{})
}

// watchStall opens streams again that bring nothing although somebody waits for them. A member may need long for
// its first data: each silent stream is given more time than the one before it.
func (h *History) watchStall() {
	if h.stall {
		return
	}
	h.stall = true
	now := h.c.cfg.Now()
	for _, p := range h.parts {
		p.since = now
	}
	h.c.after(streamStall, h.lookStall)
}

func (h *History) lookStall() {
	h.stall = false
	if h.closed || h.done == nil || !h.active || h.failure.Code != codec.OK {
		return
	}
	now := h.c.cfg.Now()
	for _, p := range h.parts {
		switch {
		case p.handle == nil || p.held || p.seen >= p.s.rec.local:
			p.since = now
		case now-p.since >= int64(stallTime(p.stalls)):
			p.stalls++
			p.reopen()
		}
	}
	h.stall = true
	h.c.after(streamStall, h.lookStall)
}
