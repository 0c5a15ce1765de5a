package shard

import (
	"log/slog"
	"testing"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/revclock"
)

func eventBytes(t *testing.T, e *mvccpb.Event) []byte {
	t.Helper()
	b, err := proto.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// putEvent is the put of a new key at rev.
func putEvent(t *testing.T, key string, rev int64) []byte {
	return eventBytes(t, &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(key), CreateRevision: 7, ModRevision: 7, Version: 1,
		Value: append(AppendStamp(nil, rev, rev), key...)}})
}

func deleteEvent(t *testing.T, key string) []byte {
	return eventBytes(t, &mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: 7}})
}

// decodeRig is a shard of a Core that has nothing but what decode needs.
func decodeRig() *shardState {
	return &shardState{c: &Core{log: slog.New(slog.DiscardHandler), creates: NewCreateCache(0), cfg: CoreConfig{Proxy: revclock.ID{1}}}}
}

// TestDecodeLearnsOnce checks that what a batch's answers have told the cache of create revisions is not told again, and all
// else is.
func TestDecodeLearnsOnce(t *testing.T) {
	for _, c := range []struct {
		name    string
		rec     Record
		pending bool
		learns  bool
	}{
		{"answered", Record{First: 10, Last: 11, Proxy: revclock.ID{1}}, false, false},
		{"answered, behind what came without a record", Record{First: 10, Last: 11, Proxy: revclock.ID{1}}, true, true},
		{"of ours, not answered yet", Record{First: 12, Last: 13, Proxy: revclock.ID{1}}, true, true},
		{"of another proxy", Record{First: 10, Last: 11, Proxy: revclock.ID{2}}, true, true},
	} {
		s := decodeRig()
		s.taught = 11
		c.rec.Deletes = []RecordDelete{{Rev: c.rec.Last, Key: []byte("b")}}
		clock := eventBytes(t, &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(KeyClock), Value: AppendRecord(nil, &c.rec)}})
		var pending []pendingEvent
		if c.pending {
			pending = append(pending, pendingEvent{msg: putEvent(t, "p", c.rec.First)})
		}
		s.decode(&c.rec, pending, [][]byte{putEvent(t, "a", c.rec.First), deleteEvent(t, "b"), clock}, &s.foreign, false)
		for key, want := range map[string]bool{"a": c.learns, "b": true, "p": c.pending} {
			if _, _, _, ok := s.c.creates.Get([]byte(key)); ok != want {
				t.Errorf("%s: %s is known: %v", c.name, key, ok)
			}
		}
	}
}

// TestDecodeSharedRevision checks that an entry of several events, which do not stand together, takes no other's room.
func TestDecodeSharedRevision(t *testing.T) {
	s := decodeRig()
	rec := Record{First: 10, Last: 12, Proxy: revclock.ID{2}}
	clock := eventBytes(t, &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(KeyClock), Value: AppendRecord(nil, &rec)}})
	pending := []pendingEvent{{msg: deleteEvent(t, "p")}, {msg: deleteEvent(t, "q")}}
	all := s.decode(&rec, pending, [][]byte{putEvent(t, "b", 11), putEvent(t, "a", 10), putEvent(t, "c", 12), clock}, &s.foreign, false)
	got := map[int64]string{}
	for _, en := range all {
		for _, ev := range en.Events {
			got[en.Rev] += string(ev.Key)
		}
	}
	if len(all) != 3 || got[10] != "pqa" || got[11] != "b" || got[12] != "c" {
		t.Errorf("%d entries: %v", len(all), got)
	}
}
