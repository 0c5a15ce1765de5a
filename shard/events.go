package shard

import (
	"spindle/codec"
	"spindle/watchring"
)

// publish puts the events of one batch, and what waited for its record, into the ring: decoded once,
// stamps removed, in the form in which every watcher gets them.
//
// It returns false if something about foreign values must be looked up first: then the stream begins again at
// the last record.
func (s *shardState) publish(rec *Record, events [][]byte) bool {
	entries := s.decode(rec, s.pending, events, &s.foreign, false)
	if len(s.foreign.unknown) > 0 {
		s.lookupForeign()
		return false
	}
	for _, en := range entries {
		s.c.ring.Publish(en)
		for i := range en.Events {
			s.c.recent.changed(en.Events[i].Key, en.Rev)
		}
	}
	return true
}

// decode makes entries of the events of one batch, and of what waited for its record. past says that they
// are read a second time, for a History: nothing new is learnt from them. The record's own event is among events. What they do to foreign values is
// taken from foreign.
func (s *shardState) decode(rec *Record, pending []pendingEvent, events [][]byte, foreign *foreignKeys, past bool) []*watchring.Entry {
	size := 0
	for _, p := range pending {
		size += len(p.msg) + 2*codec.MaxKVHeader
	}
	for _, e := range events {
		size += len(e) + 2*codec.MaxKVHeader
	}
	// One event is the record's. Entries are for revisions: a delete of many keys has one.
	n := min(len(pending)+len(events)-1, int(rec.Last-rec.First)+2)
	e := entries{s: s, past: past, foreign: foreign, buf: make([]byte, 0, size+foreign.bytes),
		entries: make([]watchring.Entry, 0, n), events: make([]watchring.Event, n), all: make([]*watchring.Entry, 0, n)}
	first := rec.First
	if s.c.cfg.Sabotage.UnrecordedBehind {
		first = max(s.rec.last, 1)
	}
	for _, p := range pending {
		e.add(first, p.msg, rec)
	}
	e.known = rec.Last == s.taught && rec.Proxy == s.c.cfg.Proxy && len(pending) == 0 // which have just taught it something else
	for _, ev := range events {
		e.add(0, ev, rec)
	}
	if len(foreign.unknown) == 0 {
		foreign.recorded()
	}
	return e.all
}

// entries collects the events of one batch into ring entries. What they are made of comes in one piece for the whole batch: they
// leave the ring together, too.
type entries struct {
	s     *shardState
	past  bool
	known bool // the cache of create revisions knows what was put
	// foreign has the keys whose value was foreign until now.
	foreign *foreignKeys
	buf     []byte
	entries []watchring.Entry // room for as many as there are events
	events  []watchring.Event // one for each entry; an entry with more has its own
	cur     *watchring.Entry
	top     int64 // the largest revision of an entry
	all     []*watchring.Entry
}

// add takes one event. rev is its revision, or 0 to read it from the stamp or the record.
func (e *entries) add(rev int64, ev []byte, rec *Record) {
	s := e.s
	kv, prev, del := eventKVs(ev)
	if len(kv.Key) == 0 || kv.Key[0] == 0 {
		if string(kv.Key) != KeyClock && !e.past {
			s.reservedChanged(kv, prev, del)
		}
		return
	}
	local := kv
	var st Stamp
	if del {
		if rev == 0 {
			var ok bool
			if rev, ok = rec.RevOfDelete(kv.Key); !ok {
				rev = rec.First
			}
		}
	} else {
		var user []byte
		var ok bool
		st, user, ok = ParseStamp(kv.Value)
		if !ok || st.Rev < rec.First || st.Rev > rec.Last {
			if !e.past {
				s.c.stats.Foreign++
				s.c.log.Warn("a value without a valid stamp was written to a member directly; it is not shown", "shard", s.name)
			}
			return
		}
		rev = st.Rev
		kv.Value, kv.CreateRevision, kv.ModRevision = user, st.Create, st.Rev
		kv.Version += st.VersionOffset
		if st.Lease != 0 {
			kv.Lease = st.Lease
		}
	}
	if was, ok := e.foreign.take(kv.Key, local.ModRevision); ok {
		if del && was.known && was.old == nil {
			return // clients never saw it
		}
		prev = codec.KV{}
		if was.old != nil {
			prev, _ = codec.ParseKV(was.old)
		}
	}
	en := e.entry(rev)
	start := len(e.buf)
	dst := e.buf
	if del {
		dst = codec.AppendInt(dst, 1, 1)
		kv = codec.KV{Key: kv.Key, ModRevision: rev}
		if !e.past {
			s.c.creates.Deleted(kv.Key, rev)
		}
	} else if !e.past && !e.known {
		s.c.creates.Learn(kv.Key, local.CreateRevision, st.Create, st.Rev)
	}
	var m int
	dst, m = codec.BeginMessage(dst, 2)
	dst = codec.AppendKV(dst, &kv)
	dst = codec.EndMessage(dst, m)
	noPrev := len(dst) - start
	if prev.Key != nil {
		ok := unstamp(&prev)
		if !ok && e.foreign.missing(&local, &prev) {
			return
		}
		if ok {
			dst, m = codec.BeginMessage(dst, 3)
			dst = codec.AppendKV(dst, &prev)
			dst = codec.EndMessage(dst, m)
		}
	}
	e.buf = dst
	body := dst[start:len(dst):len(dst)]
	en.Events = append(en.Events, watchring.Event{
		Key: keyOf(body), Delete: del, Create: !del && st.Create == st.Rev, Body: body, NoPrev: noPrev,
	})
	en.Size += len(body) + eventOverhead
}

// eventOverhead is what an event and its share of an entry weigh besides the encoded bytes.
const eventOverhead = 160

// keyOf returns the key inside an encoded event, so that the event does not hold a second copy of it.
func keyOf(body []byte) []byte {
	it := codec.Fields{Msg: body}
	for it.Next() {
		if it.Field.Num == 2 {
			kv, _ := codec.ParseKV(it.Field.Bytes)
			return kv.Key
		}
	}
	return nil
}

// entry returns the entry of a revision. Its events need not stand together: unrecorded ones share the first revision of a batch.
func (e *entries) entry(rev int64) *watchring.Entry {
	if e.cur != nil && e.cur.Rev == rev {
		return e.cur
	}
	if rev <= e.top {
		for _, en := range e.all {
			if en.Rev == rev {
				e.cur = en
				return en
			}
		}
	}
	e.top = max(e.top, rev)
	n := len(e.entries)
	var room []watchring.Event
	if n < len(e.events) { // else somebody's stamps are not the record's
		room = e.events[n : n : n+1]
	}
	e.entries = append(e.entries, watchring.Entry{Rev: rev, Shard: e.s.idx, Events: room})
	e.cur = &e.entries[n]
	e.all = append(e.all, e.cur)
	return e.cur
}
