package shard

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/revclock"
	"spindle/watchring"
)

// pastRig is a Core whose streams have seen everything already, over members that say what the test lets
// them say.
type pastRig struct {
	t     *testing.T
	c     *Core
	now   int64
	local []int64 // per shard
	watch []*pastWatch
	calls []pastCall
	ticks int64
}

type pastWatch struct {
	r      *pastRig
	to     codec.ClusterID
	start  int64
	sink   codec.WatchSink
	held   bool
	closed bool
	mute   bool // its node says nothing, others do
}

type pastCall struct {
	to  codec.ClusterID
	req *etcdserverpb.RangeRequest
	c   codec.Completion
}

func (r *pastRig) Call(to codec.ClusterID, m codec.Method, req []byte, _ time.Duration, c codec.Completion) {
	if m == codec.MethodTxn { // whether the shard is what it was, before a stream is opened again
		c.Complete(r.same(r.c.shards[to]), codec.Status{}, true)
		return
	}
	q := &etcdserverpb.RangeRequest{}
	if m != codec.MethodRange || proto.Unmarshal(req, q) != nil {
		r.t.Fatalf("an unexpected call of method %d", m)
	}
	r.calls = append(r.calls, pastCall{to, q, c})
}

// same is the answer of a shard that is what it was.
func (r *pastRig) same(s *shardState) []byte {
	kv := func(key string, value []byte, mod int64) *etcdserverpb.ResponseOp {
		return rangeOf(&mvccpb.KeyValue{Key: []byte(key), Value: value, CreateRevision: 1, ModRevision: mod, Version: 1})
	}
	clock := kv(KeyClock, AppendRecord(nil, &Record{First: s.rec.first, Last: s.rec.last, Kind: KindFence}), s.rec.local)
	return mustMarshal(r.t, &etcdserverpb.TxnResponse{
		Header: &etcdserverpb.ResponseHeader{Revision: s.rec.local}, Succeeded: true,
		Responses: []*etcdserverpb.ResponseOp{kv(KeyID, AppendIdentity(nil, r.c.m.Shards[s.idx].Identity), 1), clock, clock},
	})
}

func (r *pastRig) Watch(to codec.ClusterID, req []byte, sink codec.WatchSink) codec.WatchHandle {
	q := &etcdserverpb.WatchRequest{}
	if err := proto.Unmarshal(req, q); err != nil {
		r.t.Fatal(err)
	}
	c := q.GetCreateRequest()
	if string(c.Key) != "\x00" || string(c.RangeEnd) != "\x00" || !c.PrevKv || !c.Fragment {
		r.t.Errorf("the watch of the past is %v", c)
	}
	w := &pastWatch{r: r, to: to, start: c.StartRevision, sink: sink}
	r.watch = append(r.watch, w)
	return w
}

func (r *pastRig) KeepAlive(codec.ClusterID, codec.WatchSink) codec.WatchHandle {
	r.t.Fatal("a read of the past keeps no lease alive")
	return nil
}

func (w *pastWatch) Send([]byte)    {}
func (w *pastWatch) Hold(hold bool) { w.held = hold }
func (w *pastWatch) Close()         { w.closed = true }

func (w *pastWatch) Mute(time.Duration) bool { return w.mute }

// open returns the open streams.
func (r *pastRig) open() (out []*pastWatch) {
	for _, w := range r.watch {
		if !w.closed {
			out = append(out, w)
		}
	}
	return out
}

func newPastRig(t *testing.T, shards int) *pastRig {
	r := &pastRig{t: t, now: 1, local: make([]int64, shards)}
	r.c = NewCore(CoreConfig{
		Names: make([]string, shards), Now: func() int64 { return r.now }, Rand: rand.New(rand.NewPCG(1, 1)), HistoryBytes: 1000,
	}, r)
	c := r.c
	c.ring, c.frontier, c.state = watchring.NewRing(16, 1<<20, 0), watchring.NewFrontier(shards, 0), stateReady
	c.m = &Map{}
	for i := range shards {
		c.m.Shards = append(c.m.Shards, MapShard{Identity: revclock.ID{byte(i + 1)}})
		s := &shardState{c: c, idx: i, cluster: codec.ClusterID(i), name: fmt.Sprint(i)}
		s.rec = point{local: 1}
		s.points = []point{s.rec}
		r.local[i] = 1
		c.shards = append(c.shards, s)
	}
	return r
}

// tick lets time pass.
func (r *pastRig) tick(d time.Duration) {
	r.now += int64(d)
	for len(r.c.timers) > 0 && r.c.timers[0].at <= r.now {
		r.c.Tick()
	}
}

// batch is a local revision of a shard, as etcd shows it: puts "key" and deletes "-key" at their revisions. The
// shard's own stream has seen it, and every frontier moves to last.
func (r *pastRig) batch(shard int, first, last int64, what map[int64]string) []*mvccpb.Event {
	events := r.events(shard, first, last, what)
	s := r.c.shards[shard]
	s.rec = point{first, last, r.local[shard]}
	s.points = append(s.points, s.rec)
	for i := range r.c.shards {
		r.c.frontier.Set(i, last)
	}
	return events
}

// events are those of a batch that no stream of the proxy's has seen.
func (r *pastRig) events(shard int, first, last int64, what map[int64]string) []*mvccpb.Event {
	r.local[shard]++
	local := r.local[shard]
	rec := &Record{First: first, Last: last, Kind: KindBatch}
	var events []*mvccpb.Event
	for rev := first; rev <= last; rev++ {
		k := what[rev]
		switch {
		case k == "":
		case k[0] == '-':
			rec.Deletes = append(rec.Deletes, RecordDelete{Rev: rev, Key: []byte(k[1:])})
			events = append(events, expired(k[1:], local))
		default:
			v := append(AppendStamp(nil, rev, rev), "value"...)
			events = append(events, &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(k), Value: v, CreateRevision: local, ModRevision: local, Version: 1}})
		}
	}
	events = append(events, &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(KeyClock), Value: AppendRecord(nil, rec), ModRevision: local, Version: 2}})
	return events
}

// expired is a delete without a record of its own, or the event of one.
func expired(key string, local int64) *mvccpb.Event {
	return &mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: local}}
}

func (w *pastWatch) bring(fragment bool, events ...*mvccpb.Event) {
	w.r.t.Helper()
	b, err := proto.Marshal(&etcdserverpb.WatchResponse{Events: events, Fragment: fragment})
	if err != nil {
		w.r.t.Fatal(err)
	}
	w.sink.OnMessage(b)
	for i := range b {
		b[i] = 0xA5 // it was valid during the call only
	}
}

// next asks h, and returns a function that tells the answer, "" while there is none.
func (r *pastRig) next(h *History, max int) func() string {
	got := ""
	h.Next(max, func(entries []*watchring.Entry, upTo, compact int64, st codec.Status) {
		var b strings.Builder
		for _, e := range entries {
			fmt.Fprintf(&b, "%d", e.Rev)
			for _, ev := range e.Events {
				sign := "+"
				if ev.Delete {
					sign = "-"
				}
				fmt.Fprintf(&b, "%s%s", sign, ev.Key)
			}
			b.WriteString(" ")
		}
		fmt.Fprintf(&b, "to %d", upTo)
		if st.Code != codec.OK {
			fmt.Fprintf(&b, " %s %d", st.Msg, compact)
		}
		got = b.String()
	})
	return func() string { return got }
}

func expect(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %q, expected %q", what, got, want)
	}
}

func TestHistoryMerges(t *testing.T) {
	r := newPastRig(t, 3)
	a1 := r.batch(0, 1, 3, map[int64]string{1: "a", 2: "b", 3: "-a"})
	b1 := r.batch(1, 4, 4, map[int64]string{4: "c"})
	a2 := r.batch(0, 5, 6, map[int64]string{5: "d", 6: "-e"})
	b2 := r.batch(1, 7, 8, map[int64]string{8: "f"})

	h := r.c.OpenHistory(watchring.All, 2) // inside a batch
	answer := r.next(h, 1<<20)
	open := r.open()
	if len(open) != 2 || open[0].to != 0 || open[1].to != 1 || open[0].start != 2 {
		t.Fatalf("streams %v; the shard on which nothing happened needs none", open)
	}
	a, b := open[0], open[1]
	b.bring(false, append(b1, b2...)...)
	expect(t, "one shard has not come yet", answer(), "")
	a.bring(false, a1...)
	expect(t, "up to the first batch", answer(), "2+b 3-a to 3")
	answer = r.next(h, 1<<20)
	expect(t, "nothing new", answer(), "")
	a.bring(true, a2[0])
	expect(t, "half a batch", answer(), "")
	a.bring(false, a2[1:]...)
	expect(t, "the rest", answer(), "4+c 5+d 6-e 8+f to 8")

	// It goes on with what is new.
	answer = r.next(h, 1<<20)
	a3 := r.batch(0, 9, 9, map[int64]string{9: "g"})
	r.c.tryHistories()
	expect(t, "not seen yet", answer(), "")
	a.bring(false, a3...)
	expect(t, "what is new", answer(), "9+g to 9")
	h.Close()
	if len(r.open()) != 0 || len(r.c.histories) != 0 {
		t.Error("streams are left")
	}
}

func TestHistoryIsBounded(t *testing.T) {
	r := newPastRig(t, 2)
	var a, b []*mvccpb.Event
	for rev := int64(1); rev <= 40; rev += 2 {
		a = append(a, r.batch(0, rev, rev, map[int64]string{rev: "a"})...)
		b = append(b, r.batch(1, rev+1, rev+1, map[int64]string{rev + 1: "b"})...)
	}
	h := r.c.OpenHistory(watchring.All, 1)
	answer := r.next(h, 1)
	wa, wb := r.open()[0], r.open()[1]
	wa.bring(false, a...)
	if !wa.held || wb.held {
		t.Fatalf("held: %v, %v; the first is ahead", wa.held, wb.held)
	}
	wb.bring(false, b...)
	for rev := 1; rev <= 40; rev++ {
		expect(t, "one at a time", answer(), fmt.Sprintf("%d+%c to %d", rev, "ba"[rev%2], rev))
		answer = r.next(h, 1)
	}
	if wa.held || wb.held || h.parts[0].bytes != 0 {
		t.Errorf("held: %v, %v, kept: %d", wa.held, wb.held, h.parts[0].bytes)
	}
}

func TestHistoryUnrecorded(t *testing.T) {
	r := newPastRig(t, 1)
	b1 := r.batch(0, 1, 1, map[int64]string{1: "a"})
	r.local[0]++
	x := expired("x", r.local[0])
	foreign := &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte("y"), Value: []byte("no stamp"), ModRevision: r.local[0], CreateRevision: r.local[0], Version: 1}}
	b2 := r.batch(0, 2, 3, map[int64]string{3: "b"})
	h := r.c.OpenHistory(0, 1)
	answer := r.next(h, 1<<20)
	w := r.open()[0]
	w.bring(false, b1...)
	expect(t, "before", answer(), "1+a to 1")
	answer = r.next(h, 1<<20)
	w.bring(false, x, foreign)
	expect(t, "it waits for its record", answer(), "")
	// The stream breaks: what waited comes again.
	w.closed = true
	w.sink.OnEnd(codec.Status{Code: codec.Unavailable})
	r.tick(time.Second)
	if len(r.open()) != 1 || r.open()[0].start != 3 {
		t.Fatalf("streams: %v", r.open())
	}
	r.open()[0].bring(false, append([]*mvccpb.Event{x, foreign}, b2...)...)
	expect(t, "with its record", answer(), "2-x 3+b to 3")
}

// TestHistoryUnrecordedIsNotHeldBack: more without a record than a part may keep, as when many leases end while no
// proxy is there. The record that it waits for stands behind it on the same stream.
func TestHistoryUnrecordedIsNotHeldBack(t *testing.T) {
	r := newPastRig(t, 1)
	b1 := r.batch(0, 1, 1, map[int64]string{1: "a"})
	var xs []*mvccpb.Event
	for range 4 {
		r.local[0]++
		x := expired("x", r.local[0])
		x.PrevKv = &mvccpb.KeyValue{Key: []byte("x"), ModRevision: 1, CreateRevision: 1, Version: 1, Lease: 7,
			Value: append(AppendStamp(nil, 1, 1), make([]byte, r.c.cfg.HistoryBytes)...)}
		xs = append(xs, x)
	}
	b2 := r.batch(0, 2, 3, map[int64]string{3: "b"})
	h := r.c.OpenHistory(0, 1)
	answer := r.next(h, 1)
	w := r.open()[0]
	w.bring(false, b1...)
	expect(t, "before", answer(), "1+a to 1")
	answer = r.next(h, 1<<20)
	for _, x := range xs {
		if w.bring(false, x); w.held {
			t.Fatal("the stream is held back although its record is to come on it")
		}
	}
	w.bring(false, b2...)
	expect(t, "with its record", answer(), "2-x-x-x-x 3+b to 3")
	if h.parts[0].bytes != 0 {
		t.Errorf("%d bytes are counted, nothing is kept", h.parts[0].bytes)
	}
}

func TestHistoryStallOpensAnotherStream(t *testing.T) {
	r := newPastRig(t, 1)
	b := r.batch(0, 1, 1, map[int64]string{1: "a"})
	h := r.c.OpenHistory(0, 1)
	answer := r.next(h, 1<<20)
	first := r.open()[0]
	r.tick(streamStall)
	r.tick(time.Second)
	if !first.closed || len(r.open()) != 1 {
		t.Fatalf("a silent stream is still the one")
	}
	first.bring(false, b...) // too late
	expect(t, "of a closed stream", answer(), "")
	r.open()[0].bring(false, b...)
	expect(t, "of the next", answer(), "1+a to 1")
}

// A member that needs longer than a stream may be silent is heard out in the end.
func TestHistorySlowMember(t *testing.T) {
	r := newPastRig(t, 2)
	a := r.batch(0, 1, 1, map[int64]string{1: "a"})
	b := r.batch(1, 2, 2, map[int64]string{2: "b"})
	h := r.c.OpenHistory(watchring.All, 1)
	answer := r.next(h, 1<<20)
	r.open()[0].bring(false, a...) // the other one's silence counts all the same
	expect(t, "the first", answer(), "")
	opened := make(map[*pastWatch]int64)
	for i := 0; answer() == ""; i++ {
		if i > 120 {
			t.Fatalf("%d streams in two minutes, and none was heard out", len(opened))
		}
		for _, w := range r.open() {
			if w.to != 1 {
				continue
			}
			if at, ok := opened[w]; !ok {
				opened[w] = r.now
				w.created()
			} else if r.now-at >= int64(12*time.Second) {
				w.bring(false, b...)
			}
		}
		r.tick(time.Second)
	}
	expect(t, "both", answer(), "1+a 2+b to 2")
	if len(opened) > 4 || h.parts[1].stalls != 0 {
		t.Errorf("%d streams, %d stalls", len(opened), h.parts[1].stalls)
	}
}

// Histories that nobody asks any more give their places to those that wait, and go on from where they were. Those
// of another shard have places of their own.
func TestHistoryIdleGivesItsPlaceUp(t *testing.T) {
	r := newPastRig(t, 2)
	b1 := r.batch(0, 1, 1, map[int64]string{1: "a"})
	b2 := r.batch(0, 2, 2, map[int64]string{2: "b"})
	c1 := r.batch(1, 3, 3, map[int64]string{3: "c"})
	var hs []*History
	for range maxHistories {
		h := r.c.OpenHistory(0, 1)
		hs = append(hs, h)
		answer := r.next(h, 1)
		w := r.open()
		w[len(w)-1].bring(false, append(b1, b2...)...)
		expect(t, "the first chunk", answer(), "1+a to 1")
	}
	other := r.c.OpenHistory(1, 1)
	answer := r.next(other, 1)
	if w := r.open(); len(w) != maxHistories+1 || w[maxHistories].to != 1 {
		t.Fatal("another shard's has no place")
	} else {
		w[maxHistories].bring(false, c1...)
		expect(t, "another shard's", answer(), "3+c to 3")
	}
	busy := r.next(hs[1], 1)
	expect(t, "one that is asked", busy(), "2+b to 2")
	expect(t, "one that is asked", r.next(hs[1], 1)(), "to 3")
	busy = r.next(hs[1], 1) // it waits for what will come
	late := r.c.OpenHistory(0, 2)
	answer = r.next(late, 1)
	for i := 0; !late.active && i < 100; i++ {
		r.tick(100 * time.Millisecond)
		r.c.tryHistories()
	}
	w := r.open()
	last := w[len(w)-1]
	if len(w) != maxHistories+1 || last.to != 0 || hs[0].active || !hs[1].active || !late.active {
		t.Fatalf("%d streams; active: %v, %v, %v", len(w), hs[0].active, hs[1].active, late.active)
	}
	last.bring(false, b2...)
	expect(t, "who waited", answer(), "2+b to 2")
	// The first one comes back.
	answer = r.next(hs[0], 1)
	expect(t, "no place", answer(), "")
	for !hs[0].active {
		r.tick(100 * time.Millisecond)
		r.c.tryHistories()
	}
	w = r.open()
	w[len(w)-1].bring(false, append(b1, b2...)...)
	expect(t, "where it was", answer(), "2+b to 2")
	expect(t, "nothing new", busy(), "")
	for _, h := range append(hs, other, late) {
		h.Close()
	}
	if len(r.open()) != 0 || len(r.c.histories) != 0 {
		t.Error("something is left")
	}
}

func TestHistoryCompacted(t *testing.T) {
	r := newPastRig(t, 2)
	for rev := int64(1); rev <= 9; rev++ {
		r.batch(int(rev%2), rev, rev, map[int64]string{rev: "k"})
	}
	// By a client, before the read.
	r.c.noteCompaction(4)
	h := r.c.OpenHistory(watchring.All, 3)
	expect(t, "below the compact revision", r.next(h, 1)(), "to 2 "+codec.ErrCompacted.Msg+" 4")
	h.Close()

	// By somebody else, while it reads.
	h = r.c.OpenHistory(watchring.All, 4)
	answer := r.next(h, 1)
	w := r.open()[0]
	msg, err := proto.Marshal(&etcdserverpb.WatchResponse{Canceled: true, CompactRevision: 5})
	if err != nil {
		t.Fatal(err)
	}
	w.sink.OnMessage(msg)
	if len(r.calls) != 1 || r.calls[0].req.Revision != 5 || string(r.calls[0].req.Key) != KeyClock {
		t.Fatalf("calls: %v", r.calls)
	}
	resp, err := proto.Marshal(&etcdserverpb.RangeResponse{Kvs: []*mvccpb.KeyValue{{
		Key: []byte(KeyClock), ModRevision: 5, Value: AppendRecord(nil, &Record{First: 8, Last: 8, Kind: KindBatch}),
	}}})
	if err != nil {
		t.Fatal(err)
	}
	r.calls[0].c.Complete(resp, codec.Status{}, true)
	// What had no record and shares revision 8 may be gone.
	expect(t, "compacted under the read", answer(), "to 3 "+codec.ErrCompacted.Msg+" 9")
	if len(r.open()) != 0 {
		t.Error("streams are left")
	}
	h.Close()
}

func TestHistoriesWaitInOrder(t *testing.T) {
	r := newPastRig(t, 1)
	b := r.batch(0, 1, 1, map[int64]string{1: "a"})
	var hs []*History
	var answers []func() string
	for range maxHistories + 2 {
		h := r.c.OpenHistory(0, 1)
		hs, answers = append(hs, h), append(answers, r.next(h, 1))
	}
	if n := len(r.open()); n != maxHistories {
		t.Fatalf("%d streams", n)
	}
	hs[3].Close()
	if !r.c.frontierRose {
		t.Fatal("nobody looks who is next")
	}
	r.c.tryHistories()
	if n := len(r.open()); n != maxHistories {
		t.Fatalf("%d streams after one ended", n)
	}
	for _, w := range r.open() {
		w.bring(false, b...)
	}
	for i, a := range answers {
		want := "1+a to 1"
		if i == 3 || i == maxHistories+1 {
			want = ""
		}
		expect(t, fmt.Sprintf("read %d", i), a(), want)
	}
	for _, h := range slices.Clone(hs) {
		h.Close()
	}
	if len(r.open()) != 0 || len(r.c.histories) != 0 {
		t.Error("something is left")
	}
}

// TestHistoryCompactedBeforeTheRecord: a member is compacted at a record, and with that what waited for it is gone: a
// read from the record's first revision cannot be complete, and says so.
func TestHistoryCompactedBeforeTheRecord(t *testing.T) {
	for from, want := range map[int64]string{5: "to 4 " + codec.ErrCompacted.Msg + " 7", 6: "6+b to 6"} {
		r := newPastRig(t, 1)
		r.batch(0, 4, 4, map[int64]string{4: "a"})
		r.local[0]++ // a lease ended here
		b := r.batch(0, 5, 6, map[int64]string{5: "a", 6: "b"})
		s := r.c.shards[0]
		s.points = s.points[len(s.points)-1:]
		answer := r.next(r.c.OpenHistory(0, from), 1)
		for len(r.calls) > 0 {
			q := r.calls[0]
			r.calls = r.calls[1:]
			q.c.Complete(nil, codec.ErrCompacted, true)
		}
		for _, w := range r.open() {
			if w.start != s.rec.local {
				t.Errorf("from %d: the stream begins at %d", from, w.start)
			}
			w.bring(false, b...)
		}
		expect(t, fmt.Sprint("from ", from), answer(), want)
	}
}
