package shard

import (
	"encoding/hex"

	"spindle/codec"
	"spindle/revclock"
	"spindle/watchring"
)

// Observation is what an operator may want to know of a Core at one moment.
type Observation struct {
	Ready  bool
	Reason string // why not ready
	// Connecting is set while the coordinator is not believed: it is read anew, and rebuilt if it has lost its data.
	Connecting bool
	// Outdated is why this proxy starts again as soon as that can be done, "" if it does not.
	Outdated string
	// Believed says that this proxy has believed an epoch since it began, and so knows what the coordinator knew.
	Believed bool
	// Leaving is set from when no more than answers keeps it from starting again: by the last looks nothing is lacking, or the coordinator is asked.
	Leaving  bool
	Revision int64 // N: the last revision handed out, as folded here
	Frontier int64 // of all shards
	Compact  int64
	Memory   int64 // bytes that clients make the process hold, as Memory counts them
	RingTail int64
	RingSize int64 // bytes
	Leases   int   // that this proxy knows
	Core     Stats
	Clock    revclock.Stats
	Shards   []ShardObservation
}

// ShardObservation is the part of one shard.
type ShardObservation struct {
	Name string
	// Cluster is what the transport calls it.
	Cluster codec.ClusterID
	// Committed is the largest clock that any proxy has named in a tick (C_i).
	Committed int64
	// Clock is the last revision that the stream has shown, Handed the last one handed out (A_i).
	Clock, Handed, Frontier int64
	// Queue is the number of writes that wait for a batch; Reads that of reads that wait to be sent.
	Queue, Reads int
	// Open is the number of ranges handed out and not settled; Oldest is the first revision of the oldest,
	// Holder who was given it (hex, the beginning), OldestAge for how long it has been open, ns.
	Open      int
	Oldest    int64
	Holder    string
	OldestAge int64
	// Rejections is the number of rejections in a row, Pending that of events that wait for a record.
	Rejections, Pending int
	// Revokes is the number of copies of ended leases that wait to be revoked.
	Revokes int
	// Refused is why nothing is sent to the shard, "" if it is not refused.
	Refused string
	// Full is set while puts are refused for want of room, Size and Quota are the member's, in bytes; 0 where not known.
	Full        bool
	Size, Quota int64
	// Missing is set while the coordinator cannot be rebuilt because the shard does not answer.
	Missing bool
	// Streaming is false while the shard's watch stream is down, Held is true while the ring is full.
	Streaming, Held bool
}

// Observe returns the present state. On the core's goroutine.
func (c *Core) Observe() Observation {
	o := Observation{Core: c.stats, Clock: c.clock.Stats(), Compact: c.compacted, Memory: c.cfg.Memory.Used()}
	o.Ready, o.Reason = c.Ready()
	o.Believed, o.Leaving = c.state == stateReady || c.boot != nil && c.boot.started, c.leaving != leaveLater || c.outdated != "" && len(c.lacking()) == 0
	l := c.clock.Log()
	o.Revision = l.N()
	if c.ring == nil {
		return o
	}
	o.Frontier, o.RingTail, o.RingSize = c.frontier.Get(watchring.All), c.ring.Tail(), c.ring.Bytes()
	o.Leases = len(c.leases.table.entries)
	o.Connecting, o.Outdated = c.connecting != nil, c.outdated
	now := c.cfg.Now()
	for i, s := range c.shards {
		a, _ := l.A(i)
		so := ShardObservation{
			Name: s.name, Cluster: s.cluster, Committed: l.C(i), Clock: s.rec.last, Handed: a, Frontier: c.frontier.Get(i),
			Queue: len(s.queue), Reads: len(s.reads), Rejections: s.rejections, Pending: len(s.pending),
			Revokes:   len(s.lease.queue),
			Streaming: s.handle != nil, Held: s.holding,
		}
		so.Refused = s.banned
		so.Full, so.Size, so.Quota = s.refusesPut(), s.quota.size(), s.quota.limit
		so.Missing = o.Connecting && c.connecting.lacks(s)
		if open := l.Open(i); len(open) > 0 {
			so.Open, so.Oldest, so.OldestAge = len(open), open[0].First, now-open[0].Seen
			so.Holder = hex.EncodeToString(open[0].Holder[:4])
		}
		o.Shards = append(o.Shards, so)
	}
	return o
}
