package shard

import "time"

// poolTimers are the deadlines of a Pool: a binary heap on the loop, driven by one time.Timer. The timer is set
// only when a deadline comes before the one it stands at, so calls that end in time cost no timer
// operation; it then fires in vain once and is set to the earliest deadline left.
type poolTimers struct {
	heap    []*poolTimer
	base    time.Time
	timer   *time.Timer
	wake    func() // posts runTimers to the loop; called on any goroutine
	armed   int64  // when timer fires, 0 when it is not set
	running bool
	stopped bool
}

// poolTimer is one deadline, embedded in what it is for.
type poolTimer struct {
	at    int64 // nanoseconds since poolTimers.base
	place int   // index in the heap plus 1, 0 when not in it
	owner timerOwner
}

// timerOwner hears that its timer is due (it is out of the heap then).
type timerOwner interface{ due(now int64) }

func (t *poolTimers) init(wake func()) {
	t.base = time.Now()
	t.wake = wake
}

// now returns the pool's time; it starts above 0, so that 0 can mean none.
func (t *poolTimers) now() int64 { return int64(time.Since(t.base)) + 1 }

// set makes x due at the given time, also when it was set before.
func (t *poolTimers) set(x *poolTimer, at int64) {
	if t.stopped {
		return
	}
	x.at = at
	if x.place == 0 {
		t.heap = append(t.heap, x)
		x.place = len(t.heap)
		t.up(len(t.heap) - 1)
	} else if i := x.place - 1; !t.up(i) {
		t.down(i)
	}
	if !t.running {
		t.arm()
	}
}

// cancel takes x out.
func (t *poolTimers) cancel(x *poolTimer) {
	if x.place == 0 {
		return
	}
	i := x.place - 1
	x.place = 0
	last := len(t.heap) - 1
	moved := t.heap[last]
	t.heap[last] = nil
	t.heap = t.heap[:last]
	if i == last {
		return
	}
	t.heap[i] = moved
	moved.place = i + 1
	if !t.up(i) {
		t.down(i)
	}
}

// run fires what is due.
func (t *poolTimers) run() {
	t.armed = 0
	if t.running || t.stopped {
		return
	}
	t.running = true
	defer func() {
		t.running = false
		t.arm()
	}()
	now := t.now()
	for len(t.heap) > 0 && t.heap[0].at <= now {
		x := t.heap[0]
		t.cancel(x)
		x.owner.due(now)
	}
}

func (t *poolTimers) arm() {
	if t.stopped || len(t.heap) == 0 {
		return
	}
	at := t.heap[0].at
	if t.armed != 0 && t.armed <= at {
		return
	}
	t.armed = at
	d := time.Duration(max(at-t.now(), 0))
	if t.timer == nil {
		t.timer = time.AfterFunc(d, t.wake)
	} else {
		t.timer.Reset(d)
	}
}

func (t *poolTimers) stop() {
	t.stopped = true
	if t.timer != nil {
		t.timer.Stop()
	}
	for _, x := range t.heap {
		x.place = 0
	}
	t.heap = nil
}

func (t *poolTimers) up(i int) (moved bool) {
	h := t.heap
	x := h[i]
	for i > 0 {
		parent := (i - 1) / 2
		if h[parent].at <= x.at {
			break
		}
		h[i] = h[parent]
		h[i].place = i + 1
		i = parent
		moved = true
	}
	h[i] = x
	x.place = i + 1
	return moved
}

func (t *poolTimers) down(i int) {
	h := t.heap
	x := h[i]
	for {
		child := 2*i + 1
		if child >= len(h) {
			break
		}
		if r := child + 1; r < len(h) && h[r].at < h[child].at {
			child = r
		}
		if x.at <= h[child].at {
			break
		}
		h[i] = h[child]
		h[i].place = i + 1
		i = child
	}
	h[i] = x
	x.place = i + 1
}

// runTimers is what the timer posts.
func (p *Pool) runTimers() { p.timers.run() }
