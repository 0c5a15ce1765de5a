package shard

import "spindle/revclock"

// This file is the ring's step over the revisions that a rebuild of the coordinator left out.

// overtaken says that another shard's stream is past a rebuild that this one has come to: there is no jump then.
func (s *shardState) overtaken() bool {
	for _, o := range s.c.shards {
		if o.ahead == 0 && s.c.ring.Distance(s.rec.last, o.rec.last) >= revclock.Margin/4 {
			return true
		}
	}
	return false
}

// jumpTo is told that the shard's next record begins at revision first, for which the ring has no room. When that
// is so on every shard a rebuild of the coordinator lies between, and the ring leaves out what nobody was
// given: the jump takes no slots, so it laps no reader. It returns whether the ring has jumped.
func (s *shardState) jumpTo(first int64) bool {
	c := s.c
	s.ahead = first
	from, to := int64(0), first-1
	for i, o := range c.shards {
		if o.ahead == 0 {
			return false // its stream has not come there, or is past it
		}
		from, to = max(from, o.rec.last, c.frontier.Get(i), c.clock.Log().Clock(i)), min(to, o.ahead-1)
	}
	if to-from < revclock.Margin/4 {
		return false
	}
	c.ring.Jump(from, to)
	c.log.Info("a rebuild of the coordinator has left out revisions", "from", from+1, "to", to)
	// Readers pass it as one step: nothing of it can come any more.
	for i := range c.shards {
		c.clock.Log().SetClock(i, to)
	}
	c.stale, c.frontierRose = true, true
	for _, o := range c.shards {
		if o != s {
			c.after(0, o.resumeStream)
		}
	}
	return true
}
