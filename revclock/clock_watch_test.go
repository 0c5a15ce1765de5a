package revclock

import (
	"math/rand/v2"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// watchedTransport remembers the last watch that was opened.
type watchedTransport struct {
	from int64
	sink codec.WatchSink
}

func (t *watchedTransport) Call(codec.ClusterID, codec.Method, []byte, time.Duration, codec.Completion) {
}

func (t *watchedTransport) Watch(_ codec.ClusterID, req []byte, sink codec.WatchSink) codec.WatchHandle {
	var r pb.WatchRequest
	if err := proto.Unmarshal(req, &r); err != nil {
		panic(err)
	}
	t.from, t.sink = r.GetCreateRequest().StartRevision, sink
	return deadHandle{}
}

func (t *watchedTransport) KeepAlive(codec.ClusterID, codec.WatchSink) codec.WatchHandle {
	return deadHandle{}
}

type deadHandle struct{}

func (deadHandle) Send([]byte) {}
func (deadHandle) Hold(bool)   {}
func (deadHandle) Close()      {}

// A watch that is opened again at another coordinator takes nothing from there: it would leave out what the right one did
// meanwhile, and hand out its revisions again. (Found by the simulation, seed 300208: two records shared a revision.)
func TestWatchOfAnotherCoordinator(t *testing.T) {
	event := func(key, value string, rev int64) *mvccpb.Event {
		return &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(key), Value: []byte(value), ModRevision: rev}}
	}
	message := func(cluster uint64, events ...*mvccpb.Event) []byte {
		b, err := proto.Marshal(&pb.WatchResponse{Header: &pb.ResponseHeader{ClusterId: cluster, Revision: 9}, Events: events})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, test := range []struct {
		name   string
		first  []byte
		taken  bool
		reload bool
	}{
		{"the same", message(5, event("x", "seven", 7), event("y", "eight", 8)), true, false},
		{"another value at the last revision", message(5, event("x", "sieben", 7), event("y", "eight", 8)), false, true},
		{"another key at the last revision", message(5, event("z", "seven", 7), event("y", "eight", 8)), false, true},
		{"nothing at the last revision", message(5, event("y", "eight", 8)), false, true},
		{"another cluster", message(6, event("x", "seven", 7), event("y", "eight", 8)), false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			tr := &watchedTransport{}
			c := New(Config{Shards: 1, Now: func() int64 { return 1 }, Rand: rand.New(rand.NewPCG(1, 1))}, tr, nil)
			c.state, c.args.Cluster = stateRunning, 5
			c.watch.pos = 6
			c.openWatch(1)
			if tr.from != 7 {
				t.Fatalf("the first watch begins at %d", tr.from)
			}
			tr.sink.OnMessage(message(5))
			tr.sink.OnMessage(message(5, event("x", "seven", 7)))
			if c.watch.pos != 7 {
				t.Fatalf("the watch is at %d", c.watch.pos)
			}
			c.closeWatch()
			c.openWatch(2)
			if tr.from != 7 {
				t.Fatalf("the watch is opened again at %d", tr.from)
			}
			tr.sink.OnMessage(message(5)) // created
			tr.sink.OnMessage(test.first)
			if taken := c.watch.pos == 8; taken != test.taken {
				t.Errorf("the watch is at %d", c.watch.pos)
			}
			if reload := c.state == stateReading; reload != test.reload {
				t.Errorf("state %d", c.state)
			}
			if !test.taken && c.watch.handle != nil {
				t.Error("the watch goes on")
			}
		})
	}
}
