package report

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"spindle/bench/load"
)

// Median returns the median of values (of an even number, the mean of the two in the middle), and the smallest and the
// largest. values must not be empty.
func Median(values []float64) (mid, lo, hi float64) {
	v := slices.Sorted(slices.Values(values))
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2, v[0], v[n-1]
}

// Line is one run in one line.
func Line(target string, r *load.Result) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-12s", target)
	if r.Total.Count > 0 || len(r.Watches) == 0 {
		fmt.Fprintf(&b, " %9s/s  p50 %-8v p99 %-8v", count(r.Total.PerSecond), load.Round(r.Total.P50), load.Round(r.Total.P99))
	}
	for _, w := range r.Watches {
		fmt.Fprintf(&b, "  %d watchers %.0f events/s", w.Watchers, w.PerSecond)
		if w.FromAck.Count > 0 {
			fmt.Fprintf(&b, " lag p99 %v", load.Round(w.FromAck.P99))
		}
	}
	fmt.Fprintf(&b, "  CPU/request %v:", load.Round(r.ServersPerOp()))
	for _, p := range r.Processes {
		fmt.Fprintf(&b, " %s %v", p.Name, load.Round(p.CPUPerOp))
	}
	fmt.Fprintf(&b, " (generator %v)", load.Round(r.Generator.CPUPerOp))
	for _, s := range remarks(r) {
		b.WriteString("  " + s)
	}
	return b.String()
}

// disturbed is the part of the machine's CPU time from which on it is said that others took it. A dozen idle servers of a comparison
// take 2 to 5 %.
const disturbed = 0.1

// remarks says what was not as it should be, in one round or in all of them together.
func remarks(rounds ...*load.Result) (all []string) {
	var errors, backwards uint64
	var unanswered, late int64
	silent := false
	texts, others := map[string]uint64{}, 0.0
	for _, r := range rounds {
		errors += r.Total.Errors
		silent = silent || r.Silent()
		for text, n := range r.Texts {
			texts[text] += n
		}
		unanswered += r.NeverSent + int64(r.Unfinished)
		for _, w := range r.Watches {
			late += w.Missing
			backwards += w.Backwards
		}
		others = max(others, r.Others)
	}
	add := func(is bool, format string, args ...any) {
		if is {
			all = append(all, fmt.Sprintf(format, args...))
		}
	}
	add(silent, "NOTHING was answered in a round")
	add(errors > 0, "ERRORS %d %v", errors, texts)
	add(unanswered > 0, "%d not sent or not answered", unanswered)
	add(late > 0, "%d events late", late)
	add(backwards > 0, "WRONG: %d events out of order", backwards)
	add(others >= disturbed, "DISTURBED: others took %.0f%% of the CPUs", 100*others)
	return all
}

// group is all rounds of one target in one scenario.
type group struct {
	scenario, target string
	rounds           []int
	results          []*load.Result
}

// groups keeps the order of the first appearance.
func groups(runs []Run) (all []*group) {
	for _, r := range runs {
		i := slices.IndexFunc(all, func(g *group) bool { return g.scenario == r.Scenario && g.target == r.Target })
		if i < 0 {
			i = len(all)
			all = append(all, &group{scenario: r.Scenario, target: r.Target})
		}
		all[i].rounds = append(all[i].rounds, r.Round)
		all[i].results = append(all[i].results, r.Result)
	}
	return all
}

// median of one number of all rounds.
func (g *group) median(f func(*load.Result) float64) (mid, lo, hi float64) {
	values := make([]float64, len(g.results))
	for i, r := range g.results {
		values[i] = f(r)
	}
	return Median(values)
}

// timing is a time of a result, and of how many requests or events it is.
type timing func(*load.Result) (n uint64, d time.Duration)

// medianTime is the median of the rounds in which there was anything to time; not ok: there was none.
func (g *group) medianTime(f timing) (mid float64, ok bool) {
	var values []float64
	for _, r := range g.results {
		if n, d := f(r); n > 0 {
			values = append(values, float64(d))
		}
	}
	if len(values) == 0 {
		return 0, false
	}
	mid, _, _ = Median(values)
	return mid, true
}

func (g *group) time(f timing) string {
	mid, ok := g.medianTime(f)
	if !ok {
		return "-"
	}
	return load.Round(time.Duration(mid)).String()
}

// against is how many requests a second there are for one of other's, the median of the rounds that both have.
func (g *group) against(other *group) string {
	var ratios []float64
	for i, r := range g.results {
		if j := slices.Index(other.rounds, g.rounds[i]); j >= 0 && other.results[j].Total.PerSecond > 0 {
			ratios = append(ratios, r.Total.PerSecond/other.results[j].Total.PerSecond)
		}
	}
	if len(ratios) == 0 {
		return "-"
	}
	mid, _, _ := Median(ratios)
	return fmt.Sprintf("%.2f", mid)
}

// kinds returns the names of the kinds of requests, if there are several.
func (g *group) kinds() (names []string) {
	for _, r := range g.results {
		for _, o := range r.Ops {
			if !slices.Contains(names, o.Kind) {
				names = append(names, o.Kind)
			}
		}
	}
	if len(names) == 1 {
		return nil
	}
	return names
}

// of returns what was measured of one kind of request, of all if it is "".
func of(r *load.Result, kind string) load.Op {
	if kind == "" {
		return r.Total
	}
	return r.Of(kind)
}

func p50(kind string) timing {
	return func(r *load.Result) (uint64, time.Duration) { o := of(r, kind); return o.Count, o.P50 }
}

func p99(kind string) timing {
	return func(r *load.Result) (uint64, time.Duration) { o := of(r, kind); return o.Count, o.P99 }
}

// processes returns the names of the servers, in the order in which they were started, with all shards as one.
func (g *group) processes() (names []string) {
	for _, p := range g.results[0].Processes {
		if n := family(p.Name); !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names
}

func family(name string) string {
	if strings.HasPrefix(name, "shard-") {
		return "shards"
	}
	return name
}

// cpu is the CPU time for a request of all processes of one name.
func cpu(r *load.Result, name string) (sum time.Duration) {
	for _, p := range r.Processes {
		if family(p.Name) == name {
			sum += p.CPUPerOp
		}
	}
	return sum
}

// Summary writes the medians of all rounds, a line for each target (and for each kind of its requests, if there are several), what was not as it should be, and the checks. The lag is from the acknowledgement of a
// write to the delivery of its event, and from its sending; memory is the most that all servers had together.
func Summary(w io.Writer, d *Doc) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	var first *group // of its scenario
	all := groups(d.Runs)
	for _, g := range all {
		if first == nil || g.scenario != first.scenario {
			first = g
			fmt.Fprintf(t, "%s\trequests/s\t(lowest, highest)\tto %s\tp50\tp99\tevents/s\tlag p99\tafter sending\tmemory\tCPU/request\tof which\n", g.scenario, g.target)
		}
		mid, lo, hi := g.median(func(r *load.Result) float64 { return r.Total.PerSecond })
		events, lag, sent := "-", "-", "-"
		if n := len(g.results[0].Watches); n > 0 {
			v, _, _ := g.median(func(r *load.Result) float64 { return r.Watches[n-1].PerSecond })
			events = fmt.Sprintf("%.0f", v)
			lag = g.time(func(r *load.Result) (uint64, time.Duration) { w := &r.Watches[n-1].FromAck; return w.Count, w.P99 })
			sent = g.time(func(r *load.Result) (uint64, time.Duration) { w := &r.Watches[n-1].FromSend; return w.Count, w.P99 })
		}
		memory, _, _ := g.median(func(r *load.Result) (sum float64) {
			for _, p := range r.Processes {
				sum += float64(max(p.Peak, p.RSS))
			}
			return sum
		})
		var parts []string
		for _, name := range g.processes() {
			parts = append(parts, name+" "+g.time(func(r *load.Result) (uint64, time.Duration) { return r.Total.Count, cpu(r, name) }))
		}
		fmt.Fprintf(t, "%s\t%s\t(%s, %s)\t%s\t%s\t%s\t%s\t%s\t%s\t%s MiB\t%s\t%s\n", g.target, count(mid), count(lo), count(hi), g.against(first),
			g.time(p50("")), g.time(p99("")), events, lag, sent, mib(int64(memory)),
			g.time(func(r *load.Result) (uint64, time.Duration) { return r.Total.Count, r.ServersPerOp() }), strings.Join(parts, ", "))
		for _, kind := range g.kinds() {
			mid, lo, hi := g.median(func(r *load.Result) float64 { return r.Of(kind).PerSecond })
			fmt.Fprintf(t, "  %s\t%s\t(%s, %s)\t\t%s\t%s\t\t\t\t\t\t\n", kind, count(mid), count(lo), count(hi),
				g.time(p50(kind)), g.time(p99(kind)))
		}
	}
	t.Flush()
	for _, g := range all {
		if s := remarks(g.results...); len(s) > 0 {
			fmt.Fprintf(w, "%s %s: %s\n", g.scenario, g.target, strings.Join(s, ", "))
		}
	}
	for _, f := range d.Failed {
		fmt.Fprintf(w, "%s %s: FAILED: %s\n", f.Scenario, f.Target, f.Short())
	}
	if len(d.Checks) == 0 {
		return
	}
	fmt.Fprintln(t, "\nscenario\twhat\tto reach\tmeasured\t")
	for _, c := range d.Checks {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", c.Scenario, c.What, c.Want, c.Got, c.Verdict())
	}
	t.Flush()
}

// count shows a number for people: small ones with more digits.
func count(v float64) string {
	if v > 0 && v < 100 {
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

// Verdict is the check in a word, or why there is none.
func (c *Check) Verdict() string {
	switch {
	case c.Skipped != "":
		first, _, _ := strings.Cut(c.Skipped, "\n")
		return "not measured: " + first
	case c.OK && c.Until != "":
		return "reached until " + c.Until
	case c.OK:
		return "reached"
	case c.Until != "":
		return "MISSED until " + c.Until
	}
	return "MISSED"
}
