package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/codec/tlsconn/tlstest"
	"spindle/server/attack"
	"spindle/shard/embedded"
)

const (
	// attackKeys times memoryValue is the list that attackers ask for: 10 MiB.
	attackKeys = 10 << 10
	// attackMemory is --max-client-memory of the attacked proxy, and maxAttackRSS, in MiB, how large it may become.
	attackMemory = 256 << 20
	maxAttackRSS = 1200
)

// TestAttackReport runs every attack, in plain text and inside mutual TLS, for SPINDLE_ATTACK (3s, say) against a proxy
// that is a process of its own, and shows what the attackers sent, what the proxy spent, and what a good client beside them saw. `make attack`.
func TestAttackReport(t *testing.T) {
	each, err := time.ParseDuration(os.Getenv("SPINDLE_ATTACK"))
	if err != nil {
		t.Skip("SPINDLE_ATTACK is not a duration")
	}
	// The members' log would fill with lists that were canceled.
	m, err := embedded.Start(embedded.Config{Dir: filepath.Join(t.TempDir(), "members"), Shards: 3, NoFsync: true,
		Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	ca, other := tlstest.NewCA(t, "ca"), tlstest.NewCA(t, "other")
	pair := ca.Issue("server")
	url, metricsURL := freeURL(t), freeURL(t)
	secureURL := strings.Replace(freeURL(t), "http:", "https:", 1)
	args := append(proxyArgs(m, url+","+secureURL, metricsURL), "--max-client-memory", strconv.Itoa(attackMemory),
		"--cert-file", pair.Cert, "--key-file", pair.Key, "--trusted-ca-file", ca.File)
	p := startProcess(t, t.TempDir(), args...)
	p.awaitReady(t)
	fill(t, url, attackKeys)
	plain := attack.Target{Addr: strings.TrimPrefix(url, "http://")}
	secure := attack.Target{Addr: strings.TrimPrefix(secureURL, "https://"), TLS: ca.Client(ca.Issue("client")),
		Stranger: ca.Client(other.Issue("stranger"))}

	t.Logf("%-26s %6s %8s %9s | %7s %8s %8s | %9s %9s %7s | %s", "attack", "conns", "bursts", "sent MiB",
		"CPU s", "RSS MiB", "peak MiB", "p99 quiet", "p99 under", "errs", "stopped by")
	for _, a := range attack.All("m/", "m0") {
		attackOne(t, p, metricsURL, a, plain, each)
	}
	t.Log("inside mutual TLS:")
	for _, a := range append(attack.All("m/", "m0"), attack.OverTLS()...) {
		attackOne(t, p, metricsURL, a, secure, each)
	}
}

// attackOne runs one attack and shows its line.
func attackOne(t *testing.T, p *process, metricsURL string, a *attack.Attack, to attack.Target, each time.Duration) {
	if only := os.Getenv("SPINDLE_ATTACK_ONLY"); only != "" && a.Name != only {
		return
	}
	good := dialTarget(t, to)
	quiet, _, errs := goodClient(t, good, time.Second, nil)
	if errs > 0 {
		t.Errorf("before %s: %d errors", a.Name, errs)
	}
	before, cpu := limitHits(t, metricsURL), cpuOf(t, p)
	rss := resetPeak(t, p)
	var sent attack.Sent
	quit, done := make(chan struct{}), make(chan struct{})
	go func() { defer close(done); attack.Run(a, to, quit, &sent) }()
	under, n, errs := goodClient(t, good, each, p.done)
	close(quit)
	<-done
	after := limitHits(t, metricsURL)
	var stopped []string
	for name, v := range after {
		if v > before[name] {
			stopped = append(stopped, fmt.Sprintf("%s %d", name, v-before[name]))
		}
	}
	slices.Sort(stopped)
	peak := statusOf(t, p, "VmHWM")
	t.Logf("%-26s %6d %8d %9.1f | %7.2f %8d %8d | %9v %9v %2d/%-4d | %s", a.Name, sent.Conns.Load(), sent.Turns.Load(),
		float64(sent.Bytes.Load())/(1<<20), cpuOf(t, p)-cpu, rss, peak, quiet.Round(10*time.Microsecond),
		under.Round(10*time.Microsecond), errs, n, strings.Join(stopped, ", "))
	if peak > maxAttackRSS {
		t.Errorf("%s: the proxy took %d MiB", a.Name, peak)
	}
	if errs > 0 {
		t.Errorf("%s: %d of the good client's %d requests failed", a.Name, errs, n)
	}
}

// dialTarget is a good client of the attacked.
func dialTarget(t testing.TB, to attack.Target) pb.KVClient {
	t.Helper()
	creds := insecure.NewCredentials()
	if to.TLS != nil {
		creds = credentials.NewTLS(to.TLS.Clone())
	}
	conn, err := grpc.NewClient("passthrough:///"+to.Addr, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return pb.NewKVClient(conn)
}

// goodClient puts and gets one key again and again for d, and returns the 99th percentile of what it waited.
func goodClient(t testing.TB, c pb.KVClient, d time.Duration, gone <-chan struct{}) (p99 time.Duration, n, errs int) {
	t.Helper()
	var took []time.Duration
	for end := time.Now().Add(d); time.Now().Before(end); n++ {
		select {
		case <-gone:
			t.Fatal("the proxy is gone")
		default:
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		start := time.Now()
		_, err := c.Put(ctx, &pb.PutRequest{Key: []byte("good"), Value: []byte("v")})
		if err == nil {
			_, err = c.Range(ctx, &pb.RangeRequest{Key: []byte("good")})
		}
		cancel()
		if err != nil {
			errs++
			if errs == 1 {
				t.Logf("the good client: %v", err)
			}
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	return took[len(took)*99/100], n, errs
}

// limitHits reads what the proxy has counted, by the name of the bound.
func limitHits(t testing.TB, url string) map[string]int {
	t.Helper()
	_, page := httpGet(t, url+"/metrics")
	out := map[string]int{}
	for line := range strings.SplitSeq(page, "\n") {
		rest, ok := strings.CutPrefix(line, `spindle_client_limit_hits_total{limit="`)
		if !ok {
			continue
		}
		name, value, _ := strings.Cut(rest, `"} `)
		out[name], _ = strconv.Atoi(value)
	}
	return out
}

// cpuOf returns the seconds of CPU that the process has used.
func cpuOf(t testing.TB, p *process) float64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		t.Skip(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	utime, _ := strconv.Atoi(f[11])
	stime, _ := strconv.Atoi(f[12])
	return float64(utime+stime) / 100
}
