package shard

import (
	"fmt"

	"spindle/revclock"
)

// clockEvents is the Core as the clock sees it.
type clockEvents Core

func (e *clockEvents) Granted(shard int, token uint64, r revclock.Range) {
	(*Core)(e).shards[shard].granted(token, r)
}

func (e *clockEvents) Folded() {
	c := (*Core)(e)
	c.stale = true
}

func (e *clockEvents) NowDone(ticket uint64, n int64, a []int64) {
	c := (*Core)(e)
	k := 0
	for k < len(c.nowQueue) && c.nowQueue[k].ticket <= ticket {
		k++
	}
	if k == 0 {
		return
	}
	// Waiters may ask for another now: take them off the queue first.
	done := c.nowQueue[:k:k]
	c.nowQueue = c.nowQueue[k:]
	for _, w := range done {
		w.w.nowDone(n, a)
	}
}

func (e *clockEvents) Started() {
	if k := (*Core)(e).connecting; k != nil {
		k.adopt()
	}
}

func (e *clockEvents) Lost(err error) {
	c := (*Core)(e)
	switch {
	case c.connecting != nil:
		c.connecting.refused(err)
	case revclock.Rebuildable(err) || revclock.Foreign(err):
		c.connect(err.Error())
	default:
		c.fail(fmt.Errorf("coordinator: %w", err))
	}
}
