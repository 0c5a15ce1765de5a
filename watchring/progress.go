package watchring

import (
	"math"

	"spindle/codec"
)

// Notify sends the periodic progress notifications: to every watcher that asked for them and to which
// nothing was sent since the last Notify. Watchers that are behind, or whose sink is blocked, or that
// start above what their group has seen, get none. The owner calls it once per interval; a watcher
// that is quiet hears of it after one to two intervals, as with etcd.
func (h *Hub) Notify() {
	if h.working {
		return
	}
	h.working = true
	defer h.finish()
	for i := 0; i < len(h.notify); i++ {
		w := h.notify[i]
		if w.closed {
			continue
		}
		if w.quiet && w.state == member && !w.stream.sink.Blocked() {
			h.progress(w.stream, w.ID, w.group.cursor)
		}
		w.quiet = true
	}
}

func (h *Hub) progress(s *Stream, id, rev int64) {
	h.stats.Progress.Add(1)
	s.shown = max(s.shown, rev)
	h.sendControl(s, &Response{Header: codec.Header{Revision: rev}, WatchID: id})
}

// answer sends the on-demand progress answers that are due.
func (h *Hub) answer() {
	kept := h.asking[:0]
	for i := 0; i < len(h.asking); i++ {
		s := h.asking[i]
		if h.answerStream(s) {
			s.asking = false
			continue
		}
		kept = append(kept, s)
	}
	clear(h.asking[len(kept):])
	h.asking = kept
}

// answerStream answers s if it can, and returns true when s is owed nothing any more.
func (h *Hub) answerStream(s *Stream) bool {
	if s.want == 0 {
		return true // closed, or it has no watches any more
	}
	if len(s.lagging) > 0 || s.deep > 0 || s.sink.Blocked() {
		return false
	}
	// What every watcher has: the cursors' minimum. A watcher that has not started has its group's too,
	// but the answer must not be below its start - 1: its client would resume from the answer.
	rev, start := int64(math.MaxInt64), int64(0)
	for _, w := range s.watchers {
		if w.closed {
			continue
		}
		rev = min(rev, w.group.cursor)
		if rev < s.want {
			return false
		}
		start = max(start, w.Start)
	}
	if rev < start-1 {
		return false
	}
	if s.wantNext > rev {
		s.want, s.wantNext = s.wantNext, 0
	} else {
		s.want, s.wantNext = 0, 0
	}
	if rev >= s.shown {
		h.progress(s, AllWatches, rev)
		return s.want == 0
	}
	for _, w := range s.watchers {
		if !w.closed && w.state != lagging && w.state != deep { // added meanwhile
			h.progress(s, w.ID, w.group.cursor)
		}
	}
	return s.want == 0
}
