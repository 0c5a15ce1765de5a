package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
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
shows medians. --suite issue runs all that Spindle promises of its speed, with what is to be reached. Where CPUs are the
limit, more shards are no faster: --disks shows what they are for. In a checkout of Spindle:

  make bench                                   one load, creates, on all targets
  make bench ARGS='--suite issue'              the suite; --scenarios creates,gets some of it
  go run ./bench compare --targets direct,spindle-1 --workload get --html report.html
`

func compareCommand(ctx context.Context, args []string) error {
	spec := load.Default()
	spec.Duration, spec.Warmup = 5*time.Second, time.Second
	cfg := compare.Config{Rounds: 3, DiskBps: 4 << 20, Progress: os.Stderr}
	f := flag.NewFlagSet("bench compare", flag.ContinueOnError)
	loadFlags(f, &spec)
	targets := f.String("targets", "direct,grpc-proxy,spindle-1,spindle-2,spindle-4",
		"comma separated: direct (one etcd), grpc-proxy, spindle-N (N shards); with +tls behind it: mutual TLS towards clients; two-etcds is explained in bench/RESULTS.md")
	suite := f.String("suite", "", "issue: the scenarios with something to reach, instead of one load; they have loads and targets of their own")
	only := f.String("scenarios", "", "comma separated `names` of scenarios of the suite (default all)")
	f.IntVar(&cfg.Rounds, "rounds", cfg.Rounds, "how often each target is measured, in turns")
	f.StringVar(&cfg.Dir, "dir", "", "`directory` for the servers' data (default /dev/shm, which is memory, if 4 GiB are free there)")
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
	if err := parse(f, compareUsage+workloads()+scenarioTitles(), args); err != nil {
		return err
	}
	if err := out.check(); err != nil {
		return err
	}
	if cfg.Rounds < 1 || cfg.DiskBps < 1<<16 {
		return fmt.Errorf("--rounds %d must be positive, --disk-bps %d at least 65536", cfg.Rounds, cfg.DiskBps)
	}

	if err := spec.Validate(); err != nil {
		return err
	}
	var scenarios []*compare.Scenario
	var err error
	single := *suite == "" && *only == ""
	if single {
		scenarios, err = oneScenario(spec, strings.Split(*targets, ","), *secure, *disks)
	} else {
		scenarios, err = suiteScenarios(f, *suite, *only, spec.Duration)
	}
	if err != nil {
		return err
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
	var ended error
	for _, s := range scenarios {
		o, err := env.Run(ctx, s)
		doc.Runs = append(doc.Runs, o.Runs...)
		doc.Checks = append(doc.Checks, o.Checks...)
		for _, target := range slices.Sorted(maps.Keys(o.Failed)) {
			doc.Failed = append(doc.Failed, report.Failure{Scenario: s.Name, Target: target, Why: o.Failed[target].Error()})
		}
		if single {
			err = errors.Join(err, o.Skipped)
		}
		if err != nil {
			ended = err // what was measured so far is shown all the same
			break
		}
	}
	report.Summary(os.Stdout, doc)
	if n := len(doc.Failed); n > 0 {
		ended = errors.Join(ended, fmt.Errorf("%d could not be measured to the end", n))
	}
	return errors.Join(ended, out.write(doc))
}

// oneScenario is the comparison that the flags describe.
func oneScenario(spec load.Spec, targets []string, secure, disks bool) ([]*compare.Scenario, error) {
	for i, n := range targets {
		if secure && !strings.HasSuffix(n, compare.TLSSuffix) {
			targets[i] += compare.TLSSuffix
		}
		if err := compare.CheckTarget(targets[i]); err != nil {
			return nil, err
		}
		if targets[i] == compare.TwoStep && spec.Mix.String() != string(load.Create) {
			return nil, fmt.Errorf("--targets: %s only creates (it is explained in bench/RESULTS.md)", compare.TwoStep)
		}
		if slices.Contains(targets[:i], targets[i]) {
			return nil, fmt.Errorf("--targets: %s stands there twice", targets[i])
		}
	}
	return []*compare.Scenario{{
		Name: spec.Mix.String(), Title: fmt.Sprintf("%d clients on %d connections", spec.Clients, spec.Connections),
		Targets: targets, Load: spec, Disks: disks,
	}}, nil
}

// suiteFlags are what may be said beside --suite: its scenarios have loads and targets of their own.
var suiteFlags = []string{"suite", "scenarios", "rounds", "duration", "dir", "disk-bps", "spindle", "spindle-arg", "profile", "json", "html"}

// suiteScenarios returns those of the suite that are wanted; only is empty or holds their names.
func suiteScenarios(f *flag.FlagSet, suite, only string, each time.Duration) (wanted []*compare.Scenario, err error) {
	if suite != "issue" && suite != "" {
		return nil, fmt.Errorf("--suite %q: there is only issue", suite)
	}
	f.Visit(func(fl *flag.Flag) {
		if !slices.Contains(suiteFlags, fl.Name) {
			err = errors.Join(err, fmt.Errorf("--%s: the scenarios of a suite have their own", fl.Name))
		}
	})
	all := compare.Suite(each)
	if only == "" || err != nil {
		return all, err
	}
	for name := range strings.SplitSeq(only, ",") {
		i := slices.IndexFunc(all, func(s *compare.Scenario) bool { return s.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("--scenarios: there is no %q; there are %s", name, strings.Join(scenarioNames(all), ", "))
		}
		wanted = append(wanted, all[i])
	}
	return wanted, nil
}

// scenarioTitles is the part of the help that explains them.
func scenarioTitles() string {
	var b strings.Builder
	b.WriteString("\nScenarios of the suite:\n")
	for _, s := range compare.Suite(time.Second) {
		fmt.Fprintf(&b, "  %-12s %s\n", s.Name, s.Title)
	}
	return b.String()
}

func scenarioNames(all []*compare.Scenario) (names []string) {
	for _, s := range all {
		names = append(names, s.Name)
	}
	return names
}
