package watchring

import (
	"fmt"
	"testing"
)

// mutePast is a past that says what the test lets it say.
type mutePast struct{ open []*muteReader }

type muteReader struct {
	set    int
	from   int64
	done   func(HistoryChunk)
	closed bool
}

func (p *mutePast) OpenHistory(set int, from int64) HistoryReader {
	r := &muteReader{set: set, from: from}
	p.open = append(p.open, r)
	return r
}

func (r *muteReader) Next(_ int, done func(HistoryChunk)) { r.done = done }
func (r *muteReader) Close()                              { r.closed = true }

// Readers that wait for a dead shard leave a place for the watches of every other one.
func TestReaderForEveryGroup(t *testing.T) {
	past := &mutePast{}
	r := newRig(t, 2, HubConfig{History: past, MaxReaders: 2})
	r.ring.RaiseTail(1 << 20)
	for i := range 2 {
		r.front.Set(i, 2<<20)
	}
	sink := &recorder{t: t}
	s := r.hub.NewStream(sink)
	// Shard 0's ('b' is even) two readers and more that wait.
	for i := range 4 {
		r.hub.Add(s, &Watcher{ID: int64(i), Key: "b", Start: int64(1 + (3-i)*2*shareSpan)})
	}
	pumpAll(t, r.hub)
	if len(past.open) != 2 {
		t.Fatalf("%d readers", len(past.open))
	}
	r.hub.Add(s, &Watcher{ID: 9, Key: "a", Start: 7})
	pumpAll(t, r.hub)
	if len(past.open) != 3 || past.open[2].set != 1 || past.open[2].from != 7 {
		t.Fatalf("%d readers: the other shard's watch has none", len(past.open))
	}
	// One more of the same group does not get another.
	r.hub.Add(s, &Watcher{ID: 10, Key: "c", Start: 3})
	pumpAll(t, r.hub)
	if len(past.open) != 3 {
		t.Fatalf("%d readers", len(past.open))
	}
	s.Close()
}

// A chunk for very many watchers is handed out in turns.
func TestChunkInTurns(t *testing.T) {
	past := &mutePast{}
	const watchers, bytes = 300, 1000
	r := newRig(t, 1, HubConfig{History: past, PumpBytes: bytes})
	r.ring.RaiseTail(100)
	r.front.Set(0, 150)
	sink := &recorder{t: t}
	s := r.hub.NewStream(sink)
	all := make([]*Watcher, watchers)
	for i := range all {
		all[i] = &Watcher{ID: int64(i), Key: "a", Start: 1}
		r.hub.Add(s, all[i])
	}
	pumpAll(t, r.hub)
	if len(past.open) != 1 {
		t.Fatalf("%d readers", len(past.open))
	}
	c := HistoryChunk{UpTo: 50}
	for rev := int64(1); rev <= 5; rev++ {
		c.Entries = append(c.Entries, makeEntry(t, rev, 0, "a"))
	}
	past.open[0].done(c)
	past.open[0].done = nil
	got := map[int64]int{}
	pumps, more := 0, true
	for ; more; pumps++ {
		if pumps > watchers {
			t.Fatal("it never ends")
		}
		more = r.hub.Pump()
		if r.hub.work > bytes+1000 {
			t.Fatalf("a Pump sent %d bytes", r.hub.work)
		}
		for _, m := range sink.got {
			if len(m.Events) != 5 {
				t.Fatalf("watch %d got %v", m.WatchId, m.Events)
			}
			got[m.WatchId]++
		}
		sink.got = nil
		switch pumps {
		case 1: // Meanwhile some go, served and unserved ones, and others come.
			for i := 0; i < watchers; i += 7 {
				r.hub.Remove(all[i])
			}
			r.hub.Add(s, &Watcher{ID: 1000, Key: "a", Start: 60})
		case 3:
			for i := 1; i < watchers; i += 7 {
				r.hub.Remove(all[i])
			}
		}
		if past.open[0].done != nil && len(got) < watchers/2 {
			t.Fatal("the next chunk was asked for too early")
		}
	}
	for i, w := range all {
		if w.state != outside && got[int64(i)] != 1 {
			t.Errorf("watch %d got the chunk %d times", i, got[int64(i)])
		}
	}
	if got[1000] != 0 || past.open[0].done == nil || pumps < 10 {
		t.Errorf("%d for the late one, asked for the next: %v, %d pumps", got[1000], past.open[0].done != nil, pumps)
	}
}

// A past that cannot be read ends the RPC: a cancel without a compact revision would look like a graceful end.
func TestFailedPastEndsTheStream(t *testing.T) {
	past := &mutePast{}
	r := newRig(t, 1, HubConfig{History: past})
	r.ring.RaiseTail(100)
	r.front.Set(0, 150)
	sink := &recorder{t: t}
	s := r.hub.NewStream(sink)
	for i := range 3 {
		r.hub.Add(s, &Watcher{ID: int64(i), Key: "a", Start: 1})
	}
	pumpAll(t, r.hub)
	past.open[0].done(HistoryChunk{Err: "unreadable"})
	pumpAll(t, r.hub)
	if fmt.Sprint(sink.failed) != "[unreadable unreadable unreadable]" || len(sink.got) != 0 || s.Watchers() != 0 || !past.open[0].closed {
		t.Errorf("failed %q, sent %q, %d watchers, closed: %v", sink.failed, sink.take(), s.Watchers(), past.open[0].closed)
	}
}
