package shard

import (
	"fmt"
	"slices"

	"spindle/codec"
	"spindle/watchring"
)

// This file is the end of a start, from the believed epoch to serving: connections and clocks are compared with what is known, and the
// streams opened.

// believed opens the streams. Watchers that lost this proxy come back to revisions a little way in
// the past: the streams begin there.
func (b *bootstrap) believed(k *connecting) {
	if b.c.state != stateStarting || b.started {
		return
	}
	b.started = true
	for i, s := range b.c.shards {
		l := &k.looks[i]
		if l.out {
			continue
		}
		b.clocks[i], s.rec = l.rec.Last, point{l.rec.First, l.rec.Last, l.local}
	}
	// Only now is it known what the shards must hold: what was read may have come by one of several endpoints, and the
	// others may lead elsewhere.
	if t, ok := b.c.tr.(checking); ok {
		for _, s := range b.c.shards {
			t.Distrust(s.cluster)
		}
	}
	b.awaitChecks()
}

// awaitChecks goes on when every shard has a connection that was looked at, or is refused.
func (b *bootstrap) awaitChecks() {
	c := b.c
	live, ok := c.tr.(liveness)
	for _, s := range c.shards {
		if s.absent == "" && s.banned != "" {
			s.leave(s.banned)
		}
		if ok && s.absent == "" && !live.Connected(s.cluster) {
			b.later(retryDelay/4, b.awaitChecks)
			return
		}
	}
	b.compareClocks()
}

// compareClocks refuses a shard that has lost data: one whose clock is below what a proxy has seen
// committed there. A probe may merely be older than the tick that says so: then the shard is read again.
func (b *bootstrap) compareClocks() {
	c, round := b.c, b.round
	if b.adopts(c.clock.Log().N()) {
		return
	}
	for i, s := range c.shards {
		seen := c.clock.Log().C(i)
		if b.clocks[i] >= seen || s.lossy && s.mark.Rev >= seen || !s.begins() {
			continue
		}
		body := appendGet(nil, txnSuccess, KeyClock, 0)
		body = appendGet(body, txnSuccess, KeyCompact, 0)
		body = appendGet(body, txnSuccess, KeyLoss, 0)
		c.tr.Call(s.cluster, codec.MethodTxn, body, c.cfg.ShardTimeout, b.completion(func(resp []byte, st codec.Status, _ bool) {
			t, ok := parseTxnReply(resp, nil)
			if st.Code != codec.OK || !ok || len(t.resps) < 3 {
				b.later(c.jitter(20*retryDelay), b.compareClocks)
				return
			}
			if err := s.readMark(t.resps[1], t.resps[2]); err != nil {
				c.mistaken(err)
				return
			}
			kv, _ := firstKV(t.resps[0])
			rec, ok := ParseRecord(slices.Clone(kv.Value))
			at := point{rec.First, rec.Last, kv.ModRevision}
			if ok {
				s.saw(at)
			}
			switch {
			case !ok:
				c.fail(fmt.Errorf("member cluster %s has lost its clock key, or holds one that this version of spindle cannot read", s.name))
			case s.lossy && s.mark.Rev >= seen: // somebody else was faster
				b.clocks[i], s.rec = rec.Last, at
				b.compareClocks()
			case rec.Last < seen && slices.Contains(c.cfg.AcceptDataLoss, c.cfg.Names[s.cluster]):
				c.log.Warn("a member cluster has lost data, which is accepted", "shard", s.name, "revision", rec.Last, "was", seen)
				b.clocks[i], s.rec = rec.Last, at
				s.markLoss(kv.ModRevision, LossMark{c.m.Epoch, max(seen, c.clock.Log().N())}, func() {
					if b.live(round) {
						b.compareClocks()
					}
				})
			case rec.Last < seen:
				s.leave(fmt.Sprintf("it is at revision %d, but has been at %d: it was restored from an older backup", rec.Last, seen))
				b.compareClocks()
			default:
				b.clocks[i], s.rec = rec.Last, at
				b.compareClocks()
			}
		}))
		return
	}
	if !c.allRefused() {
		b.findStarts()
	}
}

// begins says that the start goes on with a shard: those that were left out and have returned since come later.
func (s *shardState) begins() bool { return s.absent == "" && !s.returning }

// findStarts looks for the record behind which each stream begins.
func (b *bootstrap) findStarts() {
	c, round := b.c, b.round
	n := c.clock.Log().N()
	b.tail = max(n-int64(c.cfg.RingSize)/2, c.compacted-1, 0)
	b.begun = 0
	for _, s := range c.shards {
		if s.begins() {
			b.begun++
		}
	}
	for _, s := range c.shards {
		if !s.begins() {
			continue
		}
		s.streamStart(b.tail, func(p point, st codec.Status) {
			if !b.live(round) {
				return
			}
			if st.Code != codec.OK {
				c.fail(fmt.Errorf("the history of member cluster %s cannot be read: %s", s.name, st.Msg))
				return
			}
			s.rec = p
			b.tail = max(b.tail, p.last)
			if b.begun--; b.begun == 0 {
				b.open()
			}
		})
	}
}

// open makes the ring and opens every stream.
func (b *bootstrap) open() {
	c := b.c
	c.ring = watchring.NewRing(c.cfg.RingSize, c.cfg.RingBytes, b.tail)
	c.frontier = watchring.NewFrontier(len(c.shards), 0)
	if c.compacted > 0 {
		c.frontier.SetCompacted(c.compacted)
	}
	for _, s := range c.shards {
		if s.begins() {
			b.unread++
		}
	}
	for _, s := range c.shards {
		if s.begins() {
			s.openFirst()
		}
	}
	for _, s := range c.shards {
		b.streamMoved(s)
	}
}

// streamMoved is told that a shard's stream has come to a record; the Core is ready once every stream
// has come to what was there at the start.
func (b *bootstrap) streamMoved(s *shardState) {
	c := b.c
	if c.state != stateStarting || s.streaming || !s.begun || s.rec.last < b.clocks[s.idx] {
		return
	}
	s.streaming = true
	c.stale = true
	if b.unread--; b.unread > 0 {
		return
	}
	b.awaitFences()
}

// ready ends the start.
func (b *bootstrap) ready() {
	c := b.c
	c.state, c.reason, c.boot = stateReady, "", nil
	for _, s := range c.shards {
		s.compactOf = s.compactRec
	}
	c.after(0, c.beginReturned)
	c.armNaming()
	c.armCompactionLags()
	c.startAutoCompact()
	c.startLeases()
	c.startQuotas()
	c.log.Info("serving", "shards", len(c.shards), "revision", c.clock.Log().N())
}
