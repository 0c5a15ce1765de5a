package sim

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

type completionFunc func(resp []byte, st codec.Status, sent bool)

func (f completionFunc) Complete(resp []byte, st codec.Status, sent bool) { f(resp, st, sent) }

type sinkFuncs struct {
	message func(*pb.WatchResponse)
	end     func(codec.Status)
}

func (s *sinkFuncs) OnMessage(b []byte) {
	m := &pb.WatchResponse{}
	if proto.Unmarshal(b, m) == nil {
		s.message(m)
	}
}

func (s *sinkFuncs) OnEnd(st codec.Status) { s.end(st) }

// TestNetKeepsItsContract sends puts of distinct keys through bad networks: each call completes once and not
// from within Call, an answer of OK or of "not sent" is the truth, and a stream shows every revision in
// order up to its end.
func TestNetKeepsItsContract(t *testing.T) {
	outcome := map[string]int{}
	for seed := uint64(1); seed <= 60; seed++ {
		w := NewNet(rand.New(rand.NewPCG(seed, 7)), 1)
		w.Faults = Faults{LoseRequest: .1, LoseReply: .1, Late: .1, Refused: .1, NoLeader: .1, Unsent: .1, SlowReply: .1, SlowRequest: .1}
		h := w.NewHost("h", time.Millisecond, time.Millisecond)
		h.Turn = func() {}
		l := h.Link(0)
		next, opened := int64(0), 0
		var open func()
		open = func() {
			opened++
			req := encode(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
				Key: []byte{0}, RangeEnd: []byte{0}, StartRevision: next + 1, PrevKv: true}}})
			h.Watch(0, req, &sinkFuncs{
				message: func(m *pb.WatchResponse) {
					for _, e := range m.Events {
						if e.Kv.ModRevision != max(next+1, 2) {
							t.Fatalf("seed %d: revision %d follows %d", seed, e.Kv.ModRevision, next)
						}
						next = e.Kv.ModRevision
					}
				},
				end: func(codec.Status) { w.After(time.Millisecond, open) },
			})
		}
		open()
		const n = 200
		completed := make([]int, n)
		applied := make([]bool, n) // as reported
		unsent := make([]bool, n)
		for i := range n {
			w.After(w.Between(0, time.Second), func() {
				req := encode(&pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: fmt.Appendf(nil, "key%d", i)}}}}})
				inside := true
				h.Call(0, codec.MethodTxn, req, 300*time.Millisecond, completionFunc(func(resp []byte, st codec.Status, sent bool) {
					if inside {
						t.Fatalf("seed %d: completed from within Call", seed)
					}
					completed[i]++
					applied[i] = st.Code == codec.OK
					unsent[i] = !sent || st == codec.ErrTooManyRequests
					outcome[st.Msg]++
				}))
				inside = false
				poison(req)
			})
		}
		for i := range 10 {
			w.After(time.Duration(i)*100*time.Millisecond, func() {
				switch w.Rand.IntN(4) {
				case 0:
					l.Reset()
				case 1:
					l.Hole = true
					w.After(50*time.Millisecond, func() { l.Resume(); l.Reset() })
				case 2:
					l.cluster.Pause()
					w.After(50*time.Millisecond, l.cluster.Resume)
				case 3:
					l.StreamLag = w.Between(0, 300*time.Millisecond)
				}
			})
		}
		for w.Step(w.now + int64(time.Minute)) {
		}
		if next != l.cluster.Rev() {
			t.Fatalf("seed %d: the stream is at %d, the cluster at %d", seed, next, l.cluster.Rev())
		}
		for i := range n {
			is := l.cluster.at(fmt.Appendf(nil, "key%d", i), l.cluster.Rev()) != nil
			if completed[i] != 1 || applied[i] && !is || unsent[i] && is {
				t.Fatalf("seed %d: call %d completed %d times, reported applied=%v unsent=%v, is applied=%v", seed, i, completed[i], applied[i], unsent[i], is)
			}
			if is && !applied[i] {
				outcome["failed and applied"]++
			}
		}
		if opened > 1 {
			outcome["streams opened again"]++
		}
	}
	t.Log(outcome)
	for _, o := range []string{"failed and applied", "streams opened again", "context deadline exceeded", "simulated: not connected"} {
		if outcome[o] == 0 {
			t.Errorf("never: %s", o)
		}
	}
}
