package server

import (
	"math"
	"runtime/debug"
	"runtime/metrics"
	"sync"

	"spindle/shard"
)

// The garbage collector lets garbage grow to as much as is alive (GOGC=100): with much memory in clients' hands that
// would be as much again, which nothing counts. Answers are bytes without pointers, and so cost the collector next to
// nothing: while clients hold much it may as well come more often.

// pace is how often the collector comes while clients hold a share of the memory that they may have. The server's ticker owns it.
type pace struct {
	mem   *shard.Memory
	level int
}

// paces are the parts of GOGC that are left from a share of the limit on.
var paces = []struct{ num, den, part int64 }{{0, 1, 1}, {1, 8, 2}, {3, 8, 4}}

// gogc is what the process was started with, 0 for "off", which is left alone.
var gogc = sync.OnceValue(func() int {
	s := []metrics.Sample{{Name: "/gc/gogc:percent"}}
	metrics.Read(s)
	if s[0].Value.Kind() != metrics.KindUint64 || s[0].Value.Uint64() > math.MaxInt32 {
		return 0
	}
	return int(s[0].Value.Uint64())
})

// look changes the pace if what clients hold has changed. Upwards at once, downwards only when second says so: each change
// stops the world for a moment.
func (p *pace) look(second bool) {
	level := 0
	for i := range paces {
		if i > 0 && p.mem.Above(paces[i].num, paces[i].den) {
			level = i
		}
	}
	if level > p.level || level < p.level && second {
		p.set(level)
	}
}

func (p *pace) set(level int) {
	if p.level == level || gogc() == 0 {
		return
	}
	p.level = level
	debug.SetGCPercent(max(1, gogc()/int(paces[level].part)))
}
