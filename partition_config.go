package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"spindle/shard"
	"spindle/shard/embedded"
)

// RangeConfig is the range of keys of one shard, as the configuration file has it. A bound that is not
// said is taken from the neighbour.
type RangeConfig struct {
	Shard      string
	Start, End *string // as written; see parseKey
}

// parseKey reads a key as people write it: printable ASCII, \\ for a backslash, \xNN for any other byte.
// Everything else is refused: a file that says "\xff" in double quotes means U+00FF to YAML, two bytes.
func parseKey(s string) ([]byte, error) {
	var key []byte
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c < ' ' || c > '~':
			return nil, fmt.Errorf("%q: write bytes that are not printable ASCII as \\xNN, in single quotes or none", s)
		case c != '\\':
			key = append(key, c)
		case strings.HasPrefix(s[i:], `\\`):
			key = append(key, '\\')
			i++
		case strings.HasPrefix(s[i:], `\x`) && len(s) >= i+4:
			b, err := strconv.ParseUint(s[i+2:i+4], 16, 8)
			if err != nil {
				return nil, fmt.Errorf("%q: %s is no byte: write \\xNN with two hexadecimal digits", s, s[i:i+4])
			}
			key = append(key, byte(b))
			i += 3
		default:
			return nil, fmt.Errorf("%q: a backslash begins \\\\ or \\xNN", s)
		}
	}
	return key, nil
}

// partition makes what the first start records and later ones compare, from --partitioner and the ranges
// of the file. Its error is one sentence.
func (c *Config) partition() (shard.PartitionSpec, error) {
	var spec shard.PartitionSpec
	switch c.Partitioner {
	case "":
	case "hash":
		spec.Kind = shard.PartitionHash
	case "range":
		spec.Kind = shard.PartitionRange
	default:
		return spec, fmt.Errorf("--partitioner %q: say hash or range", c.Partitioner)
	}
	if len(c.Ranges) == 0 {
		return spec, nil
	}
	if spec.Kind != shard.PartitionRange {
		return spec, fmt.Errorf("shard %s has a start or an end, which are for the partitioner range: say partitioner: range, or leave them out", c.Ranges[0].Shard)
	}
	members := map[string]int{}
	for i, s := range c.Shards {
		members[s.Name] = i
	}
	if c.Embedded() {
		for i := range c.EmbeddedShards {
			members[embedded.ShardName(i)] = i
		}
	}
	if c.Ranges[0].Start != nil && *c.Ranges[0].Start != "" {
		return spec, fmt.Errorf("shard %s is the first one and starts at %q: the first range has no start (are the shards in the order of their ranges?)", c.Ranges[0].Shard, *c.Ranges[0].Start)
	}
	seen := map[string]bool{}
	var before []byte
	for i := range c.Ranges {
		r := &c.Ranges[i]
		member, ok := members[r.Shard]
		switch {
		case !ok && c.Embedded():
			return spec, fmt.Errorf("shard %q has a range, and there is no such embedded member: they are called %s to %s", r.Shard, embedded.ShardName(0), embedded.ShardName(c.EmbeddedShards-1))
		case !ok:
			return spec, fmt.Errorf("shard %q has a range, and there is no such member cluster: name its urls, or remove it", r.Shard)
		case seen[r.Shard]:
			return spec, fmt.Errorf("shard %s is in the file twice: a shard has one range", r.Shard)
		}
		seen[r.Shard] = true
		start, err := c.boundBefore(i)
		if err != nil {
			return spec, err
		}
		switch {
		case i > 0 && len(start) == 0:
			return spec, fmt.Errorf("shard %s has an empty start, and only the first range begins at the first key", r.Shard)
		case len(start) > 0 && start[0] == 0:
			return spec, fmt.Errorf("shard %s starts at a key that begins with a zero byte: those keys are Spindle's own", r.Shard)
		case i > 0 && string(start) <= string(before):
			return spec, fmt.Errorf("shard %s starts at %q, at or before the start of shard %s: list the shards in the order of their ranges", r.Shard, start, c.Ranges[i-1].Shard)
		}
		before = start
		spec.Ranges = append(spec.Ranges, shard.RangeSpec{Start: start, Member: member})
	}
	if last := c.Ranges[len(c.Ranges)-1]; last.End != nil && *last.End != "" {
		return spec, fmt.Errorf("shard %s is the last one and ends at %q: the last range has no end, so that every key has a place", last.Shard, *last.End)
	}
	for name := range members {
		if !seen[name] {
			return spec, fmt.Errorf("shard %s has no range, and others do: give it a start and an end, or remove it", name)
		}
	}
	return spec, nil
}

// boundBefore returns where range i starts: what it says, or what the one before it says about its end.
func (c *Config) boundBefore(i int) ([]byte, error) {
	r := &c.Ranges[i]
	if i == 0 {
		return nil, nil
	}
	p := &c.Ranges[i-1]
	var end, start []byte
	var err error
	if p.End != nil {
		if end, err = parseKey(*p.End); err != nil {
			return nil, fmt.Errorf("end of shard %s: %w", p.Shard, err)
		}
	}
	if r.Start != nil {
		if start, err = parseKey(*r.Start); err != nil {
			return nil, fmt.Errorf("start of shard %s: %w", r.Shard, err)
		}
	}
	switch {
	case p.End == nil && r.Start == nil:
		return nil, fmt.Errorf("shard %s has no end and shard %s behind it no start: say where the keys divide", p.Shard, r.Shard)
	case p.End == nil:
		return start, nil
	case r.Start == nil:
		return end, nil
	case string(start) != string(end):
		return nil, fmt.Errorf("shard %s ends at %q, and shard %s behind it starts at %q: ranges have no gaps and do not overlap, in the order of the file", p.Shard, end, r.Shard, start)
	}
	return start, nil
}

// fileShard reads one element of the file's shard list that is more than a string.
func fileShard(v map[string]any) (values []string, ranges []RangeConfig, err error) {
	name, _ := v["name"].(string)
	if name == "" {
		return nil, nil, errors.New("an element without a name: write name, urls, start and end")
	}
	r := RangeConfig{Shard: name}
	for _, key := range sortedKeys(v) {
		switch key {
		case "name":
		case "urls":
			urls, err := fileValues(v[key])
			if err != nil {
				return nil, nil, fmt.Errorf("urls of %s: %w", name, err)
			}
			values = []string{name + "=" + strings.Join(urls, ",")}
		case "start", "end":
			var s string
			switch b := v[key].(type) {
			case string:
				s = b
			case fmt.Stringer: // a number
				s = b.String()
			default:
				return nil, nil, fmt.Errorf("%s of %s: write a key in quotes", key, name)
			}
			if key == "start" {
				r.Start = &s
			} else {
				r.End = &s
			}
		default:
			return nil, nil, fmt.Errorf("%s has %q: write name, urls, start and end", name, key)
		}
	}
	return values, []RangeConfig{r}, nil
}
