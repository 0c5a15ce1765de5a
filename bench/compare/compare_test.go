package compare

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/etcdmain"

	"spindle/bench/load"
	"spindle/bench/report"
)

// The test is an etcd too, as the program is: Env starts itself for one.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "etcd" {
		os.Args = os.Args[1:]
		etcdmain.Main(os.Args)
		return
	}
	os.Exit(m.Run())
}

func newEnv(t *testing.T, cfg Config) *Env {
	t.Helper()
	if testing.Short() {
		t.Skip("long")
	}
	cfg.Dir, cfg.Progress = t.TempDir(), io.Discard
	e, err := NewEnv(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.Close()
		if left, _ := os.ReadDir(cfg.Dir); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
	return e
}

// Every kind of target is started, measured and gone afterwards.
func TestTargets(t *testing.T) {
	e := newEnv(t, Config{Rounds: 2})
	spec := load.Default()
	spec.Clients, spec.Connections, spec.Warmup, spec.Duration, spec.WatchAll = 16, 2, 0, 200*time.Millisecond, true
	names := []string{Direct, Direct + TLSSuffix, Proxied, Proxied + TLSSuffix, TwoStep, SpindlePrefix + "2"}
	sc := &Scenario{Name: "s", Targets: append(names, "nothing"), Load: spec, Check: func(o *Outcome) []report.Check {
		return []report.Check{
			o.ratio("a", SpindlePrefix+"2", Direct, perSecond, atLeast(0)),
			o.ratio("b", "nothing", Direct, perSecond, atLeast(0)),
		}
	}}
	var o *Outcome
	for { // longer and longer, on a machine that is too busy to answer anything in the time
		var err error
		if o, err = e.Run(t.Context(), sc); err != nil {
			t.Fatal(err)
		}
		if sc.Load.Duration > 5*time.Second || !slices.ContainsFunc(o.Runs, func(r report.Run) bool { return nothing(r.Target, r.Result) }) {
			break
		}
		sc.Load.Duration *= 4
	}
	for name, err := range o.Failed {
		if name != "nothing" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(o.Runs) != 2*len(names) {
		t.Errorf("%d runs", len(o.Runs))
	}
	for i, r := range o.Runs {
		if want := slices.Concat(names, []string{SpindlePrefix + "2", TwoStep, Proxied + TLSSuffix, Proxied, Direct + TLSSuffix, Direct}); len(o.Failed) == 1 && r.Target != want[i] {
			t.Errorf("run %d is of %s, want %s: rounds take turns", i, r.Target, want[i])
		}
		res := r.Result
		if nothing(r.Target, res) || res.Total.Errors != 0 {
			t.Errorf("%s: %+v %v", r.Target, res.Total, res.Texts)
		}
		if n := map[string]int{Proxied: 2, Proxied + TLSSuffix: 2, TwoStep: 2, SpindlePrefix + "2": 4}[r.Target]; len(res.Processes) != max(n, 1) || res.Processes[0].RSS == 0 {
			t.Errorf("%s: %+v", r.Target, res.Processes)
		}
	}
	if len(o.Checks) != 2 || !o.Checks[0].OK || o.Checks[1].Skipped == "" || o.Checks[1].OK {
		t.Errorf("%+v", o.Checks)
	}
}

// nothing says that nothing was answered, or no watch has shown anything.
func nothing(target string, res *load.Result) bool {
	return res.Total.Count == 0 || target != TwoStep && res.Watches[0].Events == 0
}

// A run that is stopped in the middle leaves nothing behind (newEnv looks), and the rounds that it has done count.
func TestStopped(t *testing.T) {
	e := newEnv(t, Config{Rounds: 100})
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	e.cfg.Progress = writer(func(p []byte) {
		if strings.Contains(string(p), "round 1") {
			cancel(why)
		}
	})
	spec := load.Default()
	spec.Warmup, spec.Duration = 0, 50*time.Millisecond
	o, err := e.Run(ctx, &Scenario{Targets: []string{Direct}, Load: spec})
	if !errors.Is(err, why) || len(o.Runs) != 1 || len(o.Failed) != 0 {
		t.Errorf("%+v %v", o, err)
	}
}

// A target without one of its processes is measured no more, whatever it answers. Its directory may be said from where one stands.
func TestProcessLost(t *testing.T) {
	t.Chdir(t.TempDir())
	e, err := NewEnv(Config{Dir: ".", Progress: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if !filepath.IsAbs(e.dir) {
		t.Errorf("servers do not find %s", e.dir)
	}
	p, err := startProcess("shard-1", e.dir, e.self, "-test.run=^$")
	if err != nil {
		t.Fatal(err)
	}
	<-p.done
	tg := &target{procs: []*process{p}}
	if err := tg.ended(); err == nil || !strings.Contains(err.Error(), "shard-1 has ended") {
		t.Error(err)
	}
	if err := tg.last(); err == nil || !strings.Contains(err.Error(), "PASS") {
		t.Error(err)
	}
}

type writer func([]byte)

func (w writer) Write(p []byte) (int, error) { w(p); return len(p), nil }

// A disk that is throttled is as slow as it should be, and gone afterwards.
func TestDisk(t *testing.T) {
	if err := noDisks(); err != nil {
		t.Skip(err)
	}
	e := newEnv(t, Config{})
	d, err := e.newDisk()
	if err != nil {
		t.Skip(err) // a container without the right to mount, say
	}
	const bps = 4 << 20
	if err := d.throttle(bps); err != nil {
		t.Fatal(err)
	}
	if err := d.throttle(bps << 12); err == nil {
		// A limit that nothing reaches: the probe must have taken less than it should at bps.
		begin := time.Now()
		if err := os.WriteFile(filepath.Join(d.dir, "x"), make([]byte, probeBytes), 0o600); err != nil || time.Since(begin) > 10*time.Second {
			t.Error(err, time.Since(begin))
		}
	}
	for _, d := range e.disks {
		if err := d.remove(); err != nil {
			t.Error(err)
		}
	}
	e.disks = nil
}

// What a run that was killed has left is removed by the next one, what a living one uses is not.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	dead := exec.Command(os.Args[0], "-test.run=^$")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	for name, pid := range map[string]int{"dead": dead.Process.Pid, "alive": os.Getpid()} {
		d := filepath.Join(dir, dirPrefix+name)
		if err := errors.Join(os.Mkdir(d, 0o700), os.WriteFile(filepath.Join(d, ownerFile), []byte(strconv.Itoa(pid)), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	e, err := NewEnv(Config{Dir: dir, Progress: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	e.Close()
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 || left[0].Name() != dirPrefix+"alive" {
		t.Errorf("%v %v", left, err)
	}
}

// The suite asks for nothing that cannot be measured.
func TestSuite(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range Suite(time.Second) {
		if seen[s.Name] {
			t.Errorf("two scenarios %s", s.Name)
		}
		seen[s.Name] = true
		spec := s.Load
		spec.Endpoints = []string{"http://x:1"}
		if err := spec.Validate(); err != nil {
			t.Errorf("%s: %v", s.Name, err)
		}
		for _, name := range s.Targets {
			if err := CheckTarget(name); err != nil {
				t.Errorf("%s: %v", s.Name, err)
			}
		}
		// Without any run every check says that it was not measured.
		for _, c := range s.Check(&Outcome{Scenario: s}) {
			if c.Skipped == "" || c.OK {
				t.Errorf("%+v", c)
			}
		}
	}
	for _, bad := range []string{"", "spindle", "spindle-", "spindle-0", "spindle-99", "etcd", "direct+tsl"} {
		if CheckTarget(bad) == nil {
			t.Errorf("%q passes", bad)
		}
	}
}

func TestChecks(t *testing.T) {
	o := &Outcome{Scenario: &Scenario{Name: "s"}, Failed: map[string]error{"broken": errors.New("it broke")}}
	add := func(target string, values ...float64) {
		for i, v := range values {
			r := &load.Result{}
			r.Total.PerSecond, r.Total.Count = v, uint64(v)
			r.Processes = []load.Usage{{Name: "spindle", CPUPerOp: 10, Before: 100, RSS: 150, Peak: 300}, {Name: "etcd", CPUPerOp: 5}}
			o.Runs = append(o.Runs, report.Run{Target: target, Round: i + 1, Result: r})
		}
	}
	add("a", 20, 60, 400)
	add("b", 10, 20, 100)
	add("broken", 10)
	add("silent", 0)
	for _, c := range []struct {
		got  report.Check
		text string
		ok   bool
	}{
		{o.ratio("", "a", "b", perSecond, atLeast(3)), "3.00 (2.00 to 4.00)", true}, // of each round, not of the medians
		{o.ratio("", "a", "b", perSecond, atLeast(3.01)), "3.00 (2.00 to 4.00)", false},
		{o.ratio("", "a", "b", perSecond, atMost(3)), "3.00 (2.00 to 4.00)", true},
		{o.ratio("", "a", "broken", perSecond, atLeast(2)), "2.00", true}, // what was measured before it broke counts
		{o.value("", "a", serversCPU, duration, atMost(14)), "15ns (15ns to 15ns)", false},
		{o.value("", "a", proxyCPU, duration, atMost(10)), "10ns (10ns to 10ns)", true},
		{o.value("", "a", grown, plain, atMost(200)), "200.00 (200.00 to 200.00)", true},
	} {
		if c.got.Got != c.text || c.got.OK != c.ok || c.got.Skipped != "" {
			t.Errorf("%+v, want %s %v", c.got, c.text, c.ok)
		}
	}
	// A row that stands on fewer rounds than there should be says so; others do not.
	if c := o.ratio("", "a", "broken", perSecond, atLeast(2)); c.Until != "broken FAILED" || c.Verdict() != "reached until broken FAILED" {
		t.Errorf("%+v: %s", c, c.Verdict())
	}
	if c := o.ratio("", "broken", "b", perSecond, atLeast(2)); c.Verdict() != "MISSED until broken FAILED" {
		t.Errorf("%+v: %s", c, c.Verdict())
	}
	if c := o.ratio("", "a", "b", perSecond, atLeast(2)); c.Verdict() != "reached" {
		t.Errorf("%+v: %s", c, c.Verdict())
	}
	// Nor is a watch fast that brings nothing.
	add("deaf", 5, 5)
	for i, n := range []uint64{0, 7} {
		r := o.Runs[len(o.Runs)-2+i].Result
		if r.Watches = make([]load.Watch, 1); n > 0 {
			r.Watches[0].FromAck = load.Latency{Count: n, P99: 20}
		}
	}
	if c := o.value("", "deaf", lagFromAck, duration, atMost(10)); c.OK || c.Got != "20ns" {
		t.Errorf("%+v", c)
	}
	if c := o.value("", "a", lagFromAck, duration, atMost(10)); c.OK || c.Skipped == "" {
		t.Errorf("%+v", c)
	}
	o.Skipped = errors.New("no disks here")
	if c := o.value("", "gone", perSecond, plain, atLeast(0)); c.OK || c.Skipped != "no disks here" {
		t.Errorf("%+v", c)
	}
	if c := o.value("", "silent", perSecond, plain, atMost(1)); c.OK || c.Skipped == "" {
		t.Errorf("nothing was answered, and that is good: %+v", c)
	}
	if c := o.value("", "gone", perSecond, plain, atLeast(0)); c.OK || c.Skipped == "" {
		t.Errorf("%+v", c)
	}
}
