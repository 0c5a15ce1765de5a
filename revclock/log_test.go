package revclock

import (
	"bytes"
	"reflect"
	"testing"
	"time"
)

const msec = int64(time.Millisecond)

// logTest folds ticks given in short.
type logTest struct {
	t     *testing.T
	l     *Log
	rev   int64
	nonce uint64
}

func (lt *logTest) tick(holder byte, now int64, items ...TickItem) {
	lt.t.Helper()
	lt.rev++
	lt.nonce++
	folded, err := lt.l.Fold(AppendTick(nil, &Tick{Proxy: ID{holder}, Nonce: lt.nonce, Items: items}), lt.rev, now, 0)
	if err != nil || !folded {
		lt.t.Fatal(folded, err)
	}
}

func firsts(rs []Range) (f []int64) {
	for _, r := range rs {
		f = append(f, r.First)
	}
	return f
}

func wantFirsts(t *testing.T, rs []Range, want ...int64) {
	t.Helper()
	if got := firsts(rs); !reflect.DeepEqual(got, want) {
		t.Fatalf("open ranges begin at %v, want %v", got, want)
	}
}

func TestLogFold(t *testing.T) {
	lt := &logTest{t: t, l: NewLog(ID{1}, 3), rev: 10}
	l := lt.l
	if l.N() != 1 || l.Frontier(0) != 1 {
		t.Fatal("a fresh system starts at revision 1")
	}
	lt.tick(1, 100, TickItem{Shard: 0, Count: 2, Filter: []byte{1}}, TickItem{Shard: 2, Count: 3}) // 2-3, 4-6
	lt.tick(2, 200, TickItem{Shard: 0, Count: 1, Turn: true})                                      // 7
	if a, h := l.A(0); l.N() != 7 || a != 7 || h != (ID{2}) {
		t.Fatal(l.N(), a, h)
	}
	if a, h := l.A(1); a != 0 || h != (ID{}) {
		t.Fatal(a, h)
	}
	wantFirsts(t, l.Open(0), 2, 7)
	r := l.Open(0)[0]
	want := Range{First: 2, Last: 3, Holder: ID{1}, Nonce: 1, Rev: 11, Seen: 100, Filter: []byte{1}, Orphan: true}
	if !reflect.DeepEqual(r, want) {
		t.Fatalf("%+v", r)
	}
	if l.Frontier(0) != 1 || l.Frontier(1) != 7 || l.Frontier(2) != 3 {
		t.Fatal(l.Frontier(0), l.Frontier(1), l.Frontier(2))
	}

	// The second range's record overtakes the first one's.
	if n := l.Committed(0, 7, 7, ID{2}); n != 1 || l.Frontier(0) != 7 || len(l.Open(0)) != 0 {
		t.Fatal(n, l.Frontier(0))
	}
	// A tick that was folded comes again.
	if folded, err := l.Fold([]byte("whatever"), 12, 0, 0); folded || err != nil {
		t.Fatal(folded, err)
	}
	// A record that is faster than its tick.
	l.Committed(1, 8, 9, ID{2})
	if l.Frontier(1) != 9 || l.N() != 7 {
		t.Fatal(l.Frontier(1))
	}
	lt.tick(2, 300, TickItem{Shard: 1, Count: 2, Committed: 0})
	if len(l.Open(1)) != 0 || l.Frontier(1) != 9 || l.Frontier(0) != 9 {
		t.Fatal(l.Open(1))
	}
	lt.tick(3, 300, TickItem{Shard: 1, Count: 1, Committed: 9})
	if l.C(1) != 9 || l.Clock(1) != 9 {
		t.Fatal(l.C(1))
	}
	// A clock never goes back, and a range may be cut.
	l.SetClock(1, 3)
	l.SetClock(2, 5)
	wantFirsts(t, l.Open(2), 6)
	if l.Clock(1) != 9 || l.Frontier(2) != 5 {
		t.Fatal(l.Clock(1), l.Frontier(2))
	}
}

func TestLogRefuses(t *testing.T) {
	for name, tick := range map[string][]byte{
		"no tick":       []byte("x"),
		"unknown shard": AppendTick(nil, &Tick{Nonce: 1, Items: []TickItem{{Shard: 2, Count: 1}}}),
		"clock ahead":   AppendTick(nil, &Tick{Nonce: 1, Items: []TickItem{{Shard: 1, Count: 1, Committed: 5}}}),
	} {
		if _, err := NewLog(ID{1}, 2).Fold(tick, 1, 0, 0); err == nil {
			t.Error(name)
		}
	}
	l := NewLog(ID{1}, 2)
	if l.Load([]byte("x"), 0) == nil || l.Load(AppendSnapshot(nil, &Snapshot{N: 1, Shards: make([]SnapshotShard, 3)}), 0) == nil {
		t.Error("snapshot")
	}
}

func TestLogLoad(t *testing.T) {
	a := &logTest{t: t, l: NewLog(ID{1}, 2), rev: 10}
	a.tick(1, 0, TickItem{Shard: 0, Count: 4, Filter: []byte{1}}) // 2-5
	a.tick(2, 0, TickItem{Shard: 0, Count: 4, Filter: []byte{1}}) // 6-9
	a.tick(3, 0, TickItem{Shard: 1, Count: 1})                    // 10
	snap := a.l.AppendSnapshot(nil)

	b := NewLog(ID{2}, 2)
	b.SetClock(0, 5)
	if err := b.Load(snap, 77); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b.AppendSnapshot(nil), snap) || b.N() != 10 || b.Rev() != 13 {
		t.Fatal("another fold")
	}
	want := Range{First: 6, Last: 9, Holder: ID{2}, Rev: 13, Seen: 77, Filter: FilterAll, Merged: true}
	if got := b.Open(0); len(got) != 1 || !reflect.DeepEqual(got[0], want) {
		t.Fatalf("%+v", got)
	}
	wantFirsts(t, b.Open(1), 2)
	if b.Frontier(0) != 5 || b.Frontier(1) != 1 {
		t.Fatal(b.Frontier(0))
	}
	if own, other := b.LastOther(0), b.LastOther(1); own != 0 || other != 77 {
		t.Errorf("another proxy was given a range at %d, %d", own, other)
	}
	// A start that finds nothing open has learned of no other proxy: not from shards that never had a tick either.
	fresh := NewLog(ID{4}, 3)
	fresh.SetClock(0, 9)
	fresh.SetClock(1, 10)
	if err := fresh.Load(AppendSnapshot(nil, &Snapshot{Rev: 13, N: 10, Shards: []SnapshotShard{{A: 9, Holder: ID{2}}, {A: 10, Holder: ID{3}}, {}}}), 77); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if at := fresh.LastOther(i); at != 0 {
			t.Errorf("shard %d: another proxy was given a range at %d", i, at)
		}
	}
	// Records inside it cut it, and count as overtaken by nobody.
	if b.Committed(1, 10, 10, ID{3}) != 0 || b.Frontier(1) != 10 {
		t.Fatal(b.Frontier(1))
	}
	// What is known to be complete stays so over a later snapshot.
	a.tick(1, 0, TickItem{Shard: 1, Count: 1}) // 11
	if err := b.Load(a.l.AppendSnapshot(nil), 78); err != nil {
		t.Fatal(err)
	}
	if b.Frontier(1) != 10 || b.Frontier(0) != 5 {
		t.Fatal(b.Frontier(1))
	}
	wantFirsts(t, b.Open(1), 11)
}

func TestLogBoundsOpenRanges(t *testing.T) {
	lt := &logTest{t: t, l: NewLog(ID{1}, 1)}
	for range 3 * maxOpen {
		lt.tick(2, 0, TickItem{Shard: 0, Count: 2, Filter: []byte{1}})
		if len(lt.l.Open(0)) > maxOpen {
			t.Fatal(len(lt.l.Open(0)))
		}
	}
	open := lt.l.Open(0)
	if !open[0].Merged || open[0].First != 2 || !FilterMayContain(open[0].Filter, []byte("x")) {
		t.Fatalf("%+v", open[0])
	}
	for i := 1; i < len(open); i++ {
		if open[i].First != open[i-1].Last+1 {
			t.Fatal(open[i-1], open[i])
		}
	}
	if lt.l.Frontier(0) != 1 {
		t.Fatal(lt.l.Frontier(0))
	}
	lt.l.SetClock(0, lt.l.N())
	if len(lt.l.Open(0)) != 0 {
		t.Fatal("still open")
	}
}

func TestEarliest(t *testing.T) {
	lt := &logTest{t: t, l: NewLog(ID{1}, 2)}
	l := lt.l
	one := TickItem{Shard: 0, Count: 1}
	lt.tick(2, 1000*msec, one) // 2
	lt.tick(1, 1001*msec, one) // 3, own
	lt.tick(3, 1002*msec, one) // 4
	check := func(first, now, want int64) {
		t.Helper()
		if at := l.Earliest(0, first, now); at != want {
			t.Fatalf("earliest is %d, want %d", at, want)
		}
	}
	check(2, 1000*msec, 1000*msec)          // nobody before it
	check(3, 1000*msec, 1000*msec+slotBase) // a slot after the one before
	check(3, 1001*msec, 1001*msec)          // which is over by then
	check(5, 1001*msec, 1002*msec+slotBase) // the later of two
	if l.Earliest(1, 5, 7) != 7 {
		t.Fatal("other shards do not matter")
	}

	// Overtaken ranges of 2 make the wait longer, up to a bound; those of 3 stay.
	for i := range 40 {
		now := int64(2000+100*i) * msec
		lt.tick(2, now, one)
		first := l.N()
		lt.tick(1, now, one)
		l.Committed(0, first+1, first+1, ID{1})
	}
	lt.tick(2, 9000*msec, one)
	first := l.N()
	lt.tick(1, 9000*msec, one)
	check(first+1, 9000*msec, 9000*msec+slotMax)

	// Records in order make it shorter again.
	for range 2000 {
		l.Committed(0, l.N()-1, l.N()-1, ID{2})
		l.SetClock(0, l.N())
		lt.tick(2, 9000*msec, one)
		lt.tick(1, 9000*msec, one)
	}
	check(l.N(), 9000*msec, 9000*msec+slotBase)
	l.SetClock(0, l.N())

	// A turn mark is waited for until the record is there, but not forever.
	lt.tick(2, 9500*msec, TickItem{Shard: 0, Count: 1, Turn: true})
	first = l.N()
	lt.tick(1, 9500*msec, one)
	check(first+1, 9500*msec, 9500*msec+turnWait)
	l.Committed(0, first, first, ID{2})
	check(first+1, 9500*msec, 9500*msec)
}

func TestOrderForgetsTheLeast(t *testing.T) {
	l := NewLog(ID{1}, 1)
	for range 3 {
		l.order.overtaken(0, ID{9})
	}
	for i := range 3 * maxHolders {
		l.order.overtaken(0, ID{10, byte(i)})
	}
	if n := len(l.order.shards[0]); n != maxHolders {
		t.Fatal(n)
	}
	if l.order.part(0, ID{9}) <= slotStep {
		t.Fatal("forgot the slowest")
	}
}

// An item with count 0 hands out nothing: it says how far a shard is that is idle.
func TestLogNamesClocks(t *testing.T) {
	lt := &logTest{t: t, l: NewLog(ID{1}, 2), rev: 10}
	l := lt.l
	lt.tick(1, 100, TickItem{Shard: 0, Count: 2}, TickItem{Shard: 1, Count: 1})
	lt.tick(2, 200, TickItem{Shard: 0, Committed: 3}, TickItem{Shard: 1, Count: 1, Committed: 4})
	if l.N() != 5 || l.C(0) != 3 || l.C(1) != 4 {
		t.Fatal(l.N(), l.C(0), l.C(1))
	}
	if a, h := l.A(0); a != 3 || h != (ID{1}) {
		t.Fatal(a, h)
	}
	wantFirsts(t, l.Open(0), 2)
	wantFirsts(t, l.Open(1), 4, 5)
	if _, err := l.Fold(AppendTick(nil, &Tick{Nonce: 1, Items: []TickItem{{Shard: 0, Committed: 4}}}), 13, 0, 0); err != errBehind {
		t.Fatal(err)
	}
}
