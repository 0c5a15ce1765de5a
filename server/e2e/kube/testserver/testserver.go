// Package testserver starts the server that k8s.io/apiserver's own storage tests run against: Spindle over
// embedded shards, or a plain etcd for reference. It has the exported API of the package
// k8s.io/apiserver/pkg/storage/etcd3/testserver, and run.sh puts it in that package's place in a copy of
// the apiserver module, so that those tests run unchanged, the ones of private functions included.
//
// SPINDLE_KUBE_BACKEND chooses: "spindle" (default) or "etcd". Spindle is started anew for every test that asks for
// a server, as etcd is: the tests expect an empty store and small revisions.
package testserver

import (
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	storagetesting "k8s.io/apiserver/pkg/storage/testing"

	"spindle/server/node"
	"spindle/shard/embedded"
)

const (
	shards       = 3
	readyTimeout = 60 * time.Second
	dialTimeout  = 20 * time.Second
)

// NewTestConfig returns an etcd configuration. The tests change the watch progress interval in it, which
// Spindle takes over; the rest is for the plain etcd.
func NewTestConfig(t testing.TB) *embed.Config {
	cfg := embed.NewConfig()
	cfg.UnsafeNoFsync = true
	cfg.Dir = filepath.Join(t.TempDir(), "etcd")
	anyPort := []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = anyPort, anyPort
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = anyPort, anyPort
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.TickMs, cfg.ElectionMs = 20, 200 // it is alone: this only makes the start shorter
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	return cfg
}

// RunEtcd starts the server, with cfg if it is not nil, and returns a client of it. Both end with the test.
func RunEtcd(t testing.TB, cfg *embed.Config) *kubernetes.Client {
	t.Helper()
	var endpoint string
	switch backend := os.Getenv("SPINDLE_KUBE_BACKEND"); backend {
	case "", "spindle":
		endpoint = startSpindle(t, cfg)
	case "etcd":
		endpoint = startEtcd(t, cfg)
	default:
		t.Fatalf("SPINDLE_KUBE_BACKEND=%q: spindle or etcd", backend)
	}
	client, err := kubernetes.New(clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: dialTimeout, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	// As upstream's: not closed by the test, its goroutines end with the server.
	recorder := storagetesting.NewKubernetesRecorder(client.Kubernetes)
	client.KV = storagetesting.NewKVRecorder(client.KV, recorder)
	client.Kubernetes = recorder
	return client
}

func startEtcd(t testing.TB, cfg *embed.Config) string {
	t.Helper()
	if cfg == nil {
		cfg = NewTestConfig(t)
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(readyTimeout):
		t.Fatalf("etcd is not ready after %v", readyTimeout)
	}
	return "http://" + e.Clients[0].Addr().String()
}

func startSpindle(t testing.TB, cfg *embed.Config) string {
	t.Helper()
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	m, err := embedded.Start(embedded.Config{Dir: filepath.Join(t.TempDir(), "members"), Shards: shards, NoFsync: true, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	c := node.Config{
		ListenClientURLs: []string{"http://127.0.0.1:0"},
		Coordinator:      []string{m.Coordinator},
		ShardMaxTxnOps:   embedded.MaxTxnOps, ShardMaxRequestBytes: embedded.MaxRequestBytes,
		Log: log,
	}
	if cfg != nil {
		c.ProgressInterval = cfg.WatchProgressNotifyInterval
	}
	for i, u := range m.Shards {
		c.Shards = append(c.Shards, node.Shard{Name: m.Names[i], URLs: []string{u}})
	}
	n, err := node.Start(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	select {
	case <-n.Ready():
	case err := <-n.Failed():
		t.Fatalf("the proxy gave up: %v", err)
	case <-time.After(readyTimeout):
		_, why := n.Status()
		t.Fatalf("the proxy is not ready after %v: %s", readyTimeout, why)
	}
	return n.ClientURLs()[0]
}
