package main

import (
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"

	"spindle/server/node"
)

// reloadable is where the Config comes from: load makes the one that a start would have now.
type reloadable struct {
	load func() (*Config, error)
	file string
}

// reload applies the endpoints of a configuration that was read again, and names what else has changed in it. It
// returns the Config that holds from now on.
func reload(n *node.Node, log *slog.Logger, old *Config, from reloadable) *Config {
	now, err := from.load()
	if err != nil {
		log.Error("the configuration was read again and cannot be used; everything stays as it is", "file", from.file, "err", err)
		return old
	}
	next, endpoints, restart := old.compare(now)
	if len(restart) > 0 {
		log.Warn("some changes of the configuration need a restart", "file", from.file, "options", strings.Join(restart, ", "))
	}
	if len(endpoints) == 0 {
		log.Info("the configuration was read again; no endpoint has changed", "file", from.file)
		return old
	}
	var shards []node.Shard
	for _, s := range next.Shards {
		shards = append(shards, node.Shard(s))
	}
	n.SetEndpoints(shards, next.Coordinator)
	log.Info("the configuration was read again; endpoints have changed", "file", from.file, "of", strings.Join(endpoints, ", "))
	return next
}

// compare looks how c, which is in use, differs from now. next is c with the endpoints of now, where that needs no
// restart: of the clusters that endpoints names; restart names the options whose changes do.
func (c *Config) compare(now *Config) (next *Config, endpoints, restart []string) {
	for i := range options {
		o := &options[i]
		if o.name == "shard" || o.name == "coordinator" {
			continue
		}
		if !reflect.DeepEqual(o.alone(c), o.alone(now)) {
			restart = append(restart, "--"+o.name)
		}
	}
	copied := *c
	next = &copied
	if c.Embedded() != now.Embedded() {
		return next, nil, append(restart, "--shard", "--coordinator")
	}
	next.Shards = slices.Clone(c.Shards)
	place := func(in []ShardConfig, name string) int {
		return slices.IndexFunc(in, func(s ShardConfig) bool { return s.Name == name })
	}
	for i, s := range c.Shards {
		switch k := place(now.Shards, s.Name); {
		case k < 0:
			restart = append(restart, fmt.Sprintf("--shard %s (gone)", s.Name))
		case !slices.Equal(s.URLs, now.Shards[k].URLs):
			next.Shards[i] = now.Shards[k]
			endpoints = append(endpoints, s.Name)
		}
	}
	for _, s := range now.Shards {
		if place(c.Shards, s.Name) < 0 {
			restart = append(restart, fmt.Sprintf("--shard %s (new)", s.Name))
		}
	}
	if !slices.Equal(c.Coordinator, now.Coordinator) {
		next.Coordinator = now.Coordinator
		endpoints = append(endpoints, "coordinator")
	}
	if !reflect.DeepEqual(sortedRanges(c), sortedRanges(now)) {
		restart = append(restart, "start and end of the shards")
	}
	return next, endpoints, restart
}

// alone returns a Config in which o has its value of c, and nothing else is set.
func (o *option) alone(c *Config) *Config {
	only := &Config{}
	for _, v := range c.values[o.name] {
		_ = o.set(only, v) // parse has accepted it
	}
	return only
}

func sortedRanges(c *Config) []RangeConfig {
	list := slices.Clone(c.Ranges)
	slices.SortFunc(list, func(a, b RangeConfig) int { return strings.Compare(a.Shard, b.Shard) })
	return list
}
