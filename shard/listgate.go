package shard

import (
	"slices"

	"spindle/codec"
)

// This file bounds how many lists are read at a time. A list is a few bytes of a client and many pages of every
// member, so one that asks for many, or asks and cancels, must neither fill the members' time nor this
// process's memory with first pages. Those that wait for something dead do not stop those that do not: lists of other
// shards, and serializable ones, which need no coordinator, have gates of their own.

const (
	// maxLists is how many unary lists of one gate are under way; further ones wait in their order.
	maxLists = 32
	// maxListsWaiting is how many may wait at each gate: beyond, "etcdserver: too many requests".
	maxListsWaiting = 8192
)

// listGate lets maxLists lists through at a time.
type listGate struct {
	of      gateKey
	out     int
	waiting []*Op // the oldest first
	head    int
}

// gateKey names a gate. There is none before somebody comes to it, so there are few.
type gateKey struct {
	first, last  int // shards of the list: the same one, or the ends of several
	serializable bool
}

// gateOf returns the gate for op, from 1 on; 0 if it needs to pass none.
func (c *Core) gateOf(op *Op) int {
	p := &op.core.plan
	lists := false
	for i := range p.ops {
		lists = lists || p.ops[i].kind == planRange && p.ops[i].end != nil
	}
	if !lists || p.Empty() {
		return 0
	}
	var key gateKey
	if shard, one := c.shardOf(p); one {
		key.first, key.last = shard, shard
	} else if op.Kind == OpRange {
		set := c.readSet(op)
		key.first, key.last = set[0].idx, set[len(set)-1].idx
	} else {
		return 0 // a Txn over several shards is refused
	}
	key.serializable = op.Kind == OpRange && p.Serializable()
	i := slices.IndexFunc(c.gates, func(g listGate) bool { return g.of == key })
	if i < 0 {
		i = len(c.gates)
		c.gates = append(c.gates, listGate{of: key})
	}
	return i + 1
}

// enterList says that op, a Range or a Txn that only reads, whose plan is parsed, is none that has to pass a gate.
// Else it waits, at least for the end of the turn: who asks and cancels in one breath costs nothing.
func (c *Core) enterList(op *Op) bool {
	gate := c.gateOf(op)
	if gate == 0 {
		return true
	}
	g := &c.gates[gate-1]
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
	if g.out >= maxLists {
		c.armGates(op.core.gateUntil)
	}
	return false
}

// armGates looks at a time at the lists whose time is over.
func (c *Core) armGates(at int64) {
	if c.gatesArmed {
		return
	}
	c.gatesArmed = true
	c.at(at, func() {
		c.gatesArmed = false
		next := int64(0)
		for i := range c.gates {
			for g := &c.gates[i]; g.head < len(g.waiting); g = &c.gates[i] {
				if op := g.waiting[g.head]; op.core.gateUntil > c.cfg.Now() {
					if next == 0 || op.core.gateUntil < next {
						next = op.core.gateUntil
					}
					break
				}
				c.finish(g.take(), codec.ErrTimeout)
			}
		}
		if next > 0 {
			c.armGates(next)
		}
	})
}

// take takes the oldest that waits.
func (g *listGate) take() *Op {
	op := g.waiting[g.head]
	g.waiting[g.head] = nil
	if g.head++; g.head == len(g.waiting) {
		g.waiting, g.head = g.waiting[:0], 0
	}
	return op
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
		// An answer may bring another request, and with it a gate more.
		for g := &c.gates[i]; g.out < maxLists && g.head < len(g.waiting); g = &c.gates[i] {
			op := g.take()
			switch {
			case op.canceled:
				c.finish(op, statusCanceled)
			case c.cfg.Now() >= op.core.gateUntil:
				c.finish(op, codec.ErrTimeout)
			case c.state != stateReady:
				c.finish(op, codec.ErrStopped)
			default:
				g.out++
				op.core.gate = i + 1
				if op.Kind == OpTxn {
					c.submitReadTxn(op)
				} else {
					c.submitRange(op)
				}
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
