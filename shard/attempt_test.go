package shard

import (
	"testing"
	"time"
)

// One attempt that was not enough doubles the time of the next ones, once for all that were under way; after a while
// the shard is not known to be slow any more.
func TestPatience(t *testing.T) {
	const limit = 5 * time.Second
	var p patience
	now := int64(1000 * time.Second)
	want := func(d time.Duration) {
		t.Helper()
		if got := p.get(now, limit); got != d {
			t.Fatalf("%v, expected %v", got, d)
		}
	}
	want(firstPatience)
	for range 3 { // begun together, they end together
		p.ranOut(now, limit)
	}
	want(2 * firstPatience)
	now += int64(firstPatience) - 1 // this one began before, just now
	p.ranOut(now, limit)
	want(2 * firstPatience)
	now += int64(firstPatience) + 1
	p.ranOut(now, limit)
	want(4 * firstPatience)
	now += int64(4 * firstPatience)
	p.ranOut(now, limit)
	want(limit)
	p.ranOut(now+int64(limit), limit)
	now += int64(limit)
	want(limit)
	now += int64(patienceLasts) + 1
	want(firstPatience)
	if got := (&patience{}).get(now, 300*time.Millisecond); got != 300*time.Millisecond {
		t.Errorf("%v, more than the shard timeout", got)
	}
}
