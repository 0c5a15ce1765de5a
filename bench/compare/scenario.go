package compare

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"spindle/bench/load"
	"spindle/bench/report"
)

// calibration is how long a load runs to find out the most that a target does.
const calibration = 3 * time.Second

// Scenario is one load on several targets.
type Scenario struct {
	Name    string
	Title   string
	Targets []string
	Load    load.Spec // Endpoints, TLS and Processes are filled in
	Rounds  int       // 0: as configured
	// Disks puts the data of every etcd that holds keys on a throttled disk of its own. (A coordinator holds none.)
	Disks bool
	// Half finds out first what each target does in a closed loop, and then asks for half of that.
	Half bool
	// Check says what is to be reached.
	Check func(o *Outcome) []report.Check
}

// Outcome is what a scenario has measured.
type Outcome struct {
	Scenario *Scenario
	Runs     []report.Run
	Failed   map[string]error // targets that could not be measured to the end
	Skipped  error            // why this machine cannot do it at all
	Checks   []report.Check
}

// Run measures a scenario. An error is returned only if ctx has ended, with the rounds that were done until then, and no
// checks; a target that cannot be started or measured is in Failed.
func (e *Env) Run(ctx context.Context, sc *Scenario) (*Outcome, error) {
	o := &Outcome{Scenario: sc, Failed: map[string]error{}}
	e.say("\n== %s: %s", sc.Name, sc.Title)
	if sc.Disks {
		if o.Skipped = noDisks(); o.Skipped != nil {
			e.say("not measured: %v", o.Skipped)
			if sc.Check != nil {
				o.Checks = sc.Check(o)
			}
			return o, nil
		}
	}
	var targets []*target
	defer func() {
		for _, t := range targets {
			t.stop()
		}
		for _, d := range e.disks {
			if err := d.remove(); err != nil {
				e.say("%v", err)
			}
		}
		e.disks = nil
	}()
	var data func() (string, error)
	if sc.Disks {
		data = func() (string, error) {
			d, err := e.newDisk()
			if err != nil {
				return "", err
			}
			return d.dir, nil
		}
	}
	fail := func(name string, err error) {
		err = e.explain(err)
		o.Failed[name] = err
		e.say("%s: %v", name, err)
	}
	for _, name := range sc.Targets {
		t, err := e.up(ctx, name, data)
		if err == nil {
			targets = append(targets, t)
		}
		if ctx.Err() != nil {
			return o, context.Cause(ctx)
		}
		if err != nil {
			fail(name, err)
		}
	}
	for _, d := range e.disks {
		if err := d.throttle(e.cfg.DiskBps); err != nil {
			for _, t := range targets {
				fail(t.name, err)
			}
			break
		}
	}
	rounds := sc.Rounds
	if rounds == 0 {
		rounds = e.cfg.Rounds
	}
	rates := map[string]float64{}
	for round := 1; round <= rounds; round++ {
		order := slices.Clone(targets)
		if round%2 == 0 { // whoever is first finds another machine than whoever is last
			slices.Reverse(order)
		}
		for _, t := range order {
			if o.Failed[t.name] != nil {
				continue
			}
			res, err := e.load(ctx, sc, t, round, rates)
			if ctx.Err() != nil {
				return o, context.Cause(ctx)
			}
			if ended := t.ended(); err != nil || ended != nil {
				if ended == nil {
					ended = t.last()
				}
				fail(t.name, errors.Join(err, ended))
				continue
			}
			o.Runs = append(o.Runs, report.Run{Scenario: sc.Name, Target: t.name, Round: round, Result: res})
			e.say("round %d  %s", round, report.Line(t.name, res))
		}
	}
	if sc.Check != nil {
		o.Checks = sc.Check(o)
	}
	return o, nil
}

// load does one round on one target.
func (e *Env) load(ctx context.Context, sc *Scenario, t *target, round int, rates map[string]float64) (*load.Result, error) {
	spec := sc.Load
	spec.Endpoints, spec.TLS, spec.Processes = []string{t.endpoint}, t.tls, t.processes()
	spec.Seed += uint64(round)
	if sc.Half && rates[t.name] == 0 {
		most := spec
		most.Rate, most.Duration = 0, calibration
		res, err := load.Run(ctx, most, io.Discard)
		if err != nil {
			return nil, err
		}
		rates[t.name] = max(1, res.Total.PerSecond/2)
		e.say("%s does %.0f/s at the most", t.name, res.Total.PerSecond)
	}
	if sc.Half {
		spec.Rate = rates[t.name]
	}
	if readsOnly(spec.Mix) {
		if round == 1 {
			if err := prepare(ctx, spec); err != nil {
				return nil, err
			}
		}
		spec.KeysExist = true
	}
	if e.cfg.Profile != "" {
		defer e.profile(ctx, fmt.Sprintf("%s-%s-%d", sc.Name, t.name, round), t, spec.Warmup, spec.Duration)()
	}
	if t.coord != "" {
		return load.TwoStep(ctx, spec, t.coord)
	}
	return load.Run(ctx, spec, io.Discard)
}

// prepare makes the objects that a load of reads needs, with many clients, however few the load has.
func prepare(ctx context.Context, spec load.Spec) error {
	if spec.Mix[0].Work == load.Idle {
		return nil
	}
	usual := load.Default()
	spec.Clients, spec.Connections, spec.Rate = usual.Clients, usual.Connections, 0
	spec.Mix = load.Mix{{Work: load.Get, Weight: 1}}
	spec.Watchers, spec.WatchAll = 0, false
	spec.Warmup, spec.Duration = 0, time.Millisecond
	_, err := load.Run(ctx, spec, io.Discard)
	return err
}

func readsOnly(m load.Mix) bool {
	for _, s := range m {
		switch s.Work {
		case load.Get, load.List, load.Page, load.Stream, load.Idle:
		default:
			return false
		}
	}
	return true
}

func (e *Env) say(format string, args ...any) { fmt.Fprintf(e.cfg.Progress, format+"\n", args...) }
