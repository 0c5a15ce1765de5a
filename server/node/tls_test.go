package node

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"spindle/codec/tlsconn"
	"spindle/codec/tlsconn/tlstest"
	"spindle/shard/embedded"
)

// safeBuffer is a log that the test reads while it is written.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// secureConfig is a proxy with mutual TLS on both sides; member is what the members serve with.
func secureConfig(t testing.TB, ca *tlstest.CA, member tlstest.Pair, log *slog.Logger) Config {
	t.Helper()
	m, err := embedded.Start(embedded.Config{
		Dir: filepath.Join(t.TempDir(), "members"), Shards: 2, NoFsync: true,
		TLS: &embedded.TLS{CertFile: member.Cert, KeyFile: member.Key, TrustedCAFile: ca.File},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	server, proxy := ca.Issue("server"), ca.Issue("proxy")
	cfg := Config{
		ShardTimeout:      30 * time.Second,
		ListenClientURLs:  []string{"https://127.0.0.1:0"},
		ListenMetricsURLs: []string{"https://127.0.0.1:0"},
		Coordinator:       []string{m.Coordinator},
		ShardMaxTxnOps:    embedded.MaxTxnOps, ShardMaxRequestBytes: embedded.MaxRequestBytes,
		Log: log,
	}
	for i, u := range m.Shards {
		cfg.Shards = append(cfg.Shards, Shard{Name: m.Names[i], URLs: []string{u}})
	}
	if cfg.TLS, err = tlsconn.NewServerFiles(tlsconn.ServerOptions{CertFile: server.Cert, KeyFile: server.Key, TrustedCAFile: ca.File}, log); err != nil {
		t.Fatal(err)
	}
	if cfg.MemberTLS, err = tlsconn.NewClientFiles(tlsconn.ClientOptions{CAFile: ca.File, CertFile: proxy.Cert, KeyFile: proxy.Key}, log); err != nil {
		t.Fatal(err)
	}
	return cfg
}

func startReady(t testing.TB, cfg Config) *Node {
	t.Helper()
	n, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	select {
	case <-n.Ready():
	case err := <-n.Failed():
		t.Fatal(err)
	case <-time.After(3 * guard):
		_, why := n.Status()
		t.Fatalf("not ready: %s", why)
	}
	return n
}

// TestMutualTLS: clientv3 over mutual TLS to a proxy whose members and coordinator demand certificates.
func TestMutualTLS(t *testing.T) {
	ca := tlstest.NewCA(t, "ca")
	n := startReady(t, secureConfig(t, ca, ca.Issue("member"), slog.New(slog.NewTextHandler(io.Discard, nil))))
	for _, u := range append(n.ClientURLs(), n.MetricsURLs()...) {
		if !strings.HasPrefix(u, "https://") {
			t.Errorf("served at %s", u)
		}
	}
	if u := n.cfg.AdvertiseClientURLs; len(u) != 1 || !strings.HasPrefix(u[0], "https://") {
		t.Errorf("advertised as %q", u)
	}
	cl, err := clientv3.New(clientv3.Config{Endpoints: n.ClientURLs(), TLS: ca.Client(ca.Issue("client")), Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 3*guard)
	defer cancel()
	w := cl.Watch(ctx, "", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	<-w
	value := strings.Repeat("v", 200_000)
	for _, key := range []string{"a", "b", "c", "d"} {
		if _, err := cl.Put(ctx, key, value); err != nil {
			t.Fatal(err)
		}
	}
	get, err := cl.Get(ctx, "", clientv3.WithPrefix())
	if err != nil || get.Count != 4 {
		t.Fatalf("Get: %v", err)
	}
	for seen := 0; seen < 4; {
		for _, ev := range (<-w).Events {
			if string(ev.Kv.Value) != value {
				t.Fatal("another value")
			}
			seen++
		}
	}
}

// TestMemberCertificateExpired: the proxy does not become ready, and says whose certificate it is and what to do.
func TestMemberCertificateExpired(t *testing.T) {
	ca := tlstest.NewCA(t, "ca")
	var log safeBuffer
	cfg := secureConfig(t, ca, ca.Issue("old-member", tlstest.Expired), slog.New(slog.NewTextHandler(&log, nil)))
	n, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	want := `its certificate is refused: "CN=old-member" is valid from`
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(guard); ; <-tick.C {
		ready, why := n.Status()
		if ready {
			t.Fatal("ready")
		}
		if (strings.Contains(why, "coordinator") || strings.Contains(why, "member cluster")) && strings.Contains(why, want) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("not ready because: %s\n%s", why, log.String())
		}
	}
	if !strings.Contains(log.String(), "renew it") {
		t.Error(log.String())
	}
}
