package shard

import (
	"spindle/codec"
	"spindle/watchring"
)

// This file holds a shard's stream back while the ring has no room for what it brings, because another shard
// is slower. Only one whose stream is alive is waited for: readers that need another find what they have missed in
// the history.

// hold keeps events until the ring has room for them, and what waits behind them for the next fragment.
func (s *shardState) hold(events [][]byte) {
	var msg []byte
	if len(s.partial) > 0 {
		msg = codec.AppendBool(msg, 7, true)
	}
	for _, e := range events {
		msg = codec.AppendBytes(msg, 11, e)
	}
	for _, e := range s.partial {
		msg = codec.AppendBytes(msg, 11, e)
	}
	s.partial = nil
	s.held = append([][]byte{msg}, s.held...)
	now := s.c.cfg.Now()
	if s.handle == nil || s.holding && now < s.holdUntil {
		return
	}
	s.holdUntil = now + int64(s.c.cfg.ShardTimeout)
	s.c.at(s.holdUntil, s.waitedLong)
	if !s.holding {
		s.holding = true
		s.handle.Hold(true)
	}
}

// waitedLong ends the wait for shards that do not move although their streams seem to be alive: they do not
// count until they bring a record.
func (s *shardState) waitedLong() {
	c := s.c
	if !s.holding || c.cfg.Now() < s.holdUntil || c.state == stateFailed || c.state == stateClosed {
		return
	}
	for i, o := range c.shards {
		o.late = o.late || c.tooFar(s.waits, c.frontier.Get(i))
	}
	c.stale = true
	s.resumeStream()
}

// resumeStream goes on with what was held, if there is room now.
func (s *shardState) resumeStream() {
	for len(s.held) > 0 {
		if !s.roomFor(s.waits) {
			return
		}
		msg := s.held[0]
		s.held = s.held[1:]
		n := len(s.held)
		s.take(msg)
		if len(s.held) > n {
			return // no room yet
		}
	}
	if s.holding && s.handle != nil {
		s.holding = false
		s.stall.brought = s.c.cfg.Now() // it was not the stream that was silent
		s.handle.Hold(false)
	}
}

// roomFor reports whether the revisions of a record may be put into the ring now.
func (s *shardState) roomFor(rec point) bool {
	least, any := s.c.leastLive()
	return !any || !s.c.tooFar(rec, least)
}

// tooFar reports whether a record is too far ahead of a frontier. A quarter of the ring's slots stays free for
// readers; and while its entries weigh more than twice its limit, which means that they cannot be dropped yet,
// only the record that follows next is taken.
func (c *Core) tooFar(rec point, frontier int64) bool {
	return c.ring.Distance(frontier, rec.last) > c.ring.Size()*3/4 || rec.first > frontier+1 && c.ring.Bytes() > 2*c.cfg.RingBytes
}

// leastLive returns the smallest frontier of the shards that others wait for: those whose stream has brought
// something since it was opened, and was not waited for in vain.
func (c *Core) leastLive() (least int64, any bool) {
	for i, s := range c.shards {
		if s.handle == nil || !s.heard || s.late {
			continue
		}
		if f := c.frontier.Get(i); !any || f < least {
			least, any = f, true
		}
	}
	return least, any
}

// trimRing keeps the ring within its bytes. What a shard without a live stream still needs goes, too: its readers,
// and those of all shards, go to the history.
func (c *Core) trimRing() {
	upTo, any := c.leastLive()
	if !any {
		upTo = c.frontier.Get(watchring.All)
	}
	c.ring.Trim(upTo)
}
