package shard

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"spindle/codec"
	"spindle/revclock"
)

// What is closed behind a batch that is away has nothing to do with what that one may write, and overtakes nothing that it
// conflicts with.
func TestFormBehind(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 2))
	var f former
	lim := batchLimits{ops: 128, bytes: 1 << 20}
	for range 300 {
		var queue []*write
		add := func(n int) {
			for range n {
				queue = append(queue, randomWrite(t, rng))
			}
		}
		add(1 + rng.IntN(10))
		var before []*write
		for turn := range 4 {
			n, order := len(queue), map[*write]int{}
			for i, w := range queue {
				order[w] = i
			}
			batch, rest := f.form(queue, lim, turn > 0, nil, nil)
			if len(batch)+len(rest) != n || turn == 0 && len(batch) == 0 {
				t.Fatalf("seed %d: %d in the batch, %d waiting, of %d", seed, len(batch), len(rest), n)
			}
			for _, w := range batch {
				for _, e := range before {
					if overlapAny(e.plan.Writes, w.plan.Writes) || overlapAny(e.plan.Writes, w.plan.Reads) {
						t.Fatalf("seed %d: a request meets a write of the batch that is away", seed)
					}
				}
				for _, e := range rest {
					if order[e] < order[w] && (overlapAny(e.plan.Writes, w.plan.Writes) || overlapAny(e.plan.Writes, w.plan.Reads) || overlapAny(e.plan.Reads, w.plan.Writes)) {
						t.Fatalf("seed %d: a request overtook one that it conflicts with", seed)
					}
				}
			}
			if len(batch) == 0 {
				break // nothing more is closed behind that one
			}
			before, queue = batch, rest
			add(rng.IntN(10))
		}
	}
}

// aheadRig has a shard with one batch away, of the puts a and b.
type aheadRig struct {
	*roadTransport
	s     *shardState
	first *batch
	ended map[string]codec.Status // by key
}

func newAhead(t *testing.T) *aheadRig {
	r := &aheadRig{roadTransport: newRoads(t), ended: map[string]codec.Status{}}
	r.s = r.c.shards[0]
	r.create("a", "b")
	r.c.Flush()
	r.first = r.s.cur
	r.grant(r.first, 2)
	if len(r.txns) != 1 || r.first.state != batchSent {
		t.Fatal("the first batch is not on its way")
	}
	return r
}

func (r *aheadRig) create(keys ...string) {
	for _, k := range keys {
		r.c.Submit(&Op{Kind: OpTxn, Msg: mustMarshal(r.t, swapIf(k, 0)), Done: func(op *Op) { r.ended[k] = op.Status }})
	}
}

// grant is the tick that b has asked for: its range begins at first.
func (r *aheadRig) grant(b *batch, first int64) {
	r.c.clock.Stop() // forgets what was asked of it
	n := int64(len(b.writes))
	r.s.granted(b.token, revclock.Range{First: first, Last: first + max(n, 1) - 1})
	r.c.Flush()
}

// reply ends the copy of b that is on its way: its puts are made, or its guard has failed because the clock is at last.
func (r *aheadRig) reply(b *batch, committed bool, last int64) {
	m := &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: 50}, Succeeded: committed}
	if committed {
		for range len(b.writes) + 1 {
			m.Responses = append(m.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{}}})
		}
	} else {
		rec := AppendRecord(nil, &Record{First: last, Last: last, Kind: KindFence})
		m.Responses = []*pb.ResponseOp{
			rangeOf(&mvccpb.KeyValue{Key: []byte(KeyClock), Value: rec, ModRevision: 50}),
			rangeOf(&mvccpb.KeyValue{Key: []byte(KeyMap), ModRevision: r.s.mapMod}),
		}
	}
	b.Complete(mustMarshal(r.t, m), codec.Status{}, true)
	r.c.Flush()
}

// puts are the keys that the i-th Txn to the member puts, besides the clock.
func (r *aheadRig) puts(i int) string {
	var keys []string
	for _, o := range r.txns[i].Success {
		if k := string(o.GetRequestPut().GetKey()); k != "" && k != KeyClock {
			keys = append(keys, k)
		}
	}
	return strings.Join(keys, " ")
}

// When as many wait as are away, the next batch is closed; otherwise it is not.
func TestClosesAhead(t *testing.T) {
	for _, x := range []struct {
		name   string
		keys   []string
		before func(r *aheadRig)
		closed string // its keys
	}{
		{name: "as many", keys: []string{"c", "d"}, closed: "c d"},
		{name: "too few", keys: []string{"c"}},
		{name: "what meets the batch that is away waits, and so does what meets that", keys: []string{"c", "b", "d", "b"}, closed: "c d"},
		{name: "all meet it", keys: []string{"a", "b"}},
		{name: "another proxy writes", keys: []string{"c", "d"}, before: func(r *aheadRig) { r.handOut(1, 0) }},
		{name: "another proxy has written", keys: []string{"c", "d"}, closed: "c d", before: func(r *aheadRig) {
			r.handOut(1, 0)
			r.now += int64(aheadQuiet)
		}},
		{name: "rejected", keys: []string{"c", "d"}, before: func(r *aheadRig) { r.s.rejections = 1 }},
		{name: "its reply was lost", keys: []string{"c", "d"}, before: func(r *aheadRig) {
			r.first.Complete(nil, codec.Status{Code: codec.Unavailable}, true)
		}},
		{name: "it was not sent", keys: []string{"c", "d"}, before: func(r *aheadRig) {
			r.first.Complete(nil, codec.Status{Code: codec.Unavailable}, false)
		}},
		{name: "a fence is wanted", keys: []string{"c", "d"}, before: func(r *aheadRig) { r.s.wantFence = true }},
		{name: "something waits for a record", keys: []string{"c", "d"}, before: func(r *aheadRig) { r.s.pending = make([]pendingEvent, 1) }},
		{name: "a slow disk", keys: []string{"c", "d"}, before: func(r *aheadRig) {
			r.s.pace = pace{flight: int64(100 * time.Millisecond), tick: int64(time.Millisecond)}
		}},
		{name: "a fast disk", keys: []string{"c", "d"}, closed: "c d", before: func(r *aheadRig) {
			r.s.pace = pace{flight: int64(10 * time.Millisecond), tick: int64(time.Millisecond)}
		}},
	} {
		r := newAhead(t)
		if x.before != nil {
			x.before(r)
		}
		r.create(x.keys...)
		r.c.Flush()
		var keys []string
		if r.s.next != nil {
			for _, w := range r.s.next.writes {
				keys = append(keys, string(w.plan.Writes[0].Key))
			}
		}
		if got := strings.Join(keys, " "); got != x.closed {
			t.Errorf("%s: %q is closed, not %q", x.name, got, x.closed)
		}
		if len(r.txns) != 1 {
			t.Errorf("%s: it is sent", x.name)
		}
	}
}

// Whatever becomes of a batch, the one that is closed behind it is sent when that is settled and not before; what comes back goes
// into a batch with a range of its own.
func TestAheadIsSentWhenTheOtherIsSettled(t *testing.T) {
	lost := func(r *aheadRig) {
		r.first.Complete(nil, codec.Status{Code: codec.Unavailable}, true)
		r.now += int64(time.Second)
		r.c.Tick()
		r.c.Flush()
	}
	for _, granted := range []bool{false, true} {
		for _, x := range []struct {
			name    string
			until   func(r *aheadRig) // not settled yet
			sent    int               // Txns by then
			ends    func(r *aheadRig)
			next    string // what goes behind
			ticking string // the same, if it has no range then
			again   string // and what behind that
			a       codec.Code
		}{
			{name: "committed", sent: 1, ends: func(r *aheadRig) { r.reply(r.first, true, 0) }, next: "c d"},
			{name: "committed, a copy was lost", until: lost, sent: 2, ends: func(r *aheadRig) { r.reply(r.first, true, 0) }, next: "c d"},
			{name: "void", sent: 1, ends: func(r *aheadRig) { r.reply(r.first, false, 3) }, next: "c d", again: "a b"},
			{name: "perhaps void", until: func(r *aheadRig) { lost(r); r.reply(r.first, false, 3) }, sent: 2, next: "c d", again: "a b",
				ends: func(r *aheadRig) { r.s.rec.local = 50; r.s.settle(r.first); r.c.Flush() }},
			{name: "refused", sent: 1, next: "c d", again: "a", ends: func(r *aheadRig) {
				r.first.Complete(nil, codec.Status{Code: codec.NotFound}, true)
				r.c.Flush()
			}},
			{name: "given up", until: lost, sent: 2, next: "c d", a: codec.Unavailable, ends: func(r *aheadRig) {
				r.s.next.deadline += int64(time.Minute)
				r.now = r.first.deadline
				r.s.expire()
				r.c.Flush()
			}},
			{name: "both given up", until: lost, sent: 2, next: "", a: codec.Unavailable, ends: func(r *aheadRig) {
				r.now = r.s.next.deadline
				r.s.expire()
				r.c.Flush()
			}},
			{name: "somebody was faster than both", sent: 1, ends: func(r *aheadRig) { r.reply(r.first, false, 9) }, next: "a b c d", ticking: "c d"},
			{name: "a new epoch", sent: 1, next: "a b c d", ends: func(r *aheadRig) {
				r.c.clock.Stop()
				r.s.untick()
				r.reply(r.first, false, 3)
			}},
		} {
			t.Run(fmt.Sprintf("%s, granted %v", x.name, granted), func(t *testing.T) {
				r := newAhead(t)
				r.create("c", "d")
				r.c.Flush()
				next, follows := r.s.next, x.next
				if next == nil {
					t.Fatal("nothing is closed")
				}
				if granted {
					r.grant(next, 4)
				} else if x.ticking != "" {
					follows = x.ticking
				}
				if x.until != nil {
					x.until(r)
				}
				if len(r.txns) != x.sent || r.s.cur != r.first || r.s.next != next {
					t.Fatalf("%d Txns before the first batch is settled", len(r.txns))
				}
				x.ends(r)
				if r.s.cur == next && !granted {
					if len(r.txns) != x.sent {
						t.Fatal("it is sent without a range")
					}
					r.grant(next, 10)
				} else if r.s.cur != next {
					r.grant(r.s.cur, 10)
				}
				if len(r.txns) != x.sent+1 {
					t.Fatalf("%d Txns, nothing follows", len(r.txns))
				}
				if got := r.puts(x.sent); got != follows {
					t.Errorf("%q follows, not %q", got, follows)
				}
				if (r.s.cur == next) != (follows == "c d" || x.name == "both given up") {
					t.Error("it is not the one that was closed")
				}
				if x.again != "" {
					b := r.s.cur
					r.reply(b, true, 0)
					if r.s.cur == nil {
						t.Fatal("nothing of the first batch goes again")
					}
					r.grant(r.s.cur, 20)
					if got := r.puts(len(r.txns) - 1); got != x.again {
						t.Errorf("%q goes again, not %q", got, x.again)
					}
				}
				if r.s.wantFence {
					t.Error("a fence is wanted, but a later range has passed")
				}
				if _, ok := r.ended["a"]; ok != (strings.HasPrefix(x.name, "committed") || x.a != 0) {
					t.Errorf("a has ended: %v", r.ended)
				}
			})
		}
	}
}

// When the Core stops, whoever waits in either batch hears of it.
func TestStopEndsWhatIsClosedAhead(t *testing.T) {
	r := newAhead(t)
	r.create("c", "d", "e")
	r.c.Flush()
	r.create("f")
	r.c.Close()
	for _, k := range []string{"a", "b", "c", "d", "e", "f"} {
		if st, ok := r.ended[k]; !ok || st != codec.ErrStopped {
			t.Errorf("%s: %v", k, st)
		}
	}
}

// A batch that came back from behind another takes the former's claims with it: nothing is closed behind that one any more.
func TestNothingAheadAfterTakeBack(t *testing.T) {
	r := newAhead(t)
	r.create("c", "d")
	r.c.Flush()
	if r.s.next == nil {
		t.Fatal("nothing is closed ahead")
	}
	r.c.clock.Stop()
	r.s.untick() // a new epoch; the first one is still away
	r.create("a")
	r.c.Flush()
	if r.s.next != nil {
		t.Errorf("closed behind {a b}: %q", r.s.next.writes[0].plan.Writes)
	}
}

// The claims of a batch lie in its requests' bytes, and those of a canceled one are its owner's again.
func TestNothingAheadOfCanceled(t *testing.T) {
	r := &aheadRig{roadTransport: newRoads(t), ended: map[string]codec.Status{}}
	r.s = r.c.shards[0]
	a := &Op{Kind: OpTxn, Msg: mustMarshal(t, swapIf("a", 0)), Done: func(*Op) {}}
	r.c.Submit(a)
	r.create("b")
	r.c.Flush()
	r.first = r.s.cur
	r.c.Cancel(a)
	r.grant(r.first, 2)
	r.create("x", "y")
	r.c.Flush()
	if r.s.next != nil {
		t.Error("the next batch was closed by claims that lie in a buffer of somebody else's")
	}
}

// A batch whose record was seen, and whose reply does not come, holds back the next one, and with it all watches, for one reorder window and no longer.
func TestSeenBatchLetsTheNextGo(t *testing.T) {
	r := newAhead(t)
	r.s.window = int64(250 * time.Millisecond)
	self := r.c.cfg.Proxy
	l := r.c.clock.Log()
	own := func(n int) {
		r.ticks++
		tick := revclock.AppendTick(nil, &revclock.Tick{Proxy: self, Nonce: uint64(r.ticks), Items: []revclock.TickItem{{Shard: 0, Count: n, Filter: []byte{1, 2, 3, 4, 5, 6, 7, 8}}}})
		if _, err := l.Fold(tick, r.ticks, r.now, uint64(r.ticks)); err != nil {
			t.Fatal(err)
		}
	}
	own(2)
	r.create("c", "d")
	r.c.Flush()
	next := r.s.next
	own(2)
	r.c.clock.Stop()
	r.s.granted(next.token, revclock.Range{First: 4, Last: 5})
	l.Committed(0, 2, 3, self)
	r.s.sawOwnRecord(r.first.id, 20)
	r.s.streaming = true
	for _, step := range []struct {
		after time.Duration
		sent  bool
	}{{time.Duration(r.s.window) / 2, false}, {time.Duration(r.s.window), true}} {
		r.now += int64(step.after)
		r.c.stale = true
		r.c.Flush()
		if sent := r.s.cur == next && next.state == batchSent; sent != step.sent {
			t.Errorf("%s later: sent %v, want %v (state %d)", step.after, sent, step.sent, next.state)
		}
	}
}
