package shard

// This file gives revisions to what happens on a shard without a record: leases that end, somebody who
// writes to a member directly. Such events have the first revision of the next record; here is who sees to it
// that there is a next one.

// Bounds of what waits for a record. Beyond either an empty batch is sent at once, without a jitter, so that
// one revision never collects more than what happens while one batch is under way (or while no proxy
// runs: all of that has one revision). Nothing is dropped: the events have happened.
const (
	maxWaitingEvents = 512
	maxWaitingBytes  = 512 << 10
)

// addPending keeps an event until the next record gives it a revision.
func (s *shardState) addPending(ev []byte, local int64) {
	s.pending = append(s.pending, pendingEvent{append([]byte(nil), ev...), local})
	s.pendingBytes += len(ev)
}

func (s *shardState) clearPending() {
	clear(s.pending) // their bytes
	s.pending, s.pendingBytes = s.pending[:0], 0
	if cap(s.pending) > 4*maxWaitingEvents {
		s.pending = nil
	}
}

// manyPending says that what waits must not grow further.
func (s *shardState) manyPending() bool {
	return len(s.pending) >= maxWaitingEvents || s.pendingBytes >= maxWaitingBytes
}

// armPending sees to it that events which wait for a record get one, if need be from an empty batch: after a
// jitter, so that of several proxies mostly one sends it, or at once when many wait.
func (s *shardState) armPending() {
	if len(s.pending) == 0 {
		return
	}
	if s.manyPending() && s.cur == nil && !s.wantFence {
		s.fencePending()
		return
	}
	if !s.pendingTimer {
		s.pendingTimer = true
		s.c.after(s.c.jitter(fenceJitter), func() {
			s.pendingTimer = false
			s.fencePending()
			s.armPending()
		})
	}
}

// fencePending asks for an empty batch for the events that wait, unless a batch is on its way: it covers
// them, or another look follows.
func (s *shardState) fencePending() {
	if len(s.pending) > 0 && s.cur == nil {
		s.wantFence = true
		s.touch()
	}
}
