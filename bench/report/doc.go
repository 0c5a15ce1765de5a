package report

import (
	"bytes"
	"os"
	"runtime"
	"strings"

	"spindle/bench/load"
)

// Doc is everything that a report holds; --json writes it.
type Doc struct {
	Title   string
	Machine Machine
	Command string
	Checks  []Check   `json:",omitempty"`
	Failed  []Failure `json:",omitempty"`
	Runs    []Run
}

// Failure is a target that could not be measured to the end.
type Failure struct {
	Scenario, Target string
	Why              string // may end with a log
}

// Short is the beginning of Why.
func (f Failure) Short() string {
	lines := strings.SplitN(f.Why, "\n", 3)
	return strings.Join(lines[:min(2, len(lines))], "; ")
}

// Run is one load on one target.
type Run struct {
	Scenario string `json:",omitempty"`
	Target   string
	Round    int `json:",omitempty"`
	Result   *load.Result
}

// Check is something that was to be reached.
type Check struct {
	Scenario string
	What     string // in words
	Want     string // "at least 2.00", say
	Got      string // the median of the rounds, and their spread
	OK       bool
	// Until names the targets of which not all rounds were measured, because they FAILED; "": none.
	Until string `json:",omitempty"`
	// Skipped says why it was not measured.
	Skipped string `json:",omitempty"`
}

// Machine is where it was measured.
type Machine struct {
	OS, Arch, Kernel, CPU, Go string
	CPUs                      int
	MemoryGiB                 float64
	// Load is the load average when the report was made, the measured load included.
	Load string
}

// ThisMachine describes the machine that it runs on, as far as it can.
func ThisMachine() Machine {
	m := Machine{OS: runtime.GOOS, Arch: runtime.GOARCH, Go: runtime.Version(), CPUs: runtime.NumCPU()}
	read := func(path string) string {
		b, _ := os.ReadFile(path)
		return string(bytes.TrimSpace(b))
	}
	m.Kernel, m.Load = read("/proc/sys/kernel/osrelease"), read("/proc/loadavg")
	for line := range strings.Lines(read("/proc/cpuinfo")) {
		if name, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			m.CPU = strings.TrimSpace(v)
			break
		}
	}
	for line := range strings.Lines(read("/proc/meminfo")) {
		if v, ok := strings.CutPrefix(line, "MemTotal:"); ok {
			kib := 0
			for _, c := range strings.TrimSpace(v) {
				if c < '0' || c > '9' {
					break
				}
				kib = kib*10 + int(c-'0')
			}
			m.MemoryGiB = float64(kib>>10) / 1024
		}
	}
	return m
}
