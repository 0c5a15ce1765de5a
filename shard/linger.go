package shard

import "time"

// Clients of a busy shard send their next writes when a batch has answered them, and those come back one connection
// after the other. A batch that was closed for the first of them would carry a few, and the others would wait for a tick
// and a batch more. A batch costs member and coordinator, and a disk that is synced for it, much that does not depend on what
// is in it. So behind a batch that has just been answered the next one is closed once half of those who were there then
// are there again, or a part of the time that the batch took has passed. Who comes later is not kept waiting, and one
// client alone never is.

const (
	// lingerPart is the part of the time that a batch was away for which the next one may wait, behind its end.
	lingerPart = 4
	// maxLinger bounds that where batches are slow.
	maxLinger = 10 * time.Millisecond
)

// linger is for whom the next batch waits, and until when.
type linger struct {
	writes int   // that are to be there
	until  int64 // ns
	timer  int64 // one is set for this moment
}

// lingerBehind is called when a batch of n writes that was sent at a time has been answered. What waits in the queue is there.
func (s *shardState) lingerBehind(n int, sentAt int64) {
	now := s.c.cfg.Now()
	s.linger.writes = (n + len(s.queue)) / 2
	s.linger.until = now + min((now-sentAt)/lingerPart, int64(maxLinger))
}

// holdBack holds the next batch back while more writes are to come, until a timer touches the shard, and says whether it does.
func (s *shardState) holdBack() bool {
	l := &s.linger
	if s.wantFence || len(s.queue) >= l.writes || s.c.cfg.Now() >= l.until {
		l.until = 0
		return false
	}
	if l.timer != l.until {
		l.timer = l.until
		s.c.at(l.until, s.touch)
	}
	return true
}
