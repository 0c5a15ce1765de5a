package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"spindle/codec/tlsconn"
	"spindle/server/node"
	"spindle/shard"
	"spindle/shard/embedded"
)

// run serves until ctx ends (nil) or something cannot go on (one sentence that says what to do). What comes from hup has
// it read the configuration again.
func run(ctx context.Context, cfg *Config, hup <-chan os.Signal, again reloadable, stderr io.Writer) error {
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: cfg.LogLevel}))
	nc := node.Config{
		ListenClientURLs:    cfg.ListenClientURLs,
		AdvertiseClientURLs: cfg.AdvertiseClientURLs,
		ListenMetricsURLs:   cfg.ListenMetricsURLs,
		EnablePprof:         cfg.EnablePprof,
		Coordinator:         cfg.Coordinator,
		AcceptDataLoss:      cfg.AcceptDataLoss,
		ReplaceCoordinator:  cfg.ReplaceCoordinator,
		ShardMaxTxnOps:      cfg.ShardMaxTxnOps, ShardMaxRequestBytes: cfg.ShardMaxRequestBytes,
		ShardQuotaBackendBytes: cfg.ShardQuotaBackendBytes,
		Version:                version,

		MaxRequestBytes: cfg.MaxRequestBytes, MaxConcurrentStreams: cfg.MaxConcurrentStreams,
		MaxClientMemory:      int64(cfg.MaxClientMemory),
		GRPCKeepaliveMinTime: cfg.GRPCKeepaliveMinTime, GRPCKeepaliveInterval: cfg.GRPCKeepaliveInterval,
		GRPCKeepaliveTimeout: cfg.GRPCKeepaliveTimeout,

		Loops:            cfg.Loops,
		BusyPoll:         cfg.BusyPoll,
		RingSize:         cfg.RingSize,
		ReorderWindow:    cfg.ReorderWindow,
		ShardTimeout:     cfg.ShardTimeout,
		ProgressInterval: cfg.WatchProgressNotifyInterval,
		Log:              log,
	}
	var err error
	if nc.Partition, err = cfg.partition(); err != nil {
		return err
	}
	if nc.AutoCompact, err = shard.ParseAutoCompact(cfg.AutoCompactionMode, cfg.AutoCompactionRetention); err != nil {
		return err
	}
	if cfg.TLS.CertFile != "" {
		if nc.TLS, err = tlsconn.NewServerFiles(cfg.TLS, log); err != nil {
			return err
		}
	}
	if nc.MemberTLS, err = tlsconn.NewClientFiles(cfg.MemberTLS, log); err != nil {
		return err
	}
	for _, s := range cfg.Shards {
		nc.Shards = append(nc.Shards, node.Shard(s))
	}

	var membersFailed <-chan error
	where := fmt.Sprintf("%d member clusters", len(cfg.Shards))
	if cfg.Embedded() {
		dir, err := filepath.Abs(cfg.DataDir)
		if err != nil {
			return fmt.Errorf("--data-dir: %w", err)
		}
		members, err := embedded.Start(embedded.Config{Dir: cfg.DataDir, Shards: cfg.EmbeddedShards, Log: log})
		if err != nil {
			return err
		}
		defer members.Close()
		membersFailed = members.Failed()
		for i, u := range members.Shards {
			nc.Shards = append(nc.Shards, node.Shard{Name: members.Names[i], URLs: []string{u}})
		}
		nc.Coordinator = []string{members.Coordinator}
		nc.ShardMaxTxnOps, nc.ShardMaxRequestBytes = embedded.MaxTxnOps, embedded.MaxRequestBytes
		nc.BusyPoll = 0 // it would take Go's processors from the etcds
		where = fmt.Sprintf("%d embedded member clusters, data in %s", cfg.EmbeddedShards, dir)
	}

	n, err := node.Start(nc)
	if err != nil {
		return explain(err)
	}
	defer func() { n.Close() }()
	for ready := n.Ready(); ; {
		select {
		case <-ready:
			ready = nil
			announce(log, n, where)
		case err := <-n.Failed():
			return err
		case err := <-membersFailed:
			return err
		case <-n.Outdated():
			next, err := startAgain(ctx, n, nc, cfg)
			if err != nil {
				return explain(err)
			}
			n, ready = next, next.Ready()
		case <-hup:
			cfg = reload(n, log, cfg, again)
		case <-ctx.Done():
			log.Info("stopping")
			return nil
		}
	}
}

// startAgain closes n, and starts another Node in its place: with the ports that it had, and the endpoints that were read since. What
// an operator has accepted was accepted once.
func startAgain(ctx context.Context, n *node.Node, nc node.Config, cfg *Config) (*node.Node, error) {
	nc.ListenClientURLs = n.ClientURLs()
	if urls := n.MetricsURLs(); len(urls) > 0 {
		nc.ListenMetricsURLs = urls
	}
	nc.AcceptDataLoss, nc.ReplaceCoordinator = nil, false
	if !cfg.Embedded() {
		nc.Shards, nc.Coordinator = nil, cfg.Coordinator
		for _, s := range cfg.Shards {
			nc.Shards = append(nc.Shards, node.Shard(s))
		}
	}
	n.Close()
	if ctx.Err() != nil {
		return n, nil // stopped meanwhile
	}
	next, err := tryStart(ctx, func() (*node.Node, error) { return node.Start(nc) })
	if ctx.Err() != nil && next == nil {
		return n, nil
	}
	return next, err
}

// How often, and how far apart, a Node is started in the place of another one before the process ends: its ports may still be in use for a
// moment.
const (
	startTries = 5
	startPause = 200 * time.Millisecond
)

// tryStart calls start until it does not fail, startTries times at most, or until ctx is done. It returns what the last call did.
func tryStart(ctx context.Context, start func() (*node.Node, error)) (n *node.Node, err error) {
	for tries := 1; ; tries++ {
		if n, err = start(); err == nil {
			return n, nil
		}
		if tries == startTries {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(startPause):
		}
	}
}

// announce is the one line that tells a person what to do next.
func announce(log *slog.Logger, n *node.Node, where string) {
	clients := strings.Join(n.ClientURLs(), ",")
	args := []any{"client", clients, "over", where}
	if m := n.MetricsURLs(); len(m) > 0 {
		args = append(args, "metrics", m[0]+"/metrics")
	}
	try := "etcdctl --endpoints " + strings.ReplaceAll(clients, "http://", "")
	if strings.Contains(clients, "https://") {
		try += " --cacert FILE --cert FILE --key FILE"
	}
	args = append(args, "try", try+" put hello world")
	log.Info("Spindle is ready", args...)
}

// explain adds what to do to the errors that a person meets first.
func explain(err error) error {
	text := strings.TrimPrefix(err.Error(), "spindle: ")
	if strings.Contains(text, "in use") {
		text += ": stop that one, or choose another with --listen-client-urls or --listen-metrics-urls"
	}
	return errors.New(text)
}
