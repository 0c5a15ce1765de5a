package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"spindle/bench/compare"
	"spindle/bench/load"
	"spindle/bench/report"
)

const compareUsage = `bench compare [flags]    compare etcd, etcd grpc-proxy and Spindle on this machine

Starts every target with its etcds as processes of their own, puts the same load on each in turns, several rounds, and
shows medians. --suite issue runs all that Spindle promises of its speed, with the targets to reach.
`

func compareCommand(ctx context.Context, args []string) error {
	spec := load.Default()
	spec.Duration, spec.Warmup = 5*time.Second, time.Second
	cfg := compare.Config{Rounds: 3, DiskBps: 4 << 20, Progress: os.Stderr}
	f := flag.NewFlagSet("bench compare", flag.ContinueOnError)
	loadFlags(f, &spec)
	targets := f.String("targets", "direct,grpc-proxy,spindle-1,spindle-2,spindle-4",
		"comma separated: direct (one etcd), grpc-proxy, spindle-N (N shards); with +tls behind it: mutual TLS towards clients")
	suite := f.String("suite", "", "issue: the scenarios with targets to reach, instead of one load")
	only := f.String("scenarios", "", "comma separated `names` of the suite's scenarios; empty: all")
	f.IntVar(&cfg.Rounds, "rounds", cfg.Rounds, "how often each target is measured, in turns")
	f.StringVar(&cfg.Dir, "dir", "", "`directory` for the servers' data (default /dev/shm, which is memory)")
	disks := f.Bool("disks", false, "every etcd that holds keys has a throttled disk of its own (Linux, root)")
	f.IntVar(&cfg.DiskBps, "disk-bps", cfg.DiskBps, "`bytes` a second that a throttled disk writes")
	f.StringVar(&cfg.Spindle, "spindle", "", "Spindle's `binary` (default: built now)")
	f.Func("spindle-arg", "one more `argument` for Spindle; may be given several times", func(v string) error {
		cfg.SpindleArgs = append(cfg.SpindleArgs, v)
		return nil
	})
	f.StringVar(&cfg.Profile, "profile", "", "`directory` for CPU and allocation profiles of Spindle and the etcds, and CPU profiles of the generator, of every round (costs them some percent)")
	secure := f.Bool("tls", false, "mutual TLS towards clients for all targets")
	out := outputFlags(f)
	if err := parse(f, compareUsage, args); err != nil {
		return err
	}
	if err := out.check(); err != nil {
		return err
	}
	if cfg.Rounds < 1 || cfg.DiskBps < 1<<16 {
		return fmt.Errorf("--rounds %d must be positive, --disk-bps %d at least 65536", cfg.Rounds, cfg.DiskBps)
	}

	var scenarios []*compare.Scenario
	switch *suite {
	case "":
		names := strings.Split(*targets, ",")
		for i, n := range names {
			if *secure && !strings.HasSuffix(n, compare.TLSSuffix) {
				names[i] += compare.TLSSuffix
			}
			if err := compare.CheckTarget(n); err != nil {
				return err
			}
		}
		if err := spec.Validate(); err != nil {
			return err
		}
		scenarios = []*compare.Scenario{{
			Name: spec.Mix.String(), Title: fmt.Sprintf("%d clients on %d connections", spec.Clients, spec.Connections),
			Targets: names, Load: spec, Disks: *disks,
		}}
	case "issue":
		scenarios = compare.Suite(spec.Duration)
		if *only != "" {
			names := strings.Split(*only, ",")
			var known []string
			for _, s := range scenarios {
				known = append(known, s.Name)
			}
			for _, n := range names {
				if !slices.Contains(known, n) {
					return fmt.Errorf("--scenarios: there is no %q; there are %s", n, strings.Join(known, ", "))
				}
			}
			scenarios = slices.DeleteFunc(scenarios, func(s *compare.Scenario) bool { return !slices.Contains(names, s.Name) })
		}
	default:
		return fmt.Errorf("--suite %q: there is only issue", *suite)
	}

	if cfg.Profile != "" {
		if err := os.MkdirAll(cfg.Profile, 0o755); err != nil {
			return fmt.Errorf("--profile: %w", err)
		}
	}
	env, err := compare.NewEnv(cfg)
	if err != nil {
		return err
	}
	defer env.Close()
	doc := &report.Doc{Title: "Comparison"}
	var stopped error
	for _, s := range scenarios {
		o, err := env.Run(ctx, s)
		doc.Runs = append(doc.Runs, o.Runs...)
		doc.Checks = append(doc.Checks, o.Checks...)
		if err != nil {
			stopped = err // what was measured so far is shown all the same
			break
		}
		if len(o.Checks) == 0 {
			for target, err := range o.Failed {
				stopped = fmt.Errorf("%s: %w", target, err)
			}
		}
	}
	report.Summary(os.Stdout, doc.Runs, doc.Checks)
	if err := out.write(doc); err != nil {
		return err
	}
	return stopped
}
