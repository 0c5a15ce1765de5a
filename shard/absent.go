package shard

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"spindle/codec"
	"spindle/revclock"
)

// This file lets a proxy start without member clusters that are not what they were: restored from older backups, or wiped.
// They are refused, as a running proxy refuses them (verify.go), and the others are served. What spans all shards waits
// for them: their frontiers stay where they are.
//
// The coordinator can be believed without having read such a shard's map only if somebody else has believed this epoch,
// which a tick proves (revclock.Found.Believed): then the shard's map has named it. A lost coordinator is not rebuilt without
// them. And a shard whose map does not name an epoch that was believed is an older copy, whatever its clock says.
//
// What is plainly a mistake in the configuration ends the start with a sentence, as does everything at the first start: a member
// with somebody else's data, one of another system, one that is not in the map.

// leave refuses a shard from the start on. Nothing that was read of it counts.
func (s *shardState) leave(why string) {
	c := s.c
	s.forget(why)
	s.ban(why)
	if t, ok := c.tr.(checking); ok {
		t.Distrust(s.cluster)
	}
}

// forget has nothing count that was read of a shard.
func (s *shardState) forget(why string) {
	s.absent, s.begun, s.returning = why, false, false
	s.rec, s.known, s.mapMod, s.compactRec, s.lossSeen = point{}, point{}, 0, -1, false
	s.lossy, s.accepted, s.marked, s.mark = false, false, 0, LossMark{}
}

// allRefused gives up when there is nothing left to serve. It returns true then.
func (c *Core) allRefused() bool {
	if len(c.shards) == 0 {
		return false // a start that begins anew knows of none
	}
	for _, s := range c.shards {
		if s.absent == "" {
			return false
		}
	}
	c.mistaken(fmt.Errorf("every member cluster is refused: see whether the --shard addresses are right, and --coordinator; %s", strings.ReplaceAll(c.refusals, "\n", "; ")))
	return true
}

// first returns a look at a shard that is not left out.
func (k *connecting) first() *look {
	for i := range k.looks {
		if !k.looks[i].out {
			return &k.looks[i]
		}
	}
	return &k.looks[0]
}

// refusedShards names the shards that are left out, and why.
func (k *connecting) refusedShards() string {
	var names []string
	for i := range k.looks {
		if l := &k.looks[i]; l.out {
			names = append(names, "member cluster "+l.s.name+" is refused: "+l.s.absent)
		}
	}
	return strings.Join(names, "; ")
}

// leaveOut is told of an epoch that was believed once, so that every map has named it. At a start shards that do not are
// left out, or taken as they are if the operator accepts that. It returns true if it has gone on from there.
func (k *connecting) leaveOut(epoch revclock.ID) bool {
	c := k.c
	for i := range k.looks {
		if l := &k.looks[i]; !l.out && l.m.Epoch != epoch && k.known != epoch {
			// The looks are older than the coordinator's answer: it may have been rebuilt between. As long as it has this epoch, looks
			// that begin now show it on every shard.
			k.known = epoch
			k.look()
			return true
		}
	}
	out, accepted := 0, false
	for i := range k.looks {
		l := &k.looks[i]
		switch {
		case l.out:
			out++
		case l.m.Epoch == epoch || c.state != stateStarting:
		case l.s.marked > 0 && l.s.mark.Epoch == epoch:
			accepted = true // a rebuild brings it to the others' epoch
		case slices.Contains(c.cfg.AcceptDataLoss, c.cfg.Names[l.s.cluster]):
			c.log.Warn("a member cluster is of an older epoch of the coordinator: it has lost data, which is accepted", "shard", l.s.name, "revision", l.rec.Last)
			turn := k.turn
			l.s.markLoss(l.local, LossMark{Epoch: epoch}, func() {
				if k.live(turn) {
					k.look()
				}
			})
			return true
		default:
			l.s.leave(fmt.Sprintf("it is at revision %d, of an older epoch of the coordinator: it was restored from an older backup", l.rec.Last))
			l.out = true
			out++
		}
	}
	if c.allRefused() {
		return true
	}
	if accepted || out == 0 || k.sure {
		return false
	}
	k.sure, k.stands, k.wrong = true, false, ""
	k.judge()
	return true
}

// again looks at everything anew, because a shard was left out or has returned.
func (k *connecting) again() {
	k.turn++ // and the clock that is being started must not be believed: what it was started with is no more
	k.c.clock.Stop()
	k.found = nil
	turn := k.turn
	k.c.after(0, func() {
		if k.live(turn) {
			k.look()
		}
	})
}

// returned is told that a shard which was left out is what it was again, as a look at it has shown, and its map names the epoch that is
// believed, or was last.
func (s *shardState) returned(k *Check) {
	c := s.c
	s.absent, s.mapMod = "", k.mapMod
	s.saw(k.at)
	s.sawCompaction(k.compact)
	s.compactOf = k.compact
	if c.ring != nil && k.compact > c.frontier.Get(s.idx) {
		// Its loss may have been accepted meanwhile: watches that wait for it must not be led past what is missing. Of an ordinary
		// compaction some end that need not: they list anew.
		c.ring.RaiseTail(k.compact)
		c.frontier.SetCompacted(k.compact)
		c.frontierRose = true
	}
	// Before a start has found its epoch the shard is one as any other.
	s.returning = c.boot == nil || c.boot.started
	s.accept()
	if c.connecting != nil {
		c.connecting.again()
		return
	}
	c.after(0, c.beginReturned) // its connection is in use then
}

// beginReturned begins with shards that were left out and have returned.
func (c *Core) beginReturned() {
	if c.state != stateReady || c.connecting != nil {
		return // whoever ends that begins with them
	}
	for _, s := range c.shards {
		if !s.returning || s.rec.local != 0 {
			continue
		}
		s.rec = s.known
		s.settledTo = max(s.settledTo, s.rec.last)
		c.maxClock = max(c.maxClock, s.rec.last)
		from := max(c.ring.Tail(), c.compacted-1)
		s.streamStart(from, func(p point, st codec.Status) {
			if st.Code != codec.OK {
				c.fail(fmt.Errorf("the history of member cluster %s cannot be read: %s", s.name, st.Msg))
				return
			}
			s.rec = p
			c.ring.RaiseTail(p.last) // a compaction may be above the tail
			if p.last > from {
				c.noteTorn(p.last) // somebody compacted the member meanwhile, and what is gone was not seen
			}
			s.openFirst()
			s.streaming = true
			if l, ok := c.tr.(liveness); !ok || l.Connected(s.cluster) {
				s.accept() // else the next connection says so
			}
		})
	}
}

// openFirst opens the shard's stream for the first time, behind s.rec.
func (s *shardState) openFirst() {
	c := s.c
	s.points = append(s.points[:0], s.rec)
	// A stream may begin below the tail: its record was the newest when it was probed. The frontier says
	// what was seen, wherever the ring begins.
	l := c.clock.Log()
	l.SetClock(s.idx, s.rec.last)
	if f := l.Frontier(s.idx); c.connecting == nil && f > c.frontier.Get(s.idx) {
		c.frontier.Set(s.idx, f)
	}
	s.begun, s.returning = true, false
	c.stale = true
	s.openStream()
}

// soundProbes leaves those out that are refused.
func soundProbes(ps []*probe) []*probe {
	return slices.DeleteFunc(slices.Clone(ps), func(p *probe) bool { return p.why != "" })
}

// wiped handles members without a key of Spindle's where another one has the map: each takes the place of a shard of
// the map that no member is. It returns true when it has gone on, or given up.
func (b *bootstrap) wiped(m *Map, ps []*probe) bool {
	c := b.c
	for _, p := range ps {
		if !p.empty {
			continue
		}
		missing := slices.DeleteFunc(slices.Clone(m.Shards), func(s MapShard) bool {
			return slices.ContainsFunc(ps, func(p *probe) bool { return p.identity == s.Identity })
		})
		if len(missing) == 0 {
			c.mistaken(fmt.Errorf("%s is not in the partition map of this system: remove it from the configuration (shards cannot be added yet)", p.name))
			return true
		}
		name := c.cfg.Names[p.id]
		i := slices.IndexFunc(missing, func(s MapShard) bool { return s.Name == name })
		if i < 0 && len(missing) > 1 {
			c.mistaken(fmt.Errorf("%s is empty, and the partition map names several member clusters that are missing, none of them %q: give it the name that it had", p.name, name))
			return true
		}
		s := missing[max(i, 0)]
		if b.unsure(p) {
			b.later(c.jitter(2*retryDelay), b.begin)
			return true
		}
		if b.looked < 2 {
			// The map is written when every member has its identity, so who is empty after it was seen has lost it.
			b.looked++
			b.begin()
			return true
		}
		accepted := slices.Contains(c.cfg.AcceptDataLoss, name)
		lost, known := b.lost[p.id]
		if !accepted || !known {
			p.identity, p.adopt = s.Identity, accepted
			if p.why = "it is empty: it was wiped, or its address leads to another cluster"; accepted {
				p.why = "it is empty, and takes the place of what was lost once it is known up to where that was"
			}
			continue
		}
		c.log.Warn("an empty member cluster takes the place of one that has lost its data, which is accepted", "shard", s.Name)
		b.readopt(p, s, m, lost)
		return true
	}
	return false
}

// adopts begins anew when an empty member is left out that is to take the place of one that was lost: now it is known, or cannot
// be known, up to which revision something is missing. It returns false if there is none.
func (b *bootstrap) adopts(lost int64) bool {
	found := false
	for i := range b.probes {
		if p := &b.probes[i]; p.adopt {
			p.adopt, found = false, true
			b.lost[p.id] = lost
		}
	}
	if found {
		b.anew()
	}
	return found
}

// readopt gives an empty member the identity of the shard that it was, the map and a clock. Its keys are lost: all that was handed out
// up to a revision, 0 if that is not known.
func (b *bootstrap) readopt(p *probe, s MapShard, m *Map, lost int64) {
	body := appendCompareInt(nil, "\x00", "\x00", resultEqual, targetMod, cmpMod, 0)
	body = appendPutOp(body, txnSuccess, KeyID, AppendIdentity(nil, s.Identity))
	body = appendPutOp(body, txnSuccess, KeyClock, AppendInitialRecord(nil, m.Epoch))
	body = appendPutOp(body, txnSuccess, KeyMap, AppendMap(nil, m))
	body = appendPutOp(body, txnSuccess, KeyLoss, AppendLossMark(nil, LossMark{m.Epoch, lost}))
	b.c.tr.Call(p.id, codec.MethodTxn, body, b.c.cfg.ShardTimeout, b.completion(func(_ []byte, st codec.Status, _ bool) {
		if st.Code != codec.OK {
			b.later(b.c.jitter(20*retryDelay), b.begin)
			return
		}
		b.begin()
	}))
}

// identify gives the empty members of a first start their identities. It returns true when it has something to wait for.
func (b *bootstrap) identify() bool {
	c := b.c
	for i := range b.probes {
		if p := &b.probes[i]; p.empty && b.unsure(p) {
			b.later(c.jitter(2*retryDelay), b.begin)
			return true
		}
	}
	open := 0
	for i := range b.probes {
		p := &b.probes[i]
		if !p.empty {
			continue
		}
		open++
		c.tr.Call(p.id, codec.MethodTxn, p.firstTxn(), c.cfg.ShardTimeout, b.completion(func([]byte, codec.Status, bool) {
			if open--; open == 0 {
				b.begin() // whoever was faster, and whatever was lost: what is there now counts
			}
		}))
	}
	return open > 0
}

// anyMap returns the map of the member with the lowest identity that has one, nil if none has.
func anyMap(ps []*probe) []byte {
	for _, p := range ps {
		if p.mapBytes != nil {
			return p.mapBytes
		}
	}
	return nil
}

// byIdentity sorts probes; those of empty members come last.
func byIdentity(x, y *probe) int {
	if x.empty != y.empty {
		if x.empty {
			return 1
		}
		return -1
	}
	return bytes.Compare(x.identity[:], y.identity[:])
}
