package shard

import (
	"fmt"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// Values of etcd's users begin with a byte that no stamp begins with.
func TestForeignValuesAreNoStamps(t *testing.T) {
	for _, v := range []string{"hello world, this is text", `{"kind":"Pod"}`, "k8s\x00\n\x09\n\x02v1\x12\x03Pod", "f1", "", "\x01\x00\x00\x00\x00\x00\x00\x01\x00"} {
		if st, _, ok := ParseStamp([]byte(v)); ok {
			t.Errorf("%q is taken for a stamp of revision %d", v, st.Rev)
		}
	}
	if _, _, ok := ParseStamp(AppendStamp(nil, maxStampRev, 1)); !ok {
		t.Error("the largest revision has no stamp")
	}
}

// foreignStep is one event without a record, and what is kept of it: "", "-key" or "-key was R".
type foreignStep struct {
	ev   *mvccpb.Event
	want string
}

func stamped(rev int64) []byte { return append(AppendStamp(nil, rev, 1), "v"...) }

func foreignEvent(key string, local int64, value []byte, prev []byte, prevLocal int64) *mvccpb.Event {
	e := &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: local, CreateRevision: local, Value: value}}
	if value == nil {
		e.Type = mvccpb.Event_DELETE
	}
	if prev != nil {
		e.Kv.CreateRevision = 1
		e.PrevKv = &mvccpb.KeyValue{Key: []byte(key), ModRevision: prevLocal, CreateRevision: 1, Value: prev}
	}
	return e
}

// What a stream keeps of foreign changes is the same when it is opened again at its last record in the middle of
// them (found by the simulation: the previous pair of a key that was put twice was lost).
func TestForeignKeysRewind(t *testing.T) {
	raw := []byte("somebody's")
	steps := []foreignStep{
		{foreignEvent("known", 5, raw, stamped(3), 4), ""},
		{foreignEvent("new", 6, raw, nil, 0), ""},
		{foreignEvent("known", 7, raw, raw, 5), ""},
		{foreignEvent("new", 8, nil, raw, 6), ""},
		{foreignEvent("known", 9, nil, raw, 7), "-known was 3"},
		{foreignEvent("known", 10, raw, nil, 0), ""},
		{foreignEvent("known", 11, nil, raw, 10), ""},
		{foreignEvent("plain", 12, nil, stamped(2), 3), "-plain was 2"},
	}
	for stop := range steps {
		var f foreignKeys
		for i := 0; i < len(steps); i++ {
			msg, _ := proto.Marshal(steps[i].ev)
			got := ""
			if out := f.waits(msg); out != nil {
				kv, prev, del := eventKVs(out)
				if !del {
					t.Fatalf("step %d is no delete", i)
				}
				st, _, _ := ParseStamp(prev.Value)
				got = fmt.Sprintf("-%s was %d", kv.Key, st.Rev)
			}
			if got != steps[i].want || len(f.unknown) > 0 {
				t.Errorf("opened again after step %d: step %d gives %q, must be %q; unknown: %v", stop, i, got, steps[i].want, f.unknown)
			}
			if i == stop {
				f.rewind()
				i, stop = -1, -1
			}
		}
		if len(f.keys) != 0 || f.bytes != 0 {
			t.Errorf("%d keys of %d bytes are left", len(f.keys), f.bytes)
		}
	}
}

// A stream that begins behind a foreign put must look up what it has replaced.
func TestForeignUnknown(t *testing.T) {
	var f foreignKeys
	msg, _ := proto.Marshal(foreignEvent("k", 9, nil, []byte("raw"), 5))
	if out := f.waits(msg); out != nil || len(f.unknown) != 1 || f.unknown[0] != (foreignRef{"k", 5}) {
		t.Fatalf("%x, unknown: %v", out, f.unknown)
	}
	f.unknown = nil
	f.rewind()
	f.change("k", foreignKey{local: 5, known: true, old: codec.AppendKV(nil, &codec.KV{Key: []byte("k"), Value: stamped(4)})}, true)
	out := f.waits(msg)
	_, prev, del := eventKVs(out)
	if st, _, ok := ParseStamp(prev.Value); !del || !ok || st.Rev != 4 || len(f.unknown) > 0 {
		t.Errorf("%x, unknown: %v", out, f.unknown)
	}
}

// TestForeignPutsOfOneKeyHaveAnEnd: what was there before is looked for behind so many foreign puts, and then counts as
// compacted. Else a key that somebody put ten thousand times would never be found, nor taken over.
func TestForeignPutsOfOneKeyHaveAnEnd(t *testing.T) {
	for foreign, want := range map[int]codec.Status{maxForeignSteps - 1: {}, maxForeignSteps: codec.ErrCompacted} {
		r := newLeaseRig(t, 1)
		done, got := false, codec.Status{}
		local := int64(20_000)
		r.c.shards[0].before([]byte("k"), local, r.c.deadline(), func(old []byte, st codec.Status) {
			done, got = true, st
			if (old != nil) != (st.Code == codec.OK) {
				t.Errorf("%d bytes, %v", len(old), st)
			}
		})
		asked := 0
		for ; len(r.calls) > 0; asked++ {
			local--
			kv := &mvccpb.KeyValue{Key: []byte("k"), ModRevision: local, CreateRevision: 1, Version: local, Value: []byte("direct")}
			if asked == foreign {
				kv.Value = stamped(3)
			}
			r.next(0, codec.MethodRange).key(kv)
		}
		if !done || got != want || asked > maxForeignSteps {
			t.Errorf("%d foreign puts: %v, %v after %d reads", foreign, done, got, asked)
		}
	}
}

// A stream that is opened again while foreign values are looked up asks for itself. What the first lookup finds afterwards must
// not come behind the place where the stream has shown that the value was taken over. (Seeds 7002462, 7005835, 7006684 and 7007350
// of the simulation: deletes were not shown, previous pairs were older ones.)
func TestForeignLookupOfAnEarlierReading(t *testing.T) {
	r := newStreamRig(t, 1)
	s := r.c.shards[0]
	s.foreign.unknown = []foreignRef{{"k", 7}}
	s.lookupForeign()
	if len(r.calls) != 1 {
		t.Fatalf("%d lookups", len(r.calls))
	}
	s.openStream() // its connection was lost, and is back
	open := len(r.open())
	r.calls[0].c.Complete(mustMarshal(t, &etcdserverpb.RangeResponse{}), codec.Status{}, true)
	if _, known := s.foreign.keys["k"]; known || len(r.open()) != open {
		t.Errorf("it has come behind the stream: %v, %d streams", s.foreign.keys, len(r.open()))
	}
}
