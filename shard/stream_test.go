package shard

import (
	"fmt"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/revclock"
	"spindle/watchring"
)

// newStreamRig is a pastRig whose own streams are open, from the beginning.
func newStreamRig(t *testing.T, shards int) *pastRig {
	r := newPastRig(t, shards)
	for _, s := range r.c.shards {
		s.streaming = true
		s.openStream()
	}
	return r
}

// shown returns the revisions in the ring up to one.
func (r *pastRig) shown(upTo int64) string {
	out := ""
	for rev := r.c.ring.Tail() + 1; rev <= upTo; rev++ {
		if e, _ := r.c.ring.Load(rev); e != nil {
			out += fmt.Sprintf("%d:%d ", rev, len(e.Events))
		}
	}
	return out
}

// handOut lets the coordinator hand out ranges, n revisions each, to the shards in order.
func (r *pastRig) handOut(n int, shards ...int) {
	r.t.Helper()
	for _, i := range shards {
		r.ticks++
		tick := revclock.AppendTick(nil, &revclock.Tick{Proxy: revclock.ID{9}, Nonce: uint64(r.ticks), Items: []revclock.TickItem{{Shard: i, Count: n, Filter: []byte{1, 2, 3, 4, 5, 6, 7, 8}}}})
		if _, err := r.c.clock.Log().Fold(tick, r.ticks, r.now, 0); err != nil {
			r.t.Fatal(err)
		}
	}
	r.c.stale = true
}

// A local revision may come in several messages, and the ring may have no room for what stands before it.
func TestStreamTakesFragments(t *testing.T) {
	r := newStreamRig(t, 2)
	r.handOut(2, 1) // 2 and 3: the other shard's, open all the time
	r.c.frontier = watchring.NewFrontier(2, 1)
	r.streamsOf()
	w := r.open()[0]
	if w.to != 0 {
		t.Fatal("whose stream is it?")
	}
	s := r.c.shards[0]
	s.rec = point{local: 1}
	a := r.events(0, 4, 6, map[int64]string{4: "a", 5: "b", 6: "-c"})
	b := r.events(0, 7, 8, map[int64]string{7: "d", 8: "e"})
	far := r.events(0, 30, 31, map[int64]string{30: "f", 31: "g"})
	last := r.events(0, 32, 34, map[int64]string{32: "h", 33: "i", 34: "j"})
	r.handOut(28, 0) // 4 to 31
	r.handOut(3, 0)

	w.bring(true, a[:2]...)
	expect(t, "a piece of a batch", r.shown(40), "")
	w.bring(true, a[2])
	w.bring(true, append(a[3:], b[0])...)
	expect(t, "a batch, and a piece of the next", r.shown(40), "4:1 5:1 6:1 ")
	w.bring(true, append(b[1:], far[0])...)
	expect(t, "the next", r.shown(40), "4:1 5:1 6:1 7:1 8:1 ")

	// The next one has no room, and the one behind it begins in the same message.
	w.bring(true, append(far[1:], last[0])...)
	if !w.held {
		t.Fatal("there is room")
	}
	w.bring(true, last[1])
	w.bring(false, last[2:]...)
	r.c.Flush()
	expect(t, "no room", r.shown(40), "4:1 5:1 6:1 7:1 8:1 ")
	r.c.clock.Log().SetClock(1, 3)
	r.c.stale = true
	r.c.Flush()
	if w.held {
		t.Error("held with room enough")
	}
	expect(t, "all of it", r.shown(40), "30:1 31:1 32:1 33:1 34:1 ")
	if len(s.partial)+len(s.held) > 0 {
		t.Errorf("%d pieces and %d messages are left", len(s.partial), len(s.held))
	}
}

// A stream that ends inside a local revision begins again before it.
func TestStreamForgetsHalfARevision(t *testing.T) {
	r := newStreamRig(t, 1)
	s := r.c.shards[0]
	a := r.events(0, 2, 3, map[int64]string{2: "a", 3: "b"})
	r.handOut(2, 0)
	first := r.open()[0]
	first.bring(true, a[0])
	first.closed = true
	first.sink.OnEnd(codec.Status{Code: codec.Unavailable})
	r.tick(maxReopenDelay)
	w := r.open()[0]
	if w.start != 2 {
		t.Fatalf("it begins at %d", w.start)
	}
	w.bring(false, a...)
	expect(t, "each event once", r.shown(3), "2:1 3:1 ")
	if s.rec.last != 3 {
		t.Errorf("the record is %v", s.rec)
	}
}

// created is the answer to a watch's request.
func (w *pastWatch) created() {
	w.r.t.Helper()
	b, err := proto.Marshal(&etcdserverpb.WatchResponse{Created: true})
	if err != nil {
		w.r.t.Fatal(err)
	}
	w.sink.OnMessage(b)
}

// A member may need longer for its first data than a stream may be silent: openings that cut each other short
// would never get any. A stream that is behind but moves is left alone.
func TestStreamSlowMemberCatchesUp(t *testing.T) {
	r := newStreamRig(t, 1)
	s := r.c.shards[0]
	var backlog [][]*mvccpb.Event
	for rev := int64(2); rev <= 21; rev++ {
		backlog = append(backlog, r.events(0, rev, rev, map[int64]string{rev: "k"}))
	}
	r.handOut(20, 0)
	s.expectOnStream(r.local[0])
	// It answers at once, and needs 3 s for what is there.
	opens, since := 0, int64(0)
	var w *pastWatch
	for range 30 {
		if o := r.open(); len(o) == 1 && o[0] != w {
			w, since = o[0], r.now
			opens++
			w.created()
		}
		if r.now-since >= int64(3*time.Second) {
			break
		}
		r.tick(time.Second)
	}
	if opens > 2 {
		t.Fatalf("%d openings, no progress", opens)
	}
	// A revision each 1.5 s, while the shard goes on.
	for i, events := range backlog {
		w.bring(false, events...)
		r.c.Flush()
		r.local[0]++
		s.expectOnStream(r.local[0])
		r.tick(1500 * time.Millisecond)
		if w.closed {
			t.Fatalf("it was moving, and was opened again after %d revisions", i+1)
		}
	}
	if s.rec.last != 21 {
		t.Errorf("it has come to %v", s.rec)
	}
	// Silence is noticed, at first soon.
	r.tick(streamStall)
	r.tick(streamStall)
	if !w.closed || s.stall.times != 1 {
		t.Errorf("closed: %v, silent openings: %d", w.closed, s.stall.times)
	}
}

// Openings that bring nothing follow each other at growing distances, whatever the member answers to them.
func TestStreamReopensWithPauses(t *testing.T) {
	r := newStreamRig(t, 1)
	for range 60 {
		w := r.open()[0]
		w.created()
		w.closed = true
		w.sink.OnEnd(codec.Status{Code: codec.ResourceExhausted, Msg: "too large"})
		for len(r.open()) == 0 {
			r.tick(time.Millisecond)
		}
	}
	if took := time.Duration(r.now); took < 20*time.Second {
		t.Errorf("60 openings in %v", took)
	}
}

// streamsOf returns the open streams by shard, and lets them say that they are there.
func (r *pastRig) streamsOf() (out []*pastWatch) {
	out = make([]*pastWatch, len(r.c.shards))
	for _, w := range r.open() {
		out[w.to] = w
		w.created()
	}
	return out
}

// A shard without a live stream keeps nothing in the ring, and one that is slow holds the others back before
// the ring weighs more than about twice its limit.
func TestStreamRingBytes(t *testing.T) {
	const limit = 1000
	setup := func(t *testing.T) (*pastRig, []*pastWatch, func(rev int64)) {
		r := newStreamRig(t, 2)
		r.c.cfg.RingBytes = limit
		r.c.ring = watchring.NewRing(256, limit, 0)
		r.handOut(1, 0)   // 2: stays open
		r.handOut(100, 1) // 3 to 102
		w := r.streamsOf()
		return r, w, func(rev int64) {
			w[1].bring(false, r.events(1, rev, rev, map[int64]string{rev: "k"})...)
			r.c.Flush()
		}
	}
	t.Run("dead", func(t *testing.T) {
		r, w, put := setup(t)
		w[0].closed = true
		w[0].sink.OnEnd(codec.Status{Code: codec.Unavailable})
		for rev := int64(3); rev <= 102; rev++ {
			put(rev)
			if b := r.c.ring.Bytes(); b > limit {
				t.Fatalf("%d bytes at %d, the limit is %d", b, rev, limit)
			}
		}
		if w[1].held || r.c.frontier.Get(1) != 102 || r.c.frontier.Get(watchring.All) != 1 {
			t.Errorf("held: %v, frontiers %d and %d", w[1].held, r.c.frontier.Get(1), r.c.frontier.Get(watchring.All))
		}
	})
	t.Run("slow", func(t *testing.T) {
		r, w, put := setup(t)
		rev := int64(3)
		for ; rev <= 50; rev++ {
			put(rev)
		}
		if b := r.c.ring.Bytes(); !w[1].held || b > 2*limit+300 {
			t.Fatalf("%d bytes at %d, held: %v", b, rev, w[1].held)
		}
		// It comes: all goes on.
		w[0].bring(false, r.events(0, 2, 2, map[int64]string{2: "a"})...)
		r.c.Flush()
		r.c.Flush()
		if b := r.c.ring.Bytes(); w[1].held || r.c.frontier.Get(watchring.All) != 50 || b > limit {
			t.Errorf("%d bytes, held: %v, frontier %d", b, w[1].held, r.c.frontier.Get(watchring.All))
		}
	})
	t.Run("silent", func(t *testing.T) {
		r, w, put := setup(t)
		for rev := int64(3); rev <= 50; rev++ {
			put(rev)
		}
		r.tick(r.c.cfg.ShardTimeout)
		r.c.Flush()
		r.c.Flush()
		if b := r.c.ring.Bytes(); w[1].held || r.c.frontier.Get(1) != 50 || b > limit {
			t.Fatalf("after a time: %d bytes, held: %v, frontier %d", b, w[1].held, r.c.frontier.Get(1))
		}
		for rev := int64(51); rev <= 102; rev++ {
			put(rev)
			if w[1].held {
				t.Fatal("it is waited for once more, and has brought nothing meanwhile")
			}
		}
	})
}

// A shard that dies, or whose stream cannot be opened, holds nobody back.
func TestStreamDyingShardHoldsNobody(t *testing.T) {
	r := newStreamRig(t, 2)
	r.handOut(1, 0)
	r.handOut(60, 1)
	w := r.streamsOf()
	rev := int64(3)
	for ; rev <= 40; rev++ {
		w[1].bring(false, r.events(1, rev, rev, map[int64]string{rev: "k"})...)
		r.c.Flush()
	}
	if !w[1].held {
		t.Fatal("there is room")
	}
	for range 5 {
		dead := r.open()[0]
		if dead.to != 0 {
			dead = r.open()[1]
		}
		dead.closed = true
		dead.sink.OnEnd(codec.Status{Code: codec.Unavailable})
		r.c.Flush()
		if w[1].held {
			t.Fatalf("held at %d by a shard that is gone", rev)
		}
		for len(r.open()) < 2 {
			r.tick(time.Millisecond)
		}
		w[1].bring(false, r.events(1, rev, rev, map[int64]string{rev: "k"})...)
		rev++
		r.c.Flush()
		if w[1].held {
			t.Fatalf("held at %d by a stream that has brought nothing", rev)
		}
	}
}
