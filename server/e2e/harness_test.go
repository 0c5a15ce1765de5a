package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"spindle/server/node"
	"spindle/shard/embedded"
)

// How long things may take before a test calls them broken. Generous: the machines are busy.
const (
	readyTimeout = 2 * time.Minute
	callTimeout  = time.Minute
	testTimeout  = 5 * time.Minute // of all that a test asks for with one context
	maxRecvBytes = 256 << 20
)

// seed returns the seed of this run and logs it.
func seed(t testing.TB) uint64 {
	s := rand.Uint64()
	if v := os.Getenv("SPINDLE_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("SPINDLE_SEED=%q is not a number", v)
		}
		s = n
	}
	t.Logf("seed: SPINDLE_SEED=%d", s)
	return s
}

func newRand(seed uint64, stream int) *rand.Rand { return rand.New(rand.NewPCG(seed, uint64(stream))) }

// testLog shows warnings of the system under test with the test's own output.
func testLog(t testing.TB) *slog.Logger {
	level := slog.LevelWarn
	if os.Getenv("SPINDLE_TEST_DEBUG") != "" {
		level = slog.LevelDebug
	}
	w := &testWriter{t: t}
	t.Cleanup(w.stop)
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

// testWriter is t.Log as an io.Writer that goes silent when the test is over (t.Log would panic).
type testWriter struct {
	mu   sync.Mutex
	t    testing.TB
	over bool
}

func (w *testWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.over {
		w.t.Log(strings.TrimSuffix(string(p), "\n"))
	}
	return len(p), nil
}

func (w *testWriter) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
}

// startMembers starts embedded members in a directory of the test.
func startMembers(t testing.TB, shards int) *embedded.Members {
	t.Helper()
	m, err := embedded.Start(embedded.Config{
		Dir: filepath.Join(t.TempDir(), "members"), Shards: shards, NoFsync: true, Log: testLog(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

// startEtcd starts an ordinary etcd, with etcd's default limits, and returns its URL.
func startEtcd(t testing.TB) string {
	t.Helper()
	m, err := embedded.Start(embedded.Config{
		Dir: filepath.Join(t.TempDir(), "etcd"), Shards: 1, NoFsync: true, DefaultLimits: true, Log: testLog(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m.Shards[0]
}

// nodeConfig is a proxy over m, with ports of the kernel's choice.
func nodeConfig(t testing.TB, m *embedded.Members) node.Config {
	cfg := node.Config{
		// These tests ask what is answered, not how fast: a busy machine must not look like a lost shard.
		ShardTimeout:      30 * time.Second,
		ListenClientURLs:  []string{"http://127.0.0.1:0"},
		ListenMetricsURLs: []string{"http://127.0.0.1:0"},
		Coordinator:       []string{m.Coordinator},
		ShardMaxTxnOps:    embedded.MaxTxnOps, ShardMaxRequestBytes: embedded.MaxRequestBytes,
		BusyPoll: 200 * time.Microsecond, // as a proxy has it by default
		Log:      testLog(t),
	}
	for i, u := range m.Shards {
		cfg.Shards = append(cfg.Shards, node.Shard{Name: m.Names[i], URLs: []string{u}})
	}
	return cfg
}

// startNode starts a proxy and waits until it serves.
func startNode(t testing.TB, cfg node.Config) *node.Node {
	t.Helper()
	n, err := node.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	awaitNode(t, n)
	return n
}

func awaitNode(t testing.TB, n *node.Node) {
	t.Helper()
	select {
	case <-n.Ready():
	case err := <-n.Failed():
		t.Fatalf("the proxy gave up: %v", err)
	case <-time.After(readyTimeout):
		_, why := n.Status()
		t.Fatalf("the proxy is not ready after %v: %s", readyTimeout, why)
	}
}

// startSpindle starts k proxies over the same new members, all at once, and returns them ready.
func startSpindle(t testing.TB, shards, k int, change func(*node.Config)) []*node.Node {
	t.Helper()
	m := startMembers(t, shards)
	nodes := make([]*node.Node, k)
	var wg sync.WaitGroup
	errs := make([]error, k)
	for i := range k {
		cfg := nodeConfig(t, m)
		if change != nil {
			change(&cfg)
		}
		wg.Go(func() { nodes[i], errs[i] = node.Start(cfg) })
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nodes[i].Close)
	}
	for _, n := range nodes {
		awaitNode(t, n)
	}
	return nodes
}

// rpc is a raw gRPC connection with etcd's stubs: no retries, no balancer, no help of clientv3.
type rpc struct {
	conn *grpc.ClientConn
	kv   pb.KVClient
	w    pb.WatchClient
	m    pb.MaintenanceClient
	c    pb.ClusterClient
	l    pb.LeaseClient
}

func dial(t testing.TB, url string, more ...grpc.DialOption) *rpc {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+strings.TrimPrefix(url, "http://"), append(more,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxRecvBytes), grpc.MaxCallSendMsgSize(maxRecvBytes), grpc.WaitForReady(true)))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &rpc{conn, pb.NewKVClient(conn), pb.NewWatchClient(conn), pb.NewMaintenanceClient(conn), pb.NewClusterClient(conn), pb.NewLeaseClient(conn)}
}

// client returns a clientv3 for the URLs.
func client(t testing.TB, urls ...string) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: urls, DialTimeout: readyTimeout, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func callContext(t testing.TB) context.Context { return contextFor(t, callTimeout) }

// testContext is for all calls of a test.
func testContext(t testing.TB) context.Context { return contextFor(t, testTimeout) }

func contextFor(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// scale scales a test down for go test -short, and further for the race detector, under which etcd and grpc-go take ten
// times as long: what it finds it finds in the first thousands of requests.
func scale(n int) int {
	switch {
	case raceEnabled:
		return max(1, n/30)
	case testing.Short():
		return max(1, n/10)
	}
	return n
}

func waitUntil(t testing.TB, what string, timeout time.Duration, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not after %v: %s", timeout, what)
		}
		<-poll.C
	}
}

func fatalOnce(errs chan<- error, format string, args ...any) {
	select {
	case errs <- fmt.Errorf(format, args...):
	default:
	}
}
