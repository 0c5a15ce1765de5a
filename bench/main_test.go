package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"spindle/bench/report"
	"spindle/shard/embedded"
)

// silent lets the commands print into nowhere.
func silent(t *testing.T) {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	out, errs := os.Stdout, os.Stderr
	os.Stdout, os.Stderr = null, null
	t.Cleanup(func() {
		os.Stdout, os.Stderr = out, errs
		null.Close()
	})
}

// A load from the command line writes its files.
func TestLoadCommand(t *testing.T) {
	m, err := embedded.Start(embedded.Config{Dir: filepath.Join(t.TempDir(), "etcd"), Shards: 1, NoFsync: true})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	silent(t)
	dir := t.TempDir()
	jsonFile, htmlFile := filepath.Join(dir, "r.json"), filepath.Join(dir, "r.html")
	err = loadCommand(t.Context(), []string{"--endpoints", m.Shards[0], "--workload", "get=3,update", "--clients", "4", "--connections", "2", "--keys", "10",
		"--duration", "200ms", "--warmup", "0s", "--json", jsonFile, "--html", htmlFile, "--pid", "self=1"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(jsonFile)
	if err != nil {
		t.Fatal(err)
	}
	var doc report.Doc
	if err := json.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	r := doc.Runs[0].Result
	if r.Total.Count == 0 || len(r.Ops) != 2 || r.Spec.Mix.String() != "get=3,update=1" || r.Spec.Clients != 4 || r.Spec.Prefix != "/bench/" || doc.Machine.CPUs == 0 {
		t.Errorf("%+v", doc)
	}
	page, err := os.ReadFile(htmlFile)
	if err != nil || !strings.Contains(string(page), "<svg") {
		t.Errorf("%v %.200s", err, page)
	}
}

// A load that is interrupted writes its files all the same.
func TestInterruptedLoadCommand(t *testing.T) {
	m, err := embedded.Start(embedded.Config{Dir: filepath.Join(t.TempDir(), "etcd"), Shards: 1, NoFsync: true})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	silent(t)
	file := filepath.Join(t.TempDir(), "r.json")
	for wait := time.Second; ; wait *= 2 { // on a busy machine it has not begun to measure after a second
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		err := loadCommand(ctx, []string{"--endpoints", m.Shards[0], "--clients", "4", "--duration", "1h", "--warmup", "0s", "--json", file})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		b, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) && wait < time.Minute {
			continue
		}
		var doc report.Doc
		if err := errors.Join(err, json.Unmarshal(b, &doc)); err != nil {
			t.Fatal(err)
		}
		if r := doc.Runs[0].Result; r.Stopped == "" || r.Total.Count == 0 {
			t.Errorf("%+v", r)
		}
		return
	}
}

// A file that cannot be written is an error before the load, and the look for it changes nothing.
func TestOutputs(t *testing.T) {
	silent(t)
	dir := t.TempDir()
	old, fresh := filepath.Join(dir, "old"), filepath.Join(dir, "fresh")
	if err := os.WriteFile(old, []byte("yesterday's"), 0o644); err != nil {
		t.Fatal(err)
	}
	o := outputs{json: fresh, html: old}
	if err := o.check(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(old); err != nil || string(b) != "yesterday's" {
		t.Errorf("%q %v", b, err)
	}
	if _, err := os.Stat(fresh); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file is there before the report: %v", err)
	}
	// One that cannot be written does not keep the other from it.
	o = outputs{json: filepath.Join(dir, "no", "such"), html: fresh}
	if err := o.write(&report.Doc{Title: "x"}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if b, err := os.ReadFile(fresh); err != nil || !strings.Contains(string(b), "<h1>x</h1>") {
		t.Errorf("%q %v", b, err)
	}
}

// A report goes to others: it does not tell the password.
func TestCommandLine(t *testing.T) {
	for want, args := range map[string][]string{
		"bench --user root:... --json x": {"/tmp/bench", "--user", "root:secret", "--json", "x"},
		"bench -user=root:...":           {"bench", "-user=root:secret:x"},
		"bench --rate 3 --user":          {"bench", "--rate", "3", "--user"},
	} {
		if got := commandLine(args); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

func TestFlags(t *testing.T) {
	silent(t)
	for want, args := range map[string][]string{
		"--cacert": {"--cacert", "/does/not/exist"},
		"belong":   {"--cert", "x"},
		"no work \"nonsense\"; there is create, update": {"--workload", "nonsense"},
		"not a flag":       {"serve"},
		"endpoint":         {"--endpoints", "127.0.0.1:2379"},
		"--connections":    {"--connections", "0"},
		"--help":           {"--nonsense"},
		"NAME=PID":         {"--pid", "7"},
		"no such process":  {"--pid", "x=999999999"},
		"say 30s":          {"--duration", "30"},
		"--endpoints \"\"": {"--endpoints", "http://127.0.0.1:1,"},
		"--watch-all":      {"--workload", "idle"},
		"NAME:PASSWORD":    {"--user", "root"},
		"/does/not":        {"--json", "/does/not/exist"},
	} {
		if err := loadCommand(t.Context(), args); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("bench %v: %v", args, err)
		}
	}
	for want, args := range map[string][]string{
		"no target":       {"--targets", "nobody"},
		"--suite":         {"--suite", "all"},
		"there are":       {"--suite", "issue", "--scenarios", "speed"},
		"--rounds":        {"--rounds", "0"},
		"there is no \"x": {"--scenarios", "x"},
		"their own":       {"--suite", "issue", "--clients", "5"},
		"twice":           {"--targets", "direct,direct"},
		"two-etcds+tls":   {"--targets", "two-etcds", "--tls"},
		"--duration":      {"--suite", "issue", "--duration", "0s"},
		"only creates":    {"--targets", "two-etcds", "--workload", "update"},
		"--spindle: ":     {"--spindle", "/does/not/exist"},
		"from 1 to 16":    {"--targets", "spindle-17"},
		"--dir":           {"--dir", "/does/not/exist"},
		"/does/not":       {"--html", "/does/not/exist"},
	} {
		if err := compareCommand(t.Context(), args); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("bench compare %v: %v", args, err)
		}
	}
	for _, command := range []func() error{
		func() error { return loadCommand(t.Context(), []string{"--help"}) },
		func() error { return compareCommand(t.Context(), []string{"--help"}) },
	} {
		if err := command(); !errors.Is(err, flag.ErrHelp) {
			t.Error(err)
		}
	}
}
