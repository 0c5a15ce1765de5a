package embedded

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func start(t *testing.T, cfg Config) *Members {
	t.Helper()
	cfg.NoFsync = true
	m, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

func client(t *testing.T, url string) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{url}, DialTimeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestKeepsDataOverRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	m := start(t, Config{Dir: dir, Shards: 2})
	if len(m.Shards) != 2 || len(m.Names) != 2 || m.Coordinator == "" {
		t.Fatalf("members: %+v", m)
	}
	ids := map[uint64]bool{}
	all := append(append([]string{}, m.Shards...), m.Coordinator)
	for i, u := range all {
		c := client(t, u)
		r, err := c.Put(ctx, "k", "v"+string(rune('0'+i)))
		if err != nil {
			t.Fatal(err)
		}
		ids[r.Header.ClusterId] = true
		c.Close()
	}
	if len(ids) != 3 {
		t.Errorf("cluster IDs are not distinct: %v", ids)
	}
	m.Close()

	m = start(t, Config{Dir: dir, Shards: 2})
	all = append(append([]string{}, m.Shards...), m.Coordinator)
	for i, u := range all {
		c := client(t, u)
		r, err := c.Get(ctx, "k")
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Kvs) != 1 || string(r.Kvs[0].Value) != "v"+string(rune('0'+i)) {
			t.Errorf("member %d after restart: %v", i, r.Kvs)
		}
		if !ids[r.Header.ClusterId] {
			t.Errorf("member %d has another cluster ID after restart", i)
		}
		c.Close()
	}
}

func wantError(t *testing.T, cfg Config, parts ...string) {
	t.Helper()
	m, err := Start(cfg)
	if err == nil {
		m.Close()
		t.Fatal("started")
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("error has more than one line: %q", err)
	}
}

func TestRefusesWrongDirectories(t *testing.T) {
	tmp := t.TempDir()

	foreign := filepath.Join(tmp, "foreign")
	os.Mkdir(foreign, 0o700)
	os.WriteFile(filepath.Join(foreign, "thesis.tex"), nil, 0o600)
	wantError(t, Config{Dir: foreign, Shards: 3}, foreign, "thesis.tex", "--data-dir")
	if e, _ := os.ReadDir(foreign); len(e) != 1 {
		t.Errorf("something was written into a foreign directory: %v", e)
	}

	etcd := filepath.Join(tmp, "etcd")
	os.MkdirAll(filepath.Join(etcd, "member"), 0o700)
	wantError(t, Config{Dir: etcd, Shards: 3}, etcd, "data directory of an etcd", "--shard")

	file := filepath.Join(tmp, "file")
	os.WriteFile(file, nil, 0o600)
	wantError(t, Config{Dir: file, Shards: 3}, file, "--data-dir")

	future := filepath.Join(tmp, "future")
	os.Mkdir(future, 0o700)
	os.WriteFile(filepath.Join(future, stateFile), []byte(`{"format":2,"shards":3}`), 0o600)
	wantError(t, Config{Dir: future, Shards: 3}, "format 2")

	damaged := filepath.Join(tmp, "damaged")
	os.Mkdir(damaged, 0o700)
	os.WriteFile(filepath.Join(damaged, stateFile), []byte(`{"form`), 0o600)
	wantError(t, Config{Dir: damaged, Shards: 3}, "damaged")

	wantError(t, Config{Dir: filepath.Join(tmp, "x"), Shards: 0}, "--embedded-shards")
	wantError(t, Config{Dir: filepath.Join(tmp, "x"), Shards: MaxShards + 1}, "--embedded-shards")
}

func TestLockCountAndLoss(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "spindle.data")
	m := start(t, Config{Dir: dir, Shards: 1})
	wantError(t, Config{Dir: dir, Shards: 1}, dir, "in use")
	m.Close()

	wantError(t, Config{Dir: dir, Shards: 4}, "holds 1 shards, --embedded-shards says 4")

	if err := os.Rename(filepath.Join(dir, "shard-1"), filepath.Join(dir, "shard-1.away")); err != nil {
		t.Fatal(err)
	}
	wantError(t, Config{Dir: dir, Shards: 1}, "shard-1", "lost")
}
