package server

import (
	"math/rand/v2"
	"testing"
	"time"
)

// TestWheel compares the wheel with a plain set of deadlines.
func TestWheel(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 1))
	defer func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	}()
	var w wheel
	armed := map[*call]int64{} // from when on it may expire
	now := rnd.Int64N(1 << 50)
	for range 20000 {
		switch rnd.IntN(4) {
		case 0, 1:
			k := &call{deadline: now + rnd.Int64N(int64(12*time.Second)) - int64(time.Second)}
			w.add(k, now)
			armed[k] = max(now, k.deadline)
		case 2:
			for k := range armed {
				w.remove(k)
				w.remove(k) // harmless
				delete(armed, k)
				break
			}
		case 3:
			now += rnd.Int64N(int64(200 * time.Millisecond))
			if rnd.IntN(50) == 0 {
				now += int64(20 * time.Second) // the loop slept
			}
			w.advance(now, func(k *call) {
				if armed[k] == 0 || k.deadline > now || k.armed {
					t.Fatalf("expired: known since %d, deadline %v from now", armed[k], time.Duration(k.deadline-now))
				}
				delete(armed, k)
				if rnd.IntN(4) == 0 { // expiring may arm and disarm others
					other := &call{deadline: now + rnd.Int64N(int64(time.Second)) - int64(100*time.Millisecond)}
					w.add(other, now)
					armed[other] = max(now, other.deadline)
				}
			})
			for _, due := range armed {
				if due < now-2*int64(tickEvery) {
					t.Fatalf("missed a deadline by %v", time.Duration(now-due))
				}
			}
		}
		if w.count != len(armed) {
			t.Fatalf("count %d, armed %d", w.count, len(armed))
		}
	}
}
