package shard

import "testing"

// While the coordinator is read anew its log says nothing, but what believed ones have said of a shard still holds: it is not
// rebuilt with a member that was restored to before that. (Seed 7006440 of the simulation: it was, and refused when its newest state was back.)
func TestFloorWhileConnecting(t *testing.T) {
	r := newStreamRig(t, 1)
	s := r.c.shards[0]
	s.known = point{3, 3, 5}
	r.c.connecting = &connecting{c: r.c}
	for _, c := range []struct {
		named int64
		lossy bool
		want  int64
	}{{0, false, 3}, {7, false, 7}, {7, true, 3}} {
		s.named, s.lossy = c.named, c.lossy
		if got := s.floor(); got != c.want || s.lossy != c.lossy {
			t.Errorf("%+v: %d, lossy afterwards: %v", c, got, s.lossy)
		}
	}
}

// Where the fence of an accepted loss was seen, an answer of the lost time that is read late does not take its place, though it was given at a larger
// local revision.
func TestLateAnswerOfLostTime(t *testing.T) {
	r := newStreamRig(t, 1)
	s := r.c.shards[0]
	s.saw(point{3, 3, 50})
	fence := point{1000, 1001, 7}
	s.lossEndedAt(fence)
	s.saw(point{4, 4, 51})
	if s.known != fence {
		t.Errorf("what is known is at %+v", s.known)
	}
}
