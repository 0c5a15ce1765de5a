package watchring

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// TestHubAgainstModel runs a Hub through random histories and compares what each watcher gets with
// what a naive filter over the true history says it must get.
func TestHubAgainstModel(t *testing.T) {
	n := uint64(2000)
	if testing.Short() {
		n = 200
	}
	var total worldCounts
	for seed := uint64(0); seed < n; seed++ {
		w := newWorld(t, seed)
		w.run()
		if t.Failed() {
			return
		}
		total.add(w.counts)
	}
	t.Logf("%+v", total)
	if total.canceled == 0 || total.blocked == 0 || total.onDemand == 0 || total.periodic == 0 || total.fragments == 0 || total.jumps == 0 || total.separate == 0 || total.chunks == 0 || total.gone == 0 || total.paused == 0 {
		t.Errorf("the test has become blind: %+v", total)
	}
}

type worldCounts struct {
	watchers, events, canceled, blocked, onDemand, periodic, fragments, jumps, separate int
	opened, chunks, gone, paused                                                        int // of the past
}

func (c *worldCounts) add(o worldCounts) {
	c.watchers += o.watchers
	c.events += o.events
	c.canceled += o.canceled
	c.blocked += o.blocked
	c.onDemand += o.onDemand
	c.periodic += o.periodic
	c.fragments += o.fragments
	c.jumps += o.jumps
	c.separate += o.separate
	c.opened += o.opened
	c.chunks += o.chunks
	c.gone += o.gone
	c.paused += o.paused
}

// world is a ring, its writers, a Hub and clients that check every response.
type world struct {
	t      *testing.T
	seed   uint64
	rng    *rand.Rand
	shards int
	ring   *Ring
	front  *Frontier
	hub    *Hub

	handed  int64      // the last revision given to anybody
	entries []*Entry   // the true history, in order
	queue   [][]*Entry // per shard: not yet published
	streams []*modelStream
	counts  worldCounts

	kept      []keptEvents
	notifying bool       // within Notify
	past      *modelPast // nil: the Hub has no history to read
}

type modelStream struct {
	w        *world
	s        *Stream
	blocked  bool
	closed   bool
	watchers map[int64]*modelWatcher
	nextID   int64
	asked    []int64 // progress requests without an answer
	separate int64   // the last answer that was sent to each watch by itself
	trouble  bool    // do something from within Send now and then
}

type modelWatcher struct {
	Watcher
	next     int // of want: the first event not delivered
	entry    int // of world.entries: up to where want is computed
	want     []expectation
	last     int64 // revision of the last event delivered
	progress int64 // greatest R promised
	gone     bool  // its start was compacted when it was added
	partial  bool  // the last response was a fragment with more to come
}

type expectation struct {
	rev int64
	ev  *Event
}

func newWorld(t *testing.T, seed uint64) *world {
	rng := rand.New(rand.NewPCG(seed, 1))
	w := &world{t: t, seed: seed, rng: rng, shards: 1 + rng.IntN(4)}
	w.handed = rng.Int64N(50)
	w.ring = NewRing(1<<(3+rng.IntN(6)), int64(500+rng.IntN(20000)), w.handed)
	w.front = NewFrontier(w.shards, w.handed)
	w.queue = make([][]*Entry, w.shards)
	cfg := HubConfig{}
	if rng.IntN(2) == 0 {
		cfg = HubConfig{MaxResponse: 1 + rng.IntN(300), MaxFragment: 100 + rng.IntN(200), MaxCollected: 1 + rng.IntN(2000),
			PumpRevisions: 1 + rng.IntN(30), PumpBytes: 1 + rng.IntN(2000), TurnRevisions: 1 + rng.IntN(10), TurnBytes: 1 + rng.IntN(500)}
	}
	if rng.IntN(3) > 0 {
		w.past = &modelPast{w: w, sync: rng.IntN(4) == 0}
		cfg.History, cfg.MaxReaders = w.past, 1+rng.IntN(4)
	}
	w.hub = NewHub(w.ring, w.front, w.shardsOf, codec.Header{ClusterID: 1, MemberID: 2}, nil, cfg)
	return w
}

func (w *world) fail(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("seed %d: %s", w.seed, fmt.Sprintf(format, args...))
}

func (w *world) shardsOf(key, end []byte) int {
	if end != nil {
		return All
	}
	sum := 0
	for _, b := range key {
		sum += int(b)
	}
	return sum % w.shards
}

func (w *world) key() string {
	b := make([]byte, 1+w.rng.IntN(2))
	for i := range b {
		b[i] = byte('a' + w.rng.IntN(4))
	}
	return string(b)
}

// write hands out a revision and makes what happens there, on one shard.
func (w *world) write() {
	w.handed++
	if w.rng.IntN(6) == 0 {
		return // a failed compare
	}
	first := w.key()
	shard := w.shardsOf([]byte(first), nil)
	e := &Entry{Rev: w.handed, Shard: shard}
	for _, k := range []string{first, w.key(), w.key(), w.key()} {
		if w.shardsOf([]byte(k), nil) != shard || slices.ContainsFunc(e.Events, func(ev Event) bool { return string(ev.Key) == k }) {
			continue
		}
		del := w.rng.IntN(4) == 0
		e.Events = append(e.Events, makeEvent(w.t, k, e.Rev, del, !del && w.rng.IntN(2) == 0, make([]byte, w.rng.IntN(40))))
	}
	for i := range e.Events {
		e.Size += len(e.Events[i].Body)
	}
	w.entries = append(w.entries, e)
	w.queue[shard] = append(w.queue[shard], e)
}

// arrive publishes the next entry of a shard.
func (w *world) arrive(shard int, force bool) {
	q := w.queue[shard]
	if len(q) == 0 {
		return
	}
	// Mostly a writer respects the readers.
	if !force && w.ring.place(q[0].Rev)-w.ring.place(w.front.Get(All)) >= w.ring.Size() && w.rng.IntN(20) > 0 {
		return
	}
	w.ring.Publish(q[0])
	w.queue[shard] = q[1:]
}

func (w *world) raise(shard int) {
	f := w.handed
	if q := w.queue[shard]; len(q) > 0 {
		f = q[0].Rev - 1
	}
	w.front.Set(shard, f)
}

func (w *world) run() {
	for i := 0; i < 400; i++ {
		switch w.rng.IntN(20) {
		case 0, 1, 2, 3, 4:
			w.write()
		case 5, 6, 7, 8:
			w.arrive(w.rng.IntN(w.shards), false)
		case 9, 10:
			w.raise(w.rng.IntN(w.shards))
		case 11:
			w.someStream().addWatcher()
		case 12:
			w.someStream().removeWatcher()
		case 13:
			s := w.someStream()
			if s.blocked {
				s.unblock()
			} else {
				s.blocked = true
				w.counts.blocked++
			}
		case 14:
			w.notifying = true
			w.hub.Notify()
			w.notifying = false
		case 15:
			w.someStream().ask()
		case 16:
			w.odd()
		case 17:
			w.past.answer(false)
		default:
			w.hub.Pump()
			for _, r := range w.hub.readers {
				if r.paused {
					w.counts.paused++
				}
			}
		}
	}
	// Everything arrives, everybody reads: then everybody must have everything.
	for shard := range w.queue {
		for len(w.queue[shard]) > 0 {
			least := 0
			for s := range w.queue {
				if q := w.queue[s]; len(q) > 0 && (len(w.queue[least]) == 0 || q[0].Rev < w.queue[least][0].Rev) {
					least = s
				}
			}
			w.arrive(least, true)
			for s := range w.queue {
				w.raise(s)
			}
			w.hub.Pump()
		}
	}
	for s := range w.queue {
		w.raise(s)
	}
	for _, s := range w.streams {
		s.trouble = false
		s.unblock()
	}
	pumpAll(w.t, w.hub)
	for w.past.answer(true) {
		pumpAll(w.t, w.hub)
	}
	for _, s := range w.streams {
		for _, mw := range s.watchers {
			mw.extend(w, w.handed)
			if mw.next != len(mw.want) {
				w.fail("watch %d of [%q, %q) from %d: %d of %d events", mw.ID, mw.Key, mw.End, mw.Start, mw.next, len(mw.want))
			}
			if mw.state == lagging || mw.state == deep {
				w.fail("watch %d still lags: state %d", mw.ID, mw.state)
			}
		}
		future := slices.ContainsFunc(s.s.watchers, func(x *Watcher) bool { return x.Start-1 > w.handed })
		if len(s.asked) > 0 && len(s.watchers) > 0 && !future {
			w.fail("progress requests %v without an answer at %d", s.asked, w.handed)
		}
	}
	for _, s := range w.streams {
		s.s.Close()
	}
	pumpAll(w.t, w.hub)
	for _, k := range w.kept {
		if !bytes.Equal(k.events, k.was) {
			w.fail("events that a sink has kept were changed")
		}
	}
	if w.past != nil && (len(w.past.open) != 0 || len(w.hub.readers) != 0 || len(w.hub.divers) != 0 || w.hub.stats.Deep.Load() != 0) {
		w.fail("left behind: %d readers of the past, %d watchers that wait for one", len(w.hub.readers), len(w.hub.divers))
	}
	if st := w.hub.stats; st.Watchers.Load() != 0 || st.Lagging.Load() != 0 || len(w.hub.notify) != 0 {
		w.fail("left behind: %d watchers, %d lagging, %d to notify", st.Watchers.Load(), st.Lagging.Load(), len(w.hub.notify))
	}
	for _, g := range w.hub.groups {
		if g != nil && (g.size != 0 || g.members != 0 || len(g.exact) != 0 || g.ranges.root != nil || len(g.future) != 0) {
			w.fail("group %d is not empty", g.set)
		}
	}
}

// odd does what happens seldom.
func (w *world) odd() {
	switch w.rng.IntN(5) {
	case 0:
		w.front.SetCompacted(min(w.handed, w.front.Get(All)+5) - w.rng.Int64N(20))
	case 1:
		w.ring.Trim(w.front.Get(All))
	case 2:
		if w.rng.IntN(4) == 0 {
			w.ring.RaiseTail(w.front.Get(All) - w.rng.Int64N(10))
		}
	case 3:
		for s := range w.queue {
			if len(w.queue[s]) > 0 {
				return
			}
		}
		to := w.handed + w.rng.Int64N(3*w.ring.Size())
		w.ring.Jump(w.handed, to)
		w.handed = to
		w.counts.jumps++
	case 4:
		s := w.someStream()
		s.s.Close()
		s.closed = true
		w.streams = slices.DeleteFunc(w.streams, func(x *modelStream) bool { return x == s })
	}
}

func (w *world) someStream() *modelStream {
	if len(w.streams) == 0 || len(w.streams) < 4 && w.rng.IntN(4) == 0 {
		s := &modelStream{w: w, watchers: map[int64]*modelWatcher{}, trouble: w.rng.IntN(4) == 0}
		s.s = w.hub.NewStream(s)
		w.streams = append(w.streams, s)
	}
	return w.streams[w.rng.IntN(len(w.streams))]
}

func (s *modelStream) unblock() {
	s.blocked = false
	s.s.Drained()
}

func (s *modelStream) addWatcher() {
	w := s.w
	s.nextID++
	mw := &modelWatcher{Watcher: Watcher{
		ID: s.nextID, Key: w.key(), PrevKV: w.rng.IntN(2) == 0, Fragment: w.rng.IntN(4) == 0,
		NoPut: w.rng.IntN(6) == 0, NoDelete: w.rng.IntN(6) == 0, ProgressNotify: w.rng.IntN(2) == 0,
	}}
	switch w.rng.IntN(4) {
	case 0:
		mw.End = fromKey
	case 1, 2:
		mw.End = mw.Key + string(rune('a'+w.rng.IntN(5)))
		if w.rng.IntN(5) == 0 {
			mw.End = mw.Key + "\x00"
		}
	}
	mw.Start = max(1, w.handed+5-w.rng.Int64N(40))
	if w.rng.IntN(2) == 0 {
		mw.Start = w.handed + 1
	}
	mw.progress = -1
	if w.past != nil && w.rng.IntN(3) == 0 {
		mw.Start = 1 + w.rng.Int64N(w.handed+1)
	}
	mw.gone = mw.Start < w.front.Compacted() || w.past == nil && mw.Start <= w.ring.Tail()
	s.watchers[mw.ID] = mw
	w.counts.watchers++
	w.hub.Add(s.s, &mw.Watcher)
}

func (s *modelStream) removeWatcher() {
	if len(s.watchers) == 0 {
		return
	}
	ids := slices.Sorted(maps.Keys(s.watchers))
	mw := s.watchers[ids[s.w.rng.IntN(len(ids))]]
	s.forget(mw.ID)
	s.w.hub.Remove(&mw.Watcher)
	s.w.hub.Remove(&mw.Watcher)
}

// forget drops a watch; with the last one go the progress answers that are owed.
func (s *modelStream) forget(id int64) {
	if delete(s.watchers, id); len(s.watchers) == 0 {
		s.asked = nil
	}
}

func (s *modelStream) answered(rev int64) {
	for len(s.asked) > 0 && s.asked[0] <= rev {
		s.asked = s.asked[1:]
	}
}

func (s *modelStream) ask() {
	if len(s.watchers) > 0 {
		s.asked = append(s.asked, s.w.handed)
	}
	s.s.Progress(s.w.handed)
}

// extend computes what the watcher must get, up to rev.
func (mw *modelWatcher) extend(w *world, rev int64) {
	for ; mw.entry < len(w.entries) && w.entries[mw.entry].Rev <= rev; mw.entry++ {
		e := w.entries[mw.entry]
		if e.Rev < mw.Start {
			continue
		}
		for i := range e.Events {
			ev := &e.Events[i]
			if mw.holds(ev.Key) && !(ev.Delete && mw.NoDelete) && !(!ev.Delete && mw.NoPut) {
				mw.want = append(mw.want, expectation{e.Rev, ev})
			}
		}
	}
}

// promised checks a promise that everything up to rev was delivered.
func (mw *modelWatcher) promised(w *world, rev int64) {
	mw.extend(w, rev)
	if mw.next < len(mw.want) && mw.want[mw.next].rev <= rev {
		w.fail("watch %d: progress %d before the event at %d", mw.ID, rev, mw.want[mw.next].rev)
	}
	if rev < mw.Start-1 || rev < mw.progress || rev > w.handed {
		w.fail("watch %d from %d: progress %d after %d, handed out %d", mw.ID, mw.Start, rev, mw.progress, w.handed)
	}
	mw.progress = rev
}

func (s *modelStream) Blocked() bool { return s.blocked }

func (s *modelStream) Failed(reason string) { s.w.fail("a stream failed: %s", reason) }

func (s *modelStream) Ended(x *Watcher) {
	if s.watchers[x.ID] != nil {
		s.w.fail("watch %d ended without a cancel", x.ID)
	}
}

func (s *modelStream) Send(head, events []byte, shared bool) (kept bool) {
	w := s.w
	m := new(etcdserverpb.WatchResponse)
	if err := proto.Unmarshal(slices.Concat(head, events), m); err != nil {
		w.fail("%x %x: %v", head, events, err)
	}
	if kept = shared && w.rng.IntN(4) == 0; kept {
		spare := events[len(events):cap(events)] // which nobody else may need
		for i := range spare {
			spare[i] = 0xff
		}
		w.kept = append(w.kept, keptEvents{events, slices.Clone(events)})
	}
	s.take(m)
	return kept
}

// keptEvents is what a sink has kept, and how it was then.
type keptEvents struct{ events, was []byte }

// take checks one response.
func (s *modelStream) take(m *etcdserverpb.WatchResponse) {
	w := s.w
	if s.closed {
		w.fail("sent after Close: %v", m)
	}
	rev := m.Header.Revision
	if m.WatchId == AllWatches {
		w.counts.onDemand++
		if len(s.asked) == 0 || rev < s.asked[0] || s.blocked {
			w.fail("progress answer %d, asked %v, blocked %v", rev, s.asked, s.blocked)
		}
		s.answered(rev)
		for _, mw := range s.watchers {
			mw.promised(w, rev)
		}
		return
	}
	mw := s.watchers[m.WatchId]
	switch {
	case mw == nil:
		w.fail("response for a watch that is not open: %v", m)
	case m.Canceled:
		w.counts.canceled++
		need := max(mw.last+1, mw.Start)
		tail, lost := w.ring.Tail(), w.front.Compacted()
		if w.past != nil {
			tail, lost = 0, max(lost, w.past.lost)
		}
		if m.CompactRevision == 0 || need > tail && need >= lost {
			w.fail("watch %d at %d canceled: %v; tail %d, compacted %d", mw.ID, need, m, tail, lost)
		}
		if m.CompactRevision <= tail || m.CompactRevision < w.front.Compacted() || m.CompactRevision < need {
			w.fail("compact_revision %d does not help; tail %d", m.CompactRevision, w.ring.Tail())
		}
		mw.extend(w, rev)
		if mw.next < len(mw.want) && mw.want[mw.next].rev <= rev {
			w.fail("canceled with header %d above what was delivered", rev)
		}
		s.forget(m.WatchId)
	case mw.gone:
		w.fail("watch %d from %d, which is compacted: %v", mw.ID, mw.Start, m)
	case len(m.Events) == 0:
		w.counts.periodic++
		if s.blocked && w.notifying {
			w.fail("progress to a blocked sink")
		}
		if !w.notifying {
			// One shard is ahead: an answer to each watch.
			w.counts.separate++
			all := rev
			for _, x := range s.watchers {
				all = min(all, x.group.cursor)
			}
			switch {
			case len(s.asked) > 0 && s.asked[0] <= all:
				s.answered(all)
				s.separate = all
			case s.separate != all && !s.trouble:
				w.fail("progress answer %d for one watch, asked %v", rev, s.asked)
			}
		}
		mw.promised(w, rev)
	default:
		s.events(mw, m)
	}
	if s.trouble && w.rng.IntN(10) == 0 {
		switch w.rng.IntN(5) {
		case 0:
			s.addWatcher()
		case 1:
			s.removeWatcher()
		case 2:
			s.ask()
		case 3:
			s.blocked = true
		case 4:
			s.s.Close()
			s.closed = true
			clear(s.watchers)
			w.streams = slices.DeleteFunc(w.streams, func(x *modelStream) bool { return x == s })
		}
	}
}

func (s *modelStream) events(mw *modelWatcher, m *etcdserverpb.WatchResponse) {
	w := s.w
	if !mw.partial && m.Events[0].Kv.ModRevision <= mw.progress {
		w.fail("watch %d: event at %d after progress %d", mw.ID, m.Events[0].Kv.ModRevision, mw.progress)
	}
	mw.extend(w, w.handed)
	for _, got := range m.Events {
		w.counts.events++
		if mw.next == len(mw.want) {
			w.fail("watch %d: unexpected event %v", mw.ID, got)
		}
		x := mw.want[mw.next]
		var want mvccpb.Event
		body := x.ev.Body
		if !mw.PrevKV || x.rev <= w.front.Compacted() {
			body = body[:x.ev.NoPrev]
		}
		if err := proto.Unmarshal(body, &want); err != nil {
			w.t.Fatal(err)
		}
		if !proto.Equal(got, &want) {
			w.fail("watch %d: got %v, want %v", mw.ID, got, &want)
		}
		set := w.shardsOf([]byte(mw.Key), nil)
		if mw.End != "" {
			set = All
		}
		if x.rev > w.front.Get(set) {
			w.fail("watch %d: event at %d above the frontier", mw.ID, x.rev)
		}
		mw.next++
		mw.last = x.rev
	}
	if mw.partial = m.Fragment; mw.partial {
		w.counts.fragments++
		if !mw.Fragment {
			w.fail("watch %d did not ask for fragments", mw.ID)
		}
		mw.last-- // not complete yet
		return
	}
	if m.Header.Revision != mw.last {
		w.fail("watch %d: header %d, last event %d", mw.ID, m.Header.Revision, mw.last)
	}
	if mw.next < len(mw.want) && mw.want[mw.next].rev == mw.last {
		w.fail("watch %d: revision %d is divided", mw.ID, mw.last)
	}
}
