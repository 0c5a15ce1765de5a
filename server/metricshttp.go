package server

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/net/netutil"

	"spindle/codec/tlsconn"
)

// Limits of the metrics server. It is not for clients on the far side of the world.
const (
	metricsHeaderTimeout = 5 * time.Second
	metricsReadTimeout   = 10 * time.Second
	metricsWriteTimeout  = 30 * time.Second
	metricsIdleTimeout   = time.Minute
	metricsHeaderBytes   = 16 << 10
	// maxMetricsConns is how many connections one URL serves at a time, handshakes of TLS included; further ones wait in
	// the kernel. They come out of the descriptors that maxConnsShare leaves. net/http waits up to a second when accept
	// fails, and goes on.
	maxMetricsConns = 128
)

// Health is what the metrics server tells about the proxy. It is asked on goroutines of net/http.
type Health interface {
	// Ready says whether clients are served, and if not, why; if they are, what is not, "" for nothing.
	Ready() (ready bool, reason string)
	// EtcdVersion is the version of etcd that clients are shown, "3.6.0" say.
	EtcdVersion() string
}

// Metrics is the HTTP server for operators: /metrics, and the health checks and version in etcd's form.
type Metrics struct {
	servers []*http.Server
	addrs   []net.Addr
	urls    []string
}

// StartMetrics serves on urls (http://host:port or unix:///path; https and unixs with files, as etcd does: with the
// certificate for clients, whose own are demanded here too). version is Spindle's own. profiles adds /debug/pprof/.
func StartMetrics(urls []string, files *tlsconn.ServerFiles, h Health, version string, profiles bool, log *slog.Logger) (*Metrics, error) {
	if log == nil {
		log = slog.Default()
	}
	m := &Metrics{}
	if len(urls) == 0 {
		return m, nil
	}
	listens, err := parseListens(urls)
	if err == nil {
		err = needTLS(listens, files)
	}
	if err != nil {
		return nil, err
	}
	for _, ln := range listens {
		l, err := ln.open()
		if err != nil {
			_ = m.Close()
			return nil, err
		}
		s := &http.Server{
			Handler:           metricsMux(h, version, profiles),
			ReadHeaderTimeout: metricsHeaderTimeout,
			ReadTimeout:       metricsReadTimeout,
			WriteTimeout:      metricsWriteTimeout,
			IdleTimeout:       metricsIdleTimeout,
			MaxHeaderBytes:    metricsHeaderBytes,
			ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		}
		l = netutil.LimitListener(l, maxMetricsConns)
		m.servers = append(m.servers, s)
		m.addrs = append(m.addrs, l.Addr())
		m.urls = append(m.urls, ln.urlOf(l.Addr()))
		if ln.tls {
			l = tls.NewListener(l, files.HTTP1())
		}
		go func() {
			if err := s.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
				log.Error("metrics server stopped", "url", ln.url, "error", err)
			}
		}()
	}
	return m, nil
}

// Addrs returns the addresses listened on, in the order of the URLs.
func (m *Metrics) Addrs() []net.Addr { return m.addrs }

// URLs returns the same as Addrs, as URLs.
func (m *Metrics) URLs() []string { return m.urls }

// Close stops the server at once.
func (m *Metrics) Close() error {
	var errs []error
	for _, s := range m.servers {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// Shutdown stops the server after the requests under way.
func (m *Metrics) Shutdown(ctx context.Context) error {
	var errs []error
	for _, s := range m.servers {
		errs = append(errs, s.Shutdown(ctx))
	}
	return errors.Join(errs...)
}

// metricsMux answers as etcd's own handlers do (server/etcdserver/api/etcdhttp): /health is JSON with
// strings for booleans, /readyz and /livez are "ok" or 503 with the reason.
func metricsMux(h Health, version string, profiles bool) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		metrics.WritePrometheus(w, true)
	})
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		ready, reason := h.Ready()
		status, answer := http.StatusOK, "true"
		if ready {
			reason = ""
		} else {
			status, answer = http.StatusServiceUnavailable, "false"
		}
		writeJSON(w, status, struct {
			Health string `json:"health"`
			Reason string `json:"reason"`
		}{answer, reason})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		ready, reason := h.Ready()
		if !ready {
			http.Error(w, "[-]ready failed: "+reason, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprint(w, "ok\n")
		if reason != "" {
			fmt.Fprintln(w, reason)
		}
	})
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok\n") })
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) {
		etcd := h.EtcdVersion()
		writeJSON(w, http.StatusOK, struct {
			Server  string `json:"etcdserver"`
			Cluster string `json:"etcdcluster"`
			Spindle string `json:"spindle"`
		}{etcd, minorVersion(etcd), version})
	})
	if profiles {
		// A profile of many seconds moves its own write deadline. The index serves heap, allocs, goroutine and so on.
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// minorVersion turns 3.6.16 into 3.6.0, which is how etcd shows the version of a whole cluster.
func minorVersion(v string) string {
	parts := strings.SplitN(v, ".", 3)
	if len(parts) < 2 {
		return v
	}
	return parts[0] + "." + parts[1] + ".0"
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	b, err := json.Marshal(v)
	if err != nil {
		return // only strings are marshalled here
	}
	_, _ = w.Write(b)
}
