package shard

import (
	"time"

	"spindle/codec"
)

// This file has the coordinator know how far the shards are when nothing is written any more: a tick names the clock
// that its writer saw committed (C_i), but no tick follows a shard's last batch. So that a proxy which starts later
// can notice that the last writes of a member are missing, a tick of its own names them once the shard is idle.

// idleShard is the mean time for which nothing was seen on a shard until its clock is named. What was written in the last
// one and a half of them before all proxies were killed may be lost unnoticed.
const idleShard = time.Second / 2

// armNaming looks later whether clocks have to be named. Of several proxies mostly one does.
func (c *Core) armNaming() {
	if c.naming {
		return
	}
	c.naming = true
	for _, s := range c.shards {
		s.unnamed = s.known.last
	}
	c.after(c.jitter(idleShard), c.nameClocks)
}

// nameClocks names the clocks of the shards on which nothing has happened since armNaming.
func (c *Core) nameClocks() {
	c.naming = false
	if c.state != stateReady {
		return
	}
	again := false
	for i, s := range c.shards {
		switch {
		case s.known.last <= c.clock.Log().C(i):
		case c.connecting != nil || s.known.last != s.unnamed:
			again = true
		default:
			c.nameClock(s)
			again = true // the tick may be lost
		}
	}
	if again {
		c.armNaming()
	}
}

// nameClock has the next tick name what this proxy knows of a shard, if that is news.
func (c *Core) nameClock(s *shardState) bool {
	if c.state != stateReady || c.connecting != nil || s.known.last <= c.clock.Log().C(s.idx) {
		return false
	}
	c.clock.Name(s.idx, s.known.last)
	return true
}

const (
	// farewellWait bounds what a proxy does for the coordinator before it stops.
	farewellWait = 500 * time.Millisecond
	// farewellDown is for how long the coordinator has had no connection when it is not waited for: it may just be starting again.
	farewellDown = farewellWait / 5
)

// Farewell has the coordinator know how far the shards are, so that a later start can tell whether they have lost anything, and calls
// done when it does, when the coordinator is not there, or after farewellWait. The owner closes the Core then, not from within done.
func (c *Core) Farewell(done func()) {
	until := c.cfg.Now() + int64(farewellWait)
	var look func()
	look = func() {
		open := false
		for _, s := range c.shards {
			open = c.nameClock(s) || open
		}
		if !open || c.cfg.Now() >= until || c.coordinatorDown() > farewellDown {
			done()
			return
		}
		c.after(retryDelay/2, look)
	}
	look()
}

// coordinatorDown tells for how long the coordinator has had no connection, 0 while it has one, or where that cannot be told.
func (c *Core) coordinatorDown() (since time.Duration) {
	if d, ok := c.tr.(downtime); ok {
		_, since = d.Down(codec.Coordinator)
	}
	return since
}
