package shard

import (
	"slices"
	"sync/atomic"
	"time"

	"spindle/codec"
)

// This file bounds how many lists are read at a time. A list is a few bytes of a client and many pages of every
// member, so one that asks for many, or asks and cancels, must neither fill the members' time nor this
// process's memory with first pages. Those that wait for something dead do not stop those that do not: lists of other
// shards, and serializable ones, which need no coordinator, have gates of their own.

const (
	// maxLists is how many unary lists of one gate are under way; further ones wait in their order. Of those whose pages
	// are large fewer are, so that pages of about gatePages are being read on each member, but minLists at least, which is
	// more when their pages are gathered (gatherPageBytes each): a member does what it has to do for all of them by turns,
	// and everybody else's requests wait for their turn. What pages have lately been like tells how large they are.
	maxLists  = 32
	minLists  = 4
	gatePages = 8 << 20
	// maxListsWaiting is how many may wait at each gate, of one client half of the places that are free, or listsWhenBusy, if
	// that is more: beyond, "etcdserver: too many requests".
	maxListsWaiting = 8192
	listsWhenBusy   = 32
	// gateLook is how soon the lists that wait are looked through again: there may be thousands, each with a time of its own.
	gateLook = 20 * time.Millisecond
	// maxListWaits is how many shard timeouts a list waits, at a gate or for room, however many others get on.
	maxListWaits = 12
	// clientShare is the part of Memory's limit up to which a client may hold answers that it has not taken and still have
	// lists begun, once half of the limit is used. Who holds more, or has a list that waits for room, waits until that is over.
	clientShare = 64
)

// Client is what the Core knows of one client's connection, for whom it may have an op: who takes no answers must not take
// the places of those that do. A nil Client is somebody of whom nothing is known.
type Client struct {
	held    atomic.Int64 // bytes that it makes this process hold
	room    int          // of its lists, those that wait for room in Memory
	granted int64        // bytes of room that its lists have, answers not yet handed out
	moved   int64        // ns; when there was more room last, if that is what its lists wait for
}

// SetHeld says how many bytes the client makes this process hold. On any goroutine.
func (cl *Client) SetHeld(n int64) { cl.held.Store(n) }

// listGate lets lists through, a few at a time: those of each client in their order, and clients by turns.
type listGate struct {
	of    gateKey
	out   int
	moved int64 // ns; when one of those got a page behind its first ones, or ended well, last
	n     int   // that wait
	page  int64 // bytes of a page of one shard, averaged; see listPage
	lines map[*Client]*gateLine
	// The lines are in a ring; last is who had its turn last, nil if none waits.
	last *gateLine
}

// gateLine is the lists of one client that wait.
type gateLine struct {
	client *Client
	ops    []*Op // the oldest first
	head   int
	next   *gateLine
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
	i := slices.IndexFunc(c.gates, func(g *listGate) bool { return g.of == key })
	if i < 0 {
		i = len(c.gates)
		c.gates = append(c.gates, newListGate(key))
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
	g := c.gates[gate-1]
	line := g.lines[op.Client]
	if g.n >= maxListsWaiting || line != nil && op.Client != nil && line.len() >= max(listsWhenBusy, (maxListsWaiting-g.n)/2) {
		c.stats.LargeRefused++
		c.finish(op, codec.ErrTooManyRequests)
		return false
	}
	op.core.gateUntil = c.deadlineOf(op)
	g.add(line, op)
	c.gatesOpen = c.gatesOpen || g.out < g.width()
	c.armGates(op.core.gateUntil)
	return false
}

// waitsUntil is until when op may wait at g. So lists wait for each other, however many come at once, and nobody for what is dead.
func (c *Core) waitsUntil(g *listGate, op *Op) int64 {
	moved := g.moved
	if op.Client != nil {
		moved = max(moved, op.Client.moved)
	}
	return c.patience(op, op.core.gateUntil, moved)
}

// patience is until when a list waits that may wait until then in any case: for the shard timeout behind the moment at which others got on,
// but not for ever. A Txn that may write has the time that writes have, and one that has read some of its ranges holds memory.
func (c *Core) patience(op *Op, then, moved int64) int64 {
	if op.core.since != 0 || op.part {
		return then
	}
	timeout := int64(c.cfg.ShardTimeout)
	return min(max(then, moved+timeout), then+(maxListWaits-1)*timeout)
}

// armGates looks at a time, if not sooner, at the lists whose time is over.
func (c *Core) armGates(at int64) {
	if c.gatesAt != 0 && c.gatesAt <= at {
		return
	}
	c.gatesAt = at
	c.at(at, func() {
		if c.gatesAt != at {
			return // another one looks sooner, or has looked
		}
		c.gatesAt = 0
		now, next := c.cfg.Now(), int64(0)
		for i := 0; i < len(c.gates); i++ { // an answer may bring another request, and with it a gate more
			g := c.gates[i]
			late := g.drop(func(op *Op) bool {
				at := c.waitsUntil(g, op)
				if op.canceled || at <= now {
					return true
				}
				if next == 0 || at < next {
					next = at
				}
				return false
			})
			for _, op := range late {
				if op.canceled {
					c.finish(op, statusCanceled)
				} else {
					c.finish(op, codec.ErrTimeout)
				}
			}
		}
		if next > 0 {
			c.armGates(max(next, now+int64(gateLook)))
		}
	})
}

// listEnds is told of each op that ends.
func (c *Core) listEnds(op *Op, st codec.Status) {
	if st.Code == codec.OK {
		if op.admitted {
			c.large.moved = c.cfg.Now()
		}
		if gate := op.core.gate; gate > 0 {
			c.gates[gate-1].moved = c.cfg.Now()
		}
	}
	c.leaveList(op)
}

// leaveList makes room for the next list, which begins at the end of the turn.
func (c *Core) leaveList(op *Op) {
	if gate := op.core.gate; gate > 0 {
		op.core.gate = 0
		c.gates[gate-1].out--
		c.gatesOpen = true
	}
}

// listPage tells the gate of op how large a page was: a first one, or one that is gathered.
func (c *Core) listPage(op *Op, bytes int) {
	if gate := op.core.gate; gate > 0 {
		g := c.gates[gate-1]
		g.page += (int64(bytes) - g.page) / 8
	}
}

// listMoves is told that op, a list that has room, got a page behind its first ones. (If a shard is dead, the others answer the first
// pages of each list.)
func (c *Core) listMoves(op *Op) {
	c.large.moved = c.cfg.Now()
	if gate := op.core.gate; gate > 0 {
		c.gates[gate-1].moved = c.large.moved
	}
}

// mayList says that a list of cl may begin: it takes its answers, or there is room for all.
func (c *Core) mayList(cl *Client) bool {
	m := c.cfg.Memory
	if cl == nil || m == nil || m.half() || cl.room == 0 && cl.held.Load()+cl.granted <= max(m.limit/clientShare, largeAnswer) {
		return true
	}
	cl.moved = c.large.moved
	return false
}

// startLists begins what has room now. What was canceled while it waited, or waited for longer than the shard timeout, is
// only answered.
func (c *Core) startLists() {
	c.gatesOpen = false
	for i := 0; i < len(c.gates); i++ {
		for g := c.gates[i]; g.out < g.width() && g.n > 0; {
			op := g.take(c.mayList)
			if op == nil { // all that wait have to take something first
				c.lookAgain()
				break
			}
			switch {
			case op.canceled:
				c.finish(op, statusCanceled)
			case c.cfg.Now() >= c.waitsUntil(g, op):
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

// lookAgain opens the gates in a while, for clients who have taken what they were to take.
func (c *Core) lookAgain() {
	if !c.gatesLook {
		c.gatesLook = true
		c.after(largeRetry, func() {
			c.gatesLook, c.gatesOpen = false, true
			c.lookAtRoom()
		})
	}
}

// stopLists answers all that wait, when the Core ends.
func (c *Core) stopLists(st codec.Status) {
	for i := 0; i < len(c.gates); i++ {
		for g := c.gates[i]; g.n > 0; {
			c.finish(g.take(func(*Client) bool { return true }), st)
		}
	}
}

func newListGate(of gateKey) *listGate { return &listGate{of: of, lines: make(map[*Client]*gateLine)} }

// width is how many may be under way.
func (g *listGate) width() int { return int(min(max(gatePages/max(g.page, 1), minLists), maxLists)) }

// add puts op at the end of its client's line, which is line if there is one.
func (g *listGate) add(line *gateLine, op *Op) {
	g.n++
	if line == nil {
		line = &gateLine{client: op.Client}
		g.lines[op.Client] = line
		if g.last == nil {
			line.next = line
		} else {
			line.next, g.last.next = g.last.next, line
		}
		g.last = line
	}
	if line.head > 16 && line.head > len(line.ops)/2 {
		line.ops = append(line.ops[:0], line.ops[line.head:]...)
		line.head = 0
	}
	line.ops = append(line.ops, op)
}

// take takes the oldest of the next client who may; nil: none may.
func (g *listGate) take(may func(*Client) bool) *Op {
	if g.last == nil {
		return nil
	}
	for before, end := g.last, g.last; ; before = before.next {
		line := before.next
		if may(line.client) {
			g.last = line
			return g.pop(before, line)
		}
		if line == end {
			return nil
		}
	}
}

// pop takes the oldest of line, which is the one behind before, and the line away when it is empty.
func (g *listGate) pop(before, line *gateLine) *Op {
	op := line.ops[line.head]
	line.ops[line.head] = nil
	line.head++
	g.n--
	if line.len() == 0 {
		g.remove(before, line)
	}
	return op
}

// remove takes line away, which is the one behind before.
func (g *listGate) remove(before, line *gateLine) {
	delete(g.lines, line.client)
	before.next = line.next
	switch {
	case line == before:
		g.last = nil
	case line == g.last:
		g.last = before
	}
}

// drop takes out all of which over says so, in the order in which their clients have turns.
func (g *listGate) drop(over func(*Op) bool) (out []*Op) {
	before := g.last
	for n := len(g.lines); n > 0; n-- {
		line := before.next
		keep := line.ops[:0]
		for _, op := range line.ops[line.head:] {
			if over(op) {
				out = append(out, op)
			} else {
				keep = append(keep, op)
			}
		}
		clear(line.ops[len(keep):])
		if line.ops, line.head = keep, 0; len(keep) == 0 {
			g.remove(before, line)
		} else {
			before = line
		}
	}
	g.n -= len(out)
	return out
}

func (l *gateLine) len() int { return len(l.ops) - l.head }
