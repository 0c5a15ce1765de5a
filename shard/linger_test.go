package shard

import (
	"testing"
	"time"
)

// The next batch waits for those that the last one has answered, for a part of its time, and for nobody else.
func TestLinger(t *testing.T) {
	const ms = int64(time.Millisecond)
	for _, x := range []struct {
		name                   string
		answered, left, queue  int
		away, since            int64
		fence, want, wantLater bool
	}{
		{name: "one client", answered: 1, queue: 1, away: 4 * ms},
		{name: "two clients, one is back", answered: 2, queue: 1, away: 4 * ms},
		{name: "few are back", answered: 100, queue: 10, away: 4 * ms, want: true},
		{name: "half are back", answered: 100, queue: 50, away: 4 * ms},
		{name: "those who waited are there", answered: 100, left: 300, queue: 300, away: 4 * ms},
		{name: "those who waited count", answered: 100, left: 100, queue: 99, away: 4 * ms, want: true},
		{name: "the first comes late", answered: 100, queue: 1, away: 4 * ms, since: ms},
		{name: "the first comes in time", answered: 100, queue: 1, away: 4 * ms, since: ms - 1, want: true},
		{name: "a slow disk", answered: 100, queue: 1, away: 1000 * ms, since: int64(maxLinger)},
		{name: "a slow disk, in time", answered: 100, queue: 1, away: 1000 * ms, since: int64(maxLinger) - 1, want: true},
		{name: "a fence", answered: 100, queue: 10, away: 4 * ms, fence: true},
	} {
		now := 10_000 * ms
		c := &Core{cfg: CoreConfig{Now: func() int64 { return now }}}
		s := &shardState{c: c, queue: make([]*write, x.left)}
		s.lingerBehind(x.answered, now-x.away)
		s.queue, s.wantFence = make([]*write, x.queue), x.fence
		now += x.since
		if got := s.holdBack(); got != x.want {
			t.Errorf("%s: waits %v", x.name, got)
		}
		if s.holdBack(); !x.want {
			if len(c.timers) > 0 {
				t.Errorf("%s: a timer", x.name)
			}
			continue
		}
		if len(c.timers) != 1 {
			t.Errorf("%s: %d timers", x.name, len(c.timers))
			continue
		}
		now = c.timers[0].at
		if c.timers[0].f(); !c.dirty || s.holdBack() {
			t.Errorf("%s: when its time is over it still waits", x.name)
		}
		if s.holdBack() {
			t.Errorf("%s: it waits twice behind one batch", x.name)
		}
	}
}
