package shard

import (
	"time"

	"spindle/revclock"
)

// While a batch is away, the writes that came meanwhile wait for its reply, and then for a tick: that is a fifth of the time
// in which a member with a fast disk could work for them. So once as many wait as are away, the next batch is closed behind it, and its
// revisions are asked for. The clients then take turns, one half on the way and one half here.
//
// It is closed and ticked as any other, and sent only when the one before it is settled, whatever became of that: committed,
// void, refused, or given up. Its range is above that one's, so it passes it. Nothing in it meets what the one before may
// write: which of the two comes first makes no difference, and neither dooms the other's Txns.
//
// An open range holds back frontiers and reads that may have to do with it, and what is closed early leaves out who comes late. So it is not done where batches take
// much longer than ticks, and little would be gained. Nor where other proxies write to the shard: their ranges would stand behind one that
// waits, and overtake it.

const (
	// aheadTicks is for how many ticks' time a batch may be away, on the mean.
	aheadTicks = 16
	// aheadQuiet is how long no other proxy may have been given a range of the shard.
	aheadQuiet = time.Second
	// aheadSlack is the part of those who are away that may be missing from those who wait.
	aheadSlack = 8
)

// pace is how long the shard's last batches and ticks were away, on the mean; ns.
type pace struct{ flight, tick int64 }

func (p *pace) flew(d int64)   { p.flight += (d - p.flight) / 8 }
func (p *pace) ticked(d int64) { p.tick += (d - p.tick) / 8 }

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
	other := c.clock.Log().LastOther(s.idx)
	return len(s.queue) >= len(b.writes)-len(b.writes)/aheadSlack && s.rejections == 0 && s.pace.flight <= aheadTicks*s.pace.tick &&
		(other == 0 || c.cfg.Now() >= other+int64(aheadQuiet))
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
