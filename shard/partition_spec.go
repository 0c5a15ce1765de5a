package shard

import (
	"errors"
	"fmt"

	"spindle/revclock"
)

// PartitionSpec is what a configuration says about the partition map. The first start writes the map from
// it; every later one takes the recorded map and compares. The zero value says nothing: a first start
// makes a hash map, a later one takes what is recorded.
type PartitionSpec struct {
	// Kind is the partitioner, 0 for the recorded one.
	Kind PartitionKind
	// Ranges are the range partitioner's ranges, ascending; each reaches to the next one's start. Without
	// any, the recorded ones are taken.
	Ranges []RangeSpec
}

// RangeSpec puts the keys from Start on on one member cluster, named by its place in CoreConfig.Names.
type RangeSpec struct {
	Start  []byte
	Member int
}

// errNoRanges is what a first start says that is to make ranges and was told none.
var errNoRanges = errors.New("the partitioner is range, the members are new, and no ranges are given: give each shard its start and end in the configuration file")

// newMap makes the map of a first start. shards are in the order of their index; index tells which of them
// is a configured member.
func (p *PartitionSpec) newMap(epoch revclock.ID, coordinator uint64, shards []MapShard, index func(member int) int) (*Map, error) {
	if p.Kind != PartitionRange {
		return NewMap(epoch, coordinator, shards), nil
	}
	if len(p.Ranges) == 0 {
		return nil, errNoRanges
	}
	m := &Map{Epoch: epoch, Coordinator: coordinator, Kind: PartitionRange, Shards: shards}
	used := make([]bool, len(shards))
	for _, r := range p.Ranges {
		i := index(r.Member)
		used[i] = true
		m.Splits = append(m.Splits, MapSplit{Start: r.Start, Shard: i})
	}
	for i, ok := range used {
		if !ok {
			return nil, fmt.Errorf("member cluster %s has no range of keys: give it a start and an end in the configuration file, or remove it", shards[i].Name)
		}
	}
	return m, m.Validate()
}

func (k PartitionKind) String() string {
	switch k {
	case PartitionHash:
		return "hash"
	case PartitionRange:
		return "range"
	}
	return fmt.Sprintf("partitioner %d", uint8(k))
}

// check compares the configuration with the recorded map. name tells what the configuration calls a shard.
func (p *PartitionSpec) check(m *Map, index func(member int) int, name func(shard int) string) error {
	if p.Kind == 0 {
		return nil
	}
	if p.Kind != m.Kind {
		return fmt.Errorf("the member clusters were set up with the partitioner %s, and the configuration says %s: it is fixed by the first start; say --partitioner %s, or leave it out", m.Kind, p.Kind, m.Kind)
	}
	if m.Kind != PartitionRange || len(p.Ranges) == 0 {
		return nil
	}
	got := Map{Splits: make([]MapSplit, len(p.Ranges))}
	for i, r := range p.Ranges {
		got.Splits[i] = MapSplit{Start: r.Start, Shard: index(r.Member)}
	}
	for _, split := range m.Splits { // in the order of the keys: that of the shards is random
		i := split.Shard
		was, is := m.rangesOf(i), got.rangesOf(i)
		if was != is {
			return fmt.Errorf("member cluster %s was set up for %s, and the configuration gives it %s: the ranges are fixed by the first start; see whether its addresses are right, correct its start and end, or leave all of them out to take what is recorded",
				name(i), was, is)
		}
	}
	return nil
}

// rangesOf says which keys lie on a shard. Neighbouring ranges of one shard are one.
func (m *Map) rangesOf(shard int) string {
	s := ""
	for i := 0; i < len(m.Splits); i++ {
		if m.Splits[i].Shard != shard {
			continue
		}
		start := m.Splits[i].Start
		for i+1 < len(m.Splits) && m.Splits[i+1].Shard == shard {
			i++
		}
		if s != "" {
			s += " and "
		}
		from, to := "the first key", "the last one"
		if len(start) > 0 {
			from = fmt.Sprintf("%q", start)
		}
		if i+1 < len(m.Splits) {
			to = fmt.Sprintf("%q", m.Splits[i+1].Start)
		}
		s += "the keys from " + from + " to " + to
	}
	if s == "" {
		return "no keys"
	}
	return s
}
