package shard

import (
	"testing"
	"time"

	"spindle/codec"
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

// spanTransport notes how long each call may take. None of them is answered in time.
type spanTransport struct {
	codec.Transport
	spans []time.Duration
}

func (t *spanTransport) Call(_ codec.ClusterID, _ codec.Method, _ []byte, timeout time.Duration, done codec.Completion) {
	t.spans = append(t.spans, timeout)
	done.Complete(nil, statusDeadline, true)
}

// A page that takes long on a busy member says nothing about batches. No attempt but one at a large read that is known to take
// long takes the time of a second one.
func TestPatienceOfLargeReads(t *testing.T) {
	tr := &spanTransport{}
	now := int64(1000 * time.Second)
	s := &shardState{c: &Core{tr: tr, cfg: CoreConfig{ShardTimeout: 5 * time.Second, Now: func() int64 { return now }}}}
	done := completion(func([]byte, codec.Status, bool) {})
	for i, want := range []time.Duration{firstPatience, 2 * firstPatience, 4 * firstPatience, 5 * time.Second, 5 * time.Second} {
		if s.callLarge(codec.MethodRange, nil, 0, done); tr.spans[i] != want {
			t.Errorf("large attempt %d: %v, expected %v", i, tr.spans[i], want)
		}
		now += int64(3 * time.Second)
	}
	// What is known to be large has the time that it takes a busy member, before any attempt has failed.
	tr.spans = nil
	now += int64(time.Minute)
	s.callLarge(codec.MethodRange, nil, 2*largeRate, done)
	now += int64(time.Minute)
	s.callLarge(codec.MethodRange, nil, 1<<62, done)
	if tr.spans[0] != firstPatience+2*time.Second || tr.spans[1] != 5*time.Second {
		t.Errorf("large answers have %v", tr.spans)
	}
	tr.spans = nil
	for i, want := range []time.Duration{firstPatience, 2 * firstPatience, 2500 * time.Millisecond, 2500 * time.Millisecond} {
		if s.call(codec.MethodTxn, nil, done); tr.spans[i] != want {
			t.Errorf("attempt %d: %v, expected %v", i, tr.spans[i], want)
		}
		now += int64(3 * time.Second)
	}
}
