package shard

import "time"

// This file notices a stream that has gone silent without ending.

const (
	// streamStall is how long a stream may bring nothing while it lacks what is known to be there. It doubles
	// with every opening that brought no record: a member may need longer than that for its first data, and
	// whatever was on its way is lost with the stream.
	streamStall = 2 * time.Second
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
	expected int64  // local revision that a reply has shown to be there
	brought  uint64 // messages with events, of all openings
	times    int    // openings that were given up for their silence, in a row, without a record
	opened   int64  // ns
}

// expectOnStream is told that the shard has reached a local revision. A stream that does not show it, and
// brings nothing else for some time, is opened again, on another node if there is one. A stream that is behind
// and moves is left alone.
func (s *shardState) expectOnStream(local int64) {
	s.stall.expected = max(s.stall.expected, local)
	s.watchStall()
}

func (s *shardState) watchStall() {
	l := &s.stall
	if l.timer || s.pos >= l.expected {
		return
	}
	l.timer = true
	gen, brought := s.gen, l.brought
	s.c.after(stallTime(l.times), func() {
		l.timer = false
		if s.c.state == stateFailed || s.c.state == stateClosed {
			return
		}
		if s.pos < l.expected && s.gen == gen && l.brought == brought && !s.holding && s.handle != nil {
			s.c.log.Warn("the watch stream of a member cluster lags behind its answers and is silent; opening it again", "shard", s.name)
			l.times++
			s.reopen()
		}
		s.watchStall()
	})
}
