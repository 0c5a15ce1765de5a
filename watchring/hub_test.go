package watchring

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// rig is a Hub over one ring, for tests that tell a story.
type rig struct {
	t     *testing.T
	ring  *Ring
	front *Frontier
	hub   *Hub
	stats Stats
}

func newRig(t *testing.T, shards int, cfg HubConfig) *rig {
	r := &rig{t: t, ring: NewRing(64, 1<<20, 0), front: NewFrontier(shards, 0)}
	// Keys lie on the shard that their last byte names.
	shardsOf := func(key, end []byte) int {
		if end != nil {
			return All
		}
		return int(key[len(key)-1]) % shards
	}
	r.hub = NewHub(r.ring, r.front, shardsOf, codec.Header{ClusterID: 7, MemberID: 8, RaftTerm: 9}, &r.stats, cfg)
	return r
}

func (r *rig) put(rev int64, shard int, keys ...string) {
	r.ring.Publish(makeEntry(r.t, rev, shard, keys...))
}

func (r *rig) expect(sink *recorder, want ...string) {
	r.t.Helper()
	pumpAll(r.t, r.hub)
	if got := sink.take(); !slices.Equal(got, want) {
		r.t.Fatalf("got\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

func TestHubStory(t *testing.T) {
	r := newRig(t, 1, HubConfig{})
	sink := &recorder{t: t}
	s := r.hub.NewStream(sink)
	r.put(1, 0, "a")
	r.put(2, 0, "b")
	r.front.Set(0, 2)
	r.hub.Add(s, &Watcher{ID: 0, Key: "a", End: "c", Start: 1})
	r.hub.Add(s, &Watcher{ID: 1, Key: "a", Start: 3})
	r.hub.Add(s, &Watcher{ID: 2, Key: "b", End: fromKey, Start: 5})
	r.expect(sink, "id=0 rev=2 a@1 b@2")
	r.put(4, 0, "b", "a", "x")
	r.front.Set(0, 3)
	r.expect(sink)
	r.front.Set(0, 4)
	pumpAll(t, r.hub)
	got := sink.take()
	slices.Sort(got)
	if want := []string{"id=0 rev=4 b@4 a@4", "id=1 rev=4 a@4"}; !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
	r.put(5, 0, "z")
	r.front.Set(0, 6)
	r.expect(sink, "id=2 rev=5 z@5")
	s.Close()
	r.put(7, 0, "a")
	r.front.Set(0, 7)
	r.expect(sink)
	if n := r.stats.Watchers.Load(); n != 0 {
		t.Errorf("%d watchers left", n)
	}
}

// TestHubSingleShardDoesNotWait: a watch of one key follows its own shard; a range waits for all.
func TestHubSingleShardDoesNotWait(t *testing.T) {
	r := newRig(t, 2, HubConfig{})
	sink := &recorder{t: t}
	s := r.hub.NewStream(sink)
	r.hub.Add(s, &Watcher{ID: 1, Key: "k0", Start: 1}) // '0' is 48: shard 0
	r.hub.Add(s, &Watcher{ID: 2, Key: "k", End: "l", Start: 1})
	r.put(2, 0, "k0")
	r.front.Set(0, 2)
	r.expect(sink, "id=1 rev=2 k0@2")
	s.Progress(2)
	r.expect(sink)
	r.put(1, 1, "k1")
	r.front.Set(1, 3)
	r.expect(sink, "id=2 rev=2 k1@1 k0@2", "id=-1 rev=2")
}

// TestHubSlowSink: a blocked sink gets nothing more, and everything later; when the ring has moved on, a
// cancel with the compact revision.
func TestHubSlowSink(t *testing.T) {
	r := newRig(t, 1, HubConfig{})
	sink := &recorder{t: t}
	s := r.hub.NewStream(sink)
	r.hub.Add(s, &Watcher{ID: 3, Key: "a", Start: 1, ProgressNotify: true})
	sink.blocked = true
	for rev := int64(1); rev <= 3; rev++ {
		r.put(rev, 0, "a")
		r.front.Set(0, rev)
		r.expect(sink)
	}
	s.Progress(3)
	r.hub.Notify()
	r.expect(sink)
	if n := r.stats.Lagging.Load(); n != 1 {
		t.Errorf("%d lagging", n)
	}
	sink.blocked = false
	s.Drained()
	r.expect(sink, "id=3 rev=3 a@1 a@2 a@3", "id=-1 rev=3")
	r.hub.Notify() // elided: events were sent
	r.expect(sink)
	r.hub.Notify()
	r.expect(sink, "id=3 rev=3")

	sink.blocked = true
	for rev := int64(4); rev <= 100; rev++ {
		r.put(rev, 0, "a")
		r.front.Set(0, rev)
		r.expect(sink)
	}
	sink.blocked = false
	s.Drained()
	r.expect(sink, fmt.Sprintf("id=3 rev=3 canceled compact=%d", r.ring.Tail()+1))
	if !slices.Equal(sink.ended, []int64{3}) || s.Watchers() != 0 || r.stats.Lagging.Load() != 0 {
		t.Errorf("ended %v, %d watchers, %d lagging", sink.ended, s.Watchers(), r.stats.Lagging.Load())
	}
	// A client that does what the answer says gets what there is.
	r.hub.Add(s, &Watcher{ID: 4, Key: "a", Start: r.ring.Tail() + 1})
	pumpAll(t, r.hub)
	if n := len(sink.got); n != 1 || int64(len(sink.got[0].Events)) != 100-r.ring.Tail() {
		t.Errorf("after the cancel: %q", sink.take())
	}
}

func TestHubCompacted(t *testing.T) {
	r := newRig(t, 1, HubConfig{})
	sink := &recorder{t: t}
	s := r.hub.NewStream(sink)
	for rev := int64(1); rev <= 9; rev++ {
		r.put(rev, 0, "a")
	}
	r.front.Set(0, 9)
	r.front.SetCompacted(5)
	r.hub.Add(s, &Watcher{ID: 1, Key: "a", Start: 4})
	r.expect(sink, "id=1 rev=3 canceled compact=5")
	r.hub.Add(s, &Watcher{ID: 2, Key: "a", Start: 5})
	r.expect(sink, "id=2 rev=9 a@5 a@6 a@7 a@8 a@9")
	// The ring drops everything, also what a member has not read yet: members are canceled, those that
	// start later are not.
	r.hub.Add(s, &Watcher{ID: 3, Key: "a", Start: 13})
	r.ring.RaiseTail(12)
	r.put(13, 0, "a")
	r.front.Set(0, 13)
	r.expect(sink, "id=3 rev=13 a@13", "id=2 rev=9 canceled compact=13")
}

// wholePast is a HistorySource that answers once, at once, with all that it has.
type wholePast struct {
	entries []*Entry
	asked   bool
}

func (p *wholePast) OpenHistory(set int, from int64) HistoryReader {
	return &wholePast{entries: p.entries}
}
func (p *wholePast) Close() {}
func (p *wholePast) Next(max int, done func(HistoryChunk)) {
	if !p.asked {
		p.asked = true
		done(HistoryChunk{Entries: p.entries, UpTo: p.entries[len(p.entries)-1].Rev})
	}
}

// TestHubPrevKVCompacted: an event has lost its prev_kv, as in etcd, if the revision before it is compacted when
// it is sent: to a watch that begins at the compact revision (from the ring or from history), and to a
// member of its group that is as late.
func TestHubPrevKVCompacted(t *testing.T) {
	past := &wholePast{}
	r := newRig(t, 1, HubConfig{History: past})
	want := func(what string, sink *recorder, lost int64, revs ...int64) {
		t.Helper()
		pumpAll(t, r.hub)
		var got []int64
		for _, m := range sink.got {
			for _, e := range m.Events {
				got = append(got, e.Kv.ModRevision)
				if has := e.PrevKv != nil; has != (e.Kv.ModRevision > lost) {
					t.Errorf("%s: the event of %d has prev_kv: %v; %d is compacted", what, e.Kv.ModRevision, has, lost)
				}
			}
		}
		sink.got = nil
		if !slices.Equal(got, revs) {
			t.Errorf("%s: events of %v, want %v", what, got, revs)
		}
	}
	watch := func(start int64) *recorder {
		sink := &recorder{t: t}
		r.hub.Add(r.hub.NewStream(sink), &Watcher{Key: "a", Start: start, PrevKV: true})
		return sink
	}
	live := watch(1)
	for rev := int64(1); rev <= 5; rev++ {
		e := makeEntry(t, rev, 0, "a")
		r.ring.Publish(e)
		past.entries = append(past.entries, e)
	}
	r.front.Set(0, 3)
	want("a member", live, 0, 1, 2, 3)
	r.front.SetCompacted(4)
	r.front.Set(0, 5)
	want("a member that comes after the compaction", live, 4, 4, 5)
	want("from the ring", watch(4), 4, 4, 5)
	r.ring.RaiseTail(5)
	want("from history", watch(4), 4, 4, 5)
}

// TestHubAddWithinSend: a watch that is added while the Hub is at work gets nothing from before its start,
// though its cohort has collected just that.
func TestHubAddWithinSend(t *testing.T) {
	r := newRig(t, 1, HubConfig{MaxCollected: 1})
	first, second, added := &recorder{t: t}, &recorder{t: t}, &recorder{t: t}
	r.hub.Add(r.hub.NewStream(first), &Watcher{Key: "a", End: "aa", Start: 1})
	r.hub.Add(r.hub.NewStream(second), &Watcher{Key: "a", End: "b", Start: 1})
	first.onSend = func() {
		first.onSend = nil
		r.hub.Add(r.hub.NewStream(added), &Watcher{Key: "a", End: "b", Start: 2})
	}
	r.put(1, 0, "a")
	r.put(2, 0, "a")
	r.front.Set(0, 2)
	pumpAll(t, r.hub)
	r.expect(first, "id=0 rev=1 a@1", "id=0 rev=2 a@2")
	r.expect(second, "id=0 rev=1 a@1", "id=0 rev=2 a@2")
	r.expect(added, "id=0 rev=2 a@2")
}

func TestHubProgressWaits(t *testing.T) {
	r := newRig(t, 1, HubConfig{})
	sink := &recorder{t: t}
	s := r.hub.NewStream(sink)
	s.Progress(1) // no watch, no answer, not even later
	r.hub.Add(s, &Watcher{ID: 1, Key: "a", Start: 1})
	r.front.Set(0, 5)
	r.expect(sink)
	s.Progress(6)
	s.Progress(8) // must not delay the first
	s.Progress(7)
	r.expect(sink)
	r.front.Set(0, 7)
	r.expect(sink, "id=-1 rev=7")
	r.front.Set(0, 9)
	r.expect(sink, "id=-1 rev=9")
	// Never below a watch's start - 1.
	r.hub.Add(s, &Watcher{ID: 2, Key: "b", Start: 12, ProgressNotify: true})
	s.Progress(9)
	r.hub.Notify()
	r.hub.Notify()
	r.expect(sink)
	r.front.Set(0, 11)
	r.expect(sink, "id=-1 rev=11")
}

func TestHubCutsBetweenRevisions(t *testing.T) {
	r := newRig(t, 1, HubConfig{MaxResponse: 100})
	late, early := &recorder{t: t}, &recorder{t: t}
	r.hub.Add(r.hub.NewStream(early), &Watcher{Key: "a", End: "b", Start: 1})
	for rev := int64(1); rev <= 6; rev++ {
		r.put(rev, 0, "a1", "a2", "a3")
	}
	r.front.Set(0, 6)
	pumpAll(t, r.hub)
	r.hub.Add(r.hub.NewStream(late), &Watcher{Key: "a", End: "b", Start: 1})
	pumpAll(t, r.hub)
	for _, sink := range []*recorder{early, late} {
		var lines []string
		for rev := 1; rev <= 6; rev += 1 {
			lines = append(lines, fmt.Sprintf("a1@%d a2@%d a3@%d", rev, rev, rev))
		}
		got := sink.take()
		if len(got) < 3 {
			t.Errorf("not cut: %q", got)
		}
		var all []string
		for _, g := range got {
			_, events, _ := strings.Cut(g, " rev=")
			_, events, _ = strings.Cut(events, " ")
			all = append(all, events)
		}
		if strings.Join(all, " ") != strings.Join(lines, " ") {
			t.Errorf("got %q", got)
		}
		for _, g := range got {
			if strings.Count(g, "@")%3 != 0 {
				t.Errorf("a revision was divided: %q", g)
			}
		}
	}
}

func TestHubFragments(t *testing.T) {
	r := newRig(t, 1, HubConfig{MaxFragment: 200})
	whole, split := &recorder{t: t}, &recorder{t: t}
	r.hub.Add(r.hub.NewStream(whole), &Watcher{ID: 1, Key: "a", End: "b", Start: 1, PrevKV: true})
	r.hub.Add(r.hub.NewStream(split), &Watcher{ID: 2, Key: "a", End: "b", Start: 1, PrevKV: true, Fragment: true})
	e := makeEntry(t, 1, 0, "a1", "a2", "a3", "a4", "a5", "a6", "a7", "a8")
	e.Events[3] = makeEvent(t, "a4", 1, false, false, make([]byte, 500)) // larger than a fragment by itself
	r.ring.Publish(e)
	r.front.Set(0, 1)
	pumpAll(t, r.hub)
	if len(whole.got) != 1 || whole.got[0].Fragment || len(whole.got[0].Events) != 8 {
		t.Fatalf("whole: %q", whole.take())
	}
	n := 0
	for i, m := range split.got {
		if m.Fragment != (i < len(split.got)-1) {
			t.Errorf("fragment %d of %d: flag %v", i+1, len(split.got), m.Fragment)
		}
		if size := proto.Size(m); size >= 200 && len(m.Events) > 1 {
			t.Errorf("fragment %d has %d bytes", i+1, size)
		}
		for _, ev := range m.Events {
			if !proto.Equal(ev, whole.got[0].Events[n]) {
				t.Errorf("event %d differs", n)
			}
			n++
		}
		if !proto.Equal(m.Header, whole.got[0].Header) || m.Header.ClusterId != 7 || m.Header.MemberId != 8 || m.Header.RaftTerm != 9 {
			t.Errorf("header %v", m.Header)
		}
	}
	if n != 8 || len(split.got) < 3 {
		t.Errorf("%d events in %d fragments", n, len(split.got))
	}
}

// TestHubBudget: one Pump does a bounded piece of work and says that there is more; another watcher is
// served meanwhile.
func TestHubBudget(t *testing.T) {
	r := newRig(t, 1, HubConfig{PumpRevisions: 10, TurnRevisions: 4})
	slow, quick := &recorder{t: t}, &recorder{t: t}
	for rev := int64(1); rev <= 50; rev++ {
		r.put(rev, 0, "a")
	}
	r.front.Set(0, 50)
	r.hub.Add(r.hub.NewStream(slow), &Watcher{ID: 1, Key: "a", Start: 1})
	r.hub.Add(r.hub.NewStream(quick), &Watcher{ID: 2, Key: "a", Start: 48})
	if !r.hub.Pump() {
		t.Fatal("no more to do after 10 of 50 revisions")
	}
	if got := quick.take(); !slices.Equal(got, []string{"id=2 rev=50 a@48 a@49 a@50"}) {
		t.Errorf("the second watcher got %q", got)
	}
	pumpAll(t, r.hub)
	n := 0
	for _, m := range slow.got {
		n += len(m.Events)
	}
	if n != 50 {
		t.Errorf("%d events", n)
	}
}

// A Sink that panics (the loop survives that) does not leave a Hub that seems at work for ever.
func TestHubSurvivesPanic(t *testing.T) {
	r := newRig(t, 1, HubConfig{})
	sink := &recorder{t: t}
	s := r.hub.NewStream(sink)
	r.hub.Add(s, &Watcher{ID: 1, Key: "a", Start: 1, ProgressNotify: true})
	r.expect(sink)
	survive := func(work func()) {
		t.Helper()
		sink.onSend = func() { panic("boom") }
		defer func() {
			if recover() == nil {
				t.Error("nothing was sent")
			}
			sink.onSend = nil
			sink.take()
		}()
		work()
	}
	survive(func() { r.hub.Notify(); r.hub.Notify() })
	r.put(1, 0, "a")
	r.front.Set(0, 1)
	r.expect(sink, "id=1 rev=1 a@1")
	s.Progress(1)
	survive(func() { r.hub.Pump() })
	r.put(2, 0, "a")
	r.front.Set(0, 2)
	if r.hub.Pump(); !slices.Contains(sink.take(), "id=1 rev=2 a@2") {
		t.Error("no events after the panic")
	}
}
