package compare

import (
	"fmt"
	"math"
	"strings"
	"time"

	"spindle/bench/load"
	"spindle/bench/report"
)

// metric is one number of a result; NaN if the result does not tell it.
type metric func(*load.Result) float64

func perSecond(r *load.Result) float64  { return r.Total.PerSecond }
func serversCPU(r *load.Result) float64 { return float64(r.ServersPerOp()) }
func medianTime(r *load.Result) float64 { return float64(r.Total.P50) }
func events(r *load.Result) float64 {
	return watched(r, func(w *load.Watch) float64 { return w.PerSecond })
}
func lagFromAck(r *load.Result) float64 {
	return watched(r, func(w *load.Watch) float64 {
		if w.FromAck.Count == 0 { // a watch that brings nothing is not fast
			return math.NaN()
		}
		return float64(w.FromAck.P99)
	})
}

func watched(r *load.Result, f func(*load.Watch) float64) float64 {
	if len(r.Watches) == 0 {
		return math.NaN()
	}
	return f(&r.Watches[len(r.Watches)-1])
}

// proxy is the process between the clients and the members, nil if there is none.
func proxy(r *load.Result) *load.Usage {
	for i, p := range r.Processes {
		if p.Name == "spindle" || p.Name == Proxied {
			return &r.Processes[i]
		}
	}
	return nil
}

func proxyCPU(r *load.Result) float64 {
	if p := proxy(r); p != nil {
		return float64(p.CPUPerOp)
	}
	return 0
}

// grown is by how much the proxy's memory has risen at its peak.
func grown(r *load.Result) float64 {
	if p := proxy(r); p != nil {
		return float64(max(p.Peak, p.RSS) - p.Before)
	}
	return 0
}

// peak is the most memory that the proxy had.
func peak(r *load.Result) float64 {
	if p := proxy(r); p != nil {
		return float64(max(p.Peak, p.RSS))
	}
	return 0
}

// bound is a limit from below or from above.
type bound struct {
	atLeast bool
	limit   float64
}

func atLeast(v float64) bound { return bound{true, v} }
func atMost(v float64) bound  { return bound{false, v} }

func (b bound) holds(v float64) bool {
	if b.atLeast {
		return v >= b.limit
	}
	return v <= b.limit
}

func (b bound) text(show func(float64) string) string {
	if b.atLeast {
		return "at least " + show(b.limit)
	}
	return "at most " + show(b.limit)
}

func plain(v float64) string    { return fmt.Sprintf("%.2f", v) }
func duration(v float64) string { return load.Round(time.Duration(v)).String() }
func kib(v float64) string      { return fmt.Sprintf("%.1f KiB", v/1024) }
func mib(v float64) string      { return fmt.Sprintf("%.0f MiB", v/(1<<20)) }

// rounds returns m of each round of a target; one in which nothing was answered says nothing.
func (o *Outcome) rounds(target string, m metric) map[int]float64 {
	all := map[int]float64{}
	for _, r := range o.Runs {
		if r.Target == target && (r.Result.Total.Count > 0 || r.Result.Spec.Mix.String() == string(load.Idle)) {
			if v := m(r.Result); !math.IsNaN(v) {
				all[r.Round] = v
			}
		}
	}
	return all
}

// check holds the median of values against b.
func (o *Outcome) check(what string, values []float64, show func(float64) string, b bound, targets ...string) report.Check {
	c := report.Check{Scenario: o.Scenario.Name, What: what, Want: b.text(show)}
	if o.Skipped != nil {
		c.Skipped = o.Skipped.Error()
		return c
	}
	var broken []string
	for _, t := range targets {
		err := o.Failed[t]
		if err == nil {
			continue
		}
		if len(values) == 0 {
			c.Skipped = t + ": " + err.Error()
			return c
		}
		broken = append(broken, t+" FAILED")
	}
	c.Until = strings.Join(broken, ", ")
	if len(values) == 0 {
		c.Skipped = "nothing was measured"
		return c
	}
	mid, lo, hi := report.Median(values)
	c.Got, c.OK = show(mid), b.holds(mid)
	if len(values) > 1 {
		c.Got += fmt.Sprintf(" (%s to %s)", show(lo), show(hi))
	}
	return c
}

// value checks a number of one target.
func (o *Outcome) value(what, target string, m metric, show func(float64) string, b bound) report.Check {
	var values []float64
	for _, v := range o.rounds(target, m) {
		values = append(values, v)
	}
	return o.check(what, values, show, b, target)
}

// pair checks f of a number of two targets, round by round: what disturbs a round disturbs both.
func (o *Outcome) pair(what, a, b string, m metric, f func(a, b float64) float64, show func(float64) string, limit bound) report.Check {
	var values []float64
	other := o.rounds(b, m)
	for round, v := range o.rounds(a, m) {
		if w, ok := other[round]; ok {
			values = append(values, f(v, w))
		}
	}
	return o.check(what, values, show, limit, a, b)
}

// ratio checks a number of a as a part of the same of b.
func (o *Outcome) ratio(what, a, b string, m metric, limit bound) report.Check {
	return o.pair(what, a, b, m, func(a, b float64) float64 {
		if b == 0 {
			return 0
		}
		return a / b
	}, plain, limit)
}
