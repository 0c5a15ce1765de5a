package shard

import "spindle/codec"

// This file bounds how many lists are read at a time. A list is a few bytes of a client and many pages of every
// member, so one that asks for many, or asks and cancels, must neither fill the members' time nor this
// process's memory with first pages. Lists of one shard do not wait for those of another.

const (
	// maxLists is how many unary lists of one shard, or of several, are under way; further ones wait in their order.
	maxLists = 32
	// maxListsWaiting is how many may wait at each of these gates: beyond, "etcdserver: too many requests".
	maxListsWaiting = 8192
)

// listGate lets maxLists lists through at a time.
type listGate struct {
	out     int
	waiting []*Op
	head    int
}

// enterList says that op, a Range whose plan is parsed, is none that has to pass a gate. Else it waits, at least for
// the end of the turn: who asks and cancels in one breath costs nothing.
func (c *Core) enterList(op *Op) bool {
	p := &op.core.plan
	if p.ops[0].end == nil || p.Empty() {
		return true
	}
	gate := len(c.shards)
	if shard, one := c.shardOf(p); one {
		gate = shard
	}
	if c.gates == nil {
		c.gates = make([]listGate, len(c.shards)+1)
	}
	g := &c.gates[gate]
	if len(g.waiting)-g.head >= maxListsWaiting {
		c.stats.LargeRefused++
		c.finish(op, codec.ErrTooManyRequests)
		return false
	}
	op.core.gateUntil = c.deadline()
	if g.head > maxListsWaiting {
		g.waiting, g.head = append(g.waiting[:0], g.waiting[g.head:]...), 0
	}
	g.waiting = append(g.waiting, op)
	c.gatesOpen = c.gatesOpen || g.out < maxLists
	return false
}

// leaveList makes room for the next list, which begins at the end of the turn.
func (c *Core) leaveList(op *Op) {
	if gate := op.core.gate; gate > 0 {
		op.core.gate = 0
		c.gates[gate-1].out--
		c.gatesOpen = true
	}
}

// startLists begins what has room now. What was canceled while it waited, or waited for longer than the shard timeout, is
// only answered.
func (c *Core) startLists() {
	c.gatesOpen = false
	for i := range c.gates {
		g := &c.gates[i]
		for g.out < maxLists && g.head < len(g.waiting) {
			op := g.waiting[g.head]
			g.waiting[g.head] = nil
			if g.head++; g.head == len(g.waiting) {
				g.waiting, g.head = g.waiting[:0], 0
			}
			switch {
			case op.canceled:
				c.finish(op, statusCanceled)
			case c.cfg.Now() > op.core.gateUntil:
				c.finish(op, codec.ErrTimeout)
			case c.state != stateReady:
				c.finish(op, codec.ErrStopped)
			default:
				g.out++
				op.core.gate = i + 1
				c.submitRange(op)
			}
		}
	}
}

// stopLists answers all that wait, when the Core ends.
func (c *Core) stopLists(st codec.Status) {
	for i := range c.gates {
		g := &c.gates[i]
		waiting := g.waiting[g.head:]
		g.waiting, g.head = nil, 0
		for _, op := range waiting {
			c.finish(op, st)
		}
	}
}
