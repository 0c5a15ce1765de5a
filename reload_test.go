package main

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
)

// What of a changed configuration is applied at once, and what is said to need a restart.
func TestCompareConfigs(t *testing.T) {
	file := filepath.Join(t.TempDir(), "spindle.yaml")
	read := func(text string) *Config {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := parse([]string{"--config", file, "--loops", "2"}, []string{"SPINDLE_RING_SIZE=4096"})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	const base = "coordinator: http://10.0.0.1:1\nshard-timeout: 2s\n"
	const shards = "shard: [\"a=http://10.0.1.1:1,http://10.0.1.2:1\", \"b=http://10.0.2.1:1\"]\n"
	old := read(base + shards)
	for _, c := range []struct {
		name, text         string
		endpoints, restart []string
	}{
		{"nothing", base + shards, nil, nil},
		{"another way to write it", "coordinator: [http://10.0.0.1:1/]\nshard-timeout: 2000ms\n" +
			"shard: [\"b=http://10.0.2.1:1\", {name: a, urls: [http://10.0.1.1:1, http://10.0.1.2:1]}]\nreorder-window: 250ms\n", nil, nil},
		{"endpoints", "coordinator: http://10.0.0.2:1\nshard-timeout: 2s\n" + "shard: [\"a=http://10.0.1.3:1\", \"b=http://10.0.2.1:1\"]\n",
			[]string{"a", "coordinator"}, nil},
		{"shards", base + "shard: [\"a=http://10.0.1.3:1\", \"c=http://10.0.2.1:1\"]\n", []string{"a"},
			[]string{"--shard b (gone)", "--shard c (new)"}},
		{"other options", "coordinator: http://10.0.0.1:1\nlog-level: debug\nring-size: 8192\nloops: 4\n" + shards, nil,
			[]string{"--shard-timeout", "--log-level"}}, // environment and flags win as before
		{"ranges", base + "partitioner: range\nshard: [{name: a, urls: [http://10.0.1.1:1, http://10.0.1.2:1], end: m}, {name: b, urls: [http://10.0.2.1:1]}]\n", nil,
			[]string{"--partitioner", "start and end of the shards"}},
		{"embedded", "log-level: info\n", nil, []string{"--shard-timeout", "--shard", "--coordinator"}},
	} {
		now := read(c.text)
		next, endpoints, restart := old.compare(now)
		if !slices.Equal(endpoints, c.endpoints) {
			t.Errorf("%s: endpoints of %q, expected %q", c.name, endpoints, c.endpoints)
		}
		slices.Sort(restart)
		slices.Sort(c.restart)
		if !slices.Equal(restart, c.restart) {
			t.Errorf("%s: needs a restart: %q, expected %q", c.name, restart, c.restart)
		}
		// Applied once, the same endpoints are no news.
		if _, again, _ := next.compare(now); len(again) > 0 {
			t.Errorf("%s: %q change again", c.name, again)
		}
		if len(c.endpoints) == 0 && !reflect.DeepEqual(next.Shards, old.Shards) {
			t.Errorf("%s: shards %v", c.name, next.Shards)
		}
	}
	if got := old.Shards[0].URLs[0]; got != "http://10.0.1.1:1" {
		t.Errorf("the old configuration was changed: %s", got)
	}
}
