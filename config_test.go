package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"spindle/shard"
)

func TestDefaults(t *testing.T) {
	c, err := parse(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !c.Embedded() || c.EmbeddedShards != 3 || c.DataDir != "./spindle.data" ||
		c.ReorderWindow != 250*time.Millisecond || c.ShardTimeout != 5*time.Second ||
		c.WatchProgressNotifyInterval != 10*time.Minute ||
		!reflect.DeepEqual(c.ListenClientURLs, []string{"http://127.0.0.1:2379"}) ||
		!reflect.DeepEqual(c.ListenMetricsURLs, []string{"http://127.0.0.1:2381"}) {
		t.Errorf("defaults: %+v", c)
	}
}

// A flag wins over the environment, that over the file, that over the default.
func TestPrecedence(t *testing.T) {
	file := filepath.Join(t.TempDir(), "spindle.yaml")
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(`
shard:
- a=http://10.0.0.1:2379,http://10.0.0.2:2379
- b=http://10.0.1.1:2379
coordinator: [http://10.0.2.1:2379, http://10.0.2.2:2379/]
reorder-window: 1s
shard-timeout: 2s
ring-size: 2048
loops: 2
`)
	c, err := parse([]string{"--config", file, "-shard-timeout=4s"},
		[]string{"SPINDLE_SHARD_TIMEOUT=3s", "SPINDLE_RING_SIZE=4096", "SPINDLE_LOOPS=", "SPINDLE_SERVICE_HOST=10.96.0.7", "PATH=/bin"})
	if err != nil {
		t.Fatal(err)
	}
	want := []ShardConfig{
		{"a", []string{"http://10.0.0.1:2379", "http://10.0.0.2:2379"}},
		{"b", []string{"http://10.0.1.1:2379"}},
	}
	if !reflect.DeepEqual(c.Shards, want) {
		t.Errorf("shards: %v", c.Shards)
	}
	if !reflect.DeepEqual(c.Coordinator, []string{"http://10.0.2.1:2379", "http://10.0.2.2:2379"}) {
		t.Errorf("coordinator: %v", c.Coordinator)
	}
	if c.ReorderWindow != time.Second || c.RingSize != 4096 || c.ShardTimeout != 4*time.Second || c.Loops != 2 {
		t.Errorf("precedence: %+v", c)
	}

	c, err = parse(nil, []string{"SPINDLE_SHARD=x=http://h:1 y=http://h:2", "SPINDLE_COORDINATOR=http://h:3"})
	if err != nil || len(c.Shards) != 2 || c.Shards[1].Name != "y" {
		t.Errorf("shards from the environment: %+v, %v", c, err)
	}
}

// Every error is one line that names the culprit and says what to do.
func TestErrors(t *testing.T) {
	dir := t.TempDir()
	file := func(content string) string {
		name := filepath.Join(dir, "f.yaml")
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	const ranges = "partitioner: range\nshard:\n"
	real := []string{"--shard", "a=http://h:1", "--coordinator", "http://h:9"}
	for _, c := range []struct {
		name string
		args []string
		file string
		env  []string
		want []string
	}{
		{name: "unknown flag", args: []string{"--lisen-client-urls", "x"}, want: []string{"--lisen-client-urls", "--listen-client-urls"}},
		{name: "unknown flag, nothing near", args: []string{"--frobnicate"}, want: []string{"--frobnicate", "--help"}},
		{name: "no flag", args: []string{"serve"}, want: []string{`"serve"`, "--help"}},
		{name: "no value", args: []string{"--data-dir"}, want: []string{"--data-dir needs a value"}},
		{name: "twice", args: []string{"--loops", "1", "--loops", "2"}, want: []string{"--loops is given twice"}},
		{name: "no number", args: []string{"--loops", "many"}, want: []string{"--loops", `"many"`}},
		{name: "no duration", args: []string{"--reorder-window", "250"}, want: []string{"--reorder-window", "250ms"}},
		{name: "duration out of range", args: []string{"--shard-timeout", "1h"}, want: []string{"--shard-timeout 1h", "1m0s"}},
		{name: "ring", args: []string{"--ring-size", "1"}, want: []string{"--ring-size 1", "1024"}},
		{name: "level", args: []string{"--log-level", "loud"}, want: []string{"--log-level", "debug, info, warn or error"}},
		{name: "no listener", args: []string{"--listen-client-urls="}, want: []string{"--listen-client-urls is empty"}},
		{name: "tls", args: []string{"--listen-client-urls=https://127.0.0.1:2379"}, want: []string{"https://127.0.0.1:2379", "--cert-file"}},
		{name: "tls metrics", args: []string{"--listen-metrics-urls=https://127.0.0.1:2379"}, want: []string{"https://127.0.0.1:2379", "--cert-file"}},
		{name: "tls key", args: []string{"--listen-client-urls=https://127.0.0.1:2379", "--cert-file=c"}, want: []string{"--cert-file and --key-file"}},
		{name: "tls for nobody", args: []string{"--cert-file=c", "--key-file=k"}, want: []string{"--cert-file (flag)", "https://"}},
		{name: "client certificates for nobody", args: []string{"--client-cert-auth"}, want: []string{"--client-cert-auth (flag)", "https://"}},
		{name: "no bool", args: []string{"--client-cert-auth=perhaps"}, want: []string{"--client-cert-auth", "true or false"}},
		{name: "member tls for nobody", args: append(real, "--shard-cacert=c"), want: []string{"--shard-cacert (flag)", "https://"}},
		{name: "member key", args: []string{"--shard", "a=https://h:1", "--coordinator", "http://h:2", "--shard-cert=c"}, want: []string{"--shard-cert and --shard-key"}},
		{name: "no port", args: []string{"--listen-client-urls=http://127.0.0.1"}, want: []string{"host and port"}},
		{name: "port", args: []string{"--listen-client-urls=http://127.0.0.1:70000"}, want: []string{"65535"}},
		{name: "no scheme", args: []string{"--listen-client-urls=127.0.0.1:2379"}, want: []string{"http://host:port"}},
		{name: "path", args: []string{"--listen-client-urls=http://127.0.0.1:2379/v3"}, want: []string{"nothing behind it"}},
		{name: "same port", args: []string{"--listen-metrics-urls=http://127.0.0.1:2379"}, want: []string{"--listen-metrics-urls", "--listen-client-urls already"}},
		{name: "shard without name", args: []string{"--shard", "http://h:1"}, want: []string{"--shard", "NAME=URL"}},
		{name: "bad name", args: []string{"--shard", "a b=http://h:1", "--coordinator", "http://h:2"}, want: []string{`"a b"`, "letters"}},
		{name: "shard twice", args: append(real, "--shard", "a=http://h:2"), want: []string{"--shard a is given twice"}},
		{name: "endpoint twice", args: append(real, "--shard", "b=http://h:1"), want: []string{"--shard b", "http://h:1", "--shard a already"}},
		{name: "coordinator is a shard", args: []string{"--shard", "a=http://h:1", "--coordinator", "http://h:1"}, want: []string{"--coordinator", "--shard a already"}},
		{name: "no coordinator", args: []string{"--shard", "a=http://h:1"}, want: []string{"--shard without --coordinator"}},
		{name: "no shard", args: []string{"--coordinator", "http://h:1"}, want: []string{"--coordinator without --shard"}},
		{name: "both modes", args: append(real, "--data-dir", "x"), want: []string{"--data-dir", "embedded", "--shard"}},
		{name: "both modes by env", args: real, env: []string{"SPINDLE_EMBEDDED_SHARDS=3"}, want: []string{"--embedded-shards (SPINDLE_EMBEDDED_SHARDS)"}},
		{name: "embedded shards", args: []string{"--embedded-shards", "0"}, want: []string{"--embedded-shards 0", "1 to"}},
		{name: "bad env", env: []string{"SPINDLE_LOOPS=x"}, want: []string{"loops in SPINDLE_LOOPS"}},
		{name: "no file", args: []string{"--config", filepath.Join(dir, "none")}, want: []string{"--config", "no file"}},
		{name: "no yaml", file: "a: [", want: []string{"not good YAML"}},
		{name: "file with twice the same", file: "loops: 1\nloops: 2\n", want: []string{"loops"}},
		{name: "unknown in file", file: "ring_size: 5000\n", want: []string{`"ring_size"`, `"ring-size"`}},
		{name: "wrong type in file", file: "loops: {a: 1}\n", want: []string{"loops", "give a string"}},
		{name: "empty in file", file: "loops:\n", want: []string{"loops", "no value"}},
		{name: "list as file", file: "- loops\n", want: []string{"name: value"}},
		{name: "bad value in file", file: "loops: x\n", want: []string{"loops in ", "f.yaml"}},
		{name: "compaction mode", args: []string{"--auto-compaction-mode", "weekly"}, want: []string{"--auto-compaction-mode", "periodic or revision"}},
		{name: "compaction retention", args: []string{"--auto-compaction-retention", "x"}, want: []string{"--auto-compaction-retention", "30m"}},
		{name: "partitioner", args: []string{"--partitioner", "rnage"}, want: []string{"--partitioner", "hash or range"}},
		{name: "ranges without partitioner", file: "shard:\n- {name: shard-1, end: m}\n", want: []string{"shard-1", "partitioner: range"}},
		{name: "unknown shard", file: ranges + "- {name: shard-1, end: m}\n- {name: b, start: m}\n", want: []string{`"b"`, "shard-1 to shard-3"}},
		{name: "unknown shard by name", args: real, file: ranges + "- {name: a, end: m}\n- {name: b, start: m}\n", want: []string{`"b"`, "urls"}},
		{name: "a shard without a range", file: ranges + "- {name: shard-1, end: m}\n- {name: shard-3, start: m}\n", want: []string{"shard-2", "no range"}},
		{name: "gap", file: ranges + "- {name: shard-1, end: g}\n- {name: shard-2, start: h, end: m}\n- {name: shard-3}\n", want: []string{`ends at "g"`, `starts at "h"`, "no gaps"}},
		{name: "wrong order", file: ranges + "- {name: shard-1, end: m}\n- {name: shard-2, end: g}\n- {name: shard-3, start: g}\n", want: []string{"shard-3", `"g"`, "order"}},
		{name: "first with a start", file: ranges + "- {name: shard-2, start: m}\n- {name: shard-1, end: m}\n", want: []string{"shard-2", "first", "order"}},
		{name: "last with an end", file: ranges + "- {name: shard-1, end: g}\n- {name: shard-2, end: m}\n- {name: shard-3, start: m, end: z}\n", want: []string{"shard-3", "last", "no end"}},
		{name: "no bound", file: ranges + "- {name: shard-1, start: ''}\n- {name: shard-2, end: m}\n- {name: shard-3, start: m}\n", want: []string{"shard-1", "shard-2", "divide"}},
		{name: "twice in the file", file: ranges + "- {name: shard-1, end: g}\n- {name: shard-1, end: m}\n- {name: shard-3, start: m}\n", want: []string{"shard-1", "one range"}},
		{name: "reserved", file: ranges + "- {name: shard-1, end: '\\x00a'}\n- {name: shard-2, end: m}\n- {name: shard-3, start: m}\n", want: []string{"shard-2", "zero byte"}},
		{name: "bad escape", file: ranges + "- {name: shard-1, end: '\\q'}\n- {name: shard-2, end: m}\n- {name: shard-3, start: m}\n", want: []string{"shard-1", `\xNN`}},
		{name: "yaml's own escape", file: ranges + "- {name: shard-1, end: \"\\xff\"}\n- {name: shard-2, end: m}\n- {name: shard-3, start: m}\n", want: []string{"shard-1", "single quotes"}},
		{name: "no name", file: ranges + "- {end: m}\n", want: []string{"shard", "without a name"}},
		{name: "unknown key of a shard", file: ranges + "- {name: shard-1, stop: m}\n", want: []string{`"stop"`, "start and end"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := c.args
			if c.file != "" {
				args = append(args, "--config", file(c.file))
			}
			_, err := parse(args, c.env)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not say %q", err, w)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %q", err)
			}
		})
	}
}

// Ranges come from the file, bounds from either side, bytes by escapes.
func TestRangesFromFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f.yaml")
	if err := os.WriteFile(file, []byte(`
partitioner: range
coordinator: http://h:9
shard:
- {name: b, urls: "http://h:1,http://h:2", end: 'g\\\xff'}
- {name: a, urls: [http://h:3], end: 700}
- name: c
  urls: http://h:4
  start: "700"
`), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := parse([]string{"--config", file}, nil)
	if err == nil || !strings.Contains(err.Error(), "order") {
		t.Fatalf("700 is below g: %v", err)
	}
	b, _ := os.ReadFile(file)
	if err := os.WriteFile(file, bytes.ReplaceAll(b, []byte("700"), []byte("h")), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := parse([]string{"--config", file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.partition()
	want := shard.PartitionSpec{Kind: shard.PartitionRange, Ranges: []shard.RangeSpec{{Member: 0}, {Start: []byte("g\\\xff"), Member: 1}, {Start: []byte("h"), Member: 2}}}
	if err != nil || !reflect.DeepEqual(got, want) || len(c.Shards) != 3 || len(c.Shards[0].URLs) != 2 {
		t.Errorf("%+v, %+v, %v", got, c.Shards, err)
	}
	// Embedded members have names of their own.
	if err := os.WriteFile(file, []byte("partitioner: range\nembedded-shards: 2\nshard: [{name: shard-2, end: m}, {name: shard-1}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err = parse([]string{"--config", file}, nil); err != nil || !c.Embedded() {
		t.Fatal(err)
	}
	if got, _ := c.partition(); len(got.Ranges) != 2 || got.Ranges[0].Member != 1 {
		t.Errorf("%+v", got)
	}
}

func TestHelpAndVersion(t *testing.T) {
	for _, c := range []struct {
		arg  string
		want error
	}{{"--help", errHelp}, {"-h", errHelp}, {"-help", errHelp}, {"--version", errVersion}} {
		if _, err := parse([]string{c.arg}, nil); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.arg, err)
		}
	}
	var b bytes.Buffer
	printHelp(&b)
	for _, o := range options {
		if !strings.Contains(b.String(), "--"+o.name) {
			t.Errorf("--help does not name --%s", o.name)
		}
		if o.help == "" || !strings.HasSuffix(o.help, ".") {
			t.Errorf("--%s: help %q is no sentence", o.name, o.help)
		}
	}
	for line := range strings.SplitSeq(b.String(), "\n") {
		if len(line) > helpWidth {
			t.Errorf("--help has a line of %d characters: %s", len(line), line)
		}
	}
	b.Reset()
	printVersion(&b)
	if !strings.HasPrefix(b.String(), "spindle ") || strings.Count(b.String(), "\n") != 1 {
		t.Errorf("--version: %q", b.String())
	}
}

// The README lists every flag with its default.
func TestREADMEKnowsTheFlags(t *testing.T) {
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range options {
		row := ""
		for line := range strings.SplitSeq(string(b), "\n") {
			if strings.HasPrefix(line, "| `--"+o.name+"`") {
				row = line
			}
		}
		if row == "" {
			t.Errorf("README.md has no row for --%s", o.name)
		} else if o.def != "" && !strings.Contains(row, o.def) {
			t.Errorf("README.md: --%s has another default: %s", o.name, row)
		}
	}
}
