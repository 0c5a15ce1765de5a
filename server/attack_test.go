package server

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/codec"
	"spindle/server/attack"
	"spindle/shard"
	"spindle/watchring"
)

// limitHitsOf returns how often a bound was run into, by its name in the metric.
func limitHitsOf(name string) uint64 {
	return metrics.GetOrCreateCounter(strings.Replace(nameLimit, "%q", `"`+name+`"`, 1)).Get()
}

// TestAttacks runs every attack against a server on a socket, until one of the bounds that are meant for it
// has been run into, beside a good client, which must not notice.
func TestAttacks(t *testing.T) {
	if testing.Short() {
		t.Skip("seconds of floods, which the race detector makes minutes")
	}
	cfg := Config{Loops: 2, StallTimeout: 2 * time.Second, GreetTimeout: time.Second, Memory: shard.NewMemory(4 << 20),
		Codec: codec.ConnConfig{PingMinTime: 5 * time.Second, MaxConcurrentStreams: 1000}}
	s := startServer(t, cfg, func(e *Engine) {
		NewWatchService(e, WatchConfig{
			Ring: watchring.NewRing(1024, 1<<20, 0), Frontier: watchring.NewFrontier(1, 0),
			ShardsOf: func(key, end []byte) int { return 0 },
			Now:      func(done func(int64, codec.Status)) { done(1, codec.Status{}) }, WatchesPerStream: 10_000,
		})
	})
	onLoop(s.Loops()[0], func() { s.core.big = make([]byte, 64<<10) })
	good := s.dial(t, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	for _, a := range attack.All("big", "bih") {
		if a.Conns > 50 {
			a.Conns = 50
		}
		before := map[string]uint64{}
		for _, l := range a.Limits {
			before[l] = limitHitsOf(l)
		}
		quit, done := make(chan struct{}), make(chan struct{})
		var sent attack.Sent
		go func() {
			defer close(done)
			attack.Run(a, s.addr(), quit, &sent)
		}()
		over := sync.OnceFunc(func() { close(quit); <-done })
		t.Cleanup(over)
		start, worst := time.Now(), time.Duration(0)
		eventually(t, a.Name+" runs into a bound", func() bool {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			asked := time.Now()
			defer func() { worst = max(worst, time.Since(asked)) }()
			if _, err := pb.NewKVClient(good).Range(ctx, &pb.RangeRequest{Key: []byte("k")}); err != nil {
				t.Fatalf("%s: the good client: %v", a.Name, err)
			}
			for _, l := range a.Limits {
				if limitHitsOf(l) > before[l] {
					return true
				}
			}
			return len(a.Limits) == 0 && sent.Conns.Load() > 100
		})
		over()
		t.Logf("%-20s %v: %d connections, %d KiB; the good client waited %v at most", a.Name, time.Since(start).Round(time.Millisecond),
			sent.Conns.Load(), sent.Bytes.Load()>>10, worst.Round(time.Millisecond))
		eventually(t, "only the good client is left after "+a.Name, func() bool { return s.conns.Load() == 1 })
		eventually(t, "nothing is held after "+a.Name, func() bool { return s.cfg.Memory.Used() == 0 })
	}
}
