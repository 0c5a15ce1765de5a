package shard

import "time"

// This file notices a stream that has gone silent without ending.

const (
	// streamStall is how long a stream may bring nothing while it lacks what is known to be there. It doubles
	// with every opening that brought no record: a member may need longer than that for its first data, and
	// whatever was on its way is lost with the stream.
	streamStall = 2 * time.Second
	// stallLook is how often a stream that lacks something is looked at.
	stallLook = 250 * time.Millisecond
	// maxStreamStall is where it stays.
	maxStreamStall = time.Minute
	// lastingStream is how long a stream must have been open for its end to be the first one of a row.
	lastingStream = 10 * maxReopenDelay
)

// stallTime is how long a stream may bring nothing after the given number of silent ones.
func stallTime(times int) time.Duration { return min(streamStall<<min(times, 10), maxStreamStall) }

// stall is what a shard's own stream is watched by.
type stall struct {
	timer    bool
	expected int64 // local revision that a reply has shown to be there
	lacks    int64 // ns; since when the stream lacks something, if it does
	brought  int64 // ns; when it brought events last, or went on after it was held back
	times    int   // openings that were given up for their silence, in a row, without a record
	opened   int64 // ns
}

// muteness is what a WatchHandle may tell besides: whether its connection has brought nothing for so long, although others to
// the same cluster have, and it was asked. The first question has it asked, and has the others used first until it answers.
type muteness interface{ Mute(time.Duration) bool }

// expectOnStream is told that the shard has reached a local revision. A stream that does not show it, and
// brings nothing else for some time, is opened again, on another node if there is one. A stream that is behind
// and moves is left alone.
func (s *shardState) expectOnStream(local int64) {
	l := &s.stall
	if s.pos >= l.expected && s.pos < local {
		l.lacks = s.c.cfg.Now()
	}
	l.expected = max(l.expected, local)
	s.watchStall()
}

func (s *shardState) watchStall() {
	l := &s.stall
	if l.timer || s.pos >= l.expected {
		return
	}
	l.timer = true
	s.c.after(stallLook, func() {
		l.timer = false
		if s.c.state == stateFailed || s.c.state == stateClosed {
			return
		}
		if s.pos < l.expected && !s.holding && s.handle != nil && s.stalled() {
			s.c.log.Warn("the watch stream of a member cluster lags behind its answers and is silent; opening it again", "shard", s.name)
			l.times++
			s.reopen()
		}
		s.watchStall()
	})
}

// stalled says whether a stream that lacks something has been silent for too long. That is soon where its node has become mute: then the
// connection brings nothing else either, while other nodes answer.
func (s *shardState) stalled() bool {
	l := &s.stall
	idle := time.Duration(s.c.cfg.Now() - max(l.lacks, l.brought, l.opened))
	return idle >= stallTime(l.times) || idle >= stallLook && l.times == 0 && s.mute()
}

// mute says whether the node that the stream is on says nothing.
func (s *shardState) mute() bool {
	h, ok := s.handle.(muteness)
	return ok && h.Mute(firstPatience)
}
