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
					writes := func() (n int64) {
						for _, c := range append(w.net.Members, w.net.Coord) {
							n += c.Rev()
						}
						return n
					}
					begun := writes()
					w.wait("a write, or the start", func() bool { return p.ready || writes() >= begun+int64(k) })
					if p.ready {
						break
					}
					cut++
					p.crash()
					w.pass(time.Second)
					if marked := w.c.at([]byte(shard.KeyLoss), w.c.Rev()) != nil || w.c.at([]byte(shard.KeyCompact), w.c.Rev()) != nil; wipe && marked {
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
						refused++
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
					if w.c.at([]byte(shard.KeyLoss), w.c.Rev()) != nil {
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
