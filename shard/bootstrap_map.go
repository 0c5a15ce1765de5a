package shard

import (
	"fmt"
	"slices"
	"strings"

	"spindle/codec"
	"spindle/revclock"
)

// This file compares the partition maps of a start with each other and with the configuration, and makes those that are missing.

// fitMap looks whether all shards have the same map, and creates or copies it where there is none.
func (b *bootstrap) fitMap() {
	c := b.c
	ps := make([]*probe, len(b.probes))
	for i := range b.probes {
		ps[i] = &b.probes[i]
	}
	slices.SortFunc(ps, byIdentity)
	if text := anyMap(ps); text != nil {
		m, err := ParseMap(text)
		if err != nil {
			c.mistaken(err)
			return
		}
		if b.wiped(m, ps) {
			return
		}
		slices.SortFunc(ps, byIdentity)
	} else if b.identify() {
		return
	}
	for i := 1; i < len(ps); i++ {
		if ps[i].identity == ps[i-1].identity {
			c.mistaken(fmt.Errorf("%s and %s are the same cluster: give each --shard its own", ps[i-1].name, ps[i].name))
			return
		}
	}
	sound := soundProbes(ps)
	first := sound[0]
	if first.mapBytes == nil {
		for _, p := range sound[1:] {
			if p.mapBytes != nil {
				// Another proxy may be creating the maps right now, and first was read before it got its own.
				if m, err := ParseMap(p.mapBytes); err == nil && slices.ContainsFunc(m.Shards, func(s MapShard) bool { return s.Identity == first.identity }) {
					b.later(c.jitter(2*retryDelay), b.begin)
					return
				}
				c.mistaken(fmt.Errorf("%s is not in the partition map that %s holds: remove it from the configuration (shards cannot be added yet)", first.name, p.name))
				return
			}
		}
		shards := make([]MapShard, len(ps))
		for i, p := range ps {
			shards[i] = MapShard{Identity: p.identity, Name: strings.TrimPrefix(p.name, "member cluster ")}
		}
		m, err := c.cfg.Partition.newMap(revclock.ID{}, b.coord.cluster, shards, b.indexIn(shards))
		if err != nil {
			c.mistaken(err)
			return
		}
		b.createMap(first, AppendMap(nil, m))
		return
	}
	m, err := ParseMap(first.mapBytes)
	if err != nil {
		c.mistaken(fmt.Errorf("%s: %w", first.name, err))
		return
	}
	if err := b.checkMap(m, ps); err != nil {
		c.mistaken(err)
		return
	}
	for _, p := range sound[1:] {
		if p.mapBytes == nil {
			// Without an epoch: none can have been believed yet.
			n := *m
			if !slices.Contains(c.cfg.AcceptDataLoss, c.cfg.Names[p.id]) {
				n.Epoch = revclock.ID{}
			}
			b.createMap(p, AppendMap(nil, &n))
			return
		}
		other, err := ParseMap(p.mapBytes)
		if err != nil {
			c.mistaken(fmt.Errorf("%s: %w", p.name, err))
			return
		}
		if !other.SameShards(m) {
			c.mistaken(fmt.Errorf("%s and %s hold different partition maps: they belong to different systems; see whether the --shard addresses are right", first.name, p.name))
			return
		}
	}
	b.believe(m, ps)
}

// checkMap compares the map with the configuration. The order in a configuration means nothing.
func (b *bootstrap) checkMap(m *Map, ps []*probe) error {
	for _, p := range ps {
		if !slices.ContainsFunc(m.Shards, func(s MapShard) bool { return s.Identity == p.identity }) {
			return fmt.Errorf("%s is not in the partition map of this system: remove it from the configuration (shards cannot be added yet)", p.name)
		}
	}
	for _, s := range m.Shards {
		if !slices.ContainsFunc(ps, func(p *probe) bool { return s.Identity == p.identity }) {
			return fmt.Errorf("the partition map names a member cluster %q that the configuration does not have: add its --shard", s.Name)
		}
	}
	return b.c.cfg.Partition.check(m, b.indexIn(m.Shards), func(i int) string {
		for _, p := range ps {
			if p.identity == m.Shards[i].Identity {
				return strings.TrimPrefix(p.name, "member cluster ")
			}
		}
		return m.Shards[i].Name
	})
}

// indexIn returns which of shards a configured member is. All members must be among them.
func (b *bootstrap) indexIn(shards []MapShard) func(member int) int {
	return func(member int) int {
		return slices.IndexFunc(shards, func(s MapShard) bool { return s.Identity == b.probes[member].identity })
	}
}

// createMap writes the map to one shard unless another proxy was faster, and looks again.
func (b *bootstrap) createMap(p *probe, m []byte) {
	body := appendCompareInt(nil, KeyMap, "", resultEqual, targetMod, cmpMod, 0)
	body = appendPutOp(body, txnSuccess, KeyMap, m)
	b.c.tr.Call(p.id, codec.MethodTxn, body, b.c.cfg.ShardTimeout, b.completion(func(_ []byte, st codec.Status, _ bool) {
		if st.Code != codec.OK {
			b.later(b.c.jitter(20*retryDelay), b.begin)
			return
		}
		b.begin()
	}))
}
