package chaos

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// round is what happened in one round of faults.
type round struct {
	faults []*fault
	// begun, ended (mended and serving again) and recovered: every shard was written through every proxy, and the watches of
	// everything have shown all that was written before the end.
	begun, ended, recovered time.Duration
	writes, watches         time.Duration // from the end until then
}

func (r *round) kind() string {
	switch len(r.faults) {
	case 0:
		return "none"
	case 1:
		return r.faults[0].kind
	default:
		return "two at once"
	}
}

func (r *round) affects(p, s int) bool {
	return slices.ContainsFunc(r.faults, func(f *fault) bool { return f.affects(p, s) })
}

// pauses says how long the longest pauses were where the faults should not and where they may have been noticed.
func (r *round) pauses(l *load) (others, own time.Duration, where string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for p := range proxies {
		for s := range shards {
			pause := longestPause(l.acks[p][s], r.begun, r.recovered)
			switch {
			case r.affects(p, s):
				own = max(own, pause)
			case pause > others:
				others, where = pause, fmt.Sprintf("proxy-%d to %s", p, shardNames[s])
			}
		}
	}
	return others, own, where
}

// row is a line of the report: all rounds of a kind.
type row struct {
	rounds        int
	errors        map[string]int
	acked, events int
	// One of each round: the longest pauses, and how long it took to go on.
	others, own, writes, watches []time.Duration
}

// report makes the table of what clients noticed: of times the median and the longest of the rounds.
func report(rounds []*round, l *load) string {
	rows := map[string]*row{}
	total := &row{errors: map[string]int{}}
	for _, rd := range rounds {
		w := rows[rd.kind()]
		if w == nil {
			w = &row{errors: map[string]int{}}
			rows[rd.kind()] = w
		}
		for _, w := range []*row{w, total} {
			w.add(rd, l)
		}
	}
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "fault (times: median / longest, ms)\trounds\terrors\tpause, others\tpause, affected\twrites after\twatches after\twrites\tevents")
	line := func(name string, w *row) {
		var errs []string
		for _, k := range slices.Sorted(maps.Keys(w.errors)) {
			errs = append(errs, fmt.Sprintf("%d %s", w.errors[k], k))
		}
		if len(errs) == 0 {
			errs = []string{"none"}
		}
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t%d\t%d\n", name, w.rounds, strings.Join(errs, ", "), spread(w.others), spread(w.own), spread(w.writes), spread(w.watches), w.acked, w.events)
	}
	names := []string{"none"}
	for _, k := range kinds {
		names = append(names, k.name)
	}
	for _, name := range append(names, "two at once") {
		if w := rows[name]; w != nil {
			line(name, w)
		}
	}
	line("all", total)
	t.Flush()
	return b.String()
}

func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// spread shows the median and the longest, in milliseconds.
func spread(all []time.Duration) string {
	if len(all) == 0 {
		return "-"
	}
	sorted := slices.Sorted(slices.Values(all))
	return fmt.Sprintf("%d / %d", sorted[len(sorted)/2].Milliseconds(), sorted[len(sorted)-1].Milliseconds())
}

// add counts a round, after the end of the load.
func (w *row) add(rd *round, l *load) {
	w.rounds++
	w.writes, w.watches = append(w.writes, rd.writes), append(w.watches, rd.watches)
	others, own, _ := rd.pauses(l)
	if others > 0 {
		w.others = append(w.others, others)
	}
	if own > 0 {
		w.own = append(w.own, own)
	}
	for _, q := range l.rec.requests {
		if q.ret < rd.begun || q.ret > rd.recovered {
			continue
		}
		if q.acked {
			w.acked++
		}
		if q.code != 0 && !strings.Contains(q.text, "compacted") && !strings.Contains(q.text, "lease not found") {
			w.errors[q.code.String()]++
		}
	}
	for _, e := range l.rec.history {
		if e.heard >= rd.begun && e.heard <= rd.recovered {
			w.events++
		}
	}
}

// longestPause returns the longest time without an acknowledgement within from..to.
func longestPause(acks []time.Duration, from, to time.Duration) (longest time.Duration) {
	last := from
	for _, at := range acks {
		if at > from && at < to {
			longest = max(longest, at-last)
			last = at
		}
	}
	return max(longest, to-last)
}
