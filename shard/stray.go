package shard

import (
	"slices"

	"spindle/codec"
)

// This file is about endpoints that lead astray at a start. Of several endpoints of one cluster one may lead to another etcd, by
// an operator's mistake, and may be the first to answer. Until it is known what the cluster is no connection can be
// looked at (verify.go). So a start that meets what does not fit begins anew, for the shard timeout, before it ends the
// process: other connections come to their turn, and the first that fit have all be looked at. The endpoint that does not pass is named
// in the log then, and not used.

// strayPause is the mean time between two such beginnings.
const strayPause = 20 * retryDelay

// ways is what a Transport may tell besides: the endpoints of a cluster.
type ways interface {
	Endpoints(codec.ClusterID) []EndpointStatus
}

// waysTo returns the endpoints of a cluster, if there are several.
func (c *Core) waysTo(id codec.ClusterID) []EndpointStatus {
	if t, ok := c.tr.(ways); ok {
		if list := t.Endpoints(id); len(list) > 1 {
			return list
		}
	}
	return nil
}

// straying is what a start knows of that.
type straying struct {
	until   int64  // ns; then what does not fit is believed
	told    string // what the log was told last
	empties int    // rounds that have shown an empty member
}

// mistaken ends a start that found what cannot be served: at once, or when all ways had their time.
func (c *Core) mistaken(err error) {
	b := c.boot
	several := len(c.waysTo(codec.Coordinator)) > 0
	for i := range c.cfg.Names {
		several = several || len(c.waysTo(codec.ClusterID(i))) > 0
	}
	if c.state != stateStarting || c.ring != nil || !several || !b.mayWait() {
		c.fail(err)
		return
	}
	if s := err.Error(); s != b.stray.told {
		b.stray.told = s
		c.log.Warn("what was found does not fit; one of several endpoints may lead elsewhere, so the others are heard, too", "err", err)
	}
	b.anew()
}

// anew begins a start from the beginning, after a moment.
func (b *bootstrap) anew() {
	c := b.c
	c.clock.Stop()
	c.connecting, c.m, c.part, c.shards, c.refusals = nil, nil, nil, nil, ""
	b.started, b.looked = false, 0
	b.round++ // what is under way counts for nothing
	b.later(c.jitter(strayPause), b.begin)
}

// mayWait says whether other endpoints have time left.
func (b *bootstrap) mayWait() bool {
	now := b.c.cfg.Now()
	if b.stray.until == 0 {
		b.stray.until = now + int64(b.c.cfg.ShardTimeout)
	}
	return now < b.stray.until
}

// unsure says whether a member that seems to be empty has other endpoints that were not heard yet: nothing is written to it then.
func (b *bootstrap) unsure(p *probe) bool {
	list := b.c.waysTo(p.id)
	if list == nil || !b.mayWait() {
		return false
	}
	if slices.ContainsFunc(list, func(e EndpointStatus) bool { return !e.Connected && e.LastError == notDialed }) {
		return true
	}
	b.stray.empties++ // requests go round robin
	return b.stray.empties <= len(list)
}
