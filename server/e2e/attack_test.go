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

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

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

// TestAttackReport runs every attack for SPINDLE_ATTACK (3s, say) against a proxy that is a process of its own, and
// shows what the attackers sent, what the proxy spent, and what a good client beside them saw. `make attack`.
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
	url, metricsURL := freeURL(t), freeURL(t)
	args := append(proxyArgs(m, url, metricsURL), "--max-client-memory", strconv.Itoa(attackMemory))
	p := startProcess(t, t.TempDir(), args...)
	p.awaitReady(t)
	fill(t, url, attackKeys)
	addr := strings.TrimPrefix(url, "http://")

	t.Logf("%-20s %6s %8s %9s | %7s %8s %8s | %9s %9s %5s | %s", "attack", "conns", "bursts", "sent MiB",
		"CPU s", "RSS MiB", "peak MiB", "p99 quiet", "p99 under", "errs", "stopped by")
	for _, a := range attack.All("m/", "m0") {
		if only := os.Getenv("SPINDLE_ATTACK_ONLY"); only != "" && a.Name != only {
			continue
		}
		quiet, _, errs := goodClient(t, url, time.Second, nil)
		if errs > 0 {
			t.Errorf("before %s: %d errors", a.Name, errs)
		}
		before, cpu := limitHits(t, metricsURL), cpuOf(t, p)
		rss := resetPeak(t, p)
		var sent attack.Sent
		quit, done := make(chan struct{}), make(chan struct{})
		go func() { defer close(done); attack.Run(a, addr, quit, &sent) }()
		under, n, errs := goodClient(t, url, each, p.done)
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
		t.Logf("%-20s %6d %8d %9.1f | %7.2f %8d %8d | %9v %9v %2d/%d | %s", a.Name, sent.Conns.Load(), sent.Turns.Load(),
			float64(sent.Bytes.Load())/(1<<20), cpuOf(t, p)-cpu, rss, peak, quiet.Round(10*time.Microsecond),
			under.Round(10*time.Microsecond), errs, n, strings.Join(stopped, ", "))
		if peak > maxAttackRSS {
			t.Errorf("%s: the proxy took %d MiB", a.Name, peak)
		}
		if errs > 0 {
			t.Errorf("%s: %d of the good client's %d requests failed", a.Name, errs, n)
		}
	}
}

// goodClient puts and gets one key again and again for d, and returns the 99th percentile of what it waited.
func goodClient(t testing.TB, url string, d time.Duration, gone <-chan struct{}) (p99 time.Duration, n, errs int) {
	t.Helper()
	c := dial(t, url)
	var took []time.Duration
	for end := time.Now().Add(d); time.Now().Before(end); n++ {
		select {
		case <-gone:
			t.Fatal("the proxy is gone")
		default:
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		start := time.Now()
		_, err := c.kv.Put(ctx, &pb.PutRequest{Key: []byte("good"), Value: []byte("v")})
		if err == nil {
			_, err = c.kv.Range(ctx, &pb.RangeRequest{Key: []byte("good")})
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
