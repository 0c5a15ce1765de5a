package shard

import "spindle/codec"

// This file asks reads again whose parts are of different epochs of the coordinator.

// sameEpoch says that a clock record, of a local revision, is of the epoch that is believed. If it is of a newer
// one, that is looked for.
func (s *shardState) sameEpoch(rec *Record, local int64) bool {
	c := s.c
	sab := &c.cfg.Sabotage
	if rec.Epoch == c.m.Epoch || rec.Last == 0 || sab.RebuildNoFence || sab.RebuildSkipsShard || sab.RebuildFencesFirst {
		return true
	}
	if local > s.mapMod {
		c.connect("member cluster " + s.name + " has another epoch")
	}
	return false
}

// readAgain reads after a moment, if there is time left.
func (s *shardState) readAgain(it readItem) {
	c := s.c
	switch {
	case c.cfg.Now() >= it.deadline:
		it.fail(s, codec.ErrTimeout)
	case it.op != nil && it.op.canceled:
		it.fail(s, statusCanceled)
	default:
		c.after(c.jitter(retryDelay), func() { s.read(it) })
	}
}
