//go:build !race

package shard

import "testing"

// TestPlanAllocations: the requests of kube-apiserver cost no allocation from their first byte to their
// answer.
func TestPlanAllocations(t *testing.T) {
	creates := NewCreateCache(64)
	for _, c := range kubeCases(t) {
		var p Plan
		out, parts := make([]byte, 0, 4096), make([][]byte, 1)
		n := testing.AllocsPerRun(100, func() {
			var ok bool
			if out, ok = c.run(&p, out, parts, creates); !ok {
				t.Fatalf("%s failed", c.name)
			}
		})
		if n != 0 {
			t.Errorf("%s: %v allocations", c.name, n)
		}
	}
}
