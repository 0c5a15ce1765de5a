package revclock

import (
	"bytes"
	"container/heap"
	"fmt"
	"math/rand/v2"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// world is a coordinator and its network: one etcd that applies requests at some time after they were
// sent, links that lose, repeat and delay, all in virtual time and out of one seed.
type world struct {
	rng    *rand.Rand
	now    int64
	events eventHeap
	seq    uint64
	faults bool

	rev     int64
	compact int64
	kvs     map[string]*mvccpb.KeyValue
	log     []*mvccpb.Event
	streams []*stream
	cluster uint64
	// refuse answers the next requests with this status, unsent, for tests of single cases.
	refuse codec.Status
	onCall func(m codec.Method, req []byte)
}

type event struct {
	at  int64
	seq uint64
	f   func()
}

type eventHeap []event

func (h eventHeap) Len() int { return len(h) }
func (h eventHeap) Less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].seq < h[j].seq
}
func (h eventHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *eventHeap) Push(x any)   { *h = append(*h, x.(event)) }
func (h *eventHeap) Pop() any {
	x := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return x
}

func newWorld(seed uint64) *world {
	return &world{rng: rand.New(rand.NewPCG(seed, 1)), now: 1e9, rev: 1, kvs: map[string]*mvccpb.KeyValue{}, cluster: 77}
}

func (w *world) at(t int64, f func()) {
	w.seq++
	heap.Push(&w.events, event{max(t, w.now), w.seq, f})
}

func (w *world) after(d time.Duration, f func()) { w.at(w.now+int64(d), f) }

func (w *world) chance(p float64) bool { return w.faults && w.rng.Float64() < p }

func (w *world) delay() time.Duration {
	d := time.Duration(50+w.rng.IntN(2000)) * time.Microsecond
	if w.chance(0.03) {
		d += time.Duration(w.rng.IntN(3000)) * time.Millisecond // longer than a timeout, too
	}
	return d
}

// step runs one event; false when there is none until the time limit.
func (w *world) step(limit int64) bool {
	if len(w.events) == 0 || w.events[0].at > limit {
		w.now = max(w.now, limit)
		return false
	}
	e := heap.Pop(&w.events).(event)
	w.now = e.at
	e.f()
	return true
}

// link is a proxy's Transport. turn is called after everything that it reports.
type link struct {
	w    *world
	turn func()
	dead bool
}

func (l *link) Call(to codec.ClusterID, m codec.Method, req []byte, timeout time.Duration, c codec.Completion) {
	w := l.w
	if to != codec.Coordinator {
		panic("not the coordinator")
	}
	if w.onCall != nil {
		w.onCall(m, req)
	}
	req = append([]byte(nil), req...)
	done := false
	complete := func(resp []byte, st codec.Status, sent bool) {
		if done || l.dead {
			return
		}
		done = true
		c.Complete(resp, st, sent)
		for i := range resp { // the bytes are valid only during the call
			resp[i] = 0xaa
		}
		l.turn()
	}
	if w.refuse.Code != codec.OK || w.chance(0.03) {
		st := w.refuse
		if st.Code == codec.OK {
			st = codec.Status{Code: codec.Unavailable, Msg: "no connection"}
		}
		w.after(w.delay(), func() { complete(nil, st, false) })
		return
	}
	w.after(timeout, func() { complete(nil, codec.Status{Code: codec.DeadlineExceeded, Msg: "timeout"}, true) })
	copies := 1
	if w.chance(0.03) {
		copies = w.rng.IntN(3)
	}
	for range copies {
		w.after(w.delay(), func() {
			resp, st := w.apply(m, req)
			if w.chance(0.03) {
				resp, st = nil, codec.Status{Code: codec.Unavailable, Msg: "reply lost"}
			}
			w.after(w.delay(), func() { complete(resp, st, true) })
		})
	}
}

type stream struct {
	l    *link
	sink codec.WatchSink
	next int64 // revision of the next event to send
	at   int64 // messages leave in order
	gone bool
	hole bool
	open bool
}

func (l *link) KeepAlive(codec.ClusterID, codec.WatchSink) codec.WatchHandle {
	panic("the clock has no leases")
}

func (l *link) Watch(to codec.ClusterID, req []byte, sink codec.WatchSink) codec.WatchHandle {
	w := l.w
	var r pb.WatchRequest
	if err := proto.Unmarshal(req, &r); err != nil {
		panic(err)
	}
	cr := r.GetCreateRequest()
	if string(cr.Key) != "\x00" || string(cr.RangeEnd) != "\x00" || cr.StartRevision <= 0 {
		panic("not a watch of everything")
	}
	s := &stream{l: l, sink: sink, next: cr.StartRevision, hole: w.chance(0.05)}
	w.after(w.delay(), func() {
		if s.gone {
			return
		}
		if w.chance(0.1) {
			s.end()
			return
		}
		if s.next < w.compact {
			s.send(&pb.WatchResponse{Header: w.header(), Canceled: true, CompactRevision: w.compact})
			return
		}
		s.open = true
		w.streams = append(w.streams, s)
		s.send(&pb.WatchResponse{Header: w.header(), Created: true})
		w.pump(s)
	})
	return s
}

func (s *stream) Send([]byte) {}
func (s *stream) Hold(bool)   {}
func (s *stream) Close()      { s.gone = true }

func (s *stream) end() {
	if !s.gone && !s.l.dead {
		s.gone = true
		s.sink.OnEnd(codec.Status{Code: codec.Unavailable, Msg: "stream broke"})
		s.l.turn()
	}
}

func (s *stream) send(r *pb.WatchResponse) {
	w := s.l.w
	msg, err := proto.Marshal(r)
	if err != nil {
		panic(err)
	}
	s.at = max(s.at, w.now+int64(w.delay()))
	w.at(s.at, func() {
		if s.gone || s.hole || s.l.dead {
			return
		}
		s.sink.OnMessage(msg)
		for i := range msg {
			msg[i] = 0xaa
		}
		s.l.turn()
	})
}

// pump sends a stream what it lacks, sometimes in pieces.
func (w *world) pump(s *stream) {
	if s.gone || !s.open {
		return
	}
	var evs []*mvccpb.Event
	for _, e := range w.log {
		if e.Kv.ModRevision < s.next {
			continue
		}
		if n := len(evs); n > 0 && evs[n-1].Kv.ModRevision != e.Kv.ModRevision && w.rng.IntN(3) == 0 {
			s.send(&pb.WatchResponse{Header: w.header(), Events: evs})
			evs = nil
		}
		evs = append(evs, e)
	}
	if len(evs) > 0 {
		s.send(&pb.WatchResponse{Header: w.header(), Events: evs})
	}
	s.next = w.rev + 1
	if w.chance(0.01) {
		w.after(w.delay(), s.end)
	}
}

func (w *world) header() *pb.ResponseHeader {
	return &pb.ResponseHeader{ClusterId: w.cluster, MemberId: 1, Revision: w.rev, RaftTerm: 1}
}

func (w *world) apply(m codec.Method, req []byte) ([]byte, codec.Status) {
	var resp proto.Message
	switch m {
	case codec.MethodTxn:
		var r pb.TxnRequest
		if err := proto.Unmarshal(req, &r); err != nil {
			panic(err)
		}
		before := len(w.log)
		out := w.txn(&r)
		if len(w.log) > before {
			w.rev++
			for _, s := range w.streams {
				w.pump(s)
			}
		}
		out.Header = w.header()
		resp = out
	case codec.MethodCompact:
		var r pb.CompactionRequest
		if err := proto.Unmarshal(req, &r); err != nil {
			panic(err)
		}
		if r.Revision <= w.compact {
			return nil, codec.ErrCompacted
		}
		if r.Revision > w.rev {
			return nil, codec.ErrFutureRev
		}
		w.compactTo(r.Revision)
		resp = &pb.CompactionResponse{Header: w.header()}
	default:
		panic(fmt.Sprint("method ", m))
	}
	b, err := proto.Marshal(resp)
	if err != nil {
		panic(err)
	}
	return b, codec.Status{}
}

func (w *world) compactTo(rev int64) {
	w.compact = rev
	k := 0
	for k < len(w.log) && w.log[k].Kv.ModRevision < rev {
		k++
	}
	w.log = w.log[k:]
}

// txn applies at revision w.rev+1.
func (w *world) txn(r *pb.TxnRequest) *pb.TxnResponse {
	out := &pb.TxnResponse{Succeeded: true}
	for _, c := range r.Compare {
		if c.Result != pb.Compare_EQUAL || len(c.RangeEnd) > 0 {
			panic("compare")
		}
		kv := w.kvs[string(c.Key)]
		switch c.Target {
		case pb.Compare_MOD:
			u := c.TargetUnion.(*pb.Compare_ModRevision)
			out.Succeeded = out.Succeeded && kv.GetModRevision() == u.ModRevision
		case pb.Compare_CREATE:
			u := c.TargetUnion.(*pb.Compare_CreateRevision)
			out.Succeeded = out.Succeeded && kv.GetCreateRevision() == u.CreateRevision
		case pb.Compare_VALUE:
			u := c.TargetUnion.(*pb.Compare_Value)
			out.Succeeded = out.Succeeded && kv != nil && bytes.Equal(kv.Value, u.Value)
		default:
			panic("target")
		}
	}
	ops := r.Success
	if !out.Succeeded {
		ops = r.Failure
	}
	for _, op := range ops {
		switch o := op.Request.(type) {
		case *pb.RequestOp_RequestPut:
			w.put(o.RequestPut.Key, o.RequestPut.Value)
			out.Responses = append(out.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{}}})
		case *pb.RequestOp_RequestRange:
			if o.RequestRange.Serializable || len(o.RequestRange.RangeEnd) > 0 {
				panic("range")
			}
			rr := &pb.RangeResponse{}
			if kv := w.kvs[string(o.RequestRange.Key)]; kv != nil {
				kv = proto.Clone(kv).(*mvccpb.KeyValue)
				if o.RequestRange.KeysOnly {
					kv.Value = nil
				}
				rr.Kvs, rr.Count = append(rr.Kvs, kv), 1
			}
			out.Responses = append(out.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: rr}})
		case *pb.RequestOp_RequestTxn:
			out.Responses = append(out.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponseTxn{ResponseTxn: w.txn(o.RequestTxn)}})
		default:
			panic("op")
		}
	}
	return out
}

func (w *world) put(key, value []byte) {
	kv := &mvccpb.KeyValue{Key: key, Value: value, ModRevision: w.rev + 1, CreateRevision: w.rev + 1, Version: 1}
	if old := w.kvs[string(key)]; old != nil {
		kv.CreateRevision, kv.Version = old.CreateRevision, old.Version+1
	}
	w.kvs[string(key)] = kv
	w.log = append(w.log, &mvccpb.Event{Type: mvccpb.Event_PUT, Kv: kv})
}

// wipe makes the coordinator an empty one.
func (w *world) wipe() {
	w.rev, w.compact, w.kvs, w.log = 1, 0, map[string]*mvccpb.KeyValue{}, nil
	for _, s := range w.streams {
		s.end()
	}
	w.streams = nil
}
