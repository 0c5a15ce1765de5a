package sim

import (
	"slices"
	"strings"
	"testing"
	"time"

	"spindle/codec"
	"spindle/shard"
	"spindle/watchring"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// absentWorld has three shards, on each a key that was put a few times, and no proxy that runs.
type absentWorld struct {
	*script
	c    *Cluster // the one that something happens to
	keys map[*Cluster]string
	last int64 // the largest revision
	mine int64 // the last one on c
}

func newAbsentWorld(t *testing.T, idle time.Duration) *absentWorld {
	t.Helper()
	w := newWholeWorld(t)
	w.stop(idle)
	return w
}

// newWholeWorld is an absentWorld whose proxies run, and whose members are empty.
func newWholeWorld(t *testing.T) *absentWorld {
	t.Helper()
	return newTracedWorld(t, nil)
}

// newTracedWorld is a newWholeWorld that tells trace all that happens.
func newTracedWorld(t *testing.T, trace func(line string)) *absentWorld {
	t.Helper()
	w := &absentWorld{keys: map[*Cluster]string{}}
	w.script = newScript(t, Config{Seed: 1, Shards: 3, Proxies: 2, Keys: 8, Base: time.Millisecond, RingSize: 1 << 10, MaxTxnOps: 128,
		MaxRequestBytes: defaultMaxRequestBytes, Window: 250 * time.Millisecond, Timeout: 5 * time.Second, SnapshotEvery: 100, Trace: trace})
	for i := range 64 {
		k := keyName(i)
		if leaseOf([]byte(k)) == 0 {
			w.keys[w.memberOf(k)] = k
		}
	}
	w.c = w.net.Members[1]
	return w
}

// stop puts each key a few times, lets some time pass, and ends the proxies.
func (w *absentWorld) stop(idle time.Duration) {
	w.t.Helper()
	for range 4 {
		for _, c := range w.net.Members {
			w.last = w.put(w.proxies[0], w.keys[c])
			if c == w.c {
				w.mine = w.last
			}
		}
	}
	w.pass(idle)
	for _, p := range w.proxies {
		p.crash()
	}
}

// pass lets time pass.
func (w *absentWorld) pass(d time.Duration) { w.until(d, func() bool { return false }) }

// lastButOne is the local revision of w.c before its last record.
func (w *absentWorld) lastButOne() int64 {
	var recs []int64
	for _, ch := range w.c.log {
		if string(ch.KV.Key) == keyClock {
			recs = append(recs, ch.Main)
		}
	}
	return recs[len(recs)-1] - 1
}

func (w *absentWorld) start(accept ...string) *proxy {
	w.t.Helper()
	w.Accept = accept
	p := w.proxies[0]
	p.boot(0)
	w.wait("the start", func() bool { return p.ready })
	return p
}

// wantAlone: p refuses w.c with a reason, and serves the others.
func (w *absentWorld) wantAlone(p *proxy, reason string) {
	w.t.Helper()
	for c, k := range w.keys {
		_, st := w.call(p, shard.OpPut, &pb.PutRequest{Key: []byte(k), Value: []byte("w")})
		if c != w.c && st.Code != codec.OK {
			w.t.Errorf("%s of %v: %v", k, c, st)
		}
		if c == w.c && (st.Code != codec.Unavailable || !strings.Contains(st.Msg, "is refused: ") || !strings.Contains(st.Msg, reason)) {
			w.t.Errorf("%s of %v: %v; it should say %q", k, c, st, reason)
		}
	}
	if ok, why := p.core.Ready(); !ok || !strings.Contains(why, reason) {
		w.t.Errorf("ready: %v %q", ok, why)
	}
	if _, st := w.call(p, shard.OpRange, &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("z")}); st.Code == codec.OK {
		w.t.Error("a list over all shards was answered without one of them")
	}
}

// wantWhole: p serves everything, and a list and a watch over all shards reach now.
func (w *absentWorld) wantWhole(p *proxy) {
	w.t.Helper()
	w.wait("the return", func() bool {
		_, why := p.core.Ready()
		return why == ""
	})
	for _, c := range w.net.Members {
		w.last = w.put(p, w.keys[c])
	}
	resp, st := w.ask(p, shard.OpRange, &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("z")})
	if st.Code != codec.OK || len(resp.(*pb.RangeResponse).Kvs) != len(w.keys) {
		w.t.Errorf("list: %v %v", resp, st)
	}
	w.wait("the frontier", func() bool { return p.core.Frontier().Get(watchring.All) >= w.last })
}

// A member that lacks only its last write is refused alone at a start, and taken in when its newest state is back.
func TestStartWithRestoredMember(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	newest := w.c.Etcd
	w.c.replace(newest.rewound(w.lastButOne()))
	p := w.start()
	w.wantAlone(p, "restored from an older backup")
	if w.c.Rev() != w.lastButOneOf(newest) {
		t.Errorf("somebody wrote to the older state: L%d", w.c.Rev())
	}
	// A watch over all shards waits, and misses nothing.
	o := p.newViewer().watch(&watchring.Watcher{Key: "k", End: "z", Start: 2})
	p.turn()
	w.c.replace(newest)
	w.wantWhole(p)
	w.wait("the watch", func() bool { return o.ended || o.promised >= w.last })
	if revs := len(o.got); o.ended || revs != 4*3+2+3 {
		t.Errorf("the watch got %d revisions, ended: %v", revs, o.ended)
	}
}

func (w *absentWorld) lastButOneOf(e *Etcd) int64 {
	was := w.c.Etcd
	w.c.Etcd = e
	defer func() { w.c.Etcd = was }()
	return w.lastButOne()
}

// A wiped member is refused alone, nothing is written to it, and its newest state is taken in.
func TestStartWithWipedMember(t *testing.T) {
	w := newAbsentWorld(t, 0)
	newest := w.c.Etcd
	w.c.replace(newest.rewound(1))
	p := w.start()
	w.wantAlone(p, "it was wiped")
	if w.c.Rev() != 1 {
		t.Errorf("somebody wrote to the wiped member: L%d", w.c.Rev())
	}
	w.c.replace(newest)
	w.wantWhole(p)
}

// A member from before the coordinator was rebuilt is an older copy, whatever its clock says: it is not taken into
// another rebuild.
func TestStartWithMemberOfOlderEpoch(t *testing.T) {
	w := newAbsentWorld(t, 0)
	before := w.c.Rev()
	w.net.Coord.Wipe(w.net.Coord.ClusterID)
	p := w.start()
	w.put(p, w.keys[w.net.Members[0]])
	w.until(2*time.Second, func() bool { return false })
	p.crash()
	newest := w.c.Etcd
	w.c.replace(newest.rewound(before))
	p = w.start()
	w.wantAlone(p, "restored from an older backup")
	w.c.replace(newest)
	w.wantWhole(p)
}

// What is lost may be accepted, of restored and of wiped members: the member's clock goes above everything that was handed
// out, and nobody can read or watch the time before.
func TestAcceptedLoss(t *testing.T) {
	for _, wiped := range []bool{false, true} {
		w := newAbsentWorld(t, 2*time.Second)
		rev := int64(1)
		if !wiped {
			rev = w.lastButOne()
		}
		w.c.replace(w.c.Etcd.rewound(rev))
		p := w.start("m1")
		w.wait("the compaction", func() bool { return p.core.Observe().Compact > w.last })
		w.wait("its record", func() bool {
			return !slices.ContainsFunc(w.net.Members, func(c *Cluster) bool { return c.at([]byte(shard.KeyCompact), c.Rev()) == nil })
		})
		resp, st := w.ask(p, shard.OpRange, &pb.RangeRequest{Key: []byte(w.keys[w.c])})
		if kvs := resp.(*pb.RangeResponse).Kvs; st.Code != codec.OK || wiped && len(kvs) != 0 || !wiped && (len(kvs) != 1 || kvs[0].ModRevision >= w.mine) {
			t.Errorf("wiped %v: %v %v", wiped, kvs, st)
		}
		if _, st := w.ask(p, shard.OpRange, &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("z"), Revision: w.last}); st != codec.ErrCompacted {
			t.Errorf("wiped %v: the past: %v", wiped, st)
		}
		o := p.newViewer().watch(&watchring.Watcher{Key: "k", End: "z", Start: w.last})
		p.turn()
		w.wait("the end of a watch of the past", func() bool { return o.ended })
		last := w.last
		if rev := w.put(p, w.keys[w.c]); rev <= last {
			t.Errorf("wiped %v: revision %d after %d", wiped, rev, last)
		}
		// From then on it is a member as any other.
		p.crash()
		p = w.start()
		w.keysOf(wiped, p)
	}
}

// keysOf looks that everything is served, whatever was lost.
func (w *absentWorld) keysOf(wiped bool, p *proxy) {
	w.t.Helper()
	w.wantWhole(p)
	if _, st := w.ask(p, shard.OpRange, &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("z"), Revision: 2}); st != codec.ErrCompacted {
		w.t.Errorf("wiped %v: the past on another proxy: %v", wiped, st)
	}
}

// Without any member there is nothing to serve.
func TestStartWithoutAnyMember(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	for _, c := range w.net.Members {
		w.c = c
		c.replace(c.Etcd.rewound(w.lastButOne()))
	}
	w.proxies[0].boot(0)
	w.until(30*time.Second, func() bool { return false })
	if w.fault == nil || !strings.Contains(w.fault.Error(), "every member cluster is refused") {
		t.Errorf("it did not give up: %v", w.fault)
	}
}

// A shard that returns long after its last writes is taken in: its stream begins some way back.
func TestStartWithMemberOfLongAgo(t *testing.T) {
	w := newWholeWorld(t)
	for range 300 {
		w.put(w.proxies[0], w.keys[w.c])
	}
	for range 700 {
		w.put(w.proxies[0], w.keys[w.net.Members[0]])
	}
	w.stop(2 * time.Second)
	newest := w.c.Etcd
	w.c.replace(newest.rewound(w.lastButOne()))
	p := w.start()
	w.c.replace(newest)
	w.wantWhole(p)
}

// The coordinator is lost while a shard is left out. The others wait for it, and go on when it is back.
func TestAbsentMemberAndLostCoordinator(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	newest := w.c.Etcd
	older := newest.rewound(w.lastButOne())
	w.c.replace(older)
	p := w.start()
	w.net.Coord.Wipe(w.net.Coord.ClusterID)
	w.pass(10 * time.Second)
	if ok, why := p.core.Ready(); ok || !strings.Contains(why, "is refused") || w.c.Etcd != older || w.c.Rev() != w.lastButOneOf(newest) {
		t.Errorf("ready: %v %q, L%d", ok, why, w.c.Rev())
	}
	w.c.replace(newest)
	w.wantWhole(p)
}

// A start without a coordinator that has its data waits for a wiped member, and goes on when it is back.
func TestStartWaitsForWipedMember(t *testing.T) {
	w := newAbsentWorld(t, 0)
	newest := w.c.Etcd
	w.c.replace(newest.rewound(1))
	w.net.Coord.Wipe(w.net.Coord.ClusterID)
	p := w.proxies[0]
	p.boot(0)
	w.pass(10 * time.Second)
	if ok, why := p.core.Ready(); ok || !strings.Contains(why, "it was wiped") || w.c.Rev() != 1 {
		t.Errorf("ready: %v %q, L%d", ok, why, w.c.Rev())
	}
	w.c.replace(newest)
	w.wait("the start", func() bool { return p.ready })
	w.wantWhole(p)
}

// A start gives up when the last member is refused while it looks for an epoch.
func TestStartLosesEveryMember(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	p := w.proxies[0]
	p.boot(0)
	w.wait("the epoch", func() bool {
		if p.core == nil {
			return false
		}
		_, why := p.core.Ready()
		return strings.Contains(why, "waiting for the coordinator (starting)")
	})
	w.net.Coord.Pause()
	for _, c := range w.net.Members {
		c.replace(c.Etcd.rewound(1))
	}
	w.pass(30 * time.Second)
	if w.fault == nil || !strings.Contains(w.fault.Error(), "every member cluster is refused") {
		_, why := p.core.Ready()
		t.Errorf("it did not give up: %v %s", w.fault, why)
	}
}

// A shard returns while another one is down: everybody else is served.
func TestAbsentMemberReturnsAlone(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	newest := w.c.Etcd
	w.c.replace(newest.rewound(w.lastButOne()))
	p := w.start()
	down := w.net.Members[2]
	down.Pause()
	w.c.replace(newest)
	w.wait("the return", func() bool {
		_, why := p.core.Ready()
		return why == ""
	})
	for _, c := range w.net.Members[:2] {
		w.put(p, w.keys[c])
	}
	down.Resume()
	w.wantWhole(p)
}

// A returned shard is refused again while the coordinator is read: what was begun with its map is not believed.
func TestAbsentMemberComesAndGoes(t *testing.T) {
	for delay := range 20 {
		w := newAbsentWorld(t, 2*time.Second)
		newest := w.c.Etcd
		w.c.replace(newest.rewound(w.lastButOne()))
		p := w.start()
		w.net.Coord.Pause()
		w.c.replace(newest)
		w.pass(400 * time.Millisecond)
		w.c.replace(newest.rewound(w.lastButOneOf(newest)))
		n := 0
		w.until(time.Second, func() bool { n++; return n > delay })
		w.net.Coord.Resume()
		w.pass(5 * time.Second)
		w.wantAlone(p, "restored from an older backup")
		w.c.replace(newest)
		w.wantWhole(p)
	}
}

// Serializable reads of a shard that returns show nothing newer than their header says.
func TestAbsentMemberSerializable(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	newest := w.c.Etcd
	w.c.replace(newest.rewound(w.lastButOne()))
	p := w.start()
	w.c.replace(newest)
	var msgs [][]byte
	for _, req := range []*pb.RangeRequest{{Key: []byte(w.keys[w.c])}, {Key: []byte("k"), RangeEnd: []byte("z")}} {
		req.Serializable = true
		msg, err := proto.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		msgs = append(msgs, msg)
	}
	good, bad, n := 0, 0, 0
	w.until(2*time.Second, func() bool {
		p.core.Submit(&shard.Op{Kind: shard.OpRange, Msg: msgs[n%2], Done: func(s *shard.Op) {
			var r pb.RangeResponse
			if s.Status.Code != codec.OK {
				return
			}
			if err := proto.Unmarshal(s.Resp, &r); err != nil {
				t.Error(err)
			}
			good++
			for _, kv := range r.Kvs {
				if kv.ModRevision > r.Header.Revision {
					bad++
				}
			}
		}})
		p.turn()
		n++
		return n > 3000
	})
	if good == 0 || bad > 0 {
		t.Errorf("%d answers, %d keys of a revision above their header's", good, bad)
	}
}

// Who was up to date with what is lost is told so: a watch that begins behind it ends, also while another member is left out.
func TestAcceptedLossEndsWatches(t *testing.T) {
	for _, absent := range []bool{false, true} {
		w := newAbsentWorld(t, 2*time.Second)
		x, n := w.c.Etcd.rewound(w.lastButOne()), int64(1<<40)
		x.Event = func() int64 { n++; return n }
		w.c.replace(x)
		if absent {
			w.net.Members[2].replace(w.net.Members[2].Etcd.rewound(1))
		}
		p := w.start("m1")
		o := p.newViewer().watch(&watchring.Watcher{Key: w.keys[w.c], Start: w.last + 1})
		p.turn()
		w.pass(5 * time.Second)
		if !o.ended {
			t.Errorf("absent %v: a watch from %d goes on, compacted at %d; the loss of %d goes unnoticed", absent, w.last+1, p.core.Observe().Compact, w.mine)
		}
		if _, st := w.ask(p, shard.OpRange, &pb.RangeRequest{Key: []byte(w.keys[w.c]), Revision: w.last + 1}); st != codec.ErrCompacted {
			t.Errorf("absent %v: the past: %v", absent, st)
		}
	}
}

// A shard returns, and somebody has compacted it meanwhile: a watch that still needs what is gone is told so. (Seed 7501219 of
// TestSimulation: it went on without.)
func TestAbsentMemberReturnsCompacted(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	newest := w.c.Etcd
	w.c.replace(newest.rewound(w.lastButOne()))
	p := w.start()
	o := p.newViewer().watch(&watchring.Watcher{Key: "k", End: "z", Start: 2})
	p.turn()
	w.pass(time.Second)
	newest.compact = newest.rev
	w.c.replace(newest)
	w.wantWhole(p)
	w.pass(time.Second)
	if !o.ended {
		t.Errorf("the watch goes on, it got %d revisions of %d", len(o.got), 4*3+3)
	}
}

// A shard returns whose member is compacted up to where a compaction was that the others have recorded. Its stream begins behind that, so the ring
// must not be read before: the events that are not in it are missed. (Seed 662 of TestForgottenMembers: the ring's tail stayed where it was.)
func TestAbsentMemberReturnsBehindCompaction(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	newest := w.c.Etcd
	var recs []point
	for _, ch := range newest.log {
		if rec, err := parseRecord(ch.KV.Value); string(ch.KV.Key) == keyClock && err == nil {
			recs = append(recs, point{rec.last, ch.Main})
		}
	}
	at := recs[len(recs)-2]
	w.c.replace(newest.rewound(w.lastButOne()))
	p := w.start()
	foreignPut(t, w.net.Members[0], shard.KeyCompact, string(shard.AppendCompaction(nil, at.last+1)))
	w.wait("the record", func() bool { return p.core.Observe().Compact == at.last+1 })
	newest.compact = at.local
	w.c.replace(newest)
	w.wait("the return", func() bool { _, why := p.core.Ready(); return why == "" })
	if _, lapped := p.core.Ring().Load(at.last); !lapped {
		t.Errorf("the ring says that nothing happened at %d", at.last)
	}
	w.wantWhole(p)
}

// point is where a record lies.
type point struct{ last, local int64 }

// A proxy that stops in good order has the coordinator know its last writes: a start notices that they are missing.
func TestFarewellNamesClocks(t *testing.T) {
	w := newWholeWorld(t)
	for range 4 {
		for _, c := range w.net.Members {
			w.put(w.proxies[0], w.keys[c])
		}
	}
	w.proxies[1].crash()
	over, begun := false, w.net.now
	w.proxies[0].core.Farewell(func() { over = true })
	w.proxies[0].turn()
	w.wait("the farewell", func() bool { return over })
	if d := time.Duration(w.net.now - begun); d > 100*time.Millisecond {
		t.Errorf("it took %v", d)
	}
	w.proxies[0].crash()
	w.c.replace(w.c.Etcd.rewound(w.lastButOne()))
	w.wantAlone(w.start(), "restored from an older backup")
}

// A proxy that stops does not wait for a coordinator that is down.
func TestFarewellWithoutCoordinator(t *testing.T) {
	for _, x := range []struct{ downFor, atLeast, atMost time.Duration }{{0, 100 * time.Millisecond, 200 * time.Millisecond}, {time.Second, 0, 0}} {
		w := newWholeWorld(t)
		p := w.proxies[0]
		w.proxies[1].crash()
		w.last = w.put(p, w.keys[w.c])
		link := p.host.Link(codec.Coordinator)
		link.Reset()
		link.Down = true
		w.pass(x.downFor)
		over, begun := false, w.net.now
		p.core.Farewell(func() { over = true })
		p.turn()
		w.wait("the farewell", func() bool { return over })
		if d := time.Duration(w.net.now - begun); d < x.atLeast || d > x.atMost {
			t.Errorf("down for %v: it took %v", x.downFor, d)
		}
	}
}

// A proxy that refuses a member tells the others what it knows of it: they refuse it, too, although all that they have seen is there.
func TestRefusalIsTold(t *testing.T) {
	w := newWholeWorld(t)
	a, b := w.proxies[0], w.proxies[1]
	for _, c := range w.net.Members {
		w.put(a, w.keys[c])
	}
	w.pass(2 * time.Second)
	b.host.Link(w.c.ID).StreamHole = true
	before := w.c.Rev()
	w.put(a, w.keys[w.c])
	w.restoreTo(before)
	w.pass(50 * time.Millisecond)
	if _, st := w.call(b, shard.OpPut, &pb.PutRequest{Key: []byte(w.keys[w.c]), Value: []byte("w")}); st.Code == codec.OK || w.c.Rev() != before {
		t.Errorf("it was written to: %v", st)
	}
	if _, why := b.core.Ready(); !strings.Contains(why, "is refused: ") {
		t.Errorf("it is not refused: %q", why)
	}
}

// restoreTo replaces w.c by what it was.
func (w *absentWorld) restoreTo(rev int64) { w.c.replace(w.c.Etcd.rewound(rev)) }
