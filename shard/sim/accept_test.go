package sim

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"spindle/shard"
	"spindle/watchring"

	"spindle/codec"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// The ways in which a member can have lost something, each as what is done to w.c while no proxy runs.
var losses = map[string]func(w *absentWorld){
	"restored": func(w *absentWorld) { w.c.replace(w.c.Etcd.rewound(w.lastButOne())) },
	"wiped":    func(w *absentWorld) { w.c.replace(w.c.Etcd.rewound(1)) },
	"of an older epoch": func(w *absentWorld) {
		before := w.c.Rev()
		w.net.Coord.Wipe(w.net.Coord.ClusterID)
		p := w.start()
		w.last = w.put(p, w.keys[w.c])
		w.put(p, w.keys[w.net.Members[0]])
		w.last = w.put(p, w.keys[w.c])
		w.pass(2 * time.Second)
		p.crash()
		w.c.replace(w.c.Etcd.rewound(before))
	},
}

// TestAcceptedLossCutShort ends a proxy that accepts a loss behind each write that it makes anywhere, and starts another
// one, without the flag. That one refuses the member, so that the operator says it again; or the loss is accepted, and
// whoever saw what is lost is told so. That holds also if the coordinator loses its data between, which
// is all that knew of the loss, once anything of the acceptance was written.
func TestAcceptedLossCutShort(t *testing.T) {
	for name, lose := range losses {
		for _, wipe := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, coordinator wiped: %v", name, wipe), func(t *testing.T) {
				cut, refused := 0, 0
				for k := 1; ; k++ {
					w := newAbsentWorld(t, 2*time.Second)
					lose(w)
					p := w.proxies[0]
					w.Accept = []string{"m1"}
					p.boot(0)
					begun := w.writes()
					w.wait("a write, or the start", func() bool { return p.ready || w.writes() >= begun+int64(k) })
					if p.ready {
						break
					}
					cut++
					p.crash()
					w.pass(time.Second)
					begunIt := w.marked()
					if marked := w.marked() || w.c.at([]byte(shard.KeyCompact), w.c.Rev()) != nil; wipe && marked {
						w.net.Coord.Wipe(w.net.Coord.ClusterID)
					}
					w.Accept = nil
					p = w.proxies[1]
					p.boot(0)
					w.wait("the start", func() bool { return p.ready })
					if _, why := p.core.Ready(); why != "" {
						if !strings.Contains(why, "m1 is refused") {
							t.Fatalf("behind %d writes: %s", k, why)
						}
						if refused++; begunIt && !wipe {
							t.Errorf("behind %d writes: it has to be accepted again: %s", k, why)
						}
						p.crash()
						p = w.start("m1")
					}
					o := p.newViewer().watch(&watchring.Watcher{Key: w.keys[w.c], Start: w.last + 1})
					p.turn()
					w.pass(2 * time.Second)
					if !o.ended {
						t.Errorf("behind %d writes: a watch from %d goes on, compacted at %d", k, w.last+1, p.core.Observe().Compact)
					}
					if _, st := w.ask(p, shard.OpRange, &pb.RangeRequest{Key: []byte(w.keys[w.c]), Revision: w.last}); st != codec.ErrCompacted {
						t.Errorf("behind %d writes: the past: %v", k, st)
					}
					if w.marked() {
						t.Errorf("behind %d writes: the mark is still there", k)
					}
					w.wantWhole(p)
				}
				t.Logf("cut short %d times, refused afterwards %d times", cut, refused)
				if cut < 3 {
					t.Error("that is not enough")
				}
			})
		}
	}
}

// TestAcceptedLossWithMemberAway: while a loss is accepted another member is away. The others have the record of the compaction at once,
// and are not compacted again and again until that one is back.
func TestAcceptedLossWithMemberAway(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	w.c.replace(w.c.Etcd.rewound(w.lastButOne()))
	away := w.net.Members[2]
	newest := away.Etcd
	away.replace(newest.rewound(1))
	compactions := map[codec.ClusterID]int{}
	w.net.Sent = func(_ *Host, to codec.ClusterID, m codec.Method, _ []byte) {
		if m == codec.MethodCompact {
			compactions[to]++
		}
	}
	p := w.start("m1")
	has := func(c *Cluster) bool { return c.at([]byte(shard.KeyCompact), c.Rev()) != nil }
	w.wait("the record on the others", func() bool { return has(w.net.Members[0]) && has(w.c) })
	w.pass(2 * time.Minute)
	for _, c := range w.net.Members[:2] {
		if n := compactions[c.ID]; n != 1 {
			t.Errorf("%s was compacted %d times", c, n)
		}
	}
	away.replace(newest)
	w.wantWhole(p)
	w.wait("the record on the one that is back", func() bool { return has(away) })
}

// TestAcceptedLossFencedMeanwhile: a start has seen the mark and waits, while another one ends the acceptance and the members
// are written to and compacted. It sees that there is nothing left to fence. (It fenced and compacted without end.)
func TestAcceptedLossFencedMeanwhile(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	w.c.replace(w.c.Etcd.rewound(w.lastButOne()))
	p, q := w.proxies[0], w.proxies[1]
	w.Accept = []string{"m1"}
	p.boot(0)
	w.wait("the mark", func() bool { return w.marked() })
	p.crash()
	w.pass(time.Second)
	if !w.marked() {
		t.Fatal("the mark is gone")
	}
	w.Accept = nil
	cut := w.probing(q)
	p.boot(0)
	w.wait("the start", func() bool { return p.ready })
	for range 5 {
		for _, c := range w.net.Members {
			w.last = w.put(p, w.keys[c])
		}
	}
	if _, st := w.call(p, shard.OpCompact, &pb.CompactionRequest{Revision: w.last}); st.Code != codec.OK {
		t.Fatal(st)
	}
	w.last = w.put(p, w.keys[w.c])
	w.pass(2 * time.Second)
	before := w.c.Rev()
	cut.heal()
	w.wait("the second start", func() bool { return q.ready })
	if n := w.c.Rev() - before; n > 1 {
		t.Errorf("the member was written to %d times by a start that had nothing to do", n)
	}
	if at := q.core.Frontier().Compacted(); at < w.last-1 {
		t.Errorf("watches from %d on are taken; compacted at %d", at, w.last-1)
	}
}

// TestAcceptedLossEndedByAnother: of two starts that accept a loss the slower one's fence comes too late, and its streams have not
// shown the other's. It serves with that one's compaction all the same: no watch is led past what is lost. (It served without, and they
// were.)
func TestAcceptedLossEndedByAnother(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	w.c.replace(w.c.Etcd.rewound(w.lastButOne()))
	p, q := w.proxies[0], w.proxies[1]
	w.Accept = []string{"m1"}
	q.boot(0)
	held := false
	w.net.Sent = func(h *Host, to codec.ClusterID, m codec.Method, req []byte) {
		txn := &pb.TxnRequest{}
		if held || h != q.host || to != codec.Coordinator || m != codec.MethodTxn || proto.Unmarshal(req, txn) != nil || !hasPut(txn) || !w.marked() {
			return
		}
		held = true // its fence has no revisions yet
		h.Link(codec.Coordinator).Hole = true
		for _, c := range w.net.Members {
			h.Link(c.ID).StreamHole = true
		}
	}
	w.wait("the tick", func() bool { return held })
	p.boot(0)
	w.wait("the other start", func() bool { return p.ready })
	q.host.Link(codec.Coordinator).Resume()
	w.wait("the start", func() bool { return q.ready })
	if at := q.core.Observe().Compact; at <= w.last {
		t.Errorf("it serves, compacted at %d; %d is lost", at, w.last)
	}
	v := q.newViewer()
	lost := v.watch(&watchring.Watcher{Key: w.keys[w.c], Start: w.mine})
	next := v.watch(&watchring.Watcher{Key: w.keys[w.c], Start: w.last + 1})
	q.turn()
	w.pass(200 * time.Millisecond)
	for _, c := range w.net.Members {
		q.host.Link(c.ID).Resume()
	}
	w.pass(3 * time.Second)
	w.put(p, w.keys[w.c])
	w.pass(time.Second)
	for _, o := range []*view1{lost, next} {
		if !o.ended || len(o.got) > 0 {
			t.Errorf("a watch goes on past what is lost: ended %v, promised %d, it was shown %d revisions", o.ended, o.promised, len(o.got))
		}
	}
}

// TestAcceptedLossTakesOneFence: a fence of the loss that is under way is not followed by a second one.
func TestAcceptedLossTakesOneFence(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	w.c.replace(w.c.Etcd.rewound(w.lastButOne()))
	fences := 0
	w.net.Sent = func(_ *Host, to codec.ClusterID, m codec.Method, req []byte) {
		if q := (&pb.TxnRequest{}); to == w.c.ID && m == codec.MethodTxn && proto.Unmarshal(req, q) == nil {
			for _, o := range q.Success {
				if d := o.GetRequestDeleteRange(); d != nil && string(d.Key) == shard.KeyLoss {
					fences++
				}
			}
		}
	}
	w.Accept = []string{"m1"}
	p := w.proxies[0]
	p.boot(0)
	w.wait("the process", func() bool { return p.up })
	p.host.Link(w.c.ID).Base = 25 * time.Millisecond // longer than it takes to look again
	w.wait("the start", func() bool { return p.ready })
	w.pass(2 * time.Second)
	if fences != 1 {
		t.Errorf("%d fences of the loss", fences)
	}
}

// TestLossMarkedBehindProbe: a start has probed the members before another one marks the loss, and goes on after that one stopped, behind
// each of its writes. It serves nobody before the fence.
func TestLossMarkedBehindProbe(t *testing.T) {
	served := 0
	for k := 1; ; k++ {
		w := newAbsentWorld(t, 2*time.Second)
		losses["of an older epoch"](w)
		p, q := w.proxies[0], w.proxies[1]
		cut := w.probing(q)
		w.Accept = []string{"m1"}
		p.boot(0)
		begun := w.writes()
		w.wait("a write, or the start", func() bool { return p.ready || w.writes() >= begun+int64(k) })
		if p.ready {
			break
		}
		p.crash()
		w.pass(time.Second)
		cut.heal()
		w.wait("the start", func() bool { return q.ready })
		if _, why := q.core.Ready(); why != "" {
			if !strings.Contains(why, "m1 is refused") {
				t.Errorf("behind %d writes: %s", k, why)
			}
			continue
		}
		served++
		o := q.newViewer().watch(&watchring.Watcher{Key: w.keys[w.c], Start: w.last + 1})
		q.turn()
		w.pass(2 * time.Second)
		if w.marked() || !o.ended {
			t.Errorf("behind %d writes: served before the fence; mark: %v, a watch from %d on ended: %v, compacted at %d", k, w.marked(), w.last+1, o.ended, q.core.Observe().Compact)
		}
	}
	if served < 3 {
		t.Errorf("served %d times: that is not enough", served)
	}
}

// TestAcceptedLossOnRunningProxy: a proxy runs and has left the member out while another one accepts the loss. It takes the member in afterwards,
// and ends the watches that wait for it: what they lack cannot be brought any more.
func TestAcceptedLossOnRunningProxy(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	w.c.replace(w.c.Etcd.rewound(w.lastButOne()))
	q := w.proxies[1]
	q.boot(0)
	w.wait("the start", func() bool { return q.ready })
	v := q.newViewer()
	one := v.watch(&watchring.Watcher{Key: w.keys[w.c], Start: w.last + 1})
	all := v.watch(&watchring.Watcher{Key: "k", End: "z", Start: w.last + 1})
	q.turn()
	w.pass(time.Second)
	p := w.start("m1")
	w.wait("the return", func() bool {
		_, why := q.core.Ready()
		return why == ""
	})
	w.put(p, w.keys[w.c])
	w.pass(2 * time.Second)
	if !one.ended || !all.ended || len(one.got)+len(all.got) > 0 {
		t.Errorf("watches of what was lost ended: %v %v, and got %d and %d revisions", one.ended, all.ended, len(one.got), len(all.got))
	}
	if w.stats.Outdated > 0 {
		t.Error("it started again, and need not")
	}
	w.wantWhole(q)
}

// TestCopyWithMarkOfLoss: a member is restored from a backup that was made while its loss was being accepted. The mark in it does not have
// accepted what is lost now.
func TestCopyWithMarkOfLoss(t *testing.T) {
	for name, lose := range losses {
		t.Run(name, func(t *testing.T) {
			w := newAbsentWorld(t, 2*time.Second)
			lose(w)
			w.Accept = []string{"m1"}
			p := w.proxies[0]
			p.boot(0)
			copies := map[int64]*Etcd{}
			w.wait("the start", func() bool {
				if rev := w.c.Rev(); w.marked() && copies[rev] == nil {
					copies[rev] = w.c.Etcd.rewound(rev)
				}
				return p.ready
			})
			if len(copies) == 0 {
				t.Fatal("there was no mark")
			}
			w.wantWhole(p)
			w.pass(2 * time.Second)
			p.crash()
			newest := w.c.Etcd
			for rev, older := range copies {
				w.c.replace(older)
				p := w.start()
				w.wantAlone(p, "restored from an older backup")
				if w.c.Rev() != rev {
					t.Errorf("somebody wrote to the older state: L%d, was L%d", w.c.Rev(), rev)
				}
				w.c.replace(newest)
				w.wantWhole(p)
				w.pass(2 * time.Second)
				p.crash()
				newest = w.c.Etcd
			}
			// Once more, with the operator's consent.
			for _, older := range copies {
				w.c.replace(older)
				break
			}
			last := w.last
			p = w.start("m1")
			if _, st := w.ask(p, shard.OpRange, &pb.RangeRequest{Key: []byte(w.keys[w.c]), Revision: last}); st != codec.ErrCompacted {
				t.Errorf("the past: %v", st)
			}
			if w.marked() {
				t.Error("the mark is still there")
			}
		})
	}
}

// marked says whether the member has the mark of an accepted loss.
func (w *absentWorld) marked() bool { return w.c.at([]byte(shard.KeyLoss), w.c.Rev()) != nil }

// writes counts what was written anywhere.
func (w *absentWorld) writes() (n int64) {
	for _, c := range append(w.net.Members, w.net.Coord) {
		n += c.Rev()
	}
	return n
}

// probing starts p, without the flag, as far as it comes without the coordinator: its probes of the members are answered.
func (w *absentWorld) probing(p *proxy) *Link {
	w.t.Helper()
	w.Accept = nil
	p.boot(0)
	w.wait("the process", func() bool { return p.up })
	l := p.host.Link(codec.Coordinator)
	l.Deaf, l.Mute = true, true
	w.pass(time.Second)
	return l
}
