package revclock

import (
	"fmt"

	"spindle/codec"
)

// tickState is the requests that wait for revisions, and the one tick that is under way.
type tickState struct {
	slots   []tickSlot // by shard
	waiting int        // slots that are in no tick
	naming  bool       // a slot has a clock to name
	retry   retry
	nonce   uint64 // of the latest tick
	last    int64  // mod revision of t at the last tick that is folded in

	// The tick under way has the latest nonce.
	active bool
	value  []byte // what it puts
	base   int64  // last, when it was sent
	rev    int64  // the coordinator's revision of it, 0 if not known
	lost   uint64 // its reply was lost; a now with this ticket will tell, 0 if not lost
	tick   Tick   // reused
}

type tickSlot struct {
	state slotState
	req   Request
	named int64 // a clock that the next tick is to name although nothing is asked for, 0 for none
}

type slotState uint8

const (
	slotFree slotState = iota
	slotWaiting
	slotTicking
)

// Request asks for revisions for a shard; Granted tells them. Each Request is granted exactly once,
// unless Lost or Stop come before. One per shard may be outstanding, further ones are refused with false;
// so is one that cannot be written into a tick.
func (c *Clock) Request(r Request) bool {
	if r.Shard < 0 || r.Shard >= len(c.ticks.slots) || r.Count < 1 || r.Count > MaxCount ||
		len(r.Filter) > MaxFilter || r.Committed < 0 {
		return false
	}
	s := &c.ticks.slots[r.Shard]
	if s.state != slotFree {
		return false
	}
	s.state, s.req = slotWaiting, r
	c.ticks.waiting++
	return true
}

// Name has the next tick name a shard's clock, as one that was seen committed, although no revisions are asked for. If the
// tick is lost it goes unnamed.
func (c *Clock) Name(shard int, clock int64) {
	if c.state == stateRunning && clock > 0 {
		c.ticks.slots[shard].named, c.ticks.naming = clock, true
	}
}

// sendTick sends everything that waits as one tick. There is one at a time: what comes meanwhile
// shares the next one.
func (c *Clock) sendTick(now int64) {
	t := &c.ticks
	if t.active || t.waiting == 0 && !t.naming || now < t.retry.at {
		return
	}
	t.nonce++
	t.tick = Tick{Proxy: c.cfg.Proxy, Nonce: t.nonce, Items: t.tick.Items[:0]}
	for i := range t.slots {
		s := &t.slots[i]
		if s.state != slotWaiting {
			if clock := min(s.named, c.log.shards[i].a); clock > c.log.shards[i].c {
				t.tick.Items = append(t.tick.Items, TickItem{Shard: i, Committed: clock})
			}
			s.named = 0
			continue
		}
		s.state, s.named = slotTicking, 0
		t.tick.Items = append(t.tick.Items, TickItem{
			Shard: i, Count: s.req.Count, Turn: s.req.Turn,
			// The record of a batch may have been faster than its tick; the log's A is what everybody knows.
			Committed: min(s.req.Committed, c.log.shards[i].a), Filter: s.req.Filter,
		})
	}
	t.waiting, t.naming = 0, false
	if len(t.tick.Items) == 0 {
		return // somebody else has named it
	}
	t.active, t.rev, t.lost, t.base = true, 0, 0, t.last
	t.value = AppendTick(t.value[:0], &t.tick)
	c.stats.Ticks++
	c.buf = appendTickTxn(c.buf[:0], c.epoch, t.value, t.base)
	c.call(codec.MethodTxn, c.buf, t.nonce, (*Clock).tickDone)
}

func (c *Clock) tickDone(nonce uint64, resp []byte, st codec.Status, sent bool) {
	t := &c.ticks
	if !t.active || t.nonce != nonce {
		return // the watch was faster
	}
	var r reply
	if st.Code == codec.OK {
		var ok bool
		if r, ok = parseReply(resp, 1); !ok {
			st = statusUnreadable
		}
	}
	if st.Code != codec.OK {
		c.failed(&t.retry, "asking the coordinator for revisions", st)
		if !sent {
			c.retick()
			return
		}
		// It may have been applied, or still will be. The watch tells, or a read that begins now.
		c.stats.LostTicks++
		c.now.ticket++
		t.lost = c.now.ticket
		return
	}
	if !r.succeeded {
		if e := &r.ops[0]; e.found {
			c.lose(errOtherEpoch(e.kv.Value[min(1, len(e.kv.Value)):], c.epoch[1:]))
		} else {
			c.lose(errLostData)
		}
		return
	}
	c.succeeded(&t.retry)
	t.rev = r.rev
	if r.ops[0].succeeded && c.state == stateRunning && t.base == t.last && c.log.rev < r.rev {
		// No tick between the last one folded in here and this one.
		c.stats.FastTicks++
		if c.fold(t.value, r.rev) {
			c.moved(true)
		}
		return
	}
	c.settleTick()
	c.armStall()
}

// tookTick looks whether the tick that was just folded is the one under way.
func (c *Clock) tookTick() {
	t, got := &c.ticks, &c.log.tick
	if got.Proxy != c.cfg.Proxy {
		return
	}
	if !t.active || got.Nonce != t.nonce {
		c.stats.Orphans++
		return
	}
	t.active = false
	t.retry = retry{}
	for i := range got.Items {
		shard := got.Items[i].Shard
		s := &t.slots[shard]
		if s.state != slotTicking {
			continue
		}
		r := c.log.ranges[i]
		r.Filter = s.req.Filter
		c.grants = append(c.grants, grant{shard, s.req.Token, r})
		*s = tickSlot{}
	}
}

// settleTick gives a tick up that was folded as a part of a snapshot: its range cannot be told from others'.
func (c *Clock) settleTick() {
	if t := &c.ticks; t.active && t.rev > 0 && c.log.rev >= t.rev {
		c.retick()
	}
}

// retick lets all requests of the tick under way wait for another one, with a nonce of its own. If this one
// turns up after all, its ranges are orphans.
func (c *Clock) retick() {
	t := &c.ticks
	t.active = false
	c.stats.Reticks++
	for i := range t.slots {
		if t.slots[i].state == slotTicking {
			t.slots[i].state = slotWaiting
			t.waiting++
		}
	}
}

// String is for failing tests.
func (r Range) String() string {
	return fmt.Sprintf("[%d,%d] of %x tick %d at %d", r.First, r.Last, r.Holder[:2], r.Nonce, r.Rev)
}
