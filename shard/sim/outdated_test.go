package sim

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"spindle/codec"
	"spindle/revclock"
	"spindle/shard"
	"spindle/watchring"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// lossesUnder are the ways in which a member loses something while a proxy runs, each as what is done to w.c.
var lossesUnder = map[string]func(w *absentWorld){
	"what the proxy has seen": func(w *absentWorld) { w.c.replace(w.c.Etcd.rewound(w.lastButOne())) },
	"everything":              func(w *absentWorld) { w.c.replace(w.c.Etcd.rewound(1)) },
	"what others have seen":   nil, // the proxy hears nothing of what is lost
}

// loseUnder has w.c lose something while q runs. It returns the link that keeps q from the member, nil if none does.
func (w *absentWorld) loseUnder(name string, p, q *proxy) (cut *Link) {
	w.t.Helper()
	lose := lossesUnder[name]
	for _, c := range w.net.Members {
		w.last = w.put(p, w.keys[c])
	}
	w.pass(time.Second)
	if lose == nil {
		cut = q.host.Link(w.c.ID)
		cut.Deaf, cut.Mute = true, true
		before := w.c.Rev()
		w.last = w.put(p, w.keys[w.c])
		lose = func(w *absentWorld) { w.c.replace(w.c.Etcd.rewound(before)) }
		w.pass(2 * time.Second) // the others know, and so does the coordinator
	}
	p.crash()
	lose(w)
	return cut
}

// awaitReturn waits until q serves all members, in this life or in the next one.
func (w *absentWorld) awaitReturn(q *proxy) {
	w.t.Helper()
	w.wait("the return", func() bool {
		if q.core == nil || !q.ready {
			return false
		}
		_, why := q.core.Ready()
		return why == ""
	})
}

// watchesOf are two watches through q, from behind all that was written.
func (w *absentWorld) watchesOf(q *proxy) (v *viewer, one, all *view1) {
	v = q.newViewer()
	one = v.watch(&watchring.Watcher{Key: w.keys[w.c], Start: w.last + 1})
	all = v.watch(&watchring.Watcher{Key: "k", End: "z", Start: w.last + 1})
	q.turn()
	w.pass(time.Second)
	return v, one, all
}

// TestAcceptedLossStartsOthersAgain: a proxy runs while another one accepts what a member has lost, and refuses the member until it
// sees that. It starts again, so its watches end, none of them behind what is missing, and then it serves all. The acceptance is cut short behind each of its
// writes, too, and completed by another start.
func TestAcceptedLossStartsOthersAgain(t *testing.T) {
	for name := range lossesUnder {
		t.Run(name, func(t *testing.T) {
			for k := 1; ; k++ {
				w := newWholeWorld(t)
				p, q := w.proxies[0], w.proxies[1]
				cut := w.loseUnder(name, p, q)
				v, one, all := w.watchesOf(q)
				life := q.life
				if cut != nil && k%2 == 0 { // it hears of the member again before the loss is accepted
					cut.heal()
					w.pass(time.Second)
				}
				w.Accept = []string{"m1"}
				p.boot(0)
				w.wait("the process", func() bool { return p.up })
				begun := w.writes()
				w.wait("a write, or the start", func() bool { return p.ready || w.writes() >= begun+int64(k) })
				done := p.ready
				if !done {
					p.crash()
					w.pass(2 * time.Second)
					if w.marked() && q.life != life {
						t.Errorf("behind %d writes: started again before the loss was accepted", k)
					}
					p = w.start("m1")
				}
				w.Accept = nil
				rev := w.put(p, w.keys[w.c])
				if cut != nil {
					cut.heal()
				}
				w.wait("the other start", func() bool { return q.life != life })
				w.awaitReturn(q)
				w.pass(2 * time.Second)
				for _, o := range []*view1{one, all} {
					if !o.ended && !v.dead || len(o.got) > 0 {
						t.Errorf("behind %d writes: a watch from %d on: ended: %v, it was shown %d revisions", k, w.last+1, o.ended || v.dead, len(o.got))
					}
				}
				at := q.core.Observe().Compact
				if o := q.newViewer().watch(&watchring.Watcher{Key: w.keys[w.c], Start: w.last + 1}); at <= w.last {
					t.Errorf("behind %d writes: compacted at %d, a watch from %d on ended: %v", k, at, w.last+1, o.ended)
				}
				if _, st := w.ask(q, shard.OpRange, &pb.RangeRequest{Key: []byte(w.keys[w.c]), Revision: w.last}); st != codec.ErrCompacted {
					t.Errorf("behind %d writes: the past: %v", k, st)
				}
				if resp, st := w.ask(q, shard.OpRange, &pb.RangeRequest{Key: []byte(w.keys[w.c])}); st.Code != codec.OK || resp.(*pb.RangeResponse).Kvs[0].ModRevision != rev {
					t.Errorf("behind %d writes: the present: %v %v", k, resp, st)
				}
				w.wantWhole(q)
				if w.stats.Outdated > 1 || p.core.Outdated() != "" {
					t.Errorf("behind %d writes: %d starts too many", k, w.stats.Outdated)
				}
				if done {
					t.Logf("cut short %d times", k-1)
					break
				}
			}
		})
	}
}

// newLossBehind makes a world in which m1 has lost a write that q knows nothing of: q cannot reach m1 and the coordinator (cut and coord), and p,
// which wrote it (at w.last), has ended.
func newLossBehind(t *testing.T) (w *absentWorld, p, q *proxy, cut, coord *Link) {
	w = newWholeWorld(t)
	p, q = w.proxies[0], w.proxies[1]
	for _, c := range w.net.Members {
		w.last = w.put(p, w.keys[c])
	}
	w.pass(time.Second)
	cut, coord = q.host.Link(w.c.ID), q.host.Link(codec.Coordinator)
	cut.Deaf, cut.Mute, coord.Deaf, coord.Mute = true, true, true, true
	before := w.c.Rev()
	w.last = w.put(p, w.keys[w.c])
	w.pass(2 * time.Second)
	p.crash()
	w.c.replace(w.c.Etcd.rewound(before))
	return w, p, q, cut, coord
}

// TestAcceptedLossSeenOnStream: a proxy lacks only what others know, and was content with the member before its loss was marked. Parted from
// the coordinator it does not hear of the revisions that are gone. Its stream shows the fence: it starts again, and no watch is led past
// what is missing. (It took the fence as history.)
func TestAcceptedLossSeenOnStream(t *testing.T) {
	for _, early := range []bool{true, false} {
		t.Run(fmt.Sprintf("it has the member back before that: %v", early), func(t *testing.T) {
			w, p, q, cut, coord := newLossBehind(t)
			v := q.newViewer()
			lost := v.watch(&watchring.Watcher{Key: w.keys[w.c], Start: w.last})
			q.turn()
			life := q.life
			if early {
				cut.heal()
				w.pass(2 * time.Second)
			}
			w.Accept = []string{"m1"}
			p.boot(0)
			w.wait("the start", func() bool { return p.ready })
			w.Accept = nil
			cut.heal()
			w.pass(2 * time.Second)
			coord.heal()
			w.pass(2 * time.Second)
			rev := w.put(p, w.keys[w.c])
			w.wait("the other start", func() bool { return q.life != life })
			w.awaitReturn(q)
			w.pass(3 * time.Second)
			if len(lost.got) > 0 || !lost.ended && !v.dead {
				t.Errorf("a watch from %d, which is lost: ended: %v, it was shown %d revisions (a put at %d)", w.last, lost.ended || v.dead, len(lost.got), rev)
			}
			w.wantWhole(q)
			if w.stats.Outdated > 1 {
				t.Errorf("%d starts too many", w.stats.Outdated-1)
			}
		})
	}
}

// TestAcceptedLossWaitsForOthers: a proxy sees that the loss of a member which it refuses was accepted, while another cluster does not
// answer. What it serves it serves until that one is back, and only then it starts again. (It started at once, and served nothing.)
func TestAcceptedLossWaitsForOthers(t *testing.T) {
	for _, coordinator := range []bool{false, true} {
		for _, down := range []bool{false, true} {
			t.Run(fmt.Sprintf("coordinator: %v, without a connection: %v", coordinator, down), func(t *testing.T) {
				w := newWholeWorld(t)
				p, q := w.proxies[0], w.proxies[1]
				w.loseUnder("what the proxy has seen", p, q)
				w.pass(time.Second)
				cut := q.host.Link(w.c.ID)
				cut.Deaf, cut.Mute = true, true
				w.Accept = []string{"m1"}
				p.boot(0)
				w.wait("the start", func() bool { return p.ready })
				w.Accept = nil
				w.pass(2 * time.Second)
				away := w.net.Members[2]
				if coordinator {
					away = w.net.Coord
				}
				link := q.host.Link(away.ID)
				if link.Down = down; down {
					link.Reset()
				} else {
					away.Pause()
				}
				w.pass(10 * time.Second)
				life := q.life
				cut.heal()
				w.pass(time.Minute)
				if q.life != life {
					t.Fatal("it started again")
				}
				if ok, why := q.core.Ready(); !ok && !coordinator {
					t.Errorf("nothing is served: %s", why)
				}
				if link.Down = false; down {
					link.Reset()
				} else {
					away.Resume()
				}
				w.wait("the other start", func() bool { return q.life != life })
				w.awaitReturn(q)
				w.wantWhole(q)
			})
		}
	}
}

// TestCompactionIsNoAcceptance: what makes a running proxy go back to a member that lacks what it has seen is the fence of an
// accepted loss. A compaction record alone does not, be it of somebody who did not notice the loss, nor a fence that is older than what is
// lost now.
func TestCompactionIsNoAcceptance(t *testing.T) {
	for _, fenced := range []bool{false, true} {
		t.Run(fmt.Sprintf("with an older fence: %v", fenced), func(t *testing.T) {
			w := newWholeWorld(t)
			p, q := w.proxies[0], w.proxies[1]
			if fenced {
				w.last = w.put(p, w.keys[w.c])
				w.pass(2 * time.Second)
				p.crash()
				w.c.replace(w.c.Etcd.rewound(w.lastButOne()))
				p = w.start("m1")
				w.wait("the other start", func() bool { return w.stats.Outdated == 1 })
				w.awaitReturn(q)
				w.wantWhole(q)
				w.Accept = nil
				w.stats.Outdated = 0
			}
			w.loseUnder("what the proxy has seen", p, q)
			// Somebody who did not notice writes on.
			rec, _ := shard.ParseRecord(w.c.at([]byte(keyClock), w.c.Rev()).KV.Value)
			rec.First, rec.Last = w.last+50, w.last+50
			foreignPut(t, w.c, keyClock, string(shard.AppendRecord(nil, &rec)))
			if !fenced {
				foreignPut(t, w.c, shard.KeyCompact, string(shard.AppendCompaction(nil, w.last+100)))
			}
			w.pass(10 * time.Second)
			w.wantAlone(q, "restored from an older backup")
			if w.stats.Outdated > 0 {
				t.Error("it started again")
			}
		})
	}
}

// TestAcceptedLossBesideRefusedMember: the loss of one member is accepted elsewhere while another one is refused, and the coordinator has its
// data: that knows what the other one lacks, so nothing ends with what this proxy knows. It starts again, serves the first and refuses the second as
// before. (Were it to stay until nothing is refused any more, the first one would wait for the second's operator.)
func TestAcceptedLossBesideRefusedMember(t *testing.T) {
	w := newWholeWorld(t)
	p, q := w.proxies[0], w.proxies[1]
	for range 2 {
		for _, c := range w.net.Members {
			w.last = w.put(p, w.keys[c])
		}
	}
	w.pass(2 * time.Second) // the coordinator knows how far they are
	lost, other := w.c, w.net.Members[2]
	p.crash()
	w.c = other
	newest := other.Etcd
	other.replace(newest.rewound(w.lastButOne()))
	w.c = lost
	lost.replace(lost.Etcd.rewound(w.lastButOne()))
	w.wait("both refusals", func() bool { return w.refusals(q) == 2 })
	life := q.life
	w.Accept = []string{"m1"}
	p.boot(0)
	w.wait("the start", func() bool { return p.ready })
	w.Accept = nil
	w.wait("the other start", func() bool { return q.life != life && q.ready })
	w.wait("the member whose loss is accepted", func() bool { return w.refusals(q) == 1 })
	w.put(q, w.keys[lost])
	w.c = other
	w.wantAlone(q, "restored from an older backup")
	other.replace(newest)
	w.wantWhole(q)
	if w.stats.Outdated != 1 {
		t.Errorf("it has started again %d times", w.stats.Outdated)
	}
}

// refusals counts the members that p refuses.
func (w *absentWorld) refusals(p *proxy) (n int) {
	for _, s := range p.core.Observe().Shards {
		if s.Refused != "" {
			n++
		}
	}
	return n
}

// TestLastWhoKnowsStays: a proxy is to start again because a member that it refused is whole and was compacted meanwhile. Before it does, the
// coordinator loses its data and the member is put back to an older state: a start would rebuild the one from the other, and revisions would go
// back (seed 21000462 of TestAcceptedLosses). So it stays, and starts again when the member is what it was. Nor does it go when the coordinator has an epoch of
// this system again that nobody has believed, as a rebuild has left it that was cut short before its first fence, or another system's.
func TestLastWhoKnowsStays(t *testing.T) {
	for name, fill := range map[string]func(w *absentWorld){
		"empty":                                func(*absentWorld) {},
		"of an epoch that nobody has believed": func(w *absentWorld) { w.fillCoordinator(w.epoch(), false) },
		"another system's":                     func(w *absentWorld) { w.fillCoordinator(revclock.ID{0xee, 1}, true) },
	} {
		t.Run("the coordinator is "+name, func(t *testing.T) { lastWhoKnows(t, fill) })
	}
}

func lastWhoKnows(t *testing.T, fill func(w *absentWorld)) {
	told := 0
	w := newTracedWorld(t, func(line string) {
		if strings.Contains(line, "level=ERROR") && strings.Contains(line, stays) && strings.Contains(line, "shards=[m1]") {
			told++
		}
	})
	p, q := w.proxies[0], w.proxies[1]
	for range 2 {
		w.last = w.put(p, w.keys[w.c])
	}
	w.pass(time.Second)
	newest, older := w.c.Etcd, w.lastButOne()
	w.c.replace(newest.rewound(older))
	w.pass(time.Second)
	w.wantAlone(q, "restored from an older backup")
	cut := q.host.Link(w.c.ID)
	cut.Deaf, cut.Mute = true, true
	w.c.replace(newest)
	w.wait("p to take it in", func() bool { _, why := p.core.Ready(); return why == "" })
	w.last = w.put(p, w.keys[w.c])
	if _, st := w.ask(p, shard.OpCompact, &pb.CompactionRequest{Revision: w.last}); st.Code != codec.OK {
		t.Fatal(st)
	}
	p.crash()
	cut.heal()
	w.wait("the reason to start", func() bool { return q.core.Observe().Outdated != "" })
	life := q.life
	w.net.Coord.Wipe(w.net.Coord.ClusterID)
	fill(w)
	w.c.replace(newest.rewound(older))
	w.pass(time.Minute)
	if q.life != life {
		t.Fatal("it has started again")
	}
	if ok, why := q.core.Ready(); ok || !strings.Contains(why, stays) || !strings.Contains(why, "(m1)") || told != 1 {
		t.Errorf("ready: %v %q; the log was told %d times", ok, why, told)
	}
	if w.c.Rev() != older {
		t.Errorf("somebody wrote to the older state: L%d, was L%d", w.c.Rev(), older)
	}
	w.net.Coord.Wipe(w.net.Coord.ClusterID) // a start goes nowhere with another system's
	away := q.host.Link(w.net.Members[2].ID)
	away.Deaf, away.Mute = true, true
	w.c.replace(newest)
	w.pass(10 * time.Second)
	if _, why := q.core.Ready(); q.life != life || strings.Contains(why, stays) {
		t.Errorf("it only waits for another member now: %q", why)
	}
	away.heal()
	w.wait("the start", func() bool { return q.life != life })
	w.awaitReturn(q)
	w.wantWhole(q)
	if rev := w.put(q, w.keys[w.c]); rev < 1<<20 {
		t.Errorf("a put at %d behind a rebuild", rev)
	}
}

// TestAcceptedLossCompactedLater: a proxy has seen that the loss of a member was accepted, and cannot start yet, for another member does not answer it. Somebody
// compacts, so that the fence is the compaction record no more. The proxy goes on to know what it has seen. (It took the member for one that lacks something
// again, and once the coordinator had lost its data it stayed for good.) But if the member is put back to before the fence, that is another loss.
func TestAcceptedLossCompactedLater(t *testing.T) {
	for name := range lossesUnder {
		for _, again := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, and lost again: %v", name, again), func(t *testing.T) {
				w := newWholeWorld(t)
				p, q := w.proxies[0], w.proxies[1]
				for range 12 { // more than is there when somebody compacts
					w.last = w.put(p, w.keys[w.c])
				}
				cut := w.loseUnder(name, p, q)
				older := w.c.Rev()
				if cut != nil {
					cut.heal()
				}
				w.pass(time.Second)
				away := q.host.Link(w.net.Members[2].ID)
				away.Deaf, away.Mute = true, true
				w.Accept = []string{"m1"}
				p.boot(0)
				w.wait("the start", func() bool { return p.ready })
				w.Accept = nil
				life := q.life
				refusal := func() string { return q.core.Observe().Shards[w.shardOf(q)].Refused }
				const accepted = "another proxy has accepted"
				w.wait("the reason to start", func() bool { return strings.HasPrefix(refusal(), accepted) })
				w.last = w.put(p, w.keys[w.c])
				if _, st := w.ask(p, shard.OpCompact, &pb.CompactionRequest{Revision: w.last}); st.Code != codec.OK {
					t.Fatal(st)
				}
				for i := range 24 {
					w.last = w.put(p, w.keys[w.c])
					w.pass(300 * time.Millisecond)
					if why := refusal(); !strings.HasPrefix(why, accepted) {
						t.Fatalf("refused, behind %d puts: %s", i, why)
					}
				}
				p.crash()
				w.net.Coord.Wipe(w.net.Coord.ClusterID)
				newest := w.c.Etcd
				if again {
					w.c.replace(newest.rewound(older))
					w.wait("the other refusal", func() bool { return strings.Contains(refusal(), "restored from an older backup") })
				}
				away.heal()
				if again {
					w.pass(time.Minute)
					if q.life != life || w.c.Rev() != older {
						t.Fatalf("it has started again: %v; L%d, was L%d", q.life != life, w.c.Rev(), older)
					}
					w.c.replace(newest)
				}
				w.wait("the other start", func() bool { return q.life != life })
				w.awaitReturn(q)
				w.wantWhole(q)
			})
		}
	}
}

// shardOf is the index of w.c in the map.
func (w *absentWorld) shardOf(p *proxy) int {
	return slices.IndexFunc(p.core.Observe().Shards, func(s shard.ShardObservation) bool { return s.Cluster == w.c.ID })
}

// stays is what an operator is told while a proxy stays for what it knows.
const stays = "do not stop this proxy, and start no other one"

// epoch returns an epoch of this system that nobody knows.
func (w *absentWorld) epoch() (id revclock.ID) {
	first, _ := shard.ParseIdentity(firstIdentity(w.net.Members))
	copy(id[:8], first[:])
	id[8]++
	return id
}

// fillCoordinator puts an epoch into an empty coordinator, as a rebuild does, and a tick of it, if somebody is to have believed it.
func (w *absentWorld) fillCoordinator(epoch revclock.ID, tick bool) {
	put := func(k string, v []byte) { w.net.Coord.Put(&pb.PutRequest{Key: []byte(k), Value: v}) }
	put("e", revclock.AppendEpoch(nil, epoch))
	put("s", revclock.AppendSnapshot(nil, &revclock.Snapshot{Rev: 2, N: 1 << 21, Shards: make([]revclock.SnapshotShard, len(w.net.Members))}))
	if tick {
		put("t", revclock.AppendTick(nil, &revclock.Tick{}))
	}
}
