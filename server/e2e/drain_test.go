package e2e

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"spindle/shard/embedded"
)

// proxyArgs are the flags of a proxy over m that is a process of its own.
func proxyArgs(m *embedded.Members, url, metrics string) []string {
	args := []string{"--listen-client-urls", url, "--listen-metrics-urls=" + metrics, "--coordinator", m.Coordinator,
		"--shard-max-txn-ops", "1024", "--shard-max-request-bytes", "1638400", "--shard-timeout", "30s"}
	for i, u := range m.Shards {
		args = append(args, "--shard", m.Names[i]+"="+u)
	}
	return args
}

// TestStopUnderLoad stops proxies by SIGTERM, one after the other, while clients that know two of them write, read and
// watch: no call fails, no event is lost.
func TestStopUnderLoad(t *testing.T) {
	builtWithoutRace(t)
	t.Parallel()
	m := startMembers(t, 2)
	urls := []string{freeURL(t), freeURL(t)}
	procs := make([]*process, 2)
	start := func(i int) {
		procs[i] = startProcess(t, t.TempDir(), proxyArgs(m, urls[i], "")...)
		procs[i].awaitReady(t)
	}
	start(0)
	start(1)

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	const writers = 8
	errs := make(chan error, 1)
	var wg sync.WaitGroup
	var written, seen atomic.Int64
	quit := make(chan struct{})
	for w := range writers {
		c := client(t, urls...)
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-quit:
					return
				default:
				}
				key := fmt.Sprintf("drain/%d/%d", w, n)
				if _, err := c.Put(ctx, key, "v"); err != nil {
					fatalOnce(errs, "put %s: %w", key, err)
					return
				}
				written.Add(1)
				r, err := c.Get(ctx, key)
				if err != nil || len(r.Kvs) != 1 {
					fatalOnce(errs, "get %s: %v, %w", key, r, err)
					return
				}
			}
		})
	}
	watcher := client(t, urls...)
	events := watcher.Watch(ctx, "drain/", clientv3.WithPrefix(), clientv3.WithRev(1))
	go func() {
		have := map[string]bool{}
		for r := range events {
			if err := r.Err(); err != nil && ctx.Err() == nil {
				fatalOnce(errs, "watch: %w", err)
				return
			}
			for _, ev := range r.Events {
				if have[string(ev.Kv.Key)] {
					fatalOnce(errs, "event of %s twice", ev.Kv.Key)
				}
				have[string(ev.Kv.Key)] = true
			}
			seen.Store(int64(len(have)))
		}
	}()
	more := func(n int64) {
		goal := written.Load() + n
		waitUntil(t, "the load goes on", readyTimeout, func() bool { return written.Load() >= goal || len(errs) > 0 })
	}
	more(int64(scale(1000)))
	for round := range 4 {
		i := round % 2
		procs[i].signal(t, syscall.SIGTERM)
		if code := procs[i].exit(t); code != 0 {
			t.Errorf("exit code %d", code)
		}
		more(int64(scale(500)))
		start(i)
		more(int64(scale(500)))
	}
	close(quit)
	wg.Wait()
	waitUntil(t, "all events are here", readyTimeout, func() bool { return seen.Load() == written.Load() || len(errs) > 0 })
	select {
	case err := <-errs:
		t.Error(err)
	default:
	}
	t.Logf("%d writes, %d events, 4 proxies stopped", written.Load(), seen.Load())
}
