package watchring

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// seeded returns a random source and prints its seed if the test fails.
func seeded(t testing.TB, seed uint64) *rand.Rand {
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

// makeEvent encodes an event with etcd's own types.
func makeEvent(t testing.TB, key string, rev int64, del, create bool, value []byte) Event {
	ev := &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: rev}}
	if del {
		ev.Type = mvccpb.Event_DELETE
	} else {
		ev.Kv.Value = value
		ev.Kv.CreateRevision, ev.Kv.Version = rev, 1
		if !create {
			ev.Kv.CreateRevision, ev.Kv.Version = 1, 2
		}
	}
	body, err := proto.Marshal(ev)
	if err != nil {
		t.Fatal(err)
	}
	n := len(body)
	if !create {
		ev.PrevKv = &mvccpb.KeyValue{Key: []byte(key), ModRevision: rev - 1, Value: []byte("before")}
		if body, err = proto.Marshal(ev); err != nil {
			t.Fatal(err)
		}
	}
	return Event{Key: []byte(key), Delete: del, Create: create, Body: body, NoPrev: n}
}

func makeEntry(t testing.TB, rev int64, shard int, keys ...string) *Entry {
	e := &Entry{Rev: rev, Shard: shard}
	for _, k := range keys {
		e.Events = append(e.Events, makeEvent(t, k, rev, false, false, []byte("v")))
	}
	for i := range e.Events {
		e.Size += len(e.Events[i].Body)
	}
	return e
}

// recorder is a Sink that keeps what it is sent.
type recorder struct {
	t       testing.TB
	got     []*etcdserverpb.WatchResponse
	ended   []int64
	failed  []string
	blocked bool
	onSend  func()
}

func (r *recorder) Send(head, events []byte, shared bool) (kept bool) {
	m := new(etcdserverpb.WatchResponse)
	if err := proto.Unmarshal(slices.Concat(head, events), m); err != nil {
		r.t.Fatalf("response %x %x: %v", head, events, err)
	}
	r.got = append(r.got, m)
	if r.onSend != nil {
		r.onSend()
	}
	return false
}

func (r *recorder) Blocked() bool    { return r.blocked }
func (r *recorder) Ended(w *Watcher) { r.ended = append(r.ended, w.ID) }

func (r *recorder) Failed(reason string) { r.failed = append(r.failed, reason) }

// take returns the responses as short lines and forgets them.
func (r *recorder) take() []string {
	var out []string
	for _, m := range r.got {
		s := fmt.Sprintf("id=%d rev=%d", m.WatchId, m.Header.GetRevision())
		if m.Fragment {
			s += " fragment"
		}
		if m.Canceled {
			s += fmt.Sprintf(" canceled compact=%d", m.CompactRevision)
			if m.CancelReason != "" {
				s += fmt.Sprintf(" %q", m.CancelReason)
			}
		}
		for _, ev := range m.Events {
			s += fmt.Sprintf(" %s@%d", ev.Kv.Key, ev.Kv.ModRevision)
		}
		out = append(out, s)
	}
	r.got = nil
	return out
}

func pumpAll(t testing.TB, h *Hub) {
	t.Helper()
	for i := 0; h.Pump(); i++ {
		if i > 100000 {
			t.Fatal("Pump never ends")
		}
	}
}

// oneShard puts every key on shard 0.
func oneShard(key, end []byte) int { return 0 }
