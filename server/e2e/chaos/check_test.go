package chaos

import (
	"fmt"
	"sort"
	"time"
)

// maxComplaints is how much of what is wrong is told.
const maxComplaints = 30

// history is what really happened, in order of revisions, and the state that it leads to.
type history struct {
	events  []*event
	keys    []string // all that were ever written, sorted
	place   map[string]int
	byValue map[string]*event
	deletes map[string]*event // by deleteID
}

func deleteID(key string, prevMod int64) string { return fmt.Sprintf("%s\x00%d", key, prevMod) }

// from returns the place of the first event at or above rev.
func (h *history) from(rev int64) int {
	return sort.Search(len(h.events), func(i int) bool { return h.events[i].rev >= rev })
}

// verdict is what a check has found.
type verdict struct {
	wrong []string
	// What was checked.
	acked, unknown, unknownDone, wide, reads, segments, events, leases int
}

func (v *verdict) complain(format string, args ...any) {
	v.wrong = append(v.wrong, fmt.Sprintf(format, args...))
}

// check holds everything in the record against its history.
func (r *record) check() *verdict {
	r.mu.Lock()
	defer r.mu.Unlock()
	v := &verdict{wrong: append([]string(nil), r.wrong...)}
	h := r.buildHistory(v)
	v.events = len(h.events)
	r.checkWrites(v, h)
	r.checkOrder(v)
	r.checkReads(v, h)
	r.checkSegments(v, h)
	r.checkLeases(v, h)
	return v
}

// buildHistory checks that the history is consistent in itself: create revisions, versions and previous versions
// follow from one another, so that no event of a key is missing between two others.
func (r *record) buildHistory(v *verdict) *history {
	h := &history{events: r.history, place: map[string]int{}, byValue: map[string]*event{}, deletes: map[string]*event{}}
	state := map[string]*event{}
	var last int64
	for _, e := range h.events {
		if e.rev < last {
			v.complain("history: revision %d after %d", e.rev, last)
		}
		last = e.rev
		before := state[e.key]
		create, version, prev := e.rev, int64(1), int64(0)
		if before != nil {
			create, version, prev = before.create, before.version+1, before.rev
		}
		if e.prev != prev {
			v.complain("history: prev_kv of %s at %d is of revision %d, what was there is of %d", e.key, e.rev, e.prev, prev)
		}
		if _, known := h.place[e.key]; !known {
			h.place[e.key] = 0
			h.keys = append(h.keys, e.key)
		}
		if e.del {
			if before == nil {
				v.complain("history: %s at %d deletes what is not there", e.key, e.rev)
				continue
			}
			h.deletes[deleteID(e.key, before.rev)] = e
			e.lease = before.lease // whose key it was
			delete(state, e.key)
			continue
		}
		if e.create != create || e.version != version {
			v.complain("history: %s at %d has create %d version %d, expected %d and %d", e.key, e.rev, e.create, e.version, create, version)
		}
		if other := h.byValue[e.value]; other != nil {
			v.complain("history: %q was written twice: %s at %d and %s at %d", e.value, other.key, other.rev, e.key, e.rev)
		}
		h.byValue[e.value] = e
		state[e.key] = e
	}
	sort.Strings(h.keys)
	for i, k := range h.keys {
		h.place[k] = i
	}
	return h
}

// find returns the event of a write, nil if it is not there.
func (h *history) find(w write) *event {
	if w.del {
		return h.deletes[deleteID(w.key, w.prevMod)]
	}
	return h.byValue[w.value]
}

// checkWrites: an acknowledged request is in the history at its revision, whole; one without an answer is there whole or
// not at all; one that was refused is not; and nothing else is, but for keys that went with their lease.
func (r *record) checkWrites(v *verdict, h *history) {
	owner := map[int64]*request{} // of a revision
	explained := map[*event]bool{}
	// claim looks a request up at a revision (0: wherever its first write is) and reports whether it is there.
	claim := func(q *request, rev int64) bool {
		missing := 0
		for _, w := range q.writes {
			e := h.find(w)
			if e != nil && rev == 0 {
				rev = e.rev
			}
			if e == nil || e.rev != rev || e.key != w.key || e.lease != w.lease && !w.del {
				missing++
				if e != nil {
					v.complain("%v: in the history its %s is at revision %d (lease %x)", q, e.key, e.rev, e.lease)
				}
				continue
			}
			explained[e] = true
		}
		if missing == len(q.writes) {
			return false
		}
		if missing > 0 {
			v.complain("%v: only a part of it is in the history, at %d", q, rev)
		}
		if o := owner[rev]; o != nil {
			v.complain("revision %d belongs to two requests: %v and %v", rev, o, q)
		}
		owner[rev] = q
		return true
	}
	var unknown, refused []*request
	for _, q := range r.requests {
		switch {
		case len(q.writes) == 0:
		case q.acked:
			v.acked++
			if !claim(q, q.rev) {
				v.complain("acknowledged, but not in the history: %v", q)
			}
		case q.code == 0 || q.definite():
			refused = append(refused, q)
		default:
			unknown = append(unknown, q)
		}
	}
	for _, q := range unknown {
		v.unknown++
		if e := h.find(q.writes[0]); q.writes[0].del && e != nil && explained[e] {
			continue // somebody else's
		}
		if claim(q, 0) {
			v.unknownDone++
		}
	}
	for _, q := range refused {
		for _, w := range q.writes {
			if e := h.find(w); e != nil && !(w.del && explained[e]) {
				v.complain("refused, but in the history at %d: %v", e.rev, q)
			}
		}
	}
	r.checkWide(v, h, owner, explained)
	for _, e := range h.events {
		if !explained[e] && !(e.del && e.lease != 0) {
			v.complain("nobody asked for what the history has at %d: %s (delete: %v, of %d); at that revision: %v", e.rev, e.key, e.del, e.prev, owner[e.rev])
		}
	}
}

// known returns what says which revision was known to somebody before a time; 0: none.
func (r *record) known() func(time.Duration) int64 {
	all := append([]shown(nil), r.shown...)
	for _, q := range r.requests {
		if q.code == 0 && q.rev > 0 {
			all = append(all, shown{q.ret, q.rev})
		}
	}
	sort.Slice(all, func(i, j int) bool { return all[i].at < all[j].at })
	for i := 1; i < len(all); i++ {
		all[i].rev = max(all[i].rev, all[i-1].rev)
	}
	return func(at time.Duration) int64 {
		i := sort.Search(len(all), func(i int) bool { return all[i].at >= at })
		if i == 0 {
			return 0
		}
		return all[i-1].rev
	}
}

// checkOrder: a write's revision, and that of a linearizable read, is above (at least) every revision that anybody was
// shown before it began.
func (r *record) checkOrder(v *verdict) {
	known := r.known()
	for _, q := range r.requests {
		if q.code != 0 || q.stale || q.rev == 0 {
			continue
		}
		if floor := known(q.call); q.rev < floor || q.acked && q.rev == floor {
			v.complain("revision %d was known before this began: %v", floor, q)
		}
	}
}

// checkReads replays the history and holds every answer against the state at its revision.
func (r *record) checkReads(v *verdict, h *history) {
	type asked struct {
		*read
		q  *request
		at int64
	}
	var reads []asked
	for _, q := range r.requests {
		for i := range q.reads {
			rd := &q.reads[i]
			at := q.rev
			if rd.at > 0 {
				if at = rd.at; q.rev < at {
					v.complain("a read at %d has header %d: %v", at, q.rev, q)
				}
			}
			reads = append(reads, asked{rd, q, at})
		}
	}
	v.reads = len(reads)
	sort.SliceStable(reads, func(i, j int) bool { return reads[i].at < reads[j].at })
	state := make([]*event, len(h.keys))
	next := 0
	for _, rd := range reads {
		for ; next < len(h.events) && h.events[next].rev <= rd.at; next++ {
			e := h.events[next]
			state[h.place[e.key]] = e
			if e.del {
				state[h.place[e.key]] = nil
			}
		}
		var sum uint64
		var count int64
		var mods []int64
		for i := sort.SearchStrings(h.keys, rd.key); i < len(h.keys) && within(h.keys[i], rd.key, rd.end); i++ {
			e := state[i]
			if e == nil {
				continue
			}
			if count++; !rd.countOnly && (rd.limit == 0 || count <= rd.limit) {
				sum = sum*31 + e.sum
				mods = append(mods, e.rev)
			}
		}
		if sum != rd.sum || len(mods) != len(rd.mods) || count != rd.count || !rd.countOnly && rd.more != (int64(len(mods)) < count) {
			v.complain("read of [%s, %s) limit %d at %d: %s; in the history %d keys, count %d; %v",
				rd.key, rd.end, rd.limit, rd.at, describeMods(rd.read, mods), len(mods), count, rd.q)
		}
	}
}

// describeMods says where a read differs.
func describeMods(rd *read, want []int64) string {
	s := fmt.Sprintf("%d keys, count %d, more %v", len(rd.mods), rd.count, rd.more)
	for i := range max(len(rd.mods), len(want)) {
		var got, exp int64
		if i < len(rd.mods) {
			got = rd.mods[i]
		}
		if i < len(want) {
			exp = want[i]
		}
		if got != exp {
			return s + fmt.Sprintf(", key %d is of revision %d instead of %d", i, got, exp)
		}
	}
	return s
}

// checkSegments holds every watch against the history: each event once, in order, none missing, none more.
func (r *record) checkSegments(v *verdict, h *history) {
	for _, seg := range r.segments {
		v.segments++
		i := h.from(seg.start)
		for n, got := range seg.seen {
			for i < len(h.events) && !within(h.events[i].key, seg.key, seg.end) {
				i++
			}
			if i == len(h.events) {
				v.complain("%s: event %d of revision %d is not in the history", seg.who, n, got.rev)
				break
			}
			e := h.events[i]
			i++
			if got.rev != e.rev || got.sum != e.sum {
				v.complain("%s: event %d is of revision %d, in the history it is of %d (%s)", seg.who, n, got.rev, e.rev, e.key)
				break
			}
			if seg.prevKV && got.prev != e.prev && (got.prev != 0 || e.rev > r.compacted+1) {
				v.complain("%s: prev_kv at %d is of revision %d instead of %d", seg.who, e.rev, got.prev, e.prev)
			}
		}
		for ; i < len(h.events) && h.events[i].rev <= seg.upto; i++ {
			if e := h.events[i]; within(e.key, seg.key, seg.end) {
				v.complain("%s said that it is at %d, and did not bring revision %d (%s)", seg.who, seg.upto, e.rev, e.key)
				break
			}
		}
		v.events += len(seg.seen)
	}
}

// checkLeases: the keys of a lease do not go before it may end, and are gone when its revoke was answered.
func (r *record) checkLeases(v *verdict, h *history) {
	v.leases = len(r.leases)
	left := map[string]*event{}
	for _, e := range h.events {
		if !e.del {
			if e.lease != 0 {
				left[e.key] = e
			}
			continue
		}
		delete(left, e.key)
		life := r.leases[e.lease]
		if e.lease == 0 || life == nil {
			continue
		}
		at := e.heard
		if at < life.alive && (life.revoked == 0 || at < life.revoked) {
			v.complain("%s went at %d, known at %.3f, but its lease %x lives until %.3f at least", e.key, e.rev, at.Seconds(), e.lease, life.alive.Seconds())
		}
		if life.ended != 0 && e.rev > life.endedRev {
			v.complain("%s went at %d, after the revoke of its lease %x was answered at %d", e.key, e.rev, e.lease, life.endedRev)
		}
	}
	for _, e := range left {
		v.complain("%s of revision %d is still there; its lease %x has ended", e.key, e.rev, e.lease)
	}
}
