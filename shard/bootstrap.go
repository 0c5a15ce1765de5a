package shard

import (
	"encoding/binary"
	"slices"
	"strings"
	"time"

	"spindle/codec"
)

// bootstrap is a Core's way from nothing to ready:
//
//	probe    every member cluster and the coordinator are read; an empty member gets its identity and its
//	         clock
//	map      the copy on the shard with the lowest identity is created first and wins; the others are
//	         copied from it; all must be the same bytes
//	connect  an epoch is looked for that the coordinator and all maps have; the very first one is made
//	         (connect.go)
//	streams  each shard's stream begins some way back, so that watchers which were connected to this
//	         proxy before a restart find their place in the ring
//
// Every step is a compare-and-create, so any number of proxies may do this at once. What does not answer
// is asked again for ever; what does not fit fails the Core with a sentence for the operator.
type bootstrap struct {
	c       *Core
	round   int // of probing; replies of older ones are ignored
	probes  []probe
	coord   probe
	waiting int
	clocks  []int64 // clock of each shard as probed, by index in the map
	started bool    // the clock is
	unread  int     // streams that have not come to the probed clock
	begun   int     // shards whose stream's start is still looked for
	tail    int64
	looked  int // rounds that have shown a map and an empty member
	stray   straying
	lost    map[codec.ClusterID]int64 // up to where what empty members have lost is accepted
}

func newBootstrap(c *Core) *bootstrap {
	b := &bootstrap{c: c, probes: make([]probe, len(c.cfg.Names)), lost: map[codec.ClusterID]int64{}}
	return b
}

// waitingFor says what the start is waiting for.
func (b *bootstrap) waitingFor() string {
	var missing []string
	for i := range b.probes {
		if p := &b.probes[i]; !p.answered {
			missing = append(missing, describe(p))
		}
	}
	if !b.coord.answered {
		missing = append(missing, describe(&b.coord))
	}
	switch {
	case len(missing) > 0:
		return "waiting for " + strings.Join(missing, ", ")
	case b.c.connecting != nil:
		return b.c.connecting.waitingFor()
	}
	for _, s := range b.c.shards {
		if !s.streaming && s.begins() {
			return "waiting for the watch stream of member cluster " + s.name
		}
	}
	for _, s := range b.c.shards {
		if s.accepted {
			return "waiting for member cluster " + s.name + ": its loss is accepted, and its clock is to come to where it has been"
		}
	}
	return "starting"
}

func describe(p *probe) string {
	if p.err == "" {
		return p.name
	}
	return p.name + " (" + p.err + ")"
}

// live says that a start goes on with what a round of probing has found: what was asked for in another one counts for nothing.
func (b *bootstrap) live(round int) bool {
	return b.c.boot == b && b.round == round && b.c.state == stateStarting
}

// later calls f after d, if the start is still in the same round.
func (b *bootstrap) later(d time.Duration, f func()) {
	round := b.round
	b.c.after(d, func() {
		if b.live(round) {
			f()
		}
	})
}

// completion is a completion of which nothing is heard in another round.
func (b *bootstrap) completion(f completion) completion {
	round := b.round
	return func(resp []byte, st codec.Status, sent bool) {
		if b.live(round) {
			f(resp, st, sent)
		}
	}
}

func (b *bootstrap) begin() {
	b.round++
	b.waiting = len(b.probes) + 1
	for i := range b.probes {
		b.probes[i] = probe{b: b, round: b.round, id: codec.ClusterID(i), name: "member cluster " + b.c.cfg.Names[i], err: b.probes[i].err}
		b.probes[i].send()
	}
	b.coord = probe{b: b, round: b.round, id: codec.Coordinator, name: "the coordinator", err: b.coord.err}
	b.coord.send()
}

// completion makes a Completion of a function, for calls that are rare.
type completion func(resp []byte, st codec.Status, sent bool)

func (f completion) Complete(resp []byte, st codec.Status, sent bool) { f(resp, st, sent) }

// believe takes the map, and starts the clock.
func (b *bootstrap) believe(m *Map, ps []*probe) {
	c := b.c
	c.m, c.part = m, NewPartition(m)
	c.shards = make([]*shardState, len(m.Shards))
	b.clocks = make([]int64, len(m.Shards))
	compact := int64(-1)
	for i, ms := range m.Shards {
		p := ps[slices.IndexFunc(ps, func(p *probe) bool { return p.identity == ms.Identity })]
		c.shards[i] = &shardState{c: c, idx: i, cluster: p.id, name: ms.Name, mapMod: p.mapMod,
			window:     int64(c.cfg.ReorderWindow),
			compactRec: p.compact,
			rec:        point{p.clock.First, p.clock.Last, p.clockAt},
			known:      point{p.clock.First, p.clock.Last, p.clockAt},
			lossy:      p.marked > 0, accepted: p.marked > 0, marked: p.marked, mark: p.mark}
		compact = max(compact, p.compact)
	}
	for _, s := range c.shards {
		if p := ps[slices.IndexFunc(ps, func(p *probe) bool { return p.id == s.cluster })]; p.why != "" {
			if p.adopt { // for now: the operator has nothing to do
				c.log.Warn("a member cluster is empty, which is accepted: it is left out until it is known up to where it was", "shard", s.name)
				s.banned = p.why
			}
			s.leave(p.why)
		}
	}
	c.compacted, c.compactRec = compact, compact
	c.hdr = codec.Header{
		ClusterID: binary.BigEndian.Uint64(m.Shards[0].Identity[:]) | 1,
		MemberID:  memberID(c.cfg.MemberName, c.cfg.ClientURLs),
		RaftTerm:  headerTerm,
	}
	if t, ok := c.tr.(checking); ok {
		for _, s := range c.shards {
			if len(c.waysTo(s.cluster)) > 0 {
				t.Distrust(s.cluster) // now it is known what they must lead to
			}
		}
	}
	c.connect("starting")
}

// headerTerm is the raft_term that headers carry: a fresh etcd's, and stable, for there is no raft here.
const headerTerm = 2
