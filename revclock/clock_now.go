package revclock

import (
	"bytes"

	"spindle/codec"
)

// nowState is the nows that wait. One read of the coordinator is under way at a time; it serves all
// nows that were there before it was sent.
type nowState struct {
	ticket uint64 // the latest that was given
	asked  uint64 // the latest that a read serves
	busy   bool
	flying uint64 // ticket that the read under way serves
	last   int64  // ticks.last when it was sent
	retry  retry
	queue  []nowRead // done, not folded up to yet
}

type nowRead struct {
	ticket uint64
	mod    int64 // of t
}

// Now asks for the largest revision that was handed out to anybody before the call; NowDone tells it.
func (c *Clock) Now() (ticket uint64) {
	c.now.ticket++
	return c.now.ticket
}

func (c *Clock) sendNow(now int64) {
	n := &c.now
	if n.busy || n.ticket == n.asked || now < n.retry.at {
		return
	}
	n.busy, n.flying, n.last = true, n.ticket, c.ticks.last
	c.stats.NowReads++
	c.buf = appendNowTxn(c.buf[:0])
	c.call(codec.MethodTxn, c.buf, 0, (*Clock).nowDone)
}

func (c *Clock) nowDone(_ uint64, resp []byte, st codec.Status, _ bool) {
	n := &c.now
	n.busy = false
	var r reply
	if st.Code == codec.OK {
		var ok bool
		if r, ok = parseReply(resp, 2); !ok {
			st = statusUnreadable
		}
	}
	if st.Code != codec.OK {
		c.failed(&n.retry, "reading now from the coordinator", st)
		return
	}
	c.succeeded(&n.retry)
	e, t := &r.ops[0], &r.ops[1]
	switch {
	case !e.found:
		c.lose(errLostData)
		return
	case !bytes.Equal(e.kv.Value, c.epoch):
		c.lose(errOtherEpoch(e.kv.Value[min(1, len(e.kv.Value)):], c.epoch[1:]))
		return
	case t.kv.ModRevision < n.last:
		c.lose(errRegress)
		return
	}
	n.asked = n.flying
	n.queue = append(n.queue, nowRead{n.flying, t.kv.ModRevision})
	c.moved(false)
}

// answerNows reports the nows whose ticks are folded in.
func (c *Clock) answerNows() {
	n := &c.now
	k := 0
	for k < len(n.queue) && n.queue[k].mod <= c.log.rev {
		k++
	}
	if k == 0 {
		return
	}
	ticket := n.queue[k-1].ticket
	n.queue = n.queue[:copy(n.queue, n.queue[k:])]
	c.stats.Nows++
	if t := &c.ticks; t.active && t.lost > 0 && t.lost <= ticket {
		// The read began after the reply was lost, and the tick is not in what it has seen.
		c.retick()
	}
	c.as = c.log.AppendA(c.as[:0])
	c.ev.NowDone(ticket, c.log.n, c.as)
}
