package shard

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// timerProbe records when it was due.
type timerProbe struct {
	timer poolTimer
	id    int
	log   *[]int
	again func(*timerProbe)
}

func (p *timerProbe) due(int64) {
	*p.log = append(*p.log, p.id)
	if p.again != nil {
		p.again(p)
	}
}

// TestPoolTimersModel compares the heap with a sorted list under random sets and cancels.
func TestPoolTimersModel(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 1))
	var timers poolTimers
	timers.init(func() {})
	defer timers.stop()
	var log []int
	probes := make([]*timerProbe, 200)
	for i := range probes {
		probes[i] = &timerProbe{id: i, log: &log}
		probes[i].timer.owner = probes[i]
	}
	far := timers.now() + int64(time.Hour)
	model := map[int]int64{}
	for range 20000 {
		i := rng.IntN(len(probes))
		if rng.IntN(3) == 0 {
			timers.cancel(&probes[i].timer)
			delete(model, i)
		} else {
			at := far + int64(rng.IntN(1000))
			timers.set(&probes[i].timer, at)
			model[i] = at
		}
		for j, x := range timers.heap {
			if x.place != j+1 || j > 0 && timers.heap[(j-1)/2].at > x.at {
				t.Fatalf("seed %d: the heap is broken at %d", seed, j)
			}
		}
		if len(timers.heap) != len(model) {
			t.Fatalf("seed %d: %d timers, want %d", seed, len(timers.heap), len(model))
		}
	}
	timers.base = timers.base.Add(-2 * time.Hour) // two hours pass
	timers.run()
	if len(timers.heap) != 0 || len(log) != len(model) {
		t.Fatalf("seed %d: %d fired, want %d; %d left", seed, len(log), len(model), len(timers.heap))
	}
	if !slices.IsSortedFunc(log, func(a, b int) int { return int(model[a] - model[b]) }) {
		t.Fatalf("seed %d: fired out of order", seed)
	}
}

// A timer set by what fires waits for the next run, unless it is due too; and the one time.Timer always stands at
// or before the earliest deadline.
func TestPoolTimersArm(t *testing.T) {
	woken := make(chan struct{}, 100)
	var timers poolTimers
	timers.init(func() { woken <- struct{}{} })
	defer timers.stop()
	var log []int
	p := &timerProbe{id: 1, log: &log}
	p.timer.owner = p
	p.again = func(p *timerProbe) {
		if len(log) < 5 {
			timers.set(&p.timer, timers.now()+int64(time.Millisecond))
		}
	}
	late := &timerProbe{id: 2, log: &log}
	late.timer.owner = late
	timers.set(&late.timer, timers.now()+int64(time.Hour))
	timers.set(&p.timer, timers.now()+int64(time.Millisecond))
	for len(log) < 5 {
		select {
		case <-woken:
			timers.run()
		case <-time.After(testGuard):
			t.Fatalf("no wake-up after %d", len(log))
		}
	}
	if timers.armed != late.timer.at {
		t.Errorf("armed for %d, want %d", timers.armed, late.timer.at)
	}
	timers.stop()
	timers.set(&p.timer, 1)
	if p.timer.place != 0 || late.timer.place != 0 {
		t.Error("set after stop")
	}
}
