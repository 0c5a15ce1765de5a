package server

import "time"

// tickEvery is the grain of deadlines and of retries on blocked connections.
const tickEvery = 10 * time.Millisecond

// wheelSlots is the number of lists that deadlines are spread over: one turn of the wheel is 5.12 s, and
// a call with a later deadline is looked at once a turn.
const wheelSlots = 512

// wheel is a timing wheel of calls by deadline. Adding and removing take constant time and allocate
// nothing. It belongs to its loop.
type wheel struct {
	slots [wheelSlots]*call // heads of doubly linked lists
	last  int64             // the tick that advance has reached
	count int
}

func wheelTick(at int64) int64 { return at / int64(tickEvery) }

// add arms c at c.deadline; now is the present. c must not be in the wheel.
func (w *wheel) add(c *call, now int64) {
	if w.count == 0 {
		w.last = wheelTick(now)
	}
	w.count++
	// A deadline that has passed is put where the next advance looks.
	at := max(wheelTick(c.deadline)+1, w.last+1)
	c.slot = int32(at % wheelSlots)
	head := &w.slots[c.slot]
	c.next, c.prev = *head, nil
	if *head != nil {
		(*head).prev = c
	}
	*head = c
	c.armed = true
}

// remove disarms c if it is armed.
func (w *wheel) remove(c *call) {
	if !c.armed {
		return
	}
	if c.prev != nil {
		c.prev.next = c.next
	} else {
		w.slots[c.slot] = c.next
	}
	if c.next != nil {
		c.next.prev = c.prev
	}
	c.next, c.prev, c.armed = nil, nil, false
	w.count--
}

// advance calls expire for every call whose deadline is at or before now, after removing it. expire may
// add and remove others.
func (w *wheel) advance(now int64, expire func(*call)) {
	if w.count == 0 {
		return
	}
	to := wheelTick(now)
	from := max(w.last+1, to-wheelSlots+1)
	w.last = max(w.last, to)
	for t := from; t <= to; t++ {
		w.advanceSlot(int(t%wheelSlots), now, expire)
	}
}

func (w *wheel) advanceSlot(slot int, now int64, expire func(*call)) {
	for again := true; again; {
		again = false
		for c := w.slots[slot]; c != nil; c = c.next {
			if c.deadline <= now {
				w.remove(c)
				expire(c)
				again = true // expire may have changed the list: from its head again
				break
			}
		}
	}
}
