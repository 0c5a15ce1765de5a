package shard

import (
	"strings"
	"testing"
	"time"
)

func TestParseAutoCompact(t *testing.T) {
	for _, c := range []struct {
		mode, retention string
		want            AutoCompact
		err             string
	}{
		{mode: "periodic", retention: "0"},
		{mode: "revision", retention: "0"},
		{mode: "", retention: ""},
		{mode: "periodic", retention: "0s"},
		{mode: "periodic", retention: "1", want: AutoCompact{Mode: AutoCompactPeriodic, Period: time.Hour}},
		{mode: "", retention: "30m", want: AutoCompact{Mode: AutoCompactPeriodic, Period: 30 * time.Minute}},
		{mode: "periodic", retention: "1h", want: AutoCompact{Mode: AutoCompactPeriodic, Period: time.Hour}},
		{mode: "revision", retention: "1000", want: AutoCompact{Mode: AutoCompactRevision, Keep: 1000}},
		{mode: "hourly", retention: "1", err: "periodic or revision"},
		{mode: "revision", retention: "1h", err: "number of revisions"},
		{mode: "periodic", retention: "soon", err: "a duration"},
		{mode: "periodic", retention: "-5m", err: "give from"},
		{mode: "periodic", retention: "-5", err: "out of range"},
		{mode: "revision", retention: "-5", err: "out of range"},
		{mode: "revision", retention: "99999999999999999999", err: "out of range"},
		{mode: "periodic", retention: "9223372036854775807", err: "give from"},
		{mode: "periodic", retention: "1ns", err: "give from"},
	} {
		got, err := ParseAutoCompact(c.mode, c.retention)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q %q: %v", c.mode, c.retention, err)
			}
			continue
		}
		if err != nil || got != c.want {
			t.Errorf("%q %q: %+v, %v", c.mode, c.retention, got, err)
		}
	}
}

// autoRun lets several proxies look at a common revision line, which grows by one each step, and returns
// when (in steps) what was compacted.
func autoRun(t *testing.T, cfg AutoCompact, step time.Duration, steps int, phases ...int) (at, revs []int64) {
	t.Helper()
	as := make([]autoCompactor, len(phases))
	compacted := int64(-1)
	var age int64
	for i := range as {
		as[i].begin(cfg, 0, 1, compacted)
	}
	every := int(as[0].every() / step)
	for n := 1; n <= steps; n++ {
		now, rev := int64(n)*int64(step), int64(n+1)
		for i := range as {
			if n%every != phases[i] {
				continue
			}
			target := as[i].look(now, rev, compacted)
			if target == 0 {
				continue
			}
			if target <= compacted {
				t.Fatalf("step %d: compacts at %d, which is done", n, target)
			}
			if cfg.Mode == AutoCompactPeriodic {
				// revision r was made at step r-1
				if age = now - (target-1)*int64(step); age < int64(cfg.Period) {
					t.Fatalf("step %d: compacts %v old history", n, time.Duration(age))
				}
			} else if rev-target < cfg.Keep {
				t.Fatalf("step %d: keeps %d", n, rev-target)
			}
			compacted = target
			at, revs = append(at, int64(n)), append(revs, target)
			as[i].done(now, target, true)
		}
	}
	return at, revs
}

func TestAutoCompactPeriodic(t *testing.T) {
	hour := AutoCompact{Mode: AutoCompactPeriodic, Period: time.Hour}
	at, revs := autoRun(t, hour, time.Minute, 600, 0)
	// etcd: first after the period, then one each hour, up to what was there 60 to 66 minutes before.
	if len(at) != 10 || at[0] != 60 || revs[0] != 1 {
		t.Errorf("compacts at %v up to %v", at, revs)
	}
	for i := 1; i < len(at); i++ {
		if at[i]-at[i-1] != 60 {
			t.Errorf("compacts at %v", at)
		}
	}
	day := AutoCompact{Mode: AutoCompactPeriodic, Period: 24 * time.Hour}
	at, _ = autoRun(t, day, time.Minute, 3*1440, 0)
	if len(at) != 49 || at[0] != 1440 || at[1] != 1500 {
		t.Errorf("24h: %d times, %v", len(at), at)
	}
}

// Several proxies: one compacts, the others count it as their turn.
func TestAutoCompactOneAtATime(t *testing.T) {
	hour := AutoCompact{Mode: AutoCompactPeriodic, Period: time.Hour}
	if at, _ := autoRun(t, hour, time.Minute, 1200, 0, 2, 3, 5); len(at) > 21 {
		t.Errorf("four proxies compact %d times in 20 hours: %v", len(at), at)
	} else if len(at) < 18 {
		t.Errorf("four proxies compact %d times only: %v", len(at), at)
	}
	keep := AutoCompact{Mode: AutoCompactRevision, Keep: 50}
	at, revs := autoRun(t, keep, time.Second, 3600, 0, 10, 200)
	if len(at) != 12 || revs[0] != 151 {
		t.Errorf("revision: at %v up to %v", at, revs)
	}
}

// When the one that compacts is gone, another does it at one of its next turns; and a failure is tried
// again at the next look.
func TestAutoCompactGoesOn(t *testing.T) {
	for _, cfg := range []AutoCompact{
		{Mode: AutoCompactPeriodic, Period: time.Minute},
		{Mode: AutoCompactRevision, Keep: 5, Every: 10 * time.Second},
	} {
		var a autoCompactor
		a.begin(cfg, 0, 1, -1)
		fails, good := 0, 0
		for n := int64(1); n <= 200; n++ {
			now := n * int64(a.every())
			target := a.look(now, n*10, -1)
			if target == 0 {
				continue
			}
			if a.look(now, n*10, -1) != 0 {
				t.Fatal("two at a time")
			}
			if fails < 3 {
				fails++
				a.done(now, target, false)
			} else {
				good++
				a.done(now, target, true)
			}
		}
		if fails != 3 || good == 0 {
			t.Errorf("%+v: %d failures, %d compactions", cfg, fails, good)
		}
		// Nothing is written any more: nothing is compacted.
		a.begin(cfg, 0, 100, -1)
		n := 0
		for i := int64(1); i <= 500; i++ {
			if target := a.look(i*int64(a.every()), 100, -1); target != 0 {
				n++
				a.done(i*int64(a.every()), target, true)
			}
		}
		if n != 1 {
			t.Errorf("%+v: compacts %d times with nothing new", cfg, n)
		}
	}
}
