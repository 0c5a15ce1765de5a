package shard

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/revclock"
	"spindle/watchring"
)

// A whole Core whose members and coordinator answer what the fuzzer says: mostly well-formed answers with
// numbers of its choice, some damaged, some late, some refused. No panic, no hang, every request answered
// exactly once, and answers that are protobuf of the right kind.

// fuzzHang is how long one input may take; the fuzzer itself does not look for hangs.
const fuzzHang = time.Minute

// watchdog ends the process when an input takes too long; to be deferred: defer watchdog()().
func watchdog() func() bool {
	return time.AfterFunc(fuzzHang, func() { panic("an input takes too long") }).Stop
}

// script gives bytes of the fuzzer's, and zeros behind their end.
type script struct{ b []byte }

func (s *script) done() bool { return len(s.b) == 0 }

func (s *script) next() byte {
	if len(s.b) == 0 {
		return 0
	}
	x := s.b[0]
	s.b = s.b[1:]
	return x
}

// rev is a revision: mostly small.
func (s *script) rev() int64 {
	x := s.next()
	if x < 250 {
		return int64(x)
	}
	var b [8]byte
	s.b = s.b[copy(b[:], s.b):]
	return int64(binary.BigEndian.Uint64(b[:]) >> (8 * (x - 250)))
}

func (s *script) take(n int) []byte {
	n = min(n, len(s.b))
	b := s.b[:n]
	s.b = s.b[n:]
	return b
}

type fuzzCall struct {
	to   codec.ClusterID
	m    codec.Method
	req  []byte
	done codec.Completion
}

type fuzzWatch struct {
	to     codec.ClusterID
	sink   codec.WatchSink
	closed bool
}

func (w *fuzzWatch) Send([]byte) {}
func (w *fuzzWatch) Hold(bool)   {}
func (w *fuzzWatch) Close()      { w.closed = true }

type fuzzWorld struct {
	t        *testing.T
	s        *script
	c        *Core
	now      int64
	calls    []fuzzCall
	watches  []*fuzzWatch
	epoch    revclock.ID
	coord    map[string]*mvccpb.KeyValue // what an honest coordinator holds
	coordRev int64
	last     int64 // revision of the last record in order
	table    *Map
	ops      int          // under way
	waiting  map[*Op]bool // of them, the unary ones
	streams  []*RangeStream
	hist     []*History
}

func (w *fuzzWorld) Call(to codec.ClusterID, m codec.Method, req []byte, _ time.Duration, c codec.Completion) {
	w.calls = append(w.calls, fuzzCall{to, m, append([]byte(nil), req...), c})
}

func (w *fuzzWorld) Watch(to codec.ClusterID, _ []byte, sink codec.WatchSink) codec.WatchHandle {
	x := &fuzzWatch{to: to, sink: sink}
	w.watches = append(w.watches, x)
	return x
}

func (w *fuzzWorld) KeepAlive(to codec.ClusterID, sink codec.WatchSink) codec.WatchHandle {
	return w.Watch(to, nil, sink)
}

func (w *fuzzWorld) record() *Record {
	s := w.s
	last := s.rev()
	if last < 128 {
		w.last += last % 4
		last = w.last
	}
	r := &Record{Last: last, First: last - int64(s.next()%8), Kind: RecordKind(1 + s.next()%3), Epoch: w.epoch, Proxy: w.c.cfg.Proxy, Batch: uint64(s.next())}
	if r.First <= 0 && last > 0 || s.next() == 1 {
		r.First = last
	}
	if s.next()&1 == 1 {
		r.Deletes = append(r.Deletes, RecordDelete{Rev: r.First, Key: []byte("a"), End: []byte("c")})
	}
	return r
}

// kvOf makes a stored key.
func (w *fuzzWorld) kvOf(key []byte) *mvccpb.KeyValue {
	s := w.s
	kv := &mvccpb.KeyValue{Key: key, ModRevision: s.rev(), CreateRevision: s.rev(), Version: int64(s.next()), Lease: int64(s.next() / 250)}
	switch string(key) {
	case KeyClock:
		kv.Value = AppendRecord(nil, w.record())
	case KeyMap:
		kv.Value = AppendMap(nil, w.table)
	case revclock.KeyEpoch:
		kv.Value = revclock.AppendEpoch(nil, w.epoch)
	default:
		if s.next() != 200 { // 200: foreign
			r := s.rev()
			kv.Value = AppendStamp(nil, r, max(0, r-int64(s.next())))
		}
		kv.Value = append(kv.Value, s.take(int(s.next()%4))...)
	}
	return kv
}

func (w *fuzzWorld) rangeResponse(q *pb.RangeRequest) *pb.RangeResponse {
	s := w.s
	r := &pb.RangeResponse{Header: w.header()}
	if len(q.GetRangeEnd()) == 0 {
		if s.next()&7 != 7 {
			r.Kvs = append(r.Kvs, w.kvOf(q.GetKey()))
		}
	} else {
		for n := s.next() % 5; n > 0; n-- {
			key := append(append([]byte(nil), q.Key...), s.take(1)...)
			r.Kvs = append(r.Kvs, w.kvOf(key))
		}
	}
	r.Count = int64(len(r.Kvs)) + int64(s.next()/128)
	r.More = s.next()&3 == 3
	return r
}

func (w *fuzzWorld) header() *pb.ResponseHeader {
	return &pb.ResponseHeader{ClusterId: 7, Revision: w.s.rev()}
}

func (w *fuzzWorld) txnResponse(q *pb.TxnRequest) *pb.TxnResponse {
	r := &pb.TxnResponse{Header: w.header(), Succeeded: w.s.next()&7 != 7}
	ops := q.GetSuccess()
	if !r.Succeeded {
		ops = q.GetFailure()
	}
	for _, op := range ops {
		o := &pb.ResponseOp{}
		switch x := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			o.Response = &pb.ResponseOp_ResponseRange{ResponseRange: w.rangeResponse(x.RequestRange)}
		case *pb.RequestOp_RequestPut:
			p := &pb.PutResponse{Header: w.header()}
			if x.RequestPut.PrevKv {
				p.PrevKv = w.kvOf(x.RequestPut.Key)
			}
			o.Response = &pb.ResponseOp_ResponsePut{ResponsePut: p}
		case *pb.RequestOp_RequestDeleteRange:
			d := &pb.DeleteRangeResponse{Header: w.header(), Deleted: int64(w.s.next() % 3)}
			if x.RequestDeleteRange.PrevKv {
				d.PrevKvs = append(d.PrevKvs, w.kvOf(x.RequestDeleteRange.Key))
			}
			o.Response = &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: d}
		case *pb.RequestOp_RequestTxn:
			o.Response = &pb.ResponseOp_ResponseTxn{ResponseTxn: w.txnResponse(x.RequestTxn)}
		}
		r.Responses = append(r.Responses, o)
	}
	return r
}

// reply makes the answer to a call.
func (w *fuzzWorld) reply(c *fuzzCall) []byte {
	var m proto.Message
	switch c.m {
	case codec.MethodTxn:
		if c.to == codec.Coordinator && w.s.next() < 220 {
			return w.coordinate(c.req)
		}
		var q pb.TxnRequest
		if err := proto.Unmarshal(c.req, &q); err != nil {
			w.t.Fatalf("the Core sent %x: %v", c.req, err)
		}
		m = w.txnResponse(&q)
	case codec.MethodRange:
		var q pb.RangeRequest
		if err := proto.Unmarshal(c.req, &q); err != nil {
			w.t.Fatalf("the Core sent %x: %v", c.req, err)
		}
		m = w.rangeResponse(&q)
	case codec.MethodStatus:
		m = &pb.StatusResponse{Header: w.header(), Version: fmt.Sprintf("3.%d.%q", w.s.next(), w.s.take(3)), DbSize: w.s.rev(), Errors: []string{fmt.Sprintf("%q", w.s.take(3))}}
	default:
		return w.s.take(int(w.s.next() % 16))
	}
	return mustMarshal(w.t, m)
}

// coordinate answers as an honest coordinator that nobody else uses.
func (w *fuzzWorld) coordinate(req []byte) []byte {
	var q pb.TxnRequest
	if err := proto.Unmarshal(req, &q); err != nil {
		w.t.Fatalf("the Core sent %x: %v", req, err)
	}
	var run func(q *pb.TxnRequest) *pb.TxnResponse
	run = func(q *pb.TxnRequest) *pb.TxnResponse {
		r := &pb.TxnResponse{Header: &pb.ResponseHeader{ClusterId: 7}, Succeeded: true}
		for _, op := range q.Success {
			switch x := op.Request.(type) {
			case *pb.RequestOp_RequestRange:
				o := rangeOf()
				if kv := w.coord[string(x.RequestRange.Key)]; kv != nil {
					o = rangeOf(kv)
				}
				r.Responses = append(r.Responses, o)
			case *pb.RequestOp_RequestPut:
				if r.Header.Revision == 0 {
					w.coordRev++
				}
				w.coord[string(x.RequestPut.Key)] = &mvccpb.KeyValue{Key: x.RequestPut.Key, Value: x.RequestPut.Value, ModRevision: w.coordRev, CreateRevision: 2, Version: 2}
				r.Responses = append(r.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{}}})
			case *pb.RequestOp_RequestTxn:
				r.Responses = append(r.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponseTxn{ResponseTxn: run(x.RequestTxn)}})
			}
		}
		r.Header.Revision = w.coordRev
		return r
	}
	return mustMarshal(w.t, run(&q))
}

// damage changes a part of an answer.
func (w *fuzzWorld) damage(b []byte) []byte {
	s := w.s
	if len(b) == 0 {
		return s.take(int(s.next()))
	}
	i := (int(s.next())<<8 | int(s.next())) % len(b)
	switch s.next() % 3 {
	case 0:
		b[i] ^= s.next()
	case 1:
		b = b[:i]
	default:
		b = append(append(append([]byte(nil), b[:i]...), s.take(int(s.next()%16))...), b[i:]...)
	}
	return b
}

var fuzzStatuses = []codec.Status{codec.ErrCompacted, codec.ErrFutureRev, codec.ErrTimeout, codec.ErrTooManyRequests,
	{Code: codec.Unavailable, Msg: "gone"}, {Code: codec.ResourceExhausted, Msg: "trying to send message larger than max"},
	{Code: codec.InvalidArgument, Msg: "etcdserver: no"}, {Code: codec.NotFound, Msg: "etcdserver: requested lease not found"}}

func (w *fuzzWorld) answer() {
	s := w.s
	if len(w.calls) == 0 {
		return
	}
	i := int(s.next()) % len(w.calls)
	c := w.calls[i]
	w.calls = append(w.calls[:i], w.calls[i+1:]...)
	how := s.next()
	if how >= 240 {
		c.done.Complete(nil, fuzzStatuses[int(how)%len(fuzzStatuses)], how&16 == 0)
		return
	}
	b := w.reply(&c)
	if how >= 200 {
		b = w.damage(b)
	}
	c.done.Complete(b, codec.Status{}, true)
	for i := range b {
		b[i] = 0xa5 // it was valid during the call only
	}
}

func (w *fuzzWorld) event() {
	s := w.s
	if len(w.watches) == 0 {
		return
	}
	x := w.watches[int(s.next())%len(w.watches)]
	if x.closed {
		return
	}
	if s.next() == 255 {
		x.closed = true
		x.sink.OnEnd(fuzzStatuses[4])
		return
	}
	m := &pb.WatchResponse{Header: w.header(), Fragment: s.next() == 77}
	if kv := w.coord["t"]; kv != nil && x.to == codec.Coordinator && s.next() < 220 {
		x.sink.OnMessage(mustMarshal(w.t, &pb.WatchResponse{Header: w.header(), Events: []*mvccpb.Event{{Kv: kv}}}))
		return
	}
	local := s.rev()
	for n := s.next() % 6; n > 0; n-- {
		ev := &mvccpb.Event{}
		key := []byte{'a' + s.next()%4}
		switch s.next() % 8 {
		case 0, 1:
			key = []byte(KeyClock)
		case 2:
			ev.Type = mvccpb.Event_DELETE
		case 3:
			key = append([]byte{0}, s.take(5)...)
		}
		ev.Kv = w.kvOf(key)
		ev.Kv.ModRevision = local
		if s.next()&1 == 1 {
			ev.PrevKv = w.kvOf(key)
		}
		if s.next() == 9 {
			local++
		}
		m.Events = append(m.Events, ev)
	}
	if s.next() == 33 {
		m.Canceled, m.CompactRevision = true, s.rev()
	}
	b := mustMarshal(w.t, m)
	if s.next() >= 240 {
		b = w.damage(b)
	}
	x.sink.OnMessage(b)
	for i := range b {
		b[i] = 0xa5
	}
}

// submit hands in a request of a client.
func (w *fuzzWorld) submit(g *planGen) {
	s := w.s
	g.rev = s.rev()
	op := &Op{}
	switch s.next() % 9 {
	case 8:
		op.Kind = OpLeaseGrant + OpKind(s.next()%5)
		op.Msg = mustMarshal(w.t, &pb.LeaseGrantRequest{TTL: s.rev(), ID: s.rev()})
		if op.Kind != OpLeaseGrant {
			op.Msg = mustMarshal(w.t, &pb.LeaseTimeToLiveRequest{ID: s.rev(), Keys: s.next()&1 == 1})
		}
	case 0:
		op.Kind, op.Msg = OpCompact, mustMarshal(w.t, &pb.CompactionRequest{Revision: s.rev()})
	case 1:
		op.Kind = OpStatus
	case 2:
		op.Kind, op.Msg = OpRange, mustMarshal(w.t, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Limit: int64(s.next() % 5), Revision: s.rev() % 4})
	default:
		req := g.request()
		op.Kind, op.Msg = kindOf(req), mustMarshal(w.t, req)
	}
	switch x := s.next(); {
	case x == 5:
		op.Msg = w.damage(append([]byte(nil), op.Msg...))
	case x%16 == 6: // a field that may be known, of a wire type that is not its own
		op.Msg = protowire.AppendTag(op.Msg, protowire.Number(1+s.next()%16), protowire.Fixed32Type)
		op.Msg = protowire.AppendFixed32(op.Msg, uint32(s.next()))
	}
	w.ops++
	w.waiting[op] = true
	answered := false
	op.Done = func(op *Op) {
		if answered {
			w.t.Fatalf("answered twice: %v", op.Status)
		}
		answered = true
		w.ops--
		delete(w.waiting, op)
		if op.Status.Code != codec.OK {
			return
		}
		resp, ok := map[OpKind]proto.Message{OpRange: &pb.RangeResponse{}, OpPut: &pb.PutResponse{}, OpDeleteRange: &pb.DeleteRangeResponse{},
			OpTxn: &pb.TxnResponse{}, OpCompact: &pb.CompactionResponse{}, OpStatus: &pb.StatusResponse{},
			OpLeaseGrant: &pb.LeaseGrantResponse{}, OpLeaseRevoke: &pb.LeaseRevokeResponse{}, OpLeaseKeepAlive: &pb.LeaseKeepAliveResponse{},
			OpLeaseTimeToLive: &pb.LeaseTimeToLiveResponse{}, OpLeaseLeases: &pb.LeaseLeasesResponse{}}[op.Kind]
		if !ok {
			return
		}
		// AllowPartial and no UTF-8: strings of members pass as they are.
		if err := proto.Unmarshal(op.Resp, resp); err != nil && op.Kind != OpStatus {
			w.t.Fatalf("the answer to %x is %x: %v", op.Msg, op.Resp, err)
		}
	}
	w.c.Submit(op)
}

func (w *fuzzWorld) openRange() {
	st := &RangeStream{Msg: mustMarshal(w.t, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Limit: int64(w.s.next() % 9)})}
	over := false
	w.ops++
	st.Chunk = func(_ *RangeStream, msg []byte) {
		var resp pb.RangeStreamResponse
		if err := proto.Unmarshal(msg, &resp); err != nil || over {
			w.t.Fatalf("a chunk %x: %v, over %v", msg, err, over)
		}
	}
	st.Done = func(*RangeStream) {
		if over {
			w.t.Fatal("over twice")
		}
		over = true
		w.ops--
	}
	st.User = &over
	w.streams = append(w.streams, st)
	w.c.OpenRange(st)
}

// start brings the Core to readiness as honest clusters do.
func (w *fuzzWorld) start(shards int) {
	ids := []revclock.ID{{5}, {6}}
	names := []string{"a", "b"}
	var ms []MapShard
	for i := range shards {
		ms = append(ms, MapShard{Identity: ids[i], Name: names[i]})
	}
	w.table = NewMap(w.epoch, 7, ms)
	w.c = NewCore(CoreConfig{
		Proxy: revclock.ID{1}, Names: names[:shards], Now: func() int64 { return w.now },
		Rand: rand.New(rand.NewPCG(1, 2)), Log: slog.New(slog.DiscardHandler), PageKeys: 2, ChunkBytes: 64, HistoryBytes: 1000, RingSize: 64, CreateEntries: 64,
	}, w)
	record := AppendInitialRecord(nil, w.epoch)
	head := func(rev int64) *pb.ResponseHeader { return &pb.ResponseHeader{ClusterId: 7, Revision: rev} }
	kv := func(key string, value []byte, mod int64) *mvccpb.KeyValue {
		return &mvccpb.KeyValue{Key: []byte(key), Value: value, CreateRevision: mod, ModRevision: mod, Version: 1}
	}
	epochKV := kv(revclock.KeyEpoch, revclock.AppendEpoch(nil, w.epoch), 2)
	w.coord, w.coordRev = map[string]*mvccpb.KeyValue{revclock.KeyEpoch: epochKV}, 3
	snap := revclock.AppendSnapshot(nil, &revclock.Snapshot{N: 1, Shards: make([]revclock.SnapshotShard, shards)})
	w.c.Start()
	for range 20 {
		w.c.Flush()
		calls := w.calls
		w.calls = nil
		for _, c := range calls {
			var m proto.Message
			switch {
			case c.to != codec.Coordinator:
				h := head(4)
				h.ClusterId += uint64(c.to)
				m = &pb.TxnResponse{Header: h, Responses: []*pb.ResponseOp{rangeOf(kv(KeyID, AppendIdentity(nil, ids[c.to]), 2)),
					rangeOf(kv(KeyClock, record, 2)), rangeOf(kv(KeyMap, AppendMap(nil, w.table), 3)), rangeOf(), rangeOf()}}
			case c.m == codec.MethodRange:
				m = &pb.RangeResponse{Header: head(3)}
			default:
				m = &pb.TxnResponse{Header: head(3), Succeeded: true, Responses: []*pb.ResponseOp{rangeOf(epochKV), rangeOf(kv("s", snap, 2)), rangeOf()}}
			}
			c.done.Complete(mustMarshal(w.t, m), codec.Status{}, true)
		}
		if ok, _ := w.c.Ready(); ok {
			return
		}
	}
	_, why := w.c.Ready()
	w.t.Fatalf("not ready: %s", why)
}

func fuzzCore(t *testing.T, in []byte) {
	defer watchdog()()
	if len(in) > 4<<10 {
		return
	}
	w := &fuzzWorld{t: t, s: &script{in}, now: 1, epoch: revclock.ID{9}, coord: map[string]*mvccpb.KeyValue{}, waiting: map[*Op]bool{}}
	shards := 1 + int(w.s.next()&1)
	if w.s.next()&15 == 15 {
		// Members and coordinator lie from the first word on.
		w.table = NewMap(w.epoch, 7, []MapShard{{Identity: revclock.ID{5}, Name: "a"}})
		w.c = NewCore(CoreConfig{Proxy: revclock.ID{1}, Names: []string{"a"}, Now: func() int64 { return w.now },
			Rand: rand.New(rand.NewPCG(1, 2)), Log: slog.New(slog.DiscardHandler), RingSize: 64, CreateEntries: 64}, w)
		w.c.Start()
		w.c.Flush()
	} else {
		w.start(shards)
	}
	g := &planGen{rng: rand.New(rand.NewPCG(planSeed, uint64(w.s.next()))), odd: true, know: func([]byte) *mvccpb.KeyValue { return nil }}
	for !w.s.done() {
		switch w.s.next() % 16 {
		case 0, 1, 2:
			w.submit(g)
		case 3, 4, 5, 6, 7:
			w.answer()
		case 8, 9, 10:
			w.event()
		case 11:
			if len(w.streams) < 4 {
				w.openRange()
			}
		case 12:
			for _, st := range w.streams {
				if !*st.User.(*bool) {
					w.c.PullRange(st)
				}
			}
		case 13:
			w.now += int64(w.s.next()) * int64(50*time.Millisecond)
			if ok, _ := w.c.Ready(); ok && len(w.hist) < 3 && w.s.next()&3 == 0 {
				h := w.c.OpenHistory(watchring.All, w.s.rev())
				h.Next(10, func([]*watchring.Entry, int64, int64, codec.Status) {})
				w.hist = append(w.hist, h)
			}
		case 14:
			w.c.Now(func(int64, codec.Status) {})
		default:
			if d := w.c.Deadline(); d > 0 {
				w.now = max(w.now, d)
			}
		}
		w.c.Flush()
		if d := w.c.Deadline(); d > 0 && d <= w.now {
			w.c.Tick()
			w.c.Flush()
		}
		if len(w.calls) > 2000 || len(w.c.timers) > 5000 {
			t.Fatalf("%d calls and %d timers after %d bytes", len(w.calls), len(w.c.timers), len(in))
		}
	}
	for _, h := range w.hist {
		h.Close()
	}
	for _, st := range w.streams {
		if over := st.User.(*bool); !*over {
			w.c.CancelRange(st)
			*over = true
			w.ops--
		}
	}
	w.c.Close()
	// What waits for a call ends with it, what waits for anything else at its deadline.
	for range 200 {
		calls := w.calls
		w.calls = nil
		for _, c := range calls {
			c.done.Complete(nil, fuzzStatuses[4], true)
		}
		w.c.Flush()
		if w.ops == 0 {
			return
		}
		w.now = max(w.now+int64(time.Second), w.c.Deadline())
		w.c.Tick()
		w.c.Flush()
	}
	for op := range w.waiting {
		t.Errorf("no answer: kind %d, %x", op.Kind, op.Msg)
	}
	t.Fatalf("%d requests without an answer, of them %d unary; %s", w.ops, len(w.waiting), w.c.Failed())
}

func FuzzCore(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 20 {
		b := make([]byte, 100+rng.IntN(400))
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, in []byte) { fuzzCore(t, in) })
}
