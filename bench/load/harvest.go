package load

import (
	"fmt"
	"maps"
	"time"

	"spindle/bench/hist"
)

// harvest collects from all connections, once a second, what they have counted.
type harvest struct {
	r       *run
	started time.Time
	series  []Second
	last    time.Duration

	kinds [kindCount]*stat
	watch []feed // sums, one for each of run.watches
	cpu   float64
	procs []float64

	machine, spare float64 // machineCPU at the beginning
}

func newHarvest(r *run) *harvest {
	return &harvest{r: r, watch: make([]feed, len(r.watches()))}
}

func (h *harvest) elapsed() time.Duration { return time.Since(h.started) }

// begin forgets what the warm-up has counted.
func (h *harvest) begin() {
	h.collect()
	h.kinds, h.watch = [kindCount]*stat{}, make([]feed, len(h.watch))
	for _, g := range h.r.groups {
		g.conn.Lock()
		clear(g.texts)
		g.conn.Unlock()
	}
	h.procs = nil
	for _, p := range h.r.spec.Processes {
		ResetPeak(p.PID)
		cpu, err := CPUSeconds(p.PID)
		if err != nil {
			h.r.say("no CPU time of %s: %v", p.Name, err)
		}
		h.procs = append(h.procs, cpu)
	}
	h.cpu = ownCPU()
	h.machine, h.spare = machineCPU()
	h.started, h.last = time.Now(), 0
}

// collect takes over the counts of all connections, and returns what they were.
func (h *harvest) collect() (lat hist.Hist, errors, events uint64) {
	for _, g := range h.r.groups {
		g.conn.Lock()
		for k, s := range g.stats {
			if s == nil {
				continue
			}
			if h.kinds[k] == nil {
				h.kinds[k] = new(stat)
			}
			sum := h.kinds[k]
			sum.lat.Add(&s.lat)
			lat.Add(&s.lat)
			s.lat.Reset()
			sum.errors += s.errors
			errors += s.errors
			sum.conflicts += s.conflicts
			s.errors, s.conflicts = 0, 0
		}
		g.conn.Unlock()
	}
	for i, fs := range h.r.watches() {
		sum := &h.watch[i]
		for _, f := range fs.feeds {
			f.conn.Lock()
			events += f.events
			sum.events += f.events
			sum.bytes += f.bytes
			sum.messages += f.messages
			sum.backwards += f.backwards
			sum.fromAck.Add(&f.fromAck)
			sum.fromSend.Add(&f.fromSend)
			f.fromAck.Reset()
			f.fromSend.Reset()
			f.events, f.bytes, f.messages, f.backwards = 0, 0, 0, 0
			f.conn.Unlock()
		}
	}
	return lat, errors, events
}

// second ends one second of the measurement.
func (h *harvest) second() {
	lat, errors, events := h.collect()
	now := h.elapsed()
	span := (now - h.last).Seconds()
	h.last = now
	s := Second{
		At: now.Seconds(), Ops: float64(lat.Count()) / span, Events: float64(events) / span, Errors: errors,
		P50: lat.Quantile(.5), P99: lat.Quantile(.99),
	}
	h.series = append(h.series, s)
	line := fmt.Sprintf("%4.0fs  %9.0f/s  p50 %-9v p99 %-9v", s.At, s.Ops, Round(s.P50), Round(s.P99))
	if len(h.watch) > 0 {
		line += fmt.Sprintf("  events %9.0f/s", s.Events)
	}
	if errors > 0 {
		line += fmt.Sprintf("  errors %d", errors)
	}
	h.r.say("%s", line)
}

// end makes the result.
func (h *harvest) end() *Result {
	cpu := ownCPU() - h.cpu
	used, all := machineCPU()
	others := used - h.machine - cpu
	seconds := h.last.Seconds()
	res := &Result{Spec: h.r.spec, Started: h.started, Seconds: seconds, Series: h.series, Texts: map[string]uint64{}}
	var sum stat
	for k, s := range h.kinds {
		if s == nil || s.lat.Count() == 0 && s.errors == 0 {
			continue
		}
		res.Ops = append(res.Ops, s.op(kindNames[k], seconds))
		sum.lat.Add(&s.lat)
		sum.errors += s.errors
		sum.conflicts += s.conflicts
	}
	res.Total = sum.op("all", seconds)
	perOp := func(cpu float64) time.Duration {
		if res.Total.Count == 0 {
			return 0
		}
		return time.Duration(cpu * 1e9 / float64(res.Total.Count))
	}
	for i, p := range h.r.spec.Processes {
		u := Usage{Name: p.Name, Before: h.r.before[i]}
		if now, err := CPUSeconds(p.PID); err == nil {
			u.CPUSeconds = now - h.procs[i]
			others -= u.CPUSeconds
			u.CPUPerOp = perOp(u.CPUSeconds)
			u.RSS, u.Peak, _ = Memory(p.PID)
		}
		res.Processes = append(res.Processes, u)
	}
	if len(res.Processes) > 0 && all > h.spare {
		res.Others = max(0, others) / (all - h.spare)
	}
	res.Generator = Usage{Name: "generator", CPUSeconds: cpu, CPUPerOp: perOp(cpu)}
	for i, fs := range h.r.watches() {
		f := &h.watch[i]
		res.Watches = append(res.Watches, Watch{
			Name: fs.name, Watchers: fs.watchers, Events: f.events, PerSecond: float64(f.events) / seconds,
			MBps: float64(f.bytes) / seconds / 1e6, PerMessage: float64(f.events) / float64(max(f.messages, 1)),
			FromAck: summary(&f.fromAck), FromSend: summary(&f.fromSend), Backwards: f.backwards,
		})
	}
	for _, g := range h.r.groups {
		g.conn.Lock()
		for text, n := range maps.All(g.texts) {
			res.Texts[text] += n
		}
		g.conn.Unlock()
	}
	return res
}

func (s *stat) op(kind string, seconds float64) Op {
	return Op{Kind: kind, PerSecond: float64(s.lat.Count()) / seconds, Errors: s.errors, Conflicts: s.conflicts, Latency: summary(&s.lat)}
}
