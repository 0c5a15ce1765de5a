package server

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

type fakeHealth struct{ reason string }

func (f *fakeHealth) Ready() (bool, string) { return f.reason == "", f.reason }
func (f *fakeHealth) EtcdVersion() string   { return "3.6.16" }

func TestMetricsServer(t *testing.T) {
	s := startServer(t, Config{Loops: 1})
	if _, err := pb.NewKVClient(s.dial(t)).Range(testContext(t), &pb.RangeRequest{Key: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	h := &fakeHealth{}
	m, err := StartMetrics([]string{"http://127.0.0.1:0", "unix://" + t.TempDir() + "/m"}, nil, h, "v0", false, quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	get := func(path string) (int, string) {
		t.Helper()
		resp, err := http.Get("http://" + m.Addrs()[0].String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	expect := func(path string, wantCode int, want string) {
		t.Helper()
		if code, body := get(path); code != wantCode || body != want {
			t.Errorf("%s: %d %q", path, code, body)
		}
	}
	expect("/health", 200, `{"health":"true","reason":""}`)
	expect("/readyz", 200, "ok\n")
	expect("/livez", 200, "ok\n")
	expect("/version", 200, `{"etcdserver":"3.6.16","etcdcluster":"3.6.0","spindle":"v0"}`)
	h.reason = "shard a is away"
	expect("/health", 503, `{"health":"false","reason":"shard a is away"}`)
	expect("/readyz", 503, "[-]ready failed: shard a is away\n")
	expect("/livez", 200, "ok\n")

	_, body := get("/metrics")
	for _, want := range []string{
		`spindle_requests_total{method="etcdserverpb.KV/Range",code="OK"}`,
		`spindle_request_duration_seconds_count{method="etcdserverpb.KV/Range"}`,
		`spindle_client_connections `, `spindle_client_connections_blocked `, `spindle_client_streams `,
		`spindle_client_received_bytes_total`, `spindle_client_sent_bytes_total`,
		`spindle_loop_turns_total{loop="0"}`, `process_cpu_seconds_total`, `go_goroutines`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("/metrics lacks %s", want)
		}
	}
	for _, path := range []string{"/nothing", "/debug/pprof/", "/debug/pprof/profile"} {
		if code, _ := get(path); code != 404 {
			t.Errorf("%s: %d", path, code)
		}
	}
	if _, err := StartMetrics([]string{"http://" + m.Addrs()[0].String()}, nil, h, "v0", false, quiet()); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second server: %v", err)
	}
	if m, err := StartMetrics(nil, nil, h, "v0", false, nil); err != nil || m.Close() != nil {
		t.Errorf("no URLs: %v", err)
	}
}

// heldHealth answers when it is let.
type heldHealth struct {
	fakeHealth
	inside, most atomic.Int32
	let          chan struct{}
}

func (h *heldHealth) Ready() (bool, string) {
	n := h.inside.Add(1)
	for m := h.most.Load(); n > m && !h.most.CompareAndSwap(m, n); m = h.most.Load() {
	}
	<-h.let
	h.inside.Add(-1)
	return true, ""
}

// The metrics server takes a bounded number of connections, and serves those that wait when others are gone.
func TestMetricsServerIsBounded(t *testing.T) {
	const more = 20
	h := &heldHealth{let: make(chan struct{})}
	m, err := StartMetrics([]string{"http://127.0.0.1:0"}, nil, h, "v0", false, quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	answers := make(chan error, maxMetricsConns+more)
	for range maxMetricsConns + more {
		c, err := net.Dial("tcp", m.Addrs()[0].String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		go func() {
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err == nil && resp.StatusCode != 200 {
				err = errors.New(resp.Status)
			}
			answers <- err
		}()
	}
	eventually(t, "all places are taken", func() bool { return h.inside.Load() >= maxMetricsConns })
	for range maxMetricsConns + more {
		h.let <- struct{}{}
		if err := receive(t, "an answer", answers); err != nil {
			t.Error(err)
		}
	}
	if n := h.most.Load(); n > maxMetricsConns {
		t.Errorf("%d were served at once", n)
	}
	if s := m.servers[0]; s.IdleTimeout <= 0 || s.ReadTimeout <= 0 || s.ReadHeaderTimeout <= 0 || s.WriteTimeout <= 0 {
		t.Error("a connection may last for ever")
	}
}

// TestProfiles reads profiles from the metrics URL, which has them only when asked (TestMetricsServer).
func TestProfiles(t *testing.T) {
	m, err := StartMetrics([]string{"http://127.0.0.1:0"}, nil, &fakeHealth{}, "v0", true, quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for path, begin := range map[string]string{
		"/debug/pprof/": "<html>", "/debug/pprof/profile?seconds=1": "\x1f\x8b", "/debug/pprof/allocs": "\x1f\x8b",
		"/debug/pprof/heap": "\x1f\x8b", "/debug/pprof/goroutine?debug=1": "goroutine profile:",
	} {
		// An encoding of our own choice, so that net/http does not unpack what is packed.
		req, _ := http.NewRequest("GET", m.URLs()[0]+path, nil)
		req.Header.Set("Accept-Encoding", "identity")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 || !strings.HasPrefix(string(body), begin) {
			t.Errorf("%s: %d, %v, %.40q", path, resp.StatusCode, err, body)
		}
	}
}
