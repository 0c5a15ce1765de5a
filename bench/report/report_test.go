package report

import (
	"bytes"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"spindle/bench/load"
)

var update = flag.Bool("update", false, "write testdata anew")

// result is what a load might have measured; n makes them differ.
func result(n int) *load.Result {
	ms := func(v float64) time.Duration { return time.Duration(v * float64(n) * float64(time.Millisecond)) }
	spec := load.Default()
	spec.WatchAll = true
	lat := load.Latency{Count: uint64(1000 * n), Mean: ms(1.234567), Min: ms(.1), P50: ms(1), P90: ms(2.5), P99: ms(12.3456), P999: ms(99.99), Max: ms(1234.5)}
	op := load.Op{Kind: "create", PerSecond: 500 * float64(n), Errors: 3, Conflicts: 1, Latency: lat}
	get := op
	get.Kind = "get"
	all := op
	all.Kind = "all"
	r := &load.Result{
		Spec: spec, Seconds: 2, Total: all, Ops: []load.Op{op, get},
		Watches:    []load.Watch{{Name: "everything", Watchers: 1, Events: 900, PerSecond: 450, MBps: .5, PerMessage: 9, FromAck: lat, FromSend: lat, Backwards: 2, Missing: 4}},
		Generator:  load.Usage{Name: "generator", CPUSeconds: .01, CPUPerOp: 4 * time.Microsecond},
		Processes:  []load.Usage{{Name: "shard-1", CPUSeconds: .2, CPUPerOp: ms(.02), RSS: 50 << 20, Peak: 60 << 20}, {Name: "shard-2", CPUPerOp: ms(.01)}, {Name: "spindle", CPUPerOp: ms(.007)}},
		Texts:      map[string]uint64{"etcdserver: too many requests": 2, "etcdserver: <b>no space</b>": 1},
		Unfinished: 5, NeverSent: 7, Others: .12, Stopped: "a connection is lost",
	}
	for i := range 3 {
		r.Series = append(r.Series, load.Second{At: float64(i + 1), Ops: 400 * float64(n+i), Events: 300 * float64(n+i)})
	}
	return r
}

func doc() *Doc {
	return &Doc{
		Title: "A <title>", Command: "bench compare --json a&b", Machine: Machine{OS: "linux", Arch: "amd64", Go: "go1.26", CPU: "fast", CPUs: 2, MemoryGiB: 24},
		Checks: []Check{
			{Scenario: "one", What: "writes/s", Want: "at least 2.00", Got: "2.50 (2.40 to 2.60)", OK: true},
			{Scenario: "one", What: "CPU", Want: "at most 0.45", Got: "0.50"},
			{Scenario: "two", What: "disks", Want: "at least 3.80", Skipped: "throttled disks need root\nmore"},
		},
		Failed: []Failure{{"two", "spindle-1", "it <broke>\nin the middle\nof its log"}},
		Runs: []Run{
			{"one", "direct", 1, result(4)}, {"one", "spindle-1", 1, result(1)}, {"one", "spindle-1", 2, result(3)}, {"one", "direct", 2, result(8)},
			{"two", "direct", 1, result(2)},
		},
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is another (go test -update writes it; look at the difference):\n%s", file, got)
	}
}

func TestText(t *testing.T) {
	var b bytes.Buffer
	if err := Table(&b, result(1)); err != nil {
		t.Fatal(err)
	}
	golden(t, "table.txt", b.Bytes())
	b.Reset()
	d := doc()
	Summary(&b, d)
	golden(t, "summary.txt", b.Bytes())
	golden(t, "line.txt", []byte(Line("direct", result(1))+"\n"))
}

// The page is well-formed, escapes what it is given, draws no NaN, and loads nothing.
func TestHTML(t *testing.T) {
	for name, d := range map[string]*Doc{"full": doc(), "empty": {}, "nothing measured": {Runs: []Run{{Target: "x", Result: &load.Result{}}}}} {
		var b bytes.Buffer
		if err := HTML(&b, d); err != nil {
			t.Fatal(name, err)
		}
		page := b.String()
		for _, bad := range []string{"http:", "https:", "NaN", "Inf", "<script", "@import", "src=", "<title>A <title>"} {
			if strings.Contains(page, bad) {
				t.Errorf("%s: the page holds %q", name, bad)
			}
		}
		for _, svg := range regexp.MustCompile(`(?s)<svg.*?</svg>`).FindAllString(page, -1) {
			dec := xml.NewDecoder(strings.NewReader(svg))
			for {
				if _, err := dec.Token(); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatalf("%s: %v in %s", name, err, svg)
				}
			}
		}
		if name == "full" {
			golden(t, "page.html", b.Bytes())
			for _, want := range []string{"spindle-1", "spindle-1, round 2: create: 256 clients", "A &lt;title&gt;", "not measured: throttled disks need root", "MISSED", "reached"} {
				if !strings.Contains(page, want) {
					t.Errorf("the page does not hold %q", want)
				}
			}
			if n := strings.Count(page, "<svg"); n != 10 {
				t.Errorf("%d charts", n)
			}
		}
	}
}

// A slice of a chart is where its time was: the last one may be shorter than a second, and the only one too.
func TestSlices(t *testing.T) {
	for name, c := range map[string]struct{ ends, want []float64 }{
		"the last is short": {[]float64{1, 2, 2.5}, []float64{.5, 1.5, 2.25}},
		"the only one":      {[]float64{.3}, []float64{.15}},
		"late":              {[]float64{1, 3.5}, []float64{.5, 2.25}},
	} {
		r := result(1)
		r.Series, r.Seconds = nil, c.ends[len(c.ends)-1]
		for _, at := range c.ends {
			r.Series = append(r.Series, load.Second{At: at, Ops: 100})
		}
		s := section{groups: groups([]Run{{Target: "x", Result: r}})}
		s.fill(&Doc{})
		for i, m := range regexp.MustCompile(`<circle class="c0" cx="([0-9.]+)"`).FindAllStringSubmatch(string(s.Charts[0].SVG), -1) {
			if want := fmt.Sprintf("%.1f", padLeft+plotWidth*c.want[i]/r.Seconds); m[1] != want {
				t.Errorf("%s: slice %d at %s, want %s", name, i, m[1], want)
			}
		}
		if n := strings.Count(string(s.Charts[0].SVG), "<circle"); n != len(c.want) {
			t.Errorf("%s: %d slices", name, n)
		}
	}
}

// A round in which nothing of a kind was answered counts for requests/s, and has no time: else the others would seem faster than they were.
func TestRoundsWithoutAnswers(t *testing.T) {
	silent := &load.Result{Watches: []load.Watch{{}}, Processes: []load.Usage{{Name: "spindle"}}}
	half := result(1)
	half.Ops = half.Ops[:1] // no gets
	for name, c := range map[string]struct {
		rounds []*load.Result
		want   []string // beginnings of lines, blanks folded
	}{
		"one silent":  {[]*load.Result{result(1), result(1), silent, silent}, []string{"x 250 (0, 500) 1.00 1ms 12.3ms 225 12.3ms 12.3ms", "create 250 (0, 500) 1ms 12.3ms", "get 250 (0, 500) 1ms 12.3ms"}},
		"one half":    {[]*load.Result{result(1), half, half}, []string{"x 500 (500, 500) 1.00 1ms 12.3ms", "create 500 (500, 500) 1ms 12.3ms", "get 0 (0, 500) 1ms 12.3ms"}},
		"all silent":  {[]*load.Result{silent, silent}, []string{"x 0 (0, 0) - - - 0 - - - MiB - spindle -"}},
		"all are one": {[]*load.Result{half, silent}, []string{"x 250 (0, 500) 1.00 1ms 12.3ms"}},
	} {
		d := new(Doc)
		for i, r := range c.rounds {
			d.Runs = append(d.Runs, Run{Target: "x", Round: i + 1, Result: r})
		}
		var b, page bytes.Buffer
		Summary(&b, d)
		var lines []string
		for line := range strings.Lines(b.String()) {
			lines = append(lines, strings.Join(strings.Fields(line), " "))
		}
		for i, want := range c.want {
			if !strings.HasPrefix(lines[1+i], want) {
				t.Errorf("%s: %q, want %q", name, lines[1+i], want)
			}
		}
		if err := HTML(&page, d); err != nil || strings.Contains(page.String(), "NaN") {
			t.Errorf("%s: %v, or NaN", name, err)
		}
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in          []float64
		mid, lo, hi float64
	}{{[]float64{3}, 3, 3, 3}, {[]float64{5, 1}, 3, 1, 5}, {[]float64{9, 1, 2}, 2, 1, 9}, {[]float64{4, 1, 2, 8}, 3, 1, 8}} {
		if mid, lo, hi := Median(c.in); mid != c.mid || lo != c.lo || hi != c.hi {
			t.Errorf("%v: %v %v %v", c.in, mid, lo, hi)
		}
	}
}

func TestAxis(t *testing.T) {
	for in, want := range map[float64]float64{0: 1, 1: 1, 1.1: 2, 3: 5, 7: 10, 0.03: 0.05, 1234: 2000} {
		if got := niceStep(in); got < want*0.999 || got > want*1.001 {
			t.Errorf("niceStep(%v) = %v", in, got)
		}
	}
	if m := (&axis{hi: 10}).marks(); len(m) != 6 || m[0] != 0 || math.Signbit(m[0]) || m[5] != 10 {
		t.Error(m)
	}
	if m := (&axis{lo: 10, hi: 100, log: true}).marks(); len(m) != 4 {
		t.Error(m)
	}
	a := axis{lo: 1e3, hi: 1e6, log: true}
	if m := a.marks(); len(m) != 4 || a.at(1e6) != 1 || a.at(5) != 0 {
		t.Error(m, a.at(1e6), a.at(5))
	}
}
