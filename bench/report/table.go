// Package report shows what was measured: as a table, and as an HTML page that needs nothing but itself.
package report

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"

	"spindle/bench/load"
)

// Table writes one result for people.
func Table(w io.Writer, r *load.Result) error {
	s := &r.Spec
	loop := "closed loop"
	if s.Rate > 0 {
		loop = fmt.Sprintf("%g requests/s", s.Rate)
	}
	fmt.Fprintf(w, "%s: %d clients on %d connections, %s, values of %d bytes, %.1f s\n", s.Mix, s.Clients, s.Connections, loop, s.ValueSize, r.Seconds)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "request\tcount\t/s\tmean\tp50\tp90\tp99\tp99.9\tmax\terrors\tconflicts\t")
	ops := r.Ops
	if len(ops) != 1 {
		ops = append(slices.Clone(ops), r.Total)
	}
	for _, o := range ops {
		fmt.Fprintf(t, "%s\t%d\t%.0f\t%v\t%v\t%v\t%v\t%v\t%v\t%d\t%d\t\n", o.Kind, o.Count, o.PerSecond,
			load.Round(o.Mean), load.Round(o.P50), load.Round(o.P90), load.Round(o.P99), load.Round(o.P999), load.Round(o.Max), o.Errors, o.Conflicts)
	}
	t.Flush()
	if len(r.Watches) > 0 {
		fmt.Fprintln(t, "watch of\twatchers\tevents\t/s\tMB/s\tevents/message\tlag after ack p50\tp99\tmax\tafter sending p50\tp99\tmax\t")
		for _, v := range r.Watches {
			fmt.Fprintf(t, "%s\t%d\t%d\t%.0f\t%.1f\t%.1f\t%v\t%v\t%v\t%v\t%v\t%v\t\n", v.Name, v.Watchers, v.Events, v.PerSecond, v.MBps, v.PerMessage,
				load.Round(v.FromAck.P50), load.Round(v.FromAck.P99), load.Round(v.FromAck.Max), load.Round(v.FromSend.P50), load.Round(v.FromSend.P99), load.Round(v.FromSend.Max))
		}
		t.Flush()
	}
	fmt.Fprintln(t, "process\tCPU s\tcores\tCPU/request\tRSS MiB\tpeak MiB\t")
	for _, u := range append([]load.Usage{r.Generator}, r.Processes...) {
		fmt.Fprintf(t, "%s\t%.2f\t%.2f\t%v\t%s\t%s\t\n", u.Name, u.CPUSeconds, u.CPUSeconds/max(r.Seconds, 1e-9), load.Round(u.CPUPerOp), mib(u.RSS), mib(u.Peak))
	}
	t.Flush()
	if r.Silent() {
		fmt.Fprintln(w, "nothing was answered in the measured time")
	}
	if r.Stopped != "" {
		fmt.Fprintf(w, "STOPPED before its time: %s\n", r.Stopped)
	}
	for _, text := range slices.Sorted(maps.Keys(r.Texts)) {
		fmt.Fprintf(w, "%d times: %s\n", r.Texts[text], text)
	}
	for _, v := range r.Watches {
		if v.Backwards > 0 {
			fmt.Fprintf(w, "WRONG: %d events of the watch of %s were out of order\n", v.Backwards, v.Name)
		}
		if v.Missing > 0 {
			fmt.Fprintf(w, "the watches of %s had not brought %d events seconds after the load\n", v.Name, v.Missing)
		}
	}
	if r.Unfinished > 0 {
		fmt.Fprintf(w, "%d requests had no answer seconds after the load\n", r.Unfinished)
	}
	if r.Others >= disturbed {
		fmt.Fprintf(w, "others took %.0f%% of this machine's CPUs: processes that were not measured, or its host\n", 100*r.Others)
	}
	if r.NeverSent > 0 {
		fmt.Fprintf(w, "%d requests were due and not sent: all %d clients were waiting, so the latencies above are too good\n", r.NeverSent, s.Clients)
	}
	return nil
}

func mib(n int64) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f", float64(n)/(1<<20))
}
