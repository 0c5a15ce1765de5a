package shard

import (
	"spindle/codec"
)

// located says where a revision lies on a shard.
type located struct {
	// base is the last record at or below the revision.
	base point
	// inside says that the next record's batch began at or below the revision: the state lies within it.
	inside bool
	next   point
}

// locate finds where revision rev lies on the shard: in the index, else by a binary search over the
// clock key's own history. The shard's frontier must be at rev. ErrCompacted when the member has no
// history that old, Unavailable at once when the shard was left out at the start and its stream was not opened since.
func (s *shardState) locate(rev int64, f func(located, codec.Status)) {
	if s.absent != "" || s.returning {
		// Nothing is known of its past yet.
		st := codec.Status{Code: codec.Unavailable, Msg: "etcdserver: member cluster " + s.name + " is refused: " + s.banned}
		s.c.after(0, func() { f(located{}, st) })
		return
	}
	s.find(rev, f)
}

// find is locate for a shard whose stream was not opened, too.
func (s *shardState) find(rev int64, f func(located, codec.Status)) {
	if s.rec.last <= rev {
		f(located{base: s.rec}, codec.Status{})
		return
	}
	if base, next, ok := s.localAt(rev); ok {
		f(located{base: base, next: next, inside: next.local > 0 && next.first <= rev}, codec.Status{})
		return
	}
	hi := s.rec
	if len(s.points) > 0 {
		hi = s.points[0]
	}
	(&search{s: s, rev: rev, hi: hi, f: f, deadline: s.c.deadline()}).step()
}

// search looks for the last record at or below rev. Between lo and hi of the shard's local revisions
// lies the change from "at or below" to "above". It is the Completion of its reads.
type search struct {
	s        *shardState
	rev      int64
	lo       int64 // newest local revision known to show base, 0 when none is known
	base     point
	floor    int64 // local revisions at or below are compacted
	hi       point // a record above rev
	mid      int64
	compact  bool
	f        func(located, codec.Status)
	deadline int64
}

func (q *search) step() {
	low := max(q.lo, q.floor)
	if low >= q.hi.local-1 {
		if q.lo == 0 {
			q.f(located{next: q.hi}, codec.ErrCompacted)
			return
		}
		q.f(located{base: q.base, next: q.hi, inside: q.hi.first <= q.rev}, codec.Status{})
		return
	}
	q.mid = low + (q.hi.local-low)/2
	q.send()
}

func (q *search) send() {
	c := q.s.c
	body := codec.AppendString(c.scratch[:0], rangeKey, KeyClock)
	body = codec.AppendInt(body, rangeRevision, q.mid)
	c.scratch = body
	q.s.call(codec.MethodRange, body, q)
}

func (q *search) Complete(resp []byte, st codec.Status, sent bool) {
	c := q.s.c
	switch {
	case st == codec.ErrCompacted:
		q.floor = q.mid
		q.step()
		return
	case st.Code != codec.OK && c.cfg.Now() >= q.deadline:
		q.f(located{}, codec.ErrTimeout)
		return
	case st.Code != codec.OK:
		c.after(c.jitter(retryDelay), q.send)
		return
	}
	kv, found := firstKV(resp)
	rec, ok := ParseRecord(kv.Value)
	switch {
	case !found: // before the clock was created
		q.floor = q.mid
	case !ok, kv.ModRevision > q.mid:
		// The second would have the search go on for ever.
		q.f(located{}, codec.Status{Code: codec.Internal, Msg: "spindle: unreadable clock record on member cluster " + q.s.name})
		return
	case rec.Last <= q.rev:
		q.lo, q.base = q.mid, point{rec.First, rec.Last, kv.ModRevision}
	default:
		q.hi = point{rec.First, rec.Last, kv.ModRevision}
	}
	q.step()
}

// streamStart finds the record from which the shard's stream continues: the last one at or below rev, or
// the oldest that there is.
func (s *shardState) streamStart(rev int64, f func(point, codec.Status)) {
	s.find(rev, func(at located, st codec.Status) {
		switch {
		case s.c.state != stateStarting && s.c.state != stateReady:
		case st == codec.ErrCompacted:
			f(at.next, codec.Status{}) // the oldest record that is left
		case st == codec.ErrTimeout:
			s.c.after(s.c.jitter(20*retryDelay), func() { s.streamStart(rev, f) })
		case st.Code != codec.OK:
			f(at.base, st)
		default:
			s.startBack(startBack, at.base, f)
		}
	})
}

// startBack is how many local revisions of a shard its stream goes back at least, if the member still has them. A
// foreign put that nobody has taken over may stand before records: those of a proxy that ended a moment later, and
// those of rebuilds, behind which half a ring of revisions is soon over.
const startBack = 256

// startBack calls f with the record that lies so many local revisions back, or with p if that is older.
func (s *shardState) startBack(back int64, p point, f func(point, codec.Status)) {
	c := s.c
	local := s.rec.local - back
	if back == 0 || local >= p.local {
		f(p, codec.Status{})
		return
	}
	if local < 1 {
		s.startBack(back/2, p, f)
		return
	}
	body := codec.AppendInt(codec.AppendString(nil, rangeKey, KeyClock), rangeRevision, local)
	c.tr.Call(s.cluster, codec.MethodRange, body, c.cfg.ShardTimeout, completion(func(resp []byte, st codec.Status, _ bool) {
		kv, found := firstKV(resp)
		rec, ok := ParseRecord(kv.Value)
		switch {
		case c.state != stateStarting && c.state != stateReady:
		case st == codec.ErrCompacted || st.Code == codec.OK && !found:
			s.startBack(back/2, p, f) // the member has not as much, or the clock is younger
		case st.Code != codec.OK:
			c.after(c.jitter(20*retryDelay), func() { s.startBack(back, p, f) })
		case !ok || kv.ModRevision > local:
			f(p, codec.Status{Code: codec.Internal, Msg: "spindle: unreadable clock record on member cluster " + s.name})
		default:
			f(point{rec.First, rec.Last, kv.ModRevision}, codec.Status{})
		}
	}))
}
