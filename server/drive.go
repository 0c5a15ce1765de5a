package server

import (
	"sync"
	"time"
)

// Driven is a state machine that a loop drives: a *shard.Core.
type Driven interface {
	// Flush runs at the end of each turn.
	Flush()
	// Deadline is when Tick wants to be called, in nanoseconds of Config.Now; 0 for never.
	Deadline() int64
	Tick()
}

// Drive makes l the goroutine of d: Flush at the end of every turn, Tick when its Deadline has come. It
// returns a function that ends the ticks. The timer is the runtime's, not the loop's coarse tick:
// the core's slots are fractions of a millisecond.
func (l *Loop) Drive(d Driven) (stop func()) {
	t := &driver{loop: l, d: d}
	t.fire = func() {
		switch {
		case t.armed == 0:
		case t.armed <= l.eng.now():
			t.armed = 0 // the hook arms it anew
			d.Tick()
		default: // it fired for an earlier time that does not count any more
			t.timer.Reset(time.Duration(t.armed - l.eng.now()))
		}
	}
	t.timer = time.AfterFunc(time.Hour, func() { l.Post(t.fire) })
	t.timer.Stop()
	l.OnTurnEnd(t.turnEnd)
	l.Post(func() {}) // a turn, so that the hook sees a Deadline that is set already
	return t.stop
}

type driver struct {
	loop  *Loop
	d     Driven
	fire  func() // runs on the loop
	armed int64  // when the timer fires, 0 for not; the loop's

	mu      sync.Mutex // orders Reset and the final Stop
	timer   *time.Timer
	stopped bool
}

func (t *driver) turnEnd() {
	t.d.Flush()
	at := t.d.Deadline()
	if at == t.armed {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		return
	}
	t.armed = at
	if at == 0 {
		t.timer.Stop()
		return
	}
	t.timer.Reset(max(0, time.Duration(at-t.loop.eng.now())))
}

func (t *driver) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = true
	t.timer.Stop()
}
