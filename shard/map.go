package shard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/revclock"
)

// Slots is the number of slots that keys hash to; a table maps slots to shards.
const Slots = 4096

// Bounds of a Map.
const (
	MaxShards    = 1024    // member clusters of one system
	MaxShardName = 256     // bytes of a member cluster's name
	MaxSplits    = 1 << 16 // ranges of the range partitioner
)

const mapFormat = 1

// PartitionKind says how keys are spread over shards.
type PartitionKind uint8

// The partitioners.
const (
	PartitionHash  PartitionKind = 1 // slot = xxHash64(key, seed 0) & 4095
	PartitionRange PartitionKind = 2 // ordered split points
)

// Map is the partition map, the value of KeyMap: the same bytes on every shard.
//
//	0x01 ‖ epoch[16] ‖ be64 coordinator's cluster ID ‖ partitioner ‖
//	uvarint n ‖ n × (uvarint index, identity[16], uvarint len ‖ name) ‖ table ‖ uvarint 0
//
// The hash partitioner is 0x01 ‖ uvarint 4096, its table runs of slots: (uvarint length, uvarint index)
// until 4096 are told. The range partitioner is 0x02, its table
// uvarint n ‖ n × (uvarint len ‖ first key, uvarint index). The 0 is the length of an extension.
type Map struct {
	// Epoch is the coordinator's, zero as long as none was believed.
	Epoch revclock.ID
	// Coordinator is the cluster ID of the coordinator's etcd.
	Coordinator uint64
	Kind        PartitionKind
	// Shards in the order of their index, which is their place here (no shard was ever removed in format
	// 1), and what ticks, records and the rest of Spindle call a shard.
	Shards []MapShard
	// Table has the shard of each slot (hash).
	Table []uint16
	// Splits are the ranges (range), ascending; the first one begins at the empty key. Each reaches to
	// the next one's start.
	Splits []MapSplit
}

// MapShard is one shard.
type MapShard struct {
	Identity revclock.ID // the value of KeyID on it
	Name     string      // for people
}

// MapSplit is the part of the keys from Start on that lies on one shard.
type MapSplit struct {
	Start []byte
	Shard int
}

// NewMap makes the hash map of a first start. Each shard gets one run of 4096/n slots, rounded up or
// down, so that what one proxy computes another one does too. shards must be in an order that does not
// depend on a configuration (ascending identity).
func NewMap(epoch revclock.ID, coordinator uint64, shards []MapShard) *Map {
	m := &Map{Epoch: epoch, Coordinator: coordinator, Kind: PartitionHash, Shards: shards, Table: make([]uint16, Slots)}
	if n := len(shards); n > 0 {
		for i := range m.Table {
			m.Table[i] = uint16(i * n / Slots)
		}
	}
	return m
}

// AppendMap appends the value of KeyMap. m must be valid.
func AppendMap(dst []byte, m *Map) []byte {
	dst = append(dst, mapFormat)
	dst = append(dst, m.Epoch[:]...)
	dst = binary.BigEndian.AppendUint64(dst, m.Coordinator)
	dst = append(dst, byte(m.Kind))
	if m.Kind == PartitionHash {
		dst = protowire.AppendVarint(dst, Slots)
	}
	dst = protowire.AppendVarint(dst, uint64(len(m.Shards)))
	for i := range m.Shards {
		dst = protowire.AppendVarint(dst, uint64(i))
		dst = append(dst, m.Shards[i].Identity[:]...)
		dst = protowire.AppendString(dst, m.Shards[i].Name)
	}
	switch m.Kind {
	case PartitionHash:
		for i := 0; i < len(m.Table); {
			j := i
			for j < len(m.Table) && m.Table[j] == m.Table[i] {
				j++
			}
			dst = protowire.AppendVarint(dst, uint64(j-i))
			dst = protowire.AppendVarint(dst, uint64(m.Table[i]))
			i = j
		}
	case PartitionRange:
		dst = protowire.AppendVarint(dst, uint64(len(m.Splits)))
		for _, s := range m.Splits {
			dst = protowire.AppendBytes(dst, s.Start)
			dst = protowire.AppendVarint(dst, uint64(s.Shard))
		}
	}
	return append(dst, 0)
}

var errMapBytes = errors.New("the partition map is damaged")

// ParseMap reads a value of KeyMap; nothing in the Map points into v. The error says what an operator
// needs to know.
func ParseMap(v []byte) (*Map, error) {
	p := revclock.Parser{B: v}
	if f := p.Byte(); p.Bad || f != mapFormat {
		return nil, fmt.Errorf("the partition map has format %d, which this version of Spindle does not know; run a newer one", f)
	}
	m := &Map{Epoch: p.ID(), Coordinator: p.Be64(), Kind: PartitionKind(p.Byte())}
	switch {
	case p.Bad:
		return nil, errMapBytes
	case m.Kind != PartitionHash && m.Kind != PartitionRange:
		return nil, fmt.Errorf("the partition map names partitioner %d, which this version of Spindle does not know; run a newer one", m.Kind)
	case m.Kind == PartitionHash && p.Uvarint() != Slots:
		return nil, fmt.Errorf("the partition map does not have %d slots", Slots)
	}
	n := p.Uvarint()
	if n > MaxShards {
		return nil, errMapBytes
	}
	for i := range n {
		index := p.Uvarint()
		s := MapShard{Identity: p.ID(), Name: string(p.Bytes())}
		if p.Bad || index != i {
			return nil, errMapBytes
		}
		m.Shards = append(m.Shards, s)
	}
	if m.Kind == PartitionHash {
		parseTable(m, &p)
	} else {
		parseSplits(m, &p)
	}
	if p.Uvarint() != 0 || !p.Done() {
		return nil, errMapBytes
	}
	return m, m.Validate()
}

func parseTable(m *Map, p *revclock.Parser) {
	m.Table = make([]uint16, 0, Slots)
	last := uint64(MaxShards)
	for len(m.Table) < Slots && !p.Bad {
		run, index := p.Uvarint(), p.Uvarint()
		if run == 0 || run > uint64(Slots-len(m.Table)) || index >= uint64(len(m.Shards)) || index == last {
			p.Bad = true // two runs of one shard side by side would be one
			return
		}
		last = index
		for range run {
			m.Table = append(m.Table, uint16(index))
		}
	}
}

func parseSplits(m *Map, p *revclock.Parser) {
	n := p.Uvarint()
	if n > MaxSplits {
		p.Bad = true
	}
	for ; n > 0 && !p.Bad; n-- {
		start, index := p.Bytes(), p.Uvarint()
		if index >= uint64(len(m.Shards)) {
			p.Bad = true
			return
		}
		m.Splits = append(m.Splits, MapSplit{Start: slices.Clone(start), Shard: int(index)})
	}
}

// Validate checks what the rest of Spindle relies on.
func (m *Map) Validate() error {
	n := len(m.Shards)
	if n == 0 || n > MaxShards {
		return fmt.Errorf("the partition map names %d member clusters; 1 to %d are possible", n, MaxShards)
	}
	seen := make(map[revclock.ID]bool, n)
	for _, s := range m.Shards {
		if len(s.Name) > MaxShardName {
			return fmt.Errorf("the name of member cluster %.20q... is longer than %d bytes", s.Name, MaxShardName)
		}
		if s.Identity == (revclock.ID{}) || seen[s.Identity] {
			return fmt.Errorf("the partition map names member cluster identity %x twice, or not at all", s.Identity)
		}
		seen[s.Identity] = true
	}
	switch m.Kind {
	case PartitionHash:
		if len(m.Table) != Slots || len(m.Splits) != 0 {
			return fmt.Errorf("the partition map does not have %d slots", Slots)
		}
		for slot, i := range m.Table {
			if int(i) >= n {
				return fmt.Errorf("the partition map puts slot %d on member cluster %d of %d", slot, i, n)
			}
		}
	case PartitionRange:
		if len(m.Splits) == 0 || len(m.Splits) > MaxSplits || len(m.Splits[0].Start) != 0 || len(m.Table) != 0 {
			return errors.New("the partition map's first range does not begin at the empty key")
		}
		for i, s := range m.Splits {
			if s.Shard < 0 || s.Shard >= n {
				return fmt.Errorf("the partition map puts range %d on member cluster %d of %d", i, s.Shard, n)
			}
			if i > 0 && string(m.Splits[i-1].Start) >= string(s.Start) {
				return fmt.Errorf("the partition map's range %d does not begin above the one before it", i)
			}
		}
	default:
		return fmt.Errorf("the partition map names partitioner %d", m.Kind)
	}
	return nil
}

// SameShards says whether two maps have the same shards, and put the same keys on them: a rebuild of the coordinator
// changes the rest.
func (m *Map) SameShards(o *Map) bool {
	n := *o
	n.Epoch, n.Coordinator = m.Epoch, m.Coordinator
	return m.Equal(&n)
}

// Equal says whether two maps are the same in every byte.
func (m *Map) Equal(o *Map) bool {
	return m.Epoch == o.Epoch && m.Coordinator == o.Coordinator && m.Kind == o.Kind &&
		slices.Equal(m.Shards, o.Shards) && slices.Equal(m.Table, o.Table) &&
		slices.EqualFunc(m.Splits, o.Splits, func(a, b MapSplit) bool {
			return a.Shard == b.Shard && string(a.Start) == string(b.Start)
		})
}
