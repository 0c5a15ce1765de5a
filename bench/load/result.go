package load

import (
	"time"

	"spindle/bench/hist"
)

// Latency is a histogram in the numbers that people compare, in nanoseconds.
type Latency struct {
	Count                               uint64
	Mean, Min, P50, P90, P99, P999, Max time.Duration
}

func summary(h *hist.Hist) Latency {
	return Latency{h.Count(), h.Mean(), h.Min(), h.Quantile(.5), h.Quantile(.9), h.Quantile(.99), h.Quantile(.999), h.Max()}
}

// Op is what was measured of one kind of request.
type Op struct {
	Kind      string
	PerSecond float64 // answered without an error
	Errors    uint64
	Conflicts uint64 // compares that failed; they count as answered
	Latency
}

// Watch is what was measured of one group of watches.
type Watch struct {
	Name       string
	Watchers   int
	Events     uint64
	PerSecond  float64
	MBps       float64 // 10^6 bytes of responses a second
	PerMessage float64 // events in a response
	// FromAck is the lag from the acknowledgement of a write to the delivery of its event (0 if the event was
	// first), FromSend from the sending of the write: the lag from the commit lies between.
	FromAck, FromSend Latency
	Backwards         uint64 // events out of order: must be 0
	// Missing is how many events had not come when the load was over and the wait for them too: must be 0,
	// unless the server cannot keep up.
	Missing int64
}

// Usage is what a process has used during the measured time.
type Usage struct {
	Name       string
	CPUSeconds float64
	CPUPerOp   time.Duration // CPU time for each answered request
	// Resident memory in bytes: before the first connection, at the end, and the most while it was measured.
	Before, RSS, Peak int64
}

// Second is one second of the load.
type Second struct {
	At       float64 // seconds since the measurement began
	Ops      float64 // per second
	Events   float64 // per second
	Errors   uint64
	P50, P99 time.Duration
}

// Result is what one load has measured.
type Result struct {
	Spec      Spec
	Started   time.Time
	Seconds   float64 // that were measured
	Stopped   string  `json:",omitempty"` // why the load ended before its time
	Total     Op      // all kinds together
	Ops       []Op
	Watches   []Watch `json:",omitempty"`
	Generator Usage
	Processes []Usage `json:",omitempty"`
	// Others is the part (0 to 1) of the machine's CPU time that went to processes which were not measured, or was taken by
	// its host ("steal"). Only if all servers are on this machine, as Processes: 0 else.
	Others float64 `json:",omitempty"`
	Series []Second
	Texts  map[string]uint64 `json:",omitempty"` // errors, and how often
	// Unfinished requests had no answer at the end; NeverSent ones were due (open loop), and no client was free.
	Unfinished int
	NeverSent  int64
}

// Of returns what was measured of one kind of request; nothing, if there was none.
func (r *Result) Of(kind string) Op {
	for _, o := range r.Ops {
		if o.Kind == kind {
			return o
		}
	}
	return Op{Kind: kind}
}

// Silent says that requests were sent and none was answered without an error in the measured time.
func (r *Result) Silent() bool { return r.Total.Count == 0 && !r.Spec.Mix.has(Idle) }

// ServersPerOp is the CPU time of all measured processes for one request.
func (r *Result) ServersPerOp() (sum time.Duration) {
	for _, p := range r.Processes {
		sum += p.CPUPerOp
	}
	return sum
}

// Round leaves about three digits of d, for people.
func Round(d time.Duration) time.Duration {
	for _, unit := range []time.Duration{time.Second, time.Millisecond, time.Microsecond} {
		switch {
		case d >= 100*unit:
			return d.Round(unit)
		case d >= 10*unit:
			return d.Round(unit / 10)
		case d >= unit:
			return d.Round(unit / 100)
		}
	}
	return d
}
