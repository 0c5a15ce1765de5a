package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"spindle/codec/tlsconn"
	"spindle/shard"
	"spindle/shard/embedded"
)

// Config is everything that can be set, by flag, environment or file; options says how. Validate has
// accepted it before anything is started.
type Config struct {
	ListenClientURLs    []string
	AdvertiseClientURLs []string // default: ListenClientURLs
	ListenMetricsURLs   []string
	EnablePprof         bool // as etcd's, on the metrics URLs

	// TLS is for listen URLs with TLS, MemberTLS for members' endpoints.
	TLS       tlsconn.ServerOptions
	MemberTLS tlsconn.ClientOptions

	// Shards are the member clusters. Without any, Spindle runs on embedded members.
	Shards      []ShardConfig
	Coordinator []string
	// AcceptDataLoss names member clusters that may be behind what was seen of them.
	AcceptDataLoss []string
	// ReplaceCoordinator lets an empty coordinator take the place of the one that the partition map names.
	ReplaceCoordinator bool

	// Partitioner is hash, range, or empty for what the members have recorded; Ranges are from the file.
	Partitioner string
	Ranges      []RangeConfig

	// AutoCompactionMode and AutoCompactionRetention are etcd's.
	AutoCompactionMode      string
	AutoCompactionRetention string

	// DataDir and EmbeddedShards are for embedded mode only.
	DataDir        string
	EmbeddedShards int

	// ShardMaxTxnOps and ShardMaxRequestBytes are what the members accept; embedded ones accept more.
	ShardMaxTxnOps       int
	ShardMaxRequestBytes int
	// ShardQuotaBackendBytes is the quota of members that do not report it, 0 for unknown.
	ShardQuotaBackendBytes int

	// MaxRequestBytes, MaxConcurrentStreams and GRPCKeepalive* are etcd's; MaxClientMemory is in bytes, 0 for no limit.
	MaxRequestBytes       int
	MaxConcurrentStreams  int
	MaxClientMemory       int
	GRPCKeepaliveMinTime  time.Duration
	GRPCKeepaliveInterval time.Duration
	GRPCKeepaliveTimeout  time.Duration

	LogLevel slog.Level

	WatchProgressNotifyInterval time.Duration
	ReorderWindow               time.Duration
	ShardTimeout                time.Duration
	RingSize                    int
	Loops                       int // 0: half the cores
	BusyPoll                    time.Duration

	// given holds the names of the options that did not keep their default, and where from.
	given map[string]string
	// values holds what each option was set from, its default included; file is the configuration file, "" for none.
	values map[string][]string
	file   string
}

// ShardConfig names one member cluster.
type ShardConfig struct {
	Name string
	URLs []string
}

// Embedded says whether Spindle is to run on members inside its own process.
func (c *Config) Embedded() bool { return len(c.Shards) == 0 }

// Bounds of what Validate accepts.
const (
	maxShards       = 64
	maxShardName    = 64
	minRingSize     = 1 << 10
	maxRingSize     = 1 << 26
	maxLoops        = 1024
	maxBusyPoll     = 10 * time.Millisecond
	minProgress     = 100 * time.Millisecond // kube-apiserver's own rhythm of progress requests
	minWindow       = time.Millisecond
	maxWindow       = 10 * time.Second
	minShardTimeout = 100 * time.Millisecond
	maxShardTimeout = time.Minute
	minTxnOps       = 16
	minRequestBytes = 64 << 10
	maxKeepalive    = 30 * 24 * time.Hour
	// minClientRequest is small on purpose, as with etcd; maxClientRequest leaves room in one gRPC message.
	minClientRequest = 1
	maxClientRequest = 1 << 30
)

// Validate checks what single options cannot: ranges and combinations. Its error is one sentence that
// names the flag and says what to do.
func (c *Config) Validate() error {
	for _, l := range []struct {
		flag string
		urls []string
		need bool
	}{
		{"listen-client-urls", c.ListenClientURLs, true},
		{"advertise-client-urls", c.AdvertiseClientURLs, false},
		{"listen-metrics-urls", c.ListenMetricsURLs, false},
	} {
		if l.need && len(l.urls) == 0 {
			return fmt.Errorf("--%s is empty: give at least one URL, such as http://127.0.0.1:2379", l.flag)
		}
		for _, u := range l.urls {
			if err := checkURL(u); err != nil {
				return fmt.Errorf("--%s: %w", l.flag, err)
			}
		}
	}
	seen := map[string]string{}
	for _, l := range []struct {
		flag string
		urls []string
	}{{"listen-client-urls", c.ListenClientURLs}, {"listen-metrics-urls", c.ListenMetricsURLs}} {
		for _, u := range l.urls {
			if strings.HasSuffix(u, ":0") {
				continue // the kernel chooses a port
			}
			if other, ok := seen[u]; ok {
				return fmt.Errorf("--%s: %s is in --%s already: give each URL a port of its own", l.flag, u, other)
			}
			seen[u] = l.flag
		}
	}
	if err := c.validateTLS(); err != nil {
		return err
	}
	if err := c.validateMembers(); err != nil {
		return err
	}
	if _, err := c.partition(); err != nil {
		return err
	}
	if _, err := shard.ParseAutoCompact(c.AutoCompactionMode, c.AutoCompactionRetention); err != nil {
		return err
	}
	for _, r := range []struct {
		flag        string
		v, min, max time.Duration
	}{
		{"watch-progress-notify-interval", c.WatchProgressNotifyInterval, minProgress, 24 * time.Hour},
		{"reorder-window", c.ReorderWindow, minWindow, maxWindow},
		{"shard-timeout", c.ShardTimeout, minShardTimeout, maxShardTimeout},
		{"busy-poll", c.BusyPoll, 0, maxBusyPoll},
		{"grpc-keepalive-min-time", c.GRPCKeepaliveMinTime, 0, maxKeepalive},
		{"grpc-keepalive-interval", c.GRPCKeepaliveInterval, 0, maxKeepalive},
		{"grpc-keepalive-timeout", c.GRPCKeepaliveTimeout, 0, maxKeepalive},
	} {
		if r.v < r.min || r.v > r.max {
			return fmt.Errorf("--%s %v: give a duration from %v to %v", r.flag, r.v, r.min, r.max)
		}
	}
	for _, r := range []struct {
		flag        string
		v, min, max int
	}{
		{"ring-size", c.RingSize, minRingSize, maxRingSize},
		{"loops", c.Loops, 0, maxLoops},
		{"max-request-bytes", c.MaxRequestBytes, minClientRequest, maxClientRequest},
		{"max-concurrent-streams", c.MaxConcurrentStreams, 1, 1<<31 - 1},
		{"max-client-memory", c.MaxClientMemory, 0, 1 << 50},
		{"shard-max-txn-ops", c.ShardMaxTxnOps, minTxnOps, 1 << 20},
		{"shard-max-request-bytes", c.ShardMaxRequestBytes, minRequestBytes, 1 << 30},
		{"shard-quota-backend-bytes", c.ShardQuotaBackendBytes, 0, 1 << 50},
	} {
		if r.v < r.min || r.v > r.max {
			return fmt.Errorf("--%s %d: give a number from %d to %d", r.flag, r.v, r.min, r.max)
		}
	}
	return nil
}

// validateTLS checks that certificates and URLs fit; the files themselves are read by run.
func (c *Config) validateTLS() error {
	serves, secure := false, ""
	for _, u := range slices.Concat(c.ListenClientURLs, c.ListenMetricsURLs) {
		if usesTLS(u) {
			serves, secure = true, u
		}
	}
	switch {
	case (c.TLS.CertFile == "") != (c.TLS.KeyFile == ""):
		return errors.New("--cert-file and --key-file belong together: give both, or none")
	case serves && c.TLS.CertFile == "":
		return fmt.Errorf("%s needs a certificate: give --cert-file and --key-file", secure)
	case !serves:
		for _, name := range []string{"cert-file", "trusted-ca-file", "client-cert-auth", "client-crl-file", "client-cert-allowed-hostname"} {
			if from := c.given[name]; from != "" && !(name == "client-cert-auth" && !c.TLS.ClientCertAuth) {
				return fmt.Errorf("--%s (%s) has no effect, since nothing is served with TLS: write https:// in --listen-client-urls", name, from)
			}
		}
	}
	if (c.MemberTLS.CertFile == "") != (c.MemberTLS.KeyFile == "") {
		return errors.New("--shard-cert and --shard-key belong together: give both, or none")
	}
	if c.membersUseTLS() {
		return nil
	}
	for _, name := range []string{"shard-cacert", "shard-cert"} {
		if from := c.given[name]; from != "" {
			return fmt.Errorf("--%s (%s) has no effect, since no endpoint of --shard or --coordinator begins with https://: write https:// there", name, from)
		}
	}
	return nil
}

func (c *Config) membersUseTLS() bool {
	for _, s := range c.Shards {
		if slices.ContainsFunc(s.URLs, usesTLS) {
			return true
		}
	}
	return slices.ContainsFunc(c.Coordinator, usesTLS)
}

func usesTLS(u string) bool {
	return strings.HasPrefix(u, "https:") || strings.HasPrefix(u, "unixs:")
}

func (c *Config) validateMembers() error {
	if c.Embedded() {
		if len(c.Coordinator) > 0 {
			return errors.New("--coordinator without --shard: name the member clusters too, one --shard NAME=URL[,URL...] each (or neither, for embedded members)")
		}
		if c.EmbeddedShards < 1 || c.EmbeddedShards > embedded.MaxShards {
			return fmt.Errorf("--embedded-shards %d: give a number from 1 to %d", c.EmbeddedShards, embedded.MaxShards)
		}
		if c.DataDir == "" {
			return errors.New("--data-dir is empty: name a directory for the embedded members' data")
		}
		for _, name := range []string{"shard-max-txn-ops", "shard-max-request-bytes", "shard-quota-backend-bytes"} {
			if from := c.given[name]; from != "" {
				return fmt.Errorf("--%s (%s) describes member clusters that were started elsewhere: name them with --shard, or leave it out", name, from)
			}
		}
		return nil
	}
	for _, name := range []string{"data-dir", "embedded-shards"} {
		if from := c.given[name]; from != "" {
			return fmt.Errorf("--%s (%s) is for embedded members, and --shard names real ones: leave out one of the two", name, from)
		}
	}
	if len(c.Coordinator) == 0 {
		return errors.New("--shard without --coordinator: name the small etcd cluster that hands out revisions, --coordinator URL[,URL...]")
	}
	if len(c.Shards) > maxShards {
		return fmt.Errorf("%d times --shard: at most %d are supported", len(c.Shards), maxShards)
	}
	names, urls := map[string]bool{}, map[string]string{}
	add := func(flag string, list []string) error {
		for _, u := range list {
			if err := checkURL(u); err != nil {
				return fmt.Errorf("%s: %w", flag, err)
			}
			if other, ok := urls[u]; ok {
				return fmt.Errorf("%s: %s is in %s already: an etcd can have one place only", flag, u, other)
			}
			urls[u] = flag
		}
		return nil
	}
	for _, s := range c.Shards {
		if err := checkShardName(s.Name); err != nil {
			return err
		}
		if names[s.Name] {
			return fmt.Errorf("--shard %s is given twice: list all endpoints of one member cluster in one --shard %s=URL,URL", s.Name, s.Name)
		}
		names[s.Name] = true
		if err := add("--shard "+s.Name, s.URLs); err != nil {
			return err
		}
	}
	return add("--coordinator", c.Coordinator)
}

func checkShardName(name string) error {
	ok := name != "" && len(name) <= maxShardName && !strings.ContainsFunc(name, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_.", r))
	})
	if !ok {
		return fmt.Errorf("--shard: %q is no good name: use 1 to %d letters, digits, '-', '_' and '.'", name, maxShardName)
	}
	return nil
}

// checkURL accepts http://host:port and unix:///path, and both with TLS.
func checkURL(s string) error {
	u, err := url.Parse(s)
	if err != nil {
		return fmt.Errorf("%q is not a URL: write http://host:port", s)
	}
	switch u.Scheme {
	case "http", "https":
	case "unix", "unixs":
		if u.Host == "" && len(u.Path) > 1 {
			return nil
		}
		return fmt.Errorf("%s: write unix:///path (or unixs:///path) with three slashes, or http://host:port", s)
	default:
		return fmt.Errorf("%q is not a URL of the form http://host:port or https://host:port", s)
	}
	host, port, err := net.SplitHostPort(u.Host)
	if err != nil || host == "" || port == "" {
		return fmt.Errorf("%s: host and port are both needed, as in http://127.0.0.1:2379", s)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
		return fmt.Errorf("%s: a port is a number from 1 to 65535", s)
	}
	if u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return fmt.Errorf("%s: only %s://host:port, nothing behind it", s, u.Scheme)
	}
	return nil
}
