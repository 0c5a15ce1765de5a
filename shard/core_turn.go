package shard

// This file is the end of a turn of the loop.

// Flush ends a turn: closed batches, reads, ticks leave; frontiers are published.
func (c *Core) Flush() {
	if c.state == stateFailed || c.state == stateClosed {
		return
	}
	for range 8 { // what is woken may itself have something to send
		if c.gatesOpen {
			c.startLists()
		}
		if c.stale {
			c.stale = false
			c.moveFrontiers()
		}
		if c.frontierRose {
			c.frontierRose = false
			c.wakeWaiters()
			c.tryHistories()
			if c.onFrontier != nil {
				c.onFrontier()
			}
		}
		if c.dirty {
			c.dirty = false
			for _, s := range c.shards {
				s.flushWrites()
				s.flushReads()
			}
		}
		c.recentTurn = nil // its now leaves
		c.clock.Flush()
		if !c.dirty && !c.stale && !c.frontierRose && !c.gatesOpen {
			return
		}
	}
	c.after(0, func() {}) // there is more: another turn, at once
}

// moveFrontiers recomputes every F_i from the log and the streams, and publishes it.
func (c *Core) moveFrontiers() {
	if c.frontier == nil {
		return
	}
	l := c.clock.Log()
	for i, s := range c.shards {
		if c.connecting != nil {
			// The log may be of a coordinator that is not believed. What a stream has shown stays true.
			if f := l.Clock(i); f > c.frontier.Get(i) {
				c.frontier.Set(i, f)
				c.frontierRose = true
			}
			continue
		}
		f := l.Frontier(i)
		if c.cfg.Sabotage.FrontierIgnoresRanges || c.cfg.Sabotage.DeadShardPassed && s.handle == nil {
			f = l.N()
		}
		if f > c.frontier.Get(i) {
			c.frontier.Set(i, f)
			c.frontierRose = true
		}
		if s.streaming {
			s.watchOpenRanges()
		}
	}
	if c.frontierRose {
		c.publishCompaction()
	}
	c.trimRing()
	for _, s := range c.shards {
		s.resumeStream()
	}
}
