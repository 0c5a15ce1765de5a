package server

import (
	"spindle/codec"
	"spindle/watchring"
)

// History is a read of the shards' past; *shard.History. All calls come on loop 0, and so do the answers. After
// Close no answer comes.
type History interface {
	Next(max int, done func(entries []*watchring.Entry, upTo, compact int64, st codec.Status))
	Close()
}

// historySource is the past as the Hub of one loop sees it: questions go to the core's loop by mailbox,
// answers come back the same way.
type historySource struct{ w *watchLoop }

// OpenHistory implements watchring.HistorySource.
func (s *historySource) OpenHistory(set int, from int64) watchring.HistoryReader {
	r := &historyReader{w: s.w}
	s.w.postHome(func() { r.history = s.w.svc.cfg.OpenHistory(set, from) })
	return r
}

// historyReader is one read of the past that belongs to a Hub.
type historyReader struct {
	w      *watchLoop
	closed bool // on the Hub's loop

	history History // on loop 0
}

// Next implements watchring.HistoryReader.
func (r *historyReader) Next(max int, done func(watchring.HistoryChunk)) {
	r.w.postHome(func() {
		r.history.Next(max, func(entries []*watchring.Entry, upTo, compact int64, st codec.Status) {
			c := watchring.HistoryChunk{Entries: entries, UpTo: upTo}
			switch {
			case st == codec.ErrCompacted:
				c.Compact = compact
			case st.Code != codec.OK:
				c.Err = st.Msg
			}
			r.w.post(func() {
				if !r.closed {
					r.w.dirty = true
					done(c)
				}
			})
		})
	})
}

// Close implements watchring.HistoryReader.
func (r *historyReader) Close() {
	r.closed = true
	r.w.postHome(func() { r.history.Close() })
}
