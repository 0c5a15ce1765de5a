package sim

import (
	"bytes"
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/shard"
)

// This file loses what a member has, for good, and has an operator accept that as the README says: every proxy is stopped, one
// is started with the flag, which may end anywhere, and the others are started without it, before or after.
//
// Such a run has two histories: what there was until then, with what is lost, and what there is in the end. What clients were
// told below the fence of the loss must fit the first one, what they were told from there on the second.

// maxCuts bounds how many starts that accept a loss end early.
const maxCuts = 5

// loss is what a member lost.
type loss struct {
	c     *Cluster
	shard int   // in the map
	lost  *Etcd // what it was
	begun int64 // virtual ns
	over  int64 // when it was seen to be accepted, 0 before
	cuts  int
}

// losing reports whether a loss is not accepted yet.
func (r *Run) losing() bool { return r.loss != nil && r.loss.over == 0 }

// lose stops all proxies and restores a member to an older state, or wipes it, as soon as that is one whose loss can be noticed.
func (r *Run) lose() {
	w := r.net
	if !r.chaos {
		return
	}
	c := w.Members[w.Rand.IntN(r.Shards)]
	rev := r.olderRevision(c)
	if rev == 0 || c.paused || !r.coordinatorKnows() || r.restored() {
		w.After(w.Between(0, 200*time.Millisecond), r.lose)
		return
	}
	l := &loss{c: c, lost: c.Etcd, begun: w.now}
	for _, s := range r.proxies[0].core.Observe().Shards {
		if s.Cluster == c.ID {
			break
		}
		l.shard++
	}
	if r.Shards > 1 && w.Chance(0.4) {
		rev = 1
	}
	r.loss = l
	r.stats.Losses++
	for _, p := range r.proxies {
		p.crash()
	}
	w.tracef("%s: loses everything behind L%d, was at L%d", c, rev, c.Rev())
	c.replace(c.Etcd.rewound(rev))
	first := w.Rand.IntN(len(r.proxies))
	for i, p := range r.proxies {
		p.accept = i == first || w.Chance(0.2)
		p.boot(w.Between(0, 3*time.Second))
	}
	w.After(time.Second, r.operate)
}

// marked reports whether the member has the mark of its loss, or the fence that has ended that: then the coordinator is not all that knows of it.
func (l *loss) marked() bool {
	first, _ := l.fence()
	return first > 0 || l.c.at([]byte(shard.KeyLoss), l.c.Rev()) != nil
}

// coordinatorKnows reports whether the coordinator has been what the members believe in for a while. What it has lost nobody
// knows when all proxies stop: documented.
func (r *Run) coordinatorKnows() bool {
	w := r.net
	if w.Coord.paused || !r.believed() || r.stats.Wipes > 0 && w.now-r.wiped < int64(5*time.Second) {
		return false
	}
	e := w.Coord.at([]byte("e"), w.Coord.Rev())
	for _, c := range w.Members {
		m := c.at([]byte(shard.KeyMap), c.Rev())
		if m == nil || !bytes.Contains(m.KV.Value, e.KV.Value[1:]) {
			return false
		}
	}
	for _, p := range r.proxies {
		if ok, _ := p.core.Ready(); !ok {
			return false
		}
	}
	return true
}

// believed reports whether the coordinator has an epoch, and a tick that proves that it was believed.
func (r *Run) believed() bool {
	c := r.net.Coord
	e, t := c.at([]byte("e"), c.Rev()), c.at([]byte("t"), c.Rev())
	return e != nil && !e.Delete && t != nil && t.Main > e.Main
}

// operate is the operator: whoever is to accept the loss is started again until it is accepted.
func (r *Run) operate() {
	w, l := r.net, r.loss
	if r.accepted() {
		w.tracef("%s: its loss is accepted", l.c)
		l.over = w.now
		for _, p := range r.proxies {
			p.accept = false
		}
		return
	}
	w.After(w.Between(100*time.Millisecond, time.Second), r.operate)
	for _, p := range r.proxies {
		if p.accept && !p.ready {
			return // it is being started
		}
	}
	// The one that was to do it has ended, or runs without having done it.
	p := r.proxies[w.Rand.IntN(len(r.proxies))]
	p.accept = true
	if p.up { // else it is about to be started
		p.crash()
		p.boot(w.Between(0, 100*time.Millisecond))
	}
}

// accepted reports whether a proxy with the flag serves, and the fence of the loss is there.
func (r *Run) accepted() bool {
	l := r.loss
	if first, _ := l.fence(); first == 0 {
		return false
	}
	for _, p := range r.proxies {
		if p.ready {
			if _, why := p.core.Ready(); why == "" {
				return true
			}
		}
	}
	return false
}

// fenced returns when that was, virtual ns.
func (l *loss) fenced() int64 {
	first, _ := l.fence()
	for _, ch := range l.c.Log() {
		if string(ch.KV.Key) == keyClock {
			if rec, err := parseRecord(ch.KV.Value); err == nil && rec.first == first {
				return ch.At
			}
		}
	}
	return 0
}

// fence returns the revisions of the fence that ended the loss, 0 if there is none.
func (l *loss) fence() (first, last int64) {
	log := l.c.Log()
	for i := len(log) - 1; i >= 0; i-- {
		if string(log[i].KV.Key) != shard.KeyLoss || !log[i].Delete {
			continue
		}
		for _, ch := range log {
			if ch.Main == log[i].Main && string(ch.KV.Key) == keyClock {
				if rec, err := parseRecord(ch.KV.Value); err == nil {
					return rec.first, rec.last
				}
			}
		}
	}
	return 0, 0
}

// cutShort ends a proxy that accepts a loss behind some of the requests by which it does.
func (r *Run) cutShort(h *Host, m codec.Method, req []byte) {
	l := r.loss
	if !r.losing() || !r.chaos || l.cuts >= maxCuts || !accepting(m, req) || !r.net.Chance(0.35) {
		return
	}
	for _, p := range r.proxies {
		if p.host != h || !p.accept {
			continue
		}
		l.cuts++
		life := p.life
		r.net.After(r.net.Between(0, 4*(r.Base+r.Jitter)), func() {
			if p.life != life || !p.up {
				return
			}
			p.crash()
			p.accept = r.net.Chance(0.5)
			p.boot(r.net.Between(0, time.Second))
		})
	}
}

// accepting reports whether a request is a step of an acceptance.
func accepting(m codec.Method, req []byte) bool {
	if m == codec.MethodCompact {
		return true
	}
	t := &pb.TxnRequest{}
	if m != codec.MethodTxn || proto.Unmarshal(req, t) != nil {
		return false
	}
	for _, o := range t.Success {
		for _, key := range []string{shard.KeyLoss, shard.KeyCompact, shard.KeyMap} {
			if p, d := o.GetRequestPut(), o.GetRequestDeleteRange(); p != nil && string(p.Key) == key || d != nil && string(d.Key) == key {
				return true
			}
		}
	}
	return false
}

// before returns the members' logs with what was lost.
func (l *loss) before(members []*Cluster) (logs [][]*Change) {
	for _, m := range members {
		if m == l.c {
			logs = append(logs, l.lost.Log())
		} else {
			logs = append(logs, m.Log())
		}
	}
	return logs
}

// lostFacts returns what is in the first history and not in the second, and refuses what the second has below the fence and the first has
// not: somebody wrote to the older state.
func lostFacts(before, after *history, fence int64) (lost []*fact, err error) {
	has := func(h *history, f *fact) bool {
		for _, o := range h.byRev[f.rev] {
			if o.key == f.key && o.delete == f.delete && o.value == f.value {
				return true
			}
		}
		return false
	}
	for _, rev := range before.revs {
		for _, f := range before.byRev[rev] {
			if rev < fence && !has(after, f) {
				lost = append(lost, f)
			}
		}
	}
	for _, rev := range after.revs {
		for _, f := range after.byRev[rev] {
			if rev < fence && !has(before, f) {
				return nil, fmt.Errorf("%v: below the fence of the loss, at %d, and not in what was lost", f, fence)
			}
		}
	}
	return lost, nil
}

// overLoss checks a watch that was opened behind a loss: it is not led past anything that is missing.
func (c *checker) overLoss(o *view1) error {
	for _, f := range c.lost {
		if !within(f.key, o.w.Key, o.w.End) {
			continue
		}
		if o.w.Start <= f.rev && f.rev <= o.promised {
			return fmt.Errorf("it was promised everything up to %d, and lacks %v, which is lost", o.promised, f)
		}
		if o.w.Start < c.fenceEnd && c.fenceEnd <= o.promised {
			return fmt.Errorf("it went on to %d, past the end of the loss at %d, and %v is lost", o.promised, c.fenceEnd, f)
		}
	}
	return nil
}

// readsLost reports whether o, which was told a revision behind the loss, has read the past that nobody may read any more. What lies on other
// members is still there, and a proxy that was started without the lost one, or whose stream is late, shows it as it was until a read
// finds the compaction's record on the member that is read. Who ended the loss may end before it has brought the record to all, and
// a full member takes none (seed 51551, in its day): then that lasts.
func (c *checker) readsLost(o *op) bool {
	members := c.r.inMap()
	for _, q := range o.pastReads() {
		if q.Revision >= c.fenceEnd {
			continue
		}
		for _, i := range c.r.part.AppendShards(nil, q.Key, q.RangeEnd) {
			if at := members[i].recorded(c.fenceEnd); at > 0 && at < o.call {
				return true
			}
		}
	}
	return false
}

// unrecorded returns a member on which no compaction at rev or above is recorded, nil if there is none.
func (r *Run) unrecorded(rev int64) *Cluster {
	for _, c := range r.net.Members {
		if c.recorded(rev) == 0 {
			return c
		}
	}
	return nil
}

// recorded returns the event of the world by which a compaction at rev or above was recorded on a member, 0 if none was.
func (c *Cluster) recorded(rev int64) int64 {
	for _, ch := range c.Log() {
		if string(ch.KV.Key) == shard.KeyCompact && !ch.Delete {
			if at, ok := shard.ParseCompaction(ch.KV.Value); ok && at >= rev {
				return ch.Seq
			}
		}
	}
	return 0
}
