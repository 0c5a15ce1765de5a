//go:build !race

package revclock

import "testing"

// What is done for every request, as opposed to every tick, allocates nothing.
func TestNoAllocations(t *testing.T) {
	_, p := quiet(t)
	filter := NewFilter(nil, 100)
	key := []byte("/registry/pods/default/a")
	l := p.c.Log()
	buf := make([]byte, 0, 1024)
	for name, f := range map[string]func(){
		"now":    func() { p.c.Now() },
		"filter": func() { FilterAdd(filter, key); FilterMayContain(filter, key); filter = NewFilter(filter, 100) },
		"log":    func() { l.Frontier(0); l.Open(0); l.Earliest(0, 99, 5); l.Committed(1, 1, 1, ID{7}) },
		"tick":   func() { buf = AppendTick(buf[:0], &Tick{Proxy: proxyA, Nonce: 1}) },
	} {
		if n := testing.AllocsPerRun(1000, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
