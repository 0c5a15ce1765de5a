package server

import (
	"runtime/metrics"
	"testing"

	"spindle/shard"
)

// TestPace: the collector comes the more often the more clients hold, and less often only after a while.
func TestPace(t *testing.T) {
	if gogc() == 0 {
		t.Skip("GOGC=off")
	}
	now := func() int {
		s := []metrics.Sample{{Name: "/gc/gogc:percent"}}
		metrics.Read(s)
		return int(s[0].Value.Uint64())
	}
	m := shard.NewMemory(800)
	p := pace{mem: m}
	defer p.set(0)
	for _, c := range []struct {
		used   int64
		second bool
		part   int
	}{{0, false, 1}, {100, false, 1}, {101, false, 2}, {301, false, 4}, {50, false, 4}, {150, true, 2}, {0, false, 2}, {0, true, 1}} {
		m.Add(c.used - m.Used())
		p.look(c.second)
		if want := gogc() / c.part; now() != want {
			t.Errorf("%d of 800 bytes: GOGC is %d, want %d", c.used, now(), want)
		}
	}
	(&pace{}).look(true) // without a limit
}
