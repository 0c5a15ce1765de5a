package chaos

import (
	"math"
	"time"

	"github.com/anishathalye/porcupine"
)

// swapKind says what a request means to one hot key.
type swapKind uint8

const (
	swapGet swapKind = iota
	swapPut
	swapSwap
)

// swap is a request about one hot key as a register sees it. "" is the value of a key that is not there.
type swap struct {
	key      string
	kind     swapKind
	expected string // swapSwap: what it compares with
	value    string // swapPut, swapSwap: what it writes
	shown    string // swapGet, and swapSwap that did not write: what the answer shows
	wrote    bool   // swapSwap: the answer says that it wrote, or there is none
}

// register is a key as one machine would have it. It knows nothing of revisions.
var register = porcupine.Model{
	Partition: func(all []porcupine.Operation) [][]porcupine.Operation {
		byKey := map[string]int{}
		var parts [][]porcupine.Operation
		for _, op := range all {
			key := op.Input.(swap).key
			i, known := byKey[key]
			if !known {
				i = len(parts)
				byKey[key] = i
				parts = append(parts, nil)
			}
			parts[i] = append(parts[i], op)
		}
		return parts
	},
	Init: func() any { return "" },
	Step: func(state, input, _ any) (bool, any) {
		switch s := input.(swap); {
		case s.kind == swapGet:
			return s.shown == state, state
		case s.kind == swapPut:
			return true, s.value
		case s.wrote:
			return s.expected == state, s.value
		default:
			return s.shown == state && s.shown != s.expected, state
		}
	},
}

// swaps returns the requests about hot keys for porcupine. A request without an answer may have happened at any time
// after it was sent. One whose value nobody has ever seen needs no place in any order; one of a deletion (which leaves
// no value to see) gets none if the history does not have it.
func (r *record) swaps() []porcupine.Operation {
	r.mu.Lock()
	defer r.mu.Unlock()
	seen, deleted := map[string]bool{}, map[string]bool{}
	for _, q := range r.requests {
		if q.swap != nil && q.code == 0 {
			seen[q.swap.shown] = true
			seen[q.swap.expected] = true
		}
	}
	for _, e := range r.history {
		if e.del {
			deleted[deleteID(e.key, e.prev)] = true
		} else {
			seen[e.value] = true
		}
	}
	acked := map[string]bool{} // deletes
	for _, q := range r.requests {
		if q.swap != nil && q.acked && q.writes[0].del {
			acked[deleteID(q.swap.key, q.writes[0].prevMod)] = true
		}
	}
	var ops []porcupine.Operation
	for _, q := range r.requests {
		if q.swap == nil {
			continue
		}
		s := *q.swap
		s.wrote = q.acked
		op := porcupine.Operation{ClientId: len(ops), Call: int64(q.call), Return: int64(q.ret)}
		if q.code != 0 {
			if s.kind == swapGet || q.definite() {
				continue
			}
			if w := q.writes[0]; w.del {
				id := deleteID(w.key, w.prevMod)
				if !deleted[id] || acked[id] {
					continue
				}
				acked[id] = true
			} else if !seen[s.value] {
				continue
			}
			s.wrote = true
			op.Return = math.MaxInt64
		}
		op.Input = s
		ops = append(ops, op)
	}
	return ops
}

// linearizable asks porcupine. Unknown means that it has not come to an end in time.
func (r *record) linearizable(timeout time.Duration) (porcupine.CheckResult, int) {
	ops := r.swaps()
	return porcupine.CheckOperationsTimeout(register, ops, timeout), len(ops)
}
