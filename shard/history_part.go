package shard

import (
	"slices"

	"spindle/codec"
	"spindle/watchring"
)

// historyPart is one shard's share of a History.
type historyPart struct {
	h       *History
	s       *shardState
	located bool  // seen and clock are known
	seen    int64 // local revision of the last record that was read
	clock   int64 // its last revision: everything up to there is in queue, or was handed out

	handle  codec.WatchHandle // nil: no stream
	gen     uint64            // of the stream: a sink of an older one is ignored
	over    bool              // the History has begun again, with other parts
	opening bool              // a timer will open it again
	held    bool
	since   int64 // ns; nothing has come since then
	stalls  int   // streams that were given up for their silence, in a row, without a record
	reopens int   // in a row, without a record

	queue []*watchring.Entry // in order, not handed out
	bytes int                // what queue weighs; the stream is held back by this alone (see limit)
	// group is the local revision that is coming in: views into the message, and copies (the first kept) of
	// what earlier fragments brought.
	group   [][]byte
	kept    int
	local   int64
	pos     int64 // the last local revision taken on this stream
	pending []pendingEvent
	foreign foreignKeys
	more    bool // the message under way is not the last fragment
}

// historySink is one opening of a part's stream.
type historySink struct {
	p   *historyPart
	gen uint64
}

// locate finds where the shard's part begins.
func (p *historyPart) locate() {
	h := p.h
	p.s.locate(h.pos, func(at located, st codec.Status) {
		switch {
		case h.closed || p.over || h.failure.Code != codec.OK:
			return
		case st == codec.ErrCompacted && at.next.local > 0 && at.next.first <= h.pos:
			// The record before is gone, but nothing of it is needed, nor of what waited for the next one, which has
			// the next one's first revision.
			p.seen, p.clock = at.next.local-1, at.next.first-1
		case st == codec.ErrCompacted:
			// The member is compacted at the record that follows, or behind it: what had waited there for its first
			// revision is gone.
			h.fail(st, max(at.next.last+1, h.pos+2))
			return
		case st.Code == codec.Unavailable:
			h.c.after(h.c.jitter(20*retryDelay), p.locate)
			return
		case st.Code != codec.OK:
			h.fail(st, 0)
			return
		default:
			p.seen, p.clock = at.base.local, at.base.last
		}
		p.located = true
		h.try()
	})
}

// open begins the stream behind the last record that was read, unless there is one.
func (p *historyPart) open() {
	if p.handle != nil || p.opening {
		return
	}
	p.since = p.h.c.cfg.Now()
	p.gen++
	p.clear()
	p.foreign.rewind()
	p.pos = p.seen
	p.handle = p.h.c.tr.Watch(p.s.cluster, watchAll(p.seen+1), &historySink{p, p.gen})
}

// clear forgets what is not complete.
func (p *historyPart) clear() {
	p.pending, p.group, p.kept, p.held = nil, nil, 0, false
}

func (p *historyPart) close() {
	p.gen++
	if p.handle != nil {
		p.handle.Close()
		p.handle = nil
	}
	p.queue, p.pending, p.group, p.bytes = nil, nil, nil, 0
}

// reopen opens the stream again after a pause.
func (p *historyPart) reopen() {
	if p.handle != nil {
		p.handle.Close()
		p.handle = nil
	}
	p.gen++
	p.clear()
	if p.opening {
		return
	}
	p.opening = true
	d := min(retryDelay<<min(p.reopens, 10), maxReopenDelay)
	p.reopens++
	p.h.c.after(p.h.c.jitter(d), func() {
		if p.opening = false; p.over {
			return
		}
		p.h.try() // which opens it if it is still needed
	})
}

// lookupForeign opens the stream again when it is known what foreign values have replaced.
func (p *historyPart) lookupForeign() {
	if p.handle != nil {
		p.handle.Close()
		p.handle = nil
	}
	p.gen++
	p.clear()
	p.opening = true
	gen := p.gen
	p.foreign.lookup(p.s, func() {
		if gen == p.gen {
			p.opening = false
			p.h.try()
		}
	})
}

// take hands out the first entry.
func (p *historyPart) take() *watchring.Entry {
	e := p.queue[0]
	p.queue[0] = nil
	p.queue = p.queue[1:]
	p.bytes -= e.Size
	return e
}

// limit is how much the part may keep before its stream is held back. What waits for its record does not count: that
// record stands behind it on the same stream, so holding the stream back would wait for ever.
func (p *historyPart) limit() int { return p.h.c.cfg.HistoryBytes }

// resume lets the stream flow again when half of what was kept is gone.
func (p *historyPart) resume() {
	if p.held && p.bytes <= p.limit()/2 && p.handle != nil {
		p.held, p.since = false, p.h.c.cfg.Now()
		p.handle.Hold(false)
	}
}

func (k *historySink) OnEnd(codec.Status) {
	if p := k.p; k.gen == p.gen {
		p.handle = nil
		p.reopen()
	}
}

func (k *historySink) OnMessage(msg []byte) {
	p := k.p
	if k.gen != p.gen {
		return
	}
	p.since = p.h.c.cfg.Now()
	var compacted int64
	var canceled bool
	p.more = false
	first := len(p.group) == 0
	it := codec.Fields{Msg: msg}
	for it.Next() && k.gen == p.gen {
		switch it.Field.Num {
		case 4:
			canceled = it.Field.Val != 0
		case 5:
			compacted = int64(it.Field.Val)
		case 7:
			p.more = it.Field.Val != 0
		case 11:
			local := eventLocal(it.Field.Bytes)
			if !first && local != p.local {
				p.finishGroup()
			}
			first, p.local = false, local
			p.group = append(p.group, it.Field.Bytes)
		}
	}
	switch {
	case k.gen != p.gen:
		return
	case it.Bad:
		p.h.fail(codec.Status{Code: codec.Internal, Msg: "spindle: member cluster " + p.s.name + " sent a watch response that cannot be read"}, 0)
		return
	case canceled && compacted > 0:
		p.compactedUnder(compacted)
		return
	case canceled:
		p.reopen()
		return
	}
	if p.more {
		// The revision may go on in the next fragment.
		for ; p.kept < len(p.group); p.kept++ {
			p.group[p.kept] = append([]byte(nil), p.group[p.kept]...)
		}
	} else {
		p.finishGroup()
	}
	if k.gen != p.gen {
		return
	}
	if !p.held && p.bytes > p.limit() {
		p.held = true
		p.handle.Hold(true)
	}
	p.h.try()
}

// finishGroup takes a local revision that is complete.
func (p *historyPart) finishGroup() {
	if len(p.group) == 0 {
		return
	}
	events, local := p.group, p.local
	p.group, p.kept = p.group[:0], 0
	if local <= p.pos {
		return
	}
	p.pos = local
	var rec Record
	has := false
	for _, e := range events {
		if kv, _, del := eventKVs(e); string(kv.Key) == KeyClock && !del {
			if has = rec.Parse(kv.Value); !has {
				p.h.fail(codec.Status{Code: codec.Internal, Msg: "spindle: unreadable clock record on member cluster " + p.s.name}, 0)
				return
			}
		}
	}
	if !has {
		for _, e := range events {
			if ev := p.foreign.waits(e); ev != nil {
				p.pending = append(p.pending, pendingEvent{append([]byte(nil), ev...), local})
			}
		}
		if len(p.foreign.unknown) > 0 {
			p.lookupForeign()
		}
		return
	}
	entries := p.s.decode(&rec, p.pending, events, &p.foreign, true)
	if len(p.foreign.unknown) > 0 {
		p.lookupForeign()
		return
	}
	slices.SortFunc(entries, func(a, b *watchring.Entry) int { return int(a.Rev - b.Rev) })
	p.pending = nil
	for _, e := range entries {
		if e.Rev > p.h.pos {
			p.queue = append(p.queue, e)
			p.bytes += e.Size
		}
	}
	p.seen, p.clock = local, rec.Last
	p.reopens, p.stalls = 0, 0
}

// compactedUnder ends the History: the member was compacted at a local revision that is above what was to
// be read. The record there says which revision that is.
func (p *historyPart) compactedUnder(local int64) {
	h := p.h
	c := h.c
	p.close()
	p.opening = true // no stream any more
	deadline := c.deadline()
	body := codec.AppendInt(codec.AppendString(nil, rangeKey, KeyClock), rangeRevision, local)
	var ask func()
	ask = func() {
		if h.closed || p.over {
			return
		}
		p.s.call(codec.MethodRange, body, completion(func(resp []byte, st codec.Status, _ bool) {
			kv, found := firstKV(resp)
			rec, ok := ParseRecord(kv.Value)
			switch {
			case p.over:
			case st.Code == codec.OK && found && ok && kv.ModRevision == local:
				h.fail(codec.ErrCompacted, max(rec.Last+1, h.pos+2))
			case st.Code == codec.OK, st == codec.ErrCompacted, c.cfg.Now() >= deadline:
				// What waited there for the next record may be gone too, or even more: behind the newest record
				// nothing is.
				h.fail(codec.ErrCompacted, max(p.s.rec.last+1, h.pos+2))
			default:
				c.after(c.jitter(20*retryDelay), ask)
			}
		}))
	}
	ask()
}
