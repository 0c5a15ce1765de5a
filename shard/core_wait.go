package shard

import (
	"slices"

	"spindle/codec"
)

// This file is what requests wait for besides answers of shards: a linearizable now, and frontiers.

type nowEntry struct {
	ticket uint64
	at     int64 // when it began to wait, ns
	w      nowWaiter
}

// nowWaiter hears of a linearizable now; a is valid only during the call.
type nowWaiter interface {
	nowDone(n int64, a []int64)
	// abandon ends the wait: the Core stops.
	abandon(st codec.Status)
}

type frontierWaiter struct {
	shard    int // or watchring.All
	rev      int64
	since    int64 // ns
	deadline int64 // ns; dropped then: who waits has a timer of its own
	f        func()
}

// Now calls done with a revision that is at least as large as every revision that anyone was shown
// before the call.
func (c *Core) Now(done func(rev int64, st codec.Status)) {
	if c.state != stateReady {
		_, why := c.Ready()
		done(0, codec.Status{Code: codec.Unavailable, Msg: "etcdserver: not ready: " + why})
		return
	}
	c.awaitNow(&nowCall{done: done})
}

type nowCall struct {
	done func(rev int64, st codec.Status)
}

func (w *nowCall) nowDone(n int64, _ []int64) {
	if w.done != nil {
		f := w.done
		w.done = nil
		f(n, codec.Status{})
	}
}

func (w *nowCall) abandon(st codec.Status) {
	if w.done != nil {
		f := w.done
		w.done = nil
		f(0, st)
	}
}

func (c *Core) awaitNow(w nowWaiter) {
	if c.cfg.Sabotage.CutOffNow && c.connecting == nil && c.clock.LastError() != "" {
		c.after(0, func() { w.nowDone(c.clock.Log().N(), c.clock.Log().AppendA(nil)) })
		return
	}
	c.nowQueue = append(c.nowQueue, nowEntry{c.clock.Now(), c.cfg.Now(), w})
	c.armSweep()
}

func (c *Core) armSweep() {
	if !c.sweeping {
		c.sweeping = true
		c.after(c.cfg.ShardTimeout/8, c.sweep)
	}
}

// sweep ends the wait of those who have waited for the coordinator for too long, and forgets those whose
// wait for a frontier has ended otherwise.
func (c *Core) sweep() {
	c.sweeping = false
	now := c.cfg.Now()
	c.waiters = slices.DeleteFunc(c.waiters, func(w frontierWaiter) bool { return w.deadline <= now })
	limit := now - int64(c.cfg.ShardTimeout)
	k := 0
	for k < len(c.nowQueue) && c.nowQueue[k].at <= limit {
		k++
	}
	late := c.nowQueue[:k:k]
	c.nowQueue = c.nowQueue[k:]
	if len(c.nowQueue) > 0 || len(c.waiters) > 0 {
		c.armSweep()
	}
	for _, e := range late {
		e.w.abandon(codec.ErrTimeout)
	}
}

// awaitFrontier calls f once the frontier of shard (or All) is at rev, at once if it is there, never
// after the deadline.
func (c *Core) awaitFrontier(shard int, rev, deadline int64, f func()) {
	if c.frontier.Get(shard) >= rev {
		f()
		return
	}
	c.waiters = append(c.waiters, frontierWaiter{shard, rev, c.cfg.Now(), deadline, f})
	c.armSweep()
	c.armLagLook()
}

func (c *Core) wakeWaiters() {
	if len(c.waiters) == 0 {
		return
	}
	all := c.waiters
	c.waiters = nil
	for _, w := range all {
		if c.frontier.Get(w.shard) >= w.rev {
			w.f()
		} else {
			c.waiters = append(c.waiters, w)
		}
	}
}
