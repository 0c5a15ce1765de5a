package shard

import (
	"time"

	"spindle/revclock"
)

// While a batch is away, the writes that came meanwhile wait for its reply, and then for a tick: that is a fifth of the time
// in which a member with a fast disk could work for them. So once as many wait as are away, the next batch is closed behind it, and its
// revisions are asked for so that they are here about when the reply is. The clients then take turns, one half on the way and one
// half here.
//
// It is closed and ticked as any other, and sent only when the one before it is settled, whatever became of that: committed,
// void, refused, or given up. Its range is above that one's, so it passes it. Nothing in it meets what the one before may
// write: which of the two comes first makes no difference, and neither dooms the other's Txns.
//
// An open range holds back frontiers and reads that may have to do with it. So it is not asked for long before it can be used. Where other proxies write
// to the shard, it is not at all: their ranges would stand behind one that waits, and overtake it.

const (
	// aheadTicks is how many ticks' time before the reply is expected the range is asked for. Ticks take longer when the member is busy,
	// and a reply that waits for a range costs more than a range that waits for a reply.
	aheadTicks = 4
	// aheadQuiet is how long no other proxy may have been given a range of the shard.
	aheadQuiet = time.Second
	// aheadSlack is the part of those who are away that may be missing from those who wait.
	aheadSlack = 8
)

// pace is what is known of how long the shard's batches are away, and ticks; ns.
type pace struct {
	flight int64 // about the shortest of the last ones: most take a little longer, some very much
	tick   int64 // mean
	timer  int64 // one is set for this moment
}

func (a *pace) flew(d int64) {
	if a.flight == 0 || d < a.flight {
		a.flight = d
	} else {
		a.flight += (d - a.flight) / 16
	}
}

func (a *pace) ticked(d int64) { a.tick += (d - a.tick) / 8 }

// mayCloseAhead says whether the next batch is to be closed behind the one that is under way.
func (s *shardState) mayCloseAhead() bool {
	c, b := s.c, s.cur
	if s.next != nil || b.lastOne || b.fence || b.state != batchSent || b.unknown || b.tries > 0 || len(s.queue) == 0 ||
		s.wantFence || len(s.pending) > 0 || s.nearLead() {
		return false
	}
	if c.cfg.AlwaysAhead {
		return true
	}
	now := c.cfg.Now()
	if other := c.clock.Log().LastOther(s.idx); len(s.queue) < len(b.writes)-len(b.writes)/aheadSlack || s.rejections > 0 ||
		other > 0 && now < other+int64(aheadQuiet) {
		return false
	}
	if at := b.sentAt + s.pace.flight - aheadTicks*s.pace.tick; now < at {
		if s.pace.timer != at {
			s.pace.timer = at
			c.at(at, s.touch)
		}
		return false
	}
	return true
}

// nearLead says that half of a rebuild's margin is used up by ranges that nothing was written under.
func (s *shardState) nearLead() bool {
	c := s.c
	return c.clock.Log().N()-max(c.maxClock, s.rec.last) >= revclock.MaxLead && len(s.queue) > 0
}

// promote is called when the batch before the next one is settled.
func (s *shardState) promote() {
	b := s.next
	if b == nil {
		return
	}
	s.next, s.cur = nil, b
	switch {
	case b.state == batchTicking: // its range will come
	case s.known.last >= b.first:
		s.void(b) // somebody else was faster, and no copy of it was ever sent
	default:
		s.make(b)
	}
}
