package sim

import (
	"testing"

	"spindle/watchring"
)

// TestWatchOfTornRevision: somebody compacts a member up to a record before this proxy's stream has shown it. What
// has the record's revisions is lost here, so a watch that stands right before them must be canceled, and may begin
// again where it is told to. (Seed 151 of TestSimulation.)
func TestWatchOfTornRevision(t *testing.T) {
	w := smallWorld(t, 1, 1<<10)
	p := w.proxies[0]
	put := w.put(p, "x02")
	o := p.newViewer().watch(&watchring.Watcher{Key: "k", End: "y", PrevKV: true, Start: put})
	p.turn()
	w.wait("the put", func() bool { return o.promised >= put })

	l := p.host.Link(0)
	l.StreamHole = true
	w.net.Members[0].Expire("x02")
	rev := w.put(p, "k00")
	if rev != put+1 {
		t.Fatalf("put at %d, and then at %d", put, rev)
	}
	c := w.net.Members[0]
	c.compact = c.Rev()
	l.Reset()
	l.Resume()
	w.wait("the compaction", func() bool { return o.ended || o.promised >= rev })
	if !o.ended {
		t.Fatalf("it was promised everything up to %d, and got %v", o.promised, o.got)
	}
	if from := p.core.Frontier().Compacted(); from != rev+1 {
		t.Errorf("watches may begin at %d, must be %d", from, rev+1)
	}
	// A list shows everything up to there, and the watch behind it brings the rest.
	again := p.newViewer().watch(&watchring.Watcher{Key: "k", End: "y", Start: rev + 1})
	p.turn()
	next := w.put(p, "k01")
	w.wait("the next put", func() bool { return again.promised >= next })
	if again.ended || len(again.got) != 1 {
		t.Errorf("it got %v, ended: %v", again.got, again.ended)
	}
}

// TestWatchOfTornEvents: the same, but the member is compacted between an event that waits for a record and that
// record: the event would have had its first revision.
func TestWatchOfTornEvents(t *testing.T) {
	w := smallWorld(t, 1, 1<<10)
	p := w.proxies[0]
	w.put(p, "x02")
	put := w.put(p, "x05")
	o := p.newViewer().watch(&watchring.Watcher{Key: "k", End: "y", PrevKV: true, Start: put})
	p.turn()
	w.wait("the put", func() bool { return o.promised >= put })

	l := p.host.Link(0)
	l.StreamHole = true
	c := w.net.Members[0]
	c.Expire("x02")
	c.Expire("x05")
	c.compact = c.Rev()
	l.Reset()
	l.Resume()
	w.wait("a record", func() bool { return o.ended || p.core.Frontier().Get(watchring.All) > put && o.promised > put })
	if !o.ended {
		t.Errorf("it was promised everything up to %d, and got %v", o.promised, o.got)
	}
}

// TestWatchOfTornPast: a watch from before the ring begins at the oldest record that a compaction has left, and what
// had no record of its own and shares its revision is gone. It was said that such deletes may be gone, as with
// etcd; but etcd 3.6 keeps those at the compact revision, and a client that was told it would never know.
func TestWatchOfTornPast(t *testing.T) {
	w := smallWorld(t, 1, 32)
	p := w.proxies[0]
	torn := w.put(p, "x02") + 1 // the end's revision: its own, or the next put's
	c := w.net.Members[0]
	c.Expire("x02")
	rev := w.put(p, "k00")
	at := c.Rev()
	var last int64
	for range 60 {
		last = w.put(p, "k01")
	}
	c.compact = at
	// A new proxy has not seen the record before.
	p.crash()
	p.boot(0)
	w.wait("the start", func() bool { return p.ready })
	o := p.newViewer().watch(&watchring.Watcher{Key: "k", End: "y", PrevKV: true, Start: torn})
	p.turn()
	w.wait("its end", func() bool { return o.ended || o.promised >= torn })
	if !o.ended {
		t.Errorf("it was promised everything up to %d, and got %v", o.promised, o.got)
	}
	behind := p.newViewer().watch(&watchring.Watcher{Key: "k", End: "y", Start: rev + 1})
	p.turn()
	w.wait("the past", func() bool { return behind.ended || behind.promised >= last })
	if behind.ended || int64(len(behind.got)) != last-rev {
		t.Errorf("the watch behind it got %d revisions of %d, ended: %v", len(behind.got), last-rev, behind.ended)
	}
	if st := p.core.Failed(); st != "" || w.fault != nil {
		t.Error(st, w.fault)
	}
}
