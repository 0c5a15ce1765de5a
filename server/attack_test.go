package server

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/codec"
	"spindle/codec/tlsconn"
	"spindle/codec/tlsconn/tlstest"
	"spindle/server/attack"
	"spindle/shard"
	"spindle/watchring"
)

// limitHitsOf returns how often a bound was run into, by its name in the metric.
func limitHitsOf(name string) uint64 {
	return metrics.GetOrCreateCounter(strings.Replace(nameLimit, "%q", `"`+name+`"`, 1)).Get()
}

// attackPatience is for machines that do much else: attackers and server share them with other tests.
const attackPatience = time.Minute

// attacksUnderRace are those that -short leaves: one of each kind that touches several loops or goroutines. The race
// detector makes minutes of all of them.
var attacksUnderRace = []string{"rapid reset", "PING flood, deaf", "zero window", "lists, deaf", "watches", "connect and leave",
	"half handshakes", "handshake flood, tickets", "strangers", "KeyUpdate flood", "records of a byte"}

// TestAttacks runs every attack against a server on a socket, until one of the bounds that are meant for it
// has been run into, beside a good client, which must not notice: in plain text, inside TLS, and with certificates of clients.
func TestAttacks(t *testing.T) {
	ca, other := tlstest.NewCA(t, "ca"), tlstest.NewCA(t, "other")
	pair, client := ca.Issue("server"), ca.Issue("client")
	serve := tlsconn.ServerOptions{CertFile: pair.Cert, KeyFile: pair.Key}
	mutual := serve
	mutual.TrustedCAFile = ca.File
	t.Run("plain", func(t *testing.T) {
		testAttacks(t, nil, attack.Target{}, attack.All("big", "bih"))
	})
	t.Run("TLS", func(t *testing.T) {
		if testing.Short() {
			t.Skip("mutual TLS does the same and more")
		}
		to := attack.Target{TLS: ca.Client()}
		testAttacks(t, &serve, to, append(attack.All("big", "bih"), attack.OverTLS()...))
	})
	t.Run("mutual TLS", func(t *testing.T) {
		to := attack.Target{TLS: ca.Client(client), Stranger: ca.Client(other.Issue("stranger"))}
		all := attack.OverTLS()
		if testing.Short() {
			all = append(all, attack.All("big", "bih")...)
		}
		testAttacks(t, &mutual, to, all)
	})
}

func testAttacks(t *testing.T, secure *tlsconn.ServerOptions, to attack.Target, attacks []*attack.Attack) {
	cfg := Config{Loops: 2, StallTimeout: 2 * time.Second, GreetTimeout: time.Second, Memory: shard.NewMemory(2 << 20),
		Codec: codec.ConnConfig{PingMinTime: 5 * time.Second, MaxConcurrentStreams: 1000}}
	creds := insecure.NewCredentials()
	if secure != nil {
		files, err := tlsconn.NewServerFiles(*secure, quiet())
		if err != nil {
			t.Fatal(err)
		}
		cfg.TLS, cfg.ListenURLs = files, []string{"https://127.0.0.1:0"}
		creds = credentials.NewTLS(to.TLS.Clone())
	}
	s := startServer(t, cfg, func(e *Engine) {
		NewWatchService(e, WatchConfig{
			Ring: watchring.NewRing(1024, 1<<20, 0), Frontier: watchring.NewFrontier(1, 0),
			ShardsOf: func(key, end []byte) int { return 0 },
			Now:      func(done func(int64, codec.Status)) { done(1, codec.Status{}) }, WatchesPerStream: 10_000,
		})
	})
	to.Addr = s.addr()
	onLoop(s.Loops()[0], func() { s.core.big = make([]byte, 64<<10) })
	good, err := grpc.NewClient("passthrough:///"+s.addr(), grpc.WithTransportCredentials(creds),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	defer good.Close()
	for _, a := range attacks {
		if testing.Short() && !slices.Contains(attacksUnderRace, a.Name) || a.Stranger && to.Stranger == nil {
			continue
		}
		a.Conns = min(a.Conns, 50)
		if testing.Short() {
			a.Conns, to.Breath = min(a.Conns, 4), 20*time.Millisecond
		}
		before := map[string]uint64{}
		for _, l := range a.Limits {
			before[l] = limitHitsOf(l)
		}
		quit, done := make(chan struct{}), make(chan struct{})
		var sent attack.Sent
		go func() {
			defer close(done)
			attack.Run(a, to, quit, &sent)
		}()
		over := sync.OnceFunc(func() { close(quit); <-done })
		t.Cleanup(over)
		start, worst := time.Now(), time.Duration(0)
		within(t, attackPatience, a.Name+" runs into a bound", func() bool {
			ctx, cancel := context.WithTimeout(context.Background(), attackPatience)
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
			return len(a.Limits) == 0 && sent.Conns.Load() > int64(5*a.Conns)
		})
		over()
		t.Logf("%-26s %v: %d connections, %d KiB; the good client waited %v at most", a.Name, time.Since(start).Round(time.Millisecond),
			sent.Conns.Load(), sent.Bytes.Load()>>10, worst.Round(time.Millisecond))
		within(t, attackPatience, "only the good client is left after "+a.Name, func() bool { return s.conns.Load() == 1 })
		within(t, attackPatience, "nothing is held after "+a.Name, func() bool { return s.cfg.Memory.Used() == 0 })
		within(t, attackPatience, "no handshake is left after "+a.Name, func() bool { return s.gate.Pending() == 0 })
	}
}
