package server

import (
	"io"
	"net/http"
	"strings"
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
	m, err := StartMetrics([]string{"http://127.0.0.1:0", "unix://" + t.TempDir() + "/m"}, nil, h, "v0", quiet())
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
	if code, _ := get("/nothing"); code != 404 {
		t.Errorf("/nothing: %d", code)
	}
	if _, err := StartMetrics([]string{"http://" + m.Addrs()[0].String()}, nil, h, "v0", quiet()); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second server: %v", err)
	}
	if m, err := StartMetrics(nil, nil, h, "v0", nil); err != nil || m.Close() != nil {
		t.Errorf("no URLs: %v", err)
	}
}
