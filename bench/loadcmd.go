package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"

	"spindle/bench/load"
	"spindle/bench/report"
)

const loadUsage = `bench [flags]            drive an etcd endpoint with the requests of Kubernetes
bench compare [flags]    compare etcd, etcd grpc-proxy and Spindle on this machine (bench compare --help)

  bench --endpoints http://10.0.3.1:2379 --workload get=8,update=3,create=1 --duration 30s
  bench --endpoints https://10.0.3.1:2379 --cacert ca.pem --cert client.pem --key client-key.pem --html report.html
  bench compare --targets direct,spindle-2 --watch-all --clients 64

What a load writes stays there, under --prefix. Ctrl-C ends it; what was measured until then is shown.
`

// workloads is the part of the help that explains them.
func workloads() string {
	var b strings.Builder
	b.WriteString("\nWorkloads:\n")
	for _, w := range load.Works {
		fmt.Fprintf(&b, "  %-10s %s\n", w.Work, w.What)
	}
	return b.String()
}

// loadFlags defines the flags that describe a load; they fill spec.
func loadFlags(f *flag.FlagSet, spec *load.Spec) {
	f.Func("workload", "`MIX` of the workloads above, with weights: get=8,update=3,create=1 (default create)",
		func(v string) (err error) { spec.Mix, err = load.ParseMix(v); return err })
	f.IntVar(&spec.Clients, "clients", spec.Clients, "logical clients, each with one request under way")
	f.IntVar(&spec.Connections, "connections", spec.Connections, "connections that the clients share")
	f.Float64Var(&spec.Rate, "rate", spec.Rate, "open loop: requests per second; latency counts from when each was due. 0: closed loop")
	f.Var((*duration)(&spec.Duration), "duration", "how long is measured, a `time` like 30s or 2m")
	f.Var((*duration)(&spec.Warmup), "warmup", "`time` that the load runs before it is measured")
	f.IntVar(&spec.ValueSize, "value-size", spec.ValueSize, "`bytes` of a value")
	f.IntVar(&spec.Keys, "keys", spec.Keys, "objects that are made before the load, for what needs some")
	f.IntVar(&spec.PageSize, "page", spec.PageSize, "keys in a page of the workload page")
	f.StringVar(&spec.Prefix, "prefix", spec.Prefix, "prefix of all keys, ends with a slash")
	f.Uint64Var(&spec.Seed, "seed", spec.Seed, "seed of the random choices")
	f.BoolVar(&spec.WatchAll, "watch-all", spec.WatchAll, "one watch of everything with prev_kv besides, as an apiserver has")
	f.IntVar(&spec.Watchers, "watchers", spec.Watchers, "watches of all pods besides, each with a stream of its own")
	f.IntVar(&spec.WatchConnections, "watch-connections", spec.WatchConnections, "connections that the --watchers share")
}

func loadCommand(ctx context.Context, args []string) error {
	spec := load.Default()
	spec.Prefix = "/bench/" // a cluster's own /registry/ is no place for what nobody made
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	loadFlags(f, &spec)
	f.Func("endpoints", "comma separated `URLs` (default http://127.0.0.1:2379)", func(v string) error {
		spec.Endpoints = nil
		for e := range strings.SplitSeq(v, ",") {
			spec.Endpoints = append(spec.Endpoints, strings.TrimSpace(e))
		}
		return nil
	})
	f.Func("pid", "`NAME=PID` of a server on this machine whose CPU and memory are reported; may be given several times", func(v string) error {
		name, pid, _ := strings.Cut(v, "=")
		n, err := strconv.Atoi(pid)
		if err != nil || name == "" {
			return errors.New("say NAME=PID")
		}
		if _, err := load.CPUSeconds(n); err != nil {
			return fmt.Errorf("there is no such process here: %w", err)
		}
		spec.Processes = append(spec.Processes, load.Process{Name: name, PID: n})
		return nil
	})
	cacert := f.String("cacert", "", "`file` with the CA of the servers")
	cert := f.String("cert", "", "`file` with the client's certificate")
	key := f.String("key", "", "`file` with the key of --cert")
	user := f.String("user", "", "`NAME:PASSWORD` of etcd's user")
	out := outputFlags(f)
	err := parse(f, loadUsage+workloads(), args)
	if err != nil {
		return err
	}
	if err := out.check(); err != nil {
		return err
	}
	var named bool
	if spec.User, spec.Password, named = strings.Cut(*user, ":"); *user != "" && (!named || spec.User == "") {
		return errors.New("--user: say NAME:PASSWORD") // without what was said, which may be a password
	}
	if spec.TLS, err = clientTLS(*cacert, *cert, *key); err != nil {
		return err
	}
	res, stopped := load.Run(ctx, spec, os.Stderr)
	if res == nil {
		return stopped
	}
	if err := report.Table(os.Stdout, res); err != nil {
		return err
	}
	doc := &report.Doc{Title: "Load on " + strings.Join(spec.Endpoints, ", "), Runs: []report.Run{{Scenario: spec.Mix.String(), Target: "servers", Result: res}}}
	if stopped == nil && res.Silent() {
		stopped = errors.New("nothing was answered: give a longer --duration, or look at the errors above")
	}
	return errors.Join(stopped, out.write(doc))
}

// clientTLS reads the files; all names may be empty.
func clientTLS(cacert, cert, key string) (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if cacert != "" {
		pem, err := os.ReadFile(cacert)
		if err != nil {
			return nil, fmt.Errorf("--cacert: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--cacert: %s holds no certificate", cacert)
		}
	}
	if (cert == "") != (key == "") {
		return nil, fmt.Errorf("--cert and --key belong together")
	}
	if cert != "" {
		c, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("--cert, --key: %w", err)
		}
		cfg.Certificates = []tls.Certificate{c}
	}
	return cfg, nil
}
