package shard

import (
	"slices"

	"spindle/codec"
	"spindle/watchring"
)

// This file sees to it that a read which waits for a shard's stream does not wait for a stream that is dead. The stream of an idle
// shard may be on a node that has become mute, unnoticed until its connection has been silent for long. What other proxies
// write there, and somebody waits for, is not shown then. So when somebody has waited for a second, the shard is asked for its clock, once for
// all who wait: if the stream lacks that, it is watched (stream_stall.go). A shard that is only slow has nothing newer
// to show, and one small read more in a second.

// armLagLook looks at the oldest who wait for a frontier when they have waited for too long.
func (c *Core) armLagLook() {
	if c.lagLooks || len(c.waiters) == 0 {
		return
	}
	c.lagLooks = true
	oldest := slices.MinFunc(c.waiters, func(a, b frontierWaiter) int { return int(a.since - b.since) }).since
	now := c.cfg.Now()
	at := oldest + int64(firstPatience)
	if at <= now {
		at = now + int64(firstPatience) // they were looked at
	}
	c.at(at, func() {
		c.lagLooks = false
		if c.state == stateReady {
			c.lookAtLags(at - int64(firstPatience))
			c.armLagLook()
		}
	})
}

// lookAtLags asks the shards whose frontiers have been waited for since a moment.
func (c *Core) lookAtLags(since int64) {
	for i, s := range c.shards {
		f := c.frontier.Get(i)
		if slices.ContainsFunc(c.waiters, func(w frontierWaiter) bool {
			return w.since <= since && w.rev > f && (w.shard == i || w.shard == watchring.All)
		}) {
			s.lookAtLag()
		}
	}
}

// lookAtLag asks the shard for its clock, and expects the stream to show it.
func (s *shardState) lookAtLag() {
	if s.lagLook || s.handle == nil || s.holding {
		return
	}
	s.mute() // so that another node is asked
	s.lagLook = true
	s.call(codec.MethodRange, codec.AppendString(nil, rangeKey, KeyClock), completion(func(resp []byte, st codec.Status, _ bool) {
		s.lagLook = false
		if kv, found := firstKV(resp); st.Code == codec.OK && found && s.c.state == stateReady {
			s.expectOnStream(kv.ModRevision)
		}
	}))
}
