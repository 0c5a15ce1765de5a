package chaos

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/grpc/codes"
)

// machine makes records as a perfect etcd would: one request after the other, a millisecond each.
type machine struct {
	r     *rand.Rand
	rec   *record
	rev   int64
	at    time.Duration
	state map[string]*event
	ids   int
}

func (m *machine) tick() time.Duration {
	m.at += time.Millisecond
	return m.at
}

// apply makes the events of a request at one revision.
func (m *machine) apply(writes []write) {
	m.rev++
	for _, w := range writes {
		before := m.state[w.key]
		e := &event{rev: m.rev, key: w.key, del: w.del, heard: m.at}
		if before != nil {
			e.prev = before.rev
		}
		if w.del {
			e.sum = sumOf(w.key, "", 0, e.rev, 0, 0)
			delete(m.state, w.key)
		} else {
			e.value, e.lease, e.create, e.version = w.value, w.lease, e.rev, 1
			if before != nil {
				e.create, e.version = before.create, before.version+1
			}
			e.sum = sumOf(e.key, e.value, e.create, e.rev, e.version, e.lease)
			m.state[w.key] = e
		}
		m.rec.history = append(m.rec.history, e)
	}
}

// write makes a request that takes effect (or not), with an answer (or none).
func (m *machine) write(happens, answered bool, s *swap, writes ...write) *request {
	q := &request{what: "write", call: m.tick(), writes: writes, swap: s, acked: happens && answered}
	if happens {
		m.apply(writes)
	}
	if q.rev = m.rev; !answered {
		q.code, q.rev = codes.Unavailable, 0
	}
	q.ret = m.tick()
	m.rec.requests = append(m.rec.requests, q)
	return q
}

// read makes a read of all keys.
func (m *machine) read() *request {
	q := &request{what: "read", call: m.tick(), rev: m.rev}
	keys := make([]string, 0, len(m.state))
	for k := range m.state {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	rd := read{key: "a", end: "z", count: int64(len(keys))}
	for _, k := range keys {
		rd.mods = append(rd.mods, m.state[k].rev)
		rd.sum = rd.sum*31 + m.state[k].sum
	}
	q.reads = []read{rd}
	q.ret = m.tick()
	m.rec.requests = append(m.rec.requests, q)
	return q
}

func (m *machine) value() string {
	m.ids++
	return fmt.Sprintf("v%d", m.ids)
}

// wide makes a delete of all of wide/, one shard after the other. It reaches only some of them if there is no answer.
func (m *machine) wide(answered bool) {
	w := &wideDelete{key: "wide/", end: "wide0"}
	q := &request{what: "delete over all shards", call: m.tick(), wide: w, rev: m.rev}
	for s := range shards {
		var part []write
		for i := range 3 {
			if e := m.state[wideKey(s, i)]; e != nil {
				part = append(part, write{key: e.key, del: true, prevMod: e.rev})
			}
		}
		if !answered && s > 1 {
			break
		}
		if s == 0 && !answered {
			// A key went with its lease, unnoticed until now.
			m.rec.leases[99] = &leaseLife{id: 99}
			q := m.write(true, true, nil, write{key: "lease/99", value: m.value(), lease: 99})
			part = append([]write{{key: "lease/99", del: true, prevMod: q.rev}}, part...)
		}
		m.apply(part)
		w.deleted = append(w.deleted, part...)
		m.tick()
	}
	if q.rev, q.acked = m.rev, len(w.deleted) > 0; !answered {
		q.code, q.rev, q.acked, w.deleted = codes.Unavailable, 0, false, nil
	}
	q.ret = m.tick()
	m.rec.requests = append(m.rec.requests, q)
}

func wideKey(s, i int) string { return fmt.Sprintf("wide/%d/%d", i, s) }

// wideShard is the shard of a wideKey.
func wideShard(key string) int { return int(key[len(key)-1] - '0') }

// segment makes what a watch shows from start up to upto.
func (m *machine) segment(key, end string, start, upto int64) {
	seg := &segment{who: fmt.Sprintf("watch of %s from %d", key, start), key: key, end: end, start: start, upto: upto, prevKV: true}
	for _, e := range m.rec.history {
		if e.rev >= start && e.rev <= upto && within(e.key, key, end) {
			seg.seen = append(seg.seen, seen{e.rev, e.sum, e.prev})
		}
	}
	m.rec.segments = append(m.rec.segments, seg)
}

// goodRecord makes a record in which nothing is wrong.
func goodRecord(seed uint64) *record {
	m := &machine{r: newRand(seed, 0), rec: newRecord(time.Time{}), rev: 1, state: map[string]*event{}}
	m.rec.shardOf = wideShard
	for i := range 200 {
		if i%20 == 19 {
			for s := range shards {
				for j := range 3 {
					// Now and then a shard has nothing.
					if (i/20)%4 != 2 || s != 1 {
						m.write(true, true, nil, write{key: wideKey(s, j), value: m.value()})
					}
				}
			}
			m.wide(i%60 != 59)
		}
		key := fmt.Sprintf("hot/%d", m.r.IntN(3))
		var expected string
		var mod int64
		if e := m.state[key]; e != nil {
			expected, mod = e.value, e.rev
		}
		switch n := m.r.IntN(10); {
		case n < 3:
			w := write{key: key, value: m.value()}
			m.write(true, m.r.IntN(10) > 0, &swap{key: key, kind: swapSwap, expected: expected, value: w.value}, w)
		case n == 3: // refused: it compared with something else
			w := write{key: key, value: m.value()}
			m.write(false, true, &swap{key: key, kind: swapSwap, expected: "else", value: w.value, shown: expected}, w)
		case n == 4 && mod > 0:
			m.write(true, true, &swap{key: key, kind: swapSwap, expected: expected}, write{key: key, del: true, prevMod: mod})
		case n == 5: // never happened, nobody said so
			w := write{key: key, value: m.value()}
			m.write(false, false, &swap{key: key, kind: swapPut, value: w.value}, w)
		case n == 6:
			m.write(true, i%3 > 0, nil, write{key: "group/a", value: m.value()}, write{key: "group/b", value: m.value()})
		case n == 7:
			q := m.read()
			q.swap = &swap{key: key, kind: swapGet, shown: expected}
		default:
			m.read()
		}
	}
	// One lease is revoked, one ends by itself.
	for id := range int64(2) {
		life := &leaseLife{id: id + 1, alive: m.at + 50*time.Millisecond}
		m.rec.leases[life.id] = life
		key := fmt.Sprintf("lease/%d", id)
		q := m.write(true, true, nil, write{key: key, value: m.value(), lease: life.id})
		if id == 0 {
			life.revoked = m.tick()
		} else {
			m.at = life.alive + time.Millisecond
		}
		m.apply([]write{{key: key, del: true, prevMod: q.rev}})
		if id == 0 {
			life.ended, life.endedRev = m.tick(), m.rev
		}
	}
	m.read()
	m.segment("a", "z", 1, m.rev)
	m.segment("a", "z", 1, m.rev/2)
	m.segment("a", "z", m.rev/2+1, m.rev)
	m.segment("hot/", "hot0", m.rev/4, m.rev/2)
	m.segment("hot/1", "", 1, m.rev)
	m.rec.shown = append(m.rec.shown, shown{m.at / 2, m.rec.history[0].rev})
	return m.rec
}

// find returns the first request from the middle on that fits.
func (r *record) find(fits func(*request) bool) *request {
	for _, q := range r.requests[len(r.requests)/2:] {
		if fits(q) {
			return q
		}
	}
	panic("the record has no such request")
}

func isAcked(q *request) bool { return q.acked && len(q.writes) == 1 && !q.writes[0].del }

// isWide is one that has deleted something on all shards.
func isWide(q *request) bool { return q.acked && q.wide != nil && len(q.wide.deleted) == 3*shards }

// partOf returns the events of a delete on one shard.
func (r *record) partOf(q *request, s int) (out []*event) {
	for _, w := range q.wide.deleted {
		for _, e := range r.history {
			if e.del && e.key == w.key && e.prev == w.prevMod && wideShard(e.key) == s {
				out = append(out, e)
			}
		}
	}
	return out
}

// dropEvents takes events out of the history and of all watches.
func (r *record) dropEvents(drop func(*event) bool) {
	r.history = slices.DeleteFunc(r.history, func(e *event) bool {
		if !drop(e) {
			return false
		}
		for _, s := range r.segments {
			s.seen = slices.DeleteFunc(s.seen, func(x seen) bool { return x.sum == e.sum })
		}
		return true
	})
}

// tampers are ways to be wrong, and what the check has to say.
var tampers = []struct {
	name, want string
	tamper     func(r *record)
}{
	{"a watch loses an event", "did not bring|in the history it is of", func(r *record) {
		s := r.segments[0]
		s.seen = slices.Delete(s.seen, 20, 21)
	}},
	{"a watch loses its last events but says it is there", "did not bring", func(r *record) {
		s := r.segments[3]
		s.seen = s.seen[:len(s.seen)-2]
	}},
	{"a watch repeats an event", "in the history it is of", func(r *record) {
		s := r.segments[2]
		s.seen = slices.Insert(s.seen, 5, s.seen[5])
	}},
	{"a watch swaps two events", "in the history it is of", func(r *record) {
		s := r.segments[1]
		s.seen[7], s.seen[8] = s.seen[8], s.seen[7]
	}},
	{"a watch shows what was not there", "in the history", func(r *record) { r.segments[0].seen[9].sum++ }},
	{"a wrong prev_kv", "prev_kv", func(r *record) {
		for i := range r.segments[0].seen {
			if s := &r.segments[0].seen[i]; s.prev > 0 {
				s.prev--
				return
			}
		}
	}},
	{"a watch goes on too late after a break", "did not bring", func(r *record) {
		s := r.segments[2]
		s.seen = s.seen[1:]
	}},
	{"all watches lose an acknowledged write", "acknowledged, but not in the history", func(r *record) {
		q := r.find(isAcked)
		r.dropEvents(func(e *event) bool { return e.rev == q.rev })
	}},
	{"all watches lose an event of a key", "expected|what was there", func(r *record) {
		done := false
		r.dropEvents(func(e *event) bool {
			hit := !done && strings.HasPrefix(e.key, "hot/") && e.version == 2
			done = done || hit
			return hit
		})
	}},
	{"a write that is doubled", "written twice", func(r *record) {
		last := r.history[len(r.history)-1]
		q := r.find(isAcked)
		for _, e := range r.history {
			if e.rev == q.rev {
				again := *e
				again.rev, again.heard = last.rev+1, last.heard
				r.history = append(r.history, &again)
				return
			}
		}
	}},
	{"two answers with swapped revisions", "in the history its", func(r *record) {
		a := r.find(isAcked)
		b := r.find(func(q *request) bool { return isAcked(q) && q != a })
		a.rev, b.rev = b.rev, a.rev
	}},
	{"two requests with one revision", "belongs to two requests", func(r *record) {
		a := r.find(func(q *request) bool { return isAcked(q) && q.writes[0].key == "hot/0" })
		b := r.find(func(q *request) bool { return isAcked(q) && q.writes[0].key == "hot/1" && q.rev > a.rev })
		for _, e := range r.history {
			if e.rev == b.rev {
				e.rev = a.rev
			}
		}
		b.rev = a.rev
	}},
	{"half of a Txn without an answer", "only a part", func(r *record) {
		q := r.find(func(q *request) bool { return len(q.writes) == 2 && q.code != 0 })
		r.dropEvents(func(e *event) bool { return e.value == q.writes[1].value })
	}},
	{"a refused write that happened", "refused, but in the history", func(r *record) { r.find(isAcked).acked = false }},
	{"a write that nobody asked for", "nobody asked", func(r *record) {
		q := r.find(isAcked)
		r.requests = slices.DeleteFunc(r.requests, func(o *request) bool { return o == q })
	}},
	{"a read of the past", "was known before", func(r *record) {
		// The last read is answered with the first one's state.
		var reads []*request
		for _, q := range r.requests {
			if len(q.reads) > 0 {
				reads = append(reads, q)
			}
		}
		old, late := reads[0], reads[len(reads)-1]
		late.rev, late.reads = old.rev, old.reads
	}},
	{"a read that is not of its revision", "read of", func(r *record) {
		a := r.find(isAcked)
		for _, q := range r.requests {
			if len(q.reads) == 1 && q.rev >= a.rev {
				q.rev = a.rev - 1
				return
			}
		}
	}},
	{"a read that misses a key", "read of", func(r *record) {
		q := r.find(func(q *request) bool { return len(q.reads) == 1 && len(q.reads[0].mods) > 1 })
		rd := &q.reads[0]
		rd.mods, rd.count = rd.mods[1:], rd.count-1
	}},
	{"a revision that runs backwards", "was known before", func(r *record) {
		q := r.find(isAcked)
		r.shown = append(r.shown, shown{q.call - 1, q.rev})
	}},
	{"progress that is ahead of a write", "was known before", func(r *record) {
		q := r.find(isAcked)
		r.shown = append(r.shown, shown{q.call - 1, q.rev + 10})
	}},
	{"a delete over shards that is not in the history", "acknowledged, but not in the history", func(r *record) {
		q := r.find(isWide)
		gone := r.partOf(q, 1)[0]
		r.dropEvents(func(e *event) bool { return e == gone })
	}},
	{"a delete over shards that takes one key later", "not at one revision", func(r *record) {
		for _, e := range r.partOf(r.find(isWide), 1)[1:] {
			e.rev++
		}
	}},
	{"a delete over shards that leaves a key", "left something of shard", func(r *record) {
		q := r.find(isWide)
		left := r.partOf(q, 1)[0]
		r.dropEvents(func(e *event) bool { return e == left })
		q.wide.deleted = slices.DeleteFunc(q.wide.deleted, func(w write) bool { return w.key == left.key })
	}},
	{"a delete over shards that leaves a shard", "never empty", func(r *record) {
		q := r.find(isWide)
		left := r.partOf(q, 1)
		r.dropEvents(func(e *event) bool { return slices.Contains(left, e) })
		q.wide.deleted = slices.DeleteFunc(q.wide.deleted, func(w write) bool { return wideShard(w.key) == 1 })
	}},
	{"a delete with one revision for two shards", "belongs to two requests|largest revision", func(r *record) {
		q := r.find(isWide)
		rev := r.partOf(q, 1)[0].rev
		for _, e := range r.partOf(q, 2) {
			e.rev = rev
		}
	}},
	{"a delete with the smallest revision of its parts", "largest revision", func(r *record) {
		q := r.find(isWide)
		q.rev = r.partOf(q, 0)[0].rev
	}},
	{"a delete over shards that happened twice", "nobody asked", func(r *record) {
		q := r.find(isWide)
		q.wide.deleted = slices.DeleteFunc(q.wide.deleted, func(w write) bool { return wideShard(w.key) == 0 })
	}},
	{"an old revision for a part", "for a part", func(r *record) {
		q := r.find(isWide)
		r.shown = append(r.shown, shown{q.call - 1, r.partOf(q, 0)[0].rev})
	}},
	{"a key that goes before its lease", "lives until", func(r *record) { r.leases[2].alive += time.Hour }},
	{"a key that goes after the revoke was answered", "was answered at", func(r *record) { r.leases[1].endedRev-- }},
	{"a key that outlives its lease", "still there", func(r *record) {
		r.dropEvents(func(e *event) bool { return e.del && e.key == "lease/1" })
	}},
}

func TestCheckFindsWhatIsWrong(t *testing.T) {
	for seed := range uint64(10) {
		r := goodRecord(seed)
		v := r.check()
		if len(v.wrong) > 0 {
			t.Fatalf("seed %d: a good record is called wrong:\n%s", seed, strings.Join(v.wrong, "\n"))
		}
		if v.acked < 50 || v.unknown == 0 || v.unknownDone == 0 || v.unknownDone == v.unknown || v.reads < 20 {
			t.Fatalf("seed %d: the record has too little in it: %+v", seed, v)
		}
		for _, c := range tampers {
			r := goodRecord(seed)
			c.tamper(r)
			v := r.check()
			if !slices.ContainsFunc(v.wrong, func(s string) bool {
				return slices.ContainsFunc(strings.Split(c.want, "|"), func(w string) bool { return strings.Contains(s, w) })
			}) {
				t.Errorf("seed %d, %s: the check does not say %q, but:\n%s", seed, c.name, c.want, strings.Join(v.wrong, "\n"))
			}
		}
	}
}

// Porcupine is told nothing of revisions, and finds what a single key shows.
func TestPorcupineFindsWhatIsWrong(t *testing.T) {
	for seed := range uint64(10) {
		r := goodRecord(seed)
		if result, n := r.linearizable(porcupineTimeout); result != porcupine.Ok || n < 50 {
			t.Fatalf("seed %d: a good record is called %s (%d requests)", seed, result, n)
		}
		hot := func(kind swapKind) *request {
			return r.find(func(q *request) bool {
				return q.swap != nil && q.swap.kind == kind && q.code == 0 && (kind == swapGet || q.acked)
			})
		}
		stale := hot(swapGet)
		stale.swap.shown = "v of long ago"
		if result, _ := r.linearizable(porcupineTimeout); result != porcupine.Illegal {
			t.Errorf("seed %d: a read of what is not there is called %s", seed, result)
		}
		r = goodRecord(seed)
		lost := hot(swapSwap)
		lost.swap.expected += "x" // it wrote over something else than it compared with
		if result, _ := r.linearizable(porcupineTimeout); result != porcupine.Illegal {
			t.Errorf("seed %d: a lost update is called %s", seed, result)
		}
	}
}
