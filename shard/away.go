package shard

import (
	"time"

	"spindle/codec"
)

// This file is what a Core does about a shard of which no node can be reached.

// downtime is what a Transport may tell besides: for how long a cluster has had no live connection, and why.
type downtime interface {
	Down(codec.ClusterID) (why string, since time.Duration)
}

// deadShare is the part of the shard timeout for which a shard without any connection is waited for: its only node may
// just be starting again. From then on requests for it are answered at once.
const deadShare = 4

// dead says why a shard is not waited for; "" if it is.
func (s *shardState) dead() string {
	if d, ok := s.c.tr.(downtime); ok {
		if why, since := d.Down(s.cluster); since > s.c.cfg.ShardTimeout/deadShare {
			return why
		}
	}
	return ""
}

// Connected is told that a cluster which had no connection has one again: nothing of it waits for a timer then.
func (c *Core) Connected(id codec.ClusterID) {
	for _, s := range c.shards {
		if s.cluster != id {
			continue
		}
		s.offline = false
		s.reopens = 0
		s.touch()
		s.openAgain(s.gen)
		c.leases.back(s)
	}
}

// openAgain opens the stream whose pause is over, if it is still wanted and nothing else has opened it.
func (s *shardState) openAgain(gen uint64) {
	if gen == s.gen && s.reopening && (s.c.state == stateReady || s.c.state == stateStarting) {
		s.openStream()
	}
}
