//go:build !race

package watchring

import (
	"fmt"
	"testing"

	"spindle/codec"
)

// discard is a Sink that takes everything.
type discard struct{ messages, bytes int }

func (d *discard) Send(head, events []byte, shared bool) bool {
	d.messages++
	d.bytes += len(head) + len(events)
	return false
}
func (d *discard) Blocked() bool  { return false }
func (d *discard) Ended(*Watcher) {}
func (d *discard) Failed(string)  {}

func TestHubAllocs(t *testing.T) {
	ring, front := NewRing(1<<12, 1<<30, 0), NewFrontier(2, 0)
	hub := NewHub(ring, front, func(key, end []byte) int {
		if end != nil {
			return All
		}
		return 0
	}, codec.Header{ClusterID: 1}, nil, HubConfig{})
	var sink discard
	for i := 0; i < 20; i++ {
		s := hub.NewStream(&sink)
		hub.Add(s, &Watcher{ID: 1, Key: "/registry/pods/", End: "/registry/pods0", Start: 1, PrevKV: true, ProgressNotify: true})
		hub.Add(s, &Watcher{ID: 2, Key: "/registry/", End: "/registry0", Start: 1})
		hub.Add(s, &Watcher{ID: 3, Key: "/registry/pods/x", Start: 1})
		hub.Add(s, &Watcher{ID: 4, Key: fmt.Sprint("/registry/", i), End: "\x00", Start: 1, NoDelete: true})
	}
	entries := make([]*Entry, 400)
	for i := range entries {
		entries[i] = makeEntry(t, int64(i+1), 0, "/registry/pods/x", "/registry/pods/y")
	}
	rev := int64(0)
	next := func() {
		for i := 0; i < 3; i++ {
			rev++
			ring.Publish(entries[rev-1])
		}
		front.Set(0, rev)
		front.Set(1, rev)
		for hub.Pump() {
		}
		hub.Notify()
	}
	next()
	next()
	before := sink.messages
	if n := testing.AllocsPerRun(100, next); n != 0 {
		t.Errorf("%v allocations per round of 6 events to 80 watchers", n)
	}
	if sink.messages-before < 100*60 {
		t.Fatalf("only %d messages", sink.messages-before)
	}
}

// BenchmarkFanOut: go test -bench FanOut ./watchring
// One operation is one revision with one event of 1 KiB, delivered to all watchers of one prefix.
func BenchmarkFanOut(b *testing.B) {
	for _, streams := range []int{1, 1000} {
		b.Run(fmt.Sprintf("1KiBTo1000WatchersOn%dStreams", streams), func(b *testing.B) {
			ring, front := NewRing(1<<10, 1<<30, 0), NewFrontier(1, 0)
			hub := NewHub(ring, front, oneShard, codec.Header{ClusterID: 1, MemberID: 2, RaftTerm: 3}, nil, HubConfig{})
			var sink discard
			all := make([]*Stream, streams)
			for i := range all {
				all[i] = hub.NewStream(&sink)
			}
			for i := 0; i < 1000; i++ {
				hub.Add(all[i%streams], &Watcher{ID: int64(i), Key: "/registry/pods/", End: "/registry/pods0", Start: 1, PrevKV: true})
			}
			ev := makeEvent(b, "/registry/pods/default/name", 1, false, true, make([]byte, 1024))
			b.ReportAllocs()
			rev := int64(0)
			for b.Loop() {
				rev++
				ring.Publish(&Entry{Rev: rev, Events: []Event{ev}, Size: 1100})
				front.Set(0, rev)
				hub.Pump()
			}
			if sink.messages != int(rev)*1000 {
				b.Fatal(sink.messages, rev)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(sink.messages), "ns/delivery")
		})
	}
}
