package shard

import (
	"bytes"
	"log/slog"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"spindle/codec"
)

// What members answer is not trusted: each parser of it against generated protobuf.

// proper says whether every field of msg that etcd knows has the wire type that etcd gives it, messages in it
// too. Others are unknown fields to protobuf, and no etcd sends them; the parsers here need not agree on them.
func proper(msg []byte, d protoreflect.MessageDescriptor) bool {
	for it := (codec.Fields{Msg: msg}); it.Next(); {
		fd := d.Fields().ByNumber(it.Field.Num)
		if fd == nil {
			continue
		}
		want := protowire.VarintType
		switch fd.Kind() {
		case protoreflect.BytesKind, protoreflect.StringKind, protoreflect.MessageKind:
			want = protowire.BytesType
		}
		if it.Field.Type != want {
			return false
		}
		if fd.Kind() == protoreflect.MessageKind && !proper(it.Field.Bytes, fd.Message()) {
			return false
		}
	}
	return true
}

// once says that no field that etcd has once stands twice in msg, where protobuf merges messages.
func once(msg []byte, d protoreflect.MessageDescriptor) bool {
	seen := map[protowire.Number]bool{}
	for it := (codec.Fields{Msg: msg}); it.Next(); {
		fd := d.Fields().ByNumber(it.Field.Num)
		if fd == nil || fd.Kind() != protoreflect.MessageKind {
			continue
		}
		n := it.Field.Num
		if o := fd.ContainingOneof(); o != nil {
			n = -1 // one of them
		}
		if !fd.IsList() && seen[n] || !once(it.Field.Bytes, fd.Message()) {
			return false
		}
		seen[n] = true
	}
	return true
}

// reads unmarshals msg, and says whether the parsers here must read it in the same way.
func reads(msg []byte, m proto.Message) (comparable bool, err error) {
	err = proto.Unmarshal(msg, m)
	d := m.ProtoReflect().Descriptor()
	return err == nil && proper(msg, d) && once(msg, d), err
}

func FuzzMemberAnswers(f *testing.F) {
	kv := &mvccpb.KeyValue{Key: []byte("k"), Value: append(AppendStamp(nil, 5, 3), "v"...), CreateRevision: 2, ModRevision: 4, Version: 2, Lease: 1}
	rr := &pb.RangeResponse{Header: &pb.ResponseHeader{ClusterId: 7, Revision: 9}, Kvs: []*mvccpb.KeyValue{kv, kv}, Count: 3, More: true}
	f.Add(mustMarshal(f, rr))
	f.Add(mustMarshal(f, &pb.TxnResponse{Header: rr.Header, Succeeded: true, Responses: []*pb.ResponseOp{
		{Response: &pb.ResponseOp_ResponseRange{ResponseRange: rr}}, {Response: &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{PrevKv: kv}}},
		{Response: &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: &pb.DeleteRangeResponse{Deleted: 2, PrevKvs: []*mvccpb.KeyValue{kv}}}}}}))
	f.Add(mustMarshal(f, &pb.StatusResponse{Header: rr.Header, Version: "3.6.1", DbSize: 7, Errors: []string{"a", "b"}, DbSizeInUse: 3}))
	f.Add(mustMarshal(f, &mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: kv, PrevKv: kv}))
	f.Fuzz(func(t *testing.T, msg []byte) {
		defer watchdog()()
		checkTxnReply(t, msg)
		checkRangeReply(t, msg)
		checkEvent(t, msg)
		var st memberStatus
		st.parse(msg)
		var want pb.StatusResponse
		if same, _ := reads(msg, &want); same && (st.version != want.Version || st.dbSize != want.DbSize || st.dbInUse != want.DbSizeInUse ||
			st.quota != want.DbSizeQuota || st.raftTerm != want.RaftTerm || st.raftIndex != want.RaftIndex || !slices.Equal(st.errors, want.Errors)) {
			t.Fatalf("%x: %+v, want %v", msg, st, &want)
		}
	})
}

func checkTxnReply(t *testing.T, msg []byte) {
	got, ok := parseTxnReply(msg, nil)
	var want pb.TxnResponse
	same, _ := reads(msg, &want)
	if !same {
		return
	}
	if !ok || got.rev != want.Header.GetRevision() || got.cluster != want.Header.GetClusterId() || got.succeeded != want.Succeeded || len(got.resps) != len(want.Responses) {
		t.Fatalf("%x: %+v %v, want %v", msg, got, ok, &want)
	}
	m, ok := readMemberTxn(msg)
	if !ok {
		t.Fatalf("%x is refused", msg)
	}
	for i, r := range want.Responses {
		kind, body, ok := m.next()
		if !ok || !bytes.Equal(body, got.resps[i]) {
			t.Fatalf("%x: response %d is %x %v, and %x", msg, i, body, ok, got.resps[i])
		}
		// Fields that etcd does not know yet may stand beside the response; no version has any.
		if len(r.ProtoReflect().GetUnknown()) == 0 && r.Response != nil {
			fd := r.ProtoReflect().WhichOneof(r.ProtoReflect().Descriptor().Oneofs().ByName("response"))
			if fd == nil || int(fd.Number()) != int(kind) {
				t.Fatalf("%x: response %d is of kind %d, want %v", msg, i, kind, fd)
			}
		}
	}
	if _, _, ok := m.next(); ok {
		t.Fatalf("%x: more responses than %d", msg, len(want.Responses))
	}
}

func checkRangeReply(t *testing.T, msg []byte) {
	first, found := firstKV(msg)
	lease := carriesLease(msg)
	end := sumPage(msg).end
	snap := NewSnapshot([][]byte{msg})
	stored, storedOK := storedKVs(msg, nil)
	var want pb.RangeResponse
	same, err := reads(msg, &want)
	if err != nil && !end.bad && storedOK && proper(msg, want.ProtoReflect().Descriptor()) && len(stored) == int(end.n) && len(stored) < 2 {
		// The header is not read, nor is any key but the last one.
		var noHeader pb.RangeResponse
		if _, herr := reads(msg, &noHeader); herr != nil && len(want.Kvs) > 0 && len(stored) == 0 {
			t.Fatalf("%x is read, protobuf says %v", msg, err)
		}
	}
	if !same {
		return
	}
	n := len(want.Kvs)
	if end.bad || end.n != int64(n) || end.count != want.Count || end.more != want.More || found != (n > 0) {
		t.Fatalf("%x: %+v, found %v, want %v", msg, end, found, &want)
	}
	hasLease := int64(n) != want.Count
	for _, kv := range want.Kvs {
		hasLease = hasLease || kv.Lease != 0
	}
	if lease != hasLease {
		t.Fatalf("%x: carries a lease is %v", msg, lease)
	}
	if n > 0 && (!bytes.Equal(first.Key, want.Kvs[0].Key) || !bytes.Equal(end.key, want.Kvs[n-1].Key)) {
		t.Fatalf("%x: first %q, last %q, want %v", msg, first.Key, end.key, &want)
	}
	keys := map[string]bool{}
	for _, kv := range want.Kvs {
		if _, _, ok := ParseStamp(kv.Value); ok {
			keys[string(kv.Key)] = true
		}
	}
	if len(snap.kvs) != len(keys) {
		t.Fatalf("%x: a snapshot of %d keys, want %d", msg, len(snap.kvs), len(keys))
	}
	for i := 1; i < len(snap.kvs); i++ {
		if bytes.Compare(snap.kvs[i-1].Key, snap.kvs[i].Key) >= 0 {
			t.Fatalf("%x: a snapshot out of order", msg)
		}
	}
}

func checkEvent(t *testing.T, msg []byte) {
	kv, prev, del := eventKVs(msg)
	local := eventLocal(msg)
	var want mvccpb.Event
	if same, _ := reads(msg, &want); !same {
		return
	}
	equal := func(a codec.KV, b *mvccpb.KeyValue) bool {
		return string(a.Key) == string(b.GetKey()) && string(a.Value) == string(b.GetValue()) && a.ModRevision == b.GetModRevision() &&
			a.CreateRevision == b.GetCreateRevision() && a.Version == b.GetVersion() && a.Lease == b.GetLease()
	}
	if !equal(kv, want.Kv) || !equal(prev, want.PrevKv) || del != (want.Type == mvccpb.Event_DELETE) || local != want.Kv.GetModRevision() {
		t.Fatalf("%x: %+v %+v %v at %d, want %v", msg, kv, prev, del, local, &want)
	}
}

// FuzzAnswer lets a member answer a client's request with anything: an answer to the client is protobuf of the
// right kind, and what is no answer leaves dst as it was.
func FuzzAnswer(f *testing.F) {
	w := &fuzzWorld{t: &testing.T{}, epoch: [16]byte{9}}
	w.c = &Core{}
	w.table = NewMap(w.epoch, 7, []MapShard{{Identity: [16]byte{5}, Name: "a"}})
	rng := rand.New(rand.NewPCG(planSeed, 6))
	g := &planGen{rng: rng, odd: true, know: func([]byte) *mvccpb.KeyValue { return nil }}
	for range 150 {
		req := g.request()
		msg := mustMarshal(f, req)
		var p Plan
		if p.Parse(kindOf(req), msg, nil).Code != codec.OK {
			continue
		}
		for i := range p.PutSlots {
			p.PutSlots[i].Known, p.PutSlots[i].Guard = true, true
		}
		var op pb.RequestOp
		if proto.Unmarshal(p.AppendRequestOp(nil, 9), &op) != nil || op.GetRequestTxn() == nil {
			continue
		}
		noise := make([]byte, 200)
		for i := range noise {
			noise[i] = byte(rng.Uint32())
		}
		w.s = &script{noise}
		f.Add(uint8(kindOf(req)), msg, mustMarshal(f, w.txnResponse(op.GetRequestTxn())))
	}
	f.Fuzz(func(t *testing.T, kind uint8, msg, reply []byte) {
		defer watchdog()()
		k := OpKind(kind % 4)
		var p Plan
		if p.Parse(k, msg, nil).Code != codec.OK {
			return
		}
		for i := range p.PutSlots {
			p.PutSlots[i].Known, p.PutSlots[i].Guard = true, true
		}
		if op := p.AppendRequestOp(nil, 9); len(op) == 0 && k != OpRange {
			t.Fatal("no operation")
		}
		hdr := codec.Header{ClusterID: 1, MemberID: 2, Revision: 9, RaftTerm: 3}
		dst := []byte("before")
		check := func(what string, out []byte, full bool) {
			if !bytes.HasPrefix(out, []byte("before")) {
				t.Fatalf("%s: %q", what, out)
			}
			if !full {
				return
			}
			resp := [...]proto.Message{OpRange: &pb.RangeResponse{}, OpPut: &pb.PutResponse{}, OpDeleteRange: &pb.DeleteRangeResponse{}, OpTxn: &pb.TxnResponse{}}[k]
			if err := proto.Unmarshal(out[len("before"):], resp); err != nil {
				t.Fatalf("%s %x: %v", what, out, err)
			}
		}
		out, oc, st := p.Answer(dst, reply, hdr, nil)
		check("Answer", out, oc == Answered && st.Code == codec.OK)
		if (oc != Answered || st.Code != codec.OK) && !bytes.Equal(out, dst) {
			t.Fatalf("outcome %v %v with %q", oc, st, out)
		}
		check("AnswerRange", p.AnswerRange(slices.Clone(dst), [][]byte{reply, reply}, hdr, nil), k == OpRange)
		snap := NewSnapshot([][]byte{reply})
		out, _, st = p.Evaluate(slices.Clone(dst), snap, hdr)
		check("Evaluate", out, st.Code == codec.OK)
		if p.Decide(snap, 9).Code == codec.OK {
			p.AppendRequestOp(nil, 9)
			out, oc, st = p.Answer(slices.Clone(dst), reply, hdr, nil)
			check("Answer after Decide", out, oc == Answered && st.Code == codec.OK)
		}
	})
}

// FuzzMergeAtRevision merges two answers of a member and a record: keys once and in order.
func FuzzMergeAtRevision(f *testing.F) {
	kv := func(key string, rev int64) *mvccpb.KeyValue {
		return &mvccpb.KeyValue{Key: []byte(key), Value: AppendStamp(nil, rev, rev)}
	}
	rec := AppendRecord(nil, &Record{First: 5, Last: 9, Kind: KindBatch, Deletes: []RecordDelete{{Rev: 6, Key: []byte("c")}}})
	f.Add(mustMarshal(f, &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{kv("a", 7), kv("b", 2)}}),
		mustMarshal(f, &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{kv("a", 2), kv("b", 2), kv("c", 3)}}), int64(6), rec, []byte("b"))
	f.Fuzz(func(t *testing.T, after, before []byte, r int64, record, last []byte) {
		defer watchdog()()
		rec, ok := ParseRecord(record)
		if !ok {
			return
		}
		if len(last) == 0 {
			last = nil
		}
		out, ok := mergeAtRevision([]byte{}, after, before, r, &rec, last)
		if !ok {
			if len(out) != 0 && false {
				t.Fatal(out)
			}
			return
		}
		var resp pb.RangeResponse
		same, err := reads(out, &resp)
		if err != nil {
			// A key with bytes that only a lax reader takes passes as it is.
			return
		}
		if same && resp.Count != int64(len(resp.Kvs)) {
			t.Fatalf("count %d of %v", resp.Count, &resp)
		}
		p := planOf(t, OpRange, &pb.RangeRequest{Key: []byte("\x01"), RangeEnd: []byte{0}})
		p.AnswerRange(nil, [][]byte{out}, codec.Header{Revision: max(r, 1)}, nil)
	})
}

// FuzzDecodeEvents makes ring entries of what a member's watch brings: what watchers would get is protobuf, has
// a revision of the batch, and never shows a reserved key.
func FuzzDecodeEvents(f *testing.F) {
	rec := AppendRecord(nil, &Record{First: 5, Last: 9, Kind: KindBatch, Deletes: []RecordDelete{{Rev: 6, Key: []byte("c")}}})
	ev := func(typ mvccpb.Event_EventType, key string, rev int64) []byte {
		e := &mvccpb.Event{Type: typ, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: 4, Version: 1}}
		if typ == mvccpb.Event_PUT {
			e.Kv.Value = append(AppendStamp(nil, rev, rev), "v"...)
		}
		e.PrevKv = &mvccpb.KeyValue{Key: []byte(key), Value: AppendStamp(nil, 2, 1)}
		return mustMarshal(f, e)
	}
	f.Add(rec, ev(mvccpb.PUT, "a", 5), ev(mvccpb.DELETE, "c", 0), ev(mvccpb.PUT, KeyMap, 7))
	f.Add(rec, ev(mvccpb.DELETE, "d", 0), ev(mvccpb.PUT, "a", 9), ev(mvccpb.PUT, "b", 100))
	f.Fuzz(func(t *testing.T, record, a, b, pending []byte) {
		defer watchdog()()
		rec, ok := ParseRecord(record)
		if !ok {
			return
		}
		c := &Core{log: slog.New(slog.DiscardHandler), creates: NewCreateCache(0)}
		s := &shardState{c: c, name: "a"}
		for _, past := range []bool{true, false} {
			if !past {
				// Reserved keys reach the Core, which is not here.
				for _, e := range [][]byte{a, b, pending} {
					if kv, _, _ := eventKVs(e); len(kv.Key) > 0 && kv.Key[0] == 0 {
						return
					}
				}
			}
			var foreign foreignKeys
			for _, en := range s.decode(&rec, []pendingEvent{{msg: pending}}, [][]byte{a, b, a}, &foreign, past) {
				if en.Rev < rec.First || en.Rev > rec.Last {
					t.Fatalf("an event at %d, of the batch %d to %d", en.Rev, rec.First, rec.Last)
				}
				for _, e := range en.Events {
					var m mvccpb.Event
					if err := proto.Unmarshal(e.Body, &m); err != nil {
						t.Fatalf("%x: %v", e.Body, err)
					}
					if !bytes.Equal(m.Kv.Key, e.Key) || len(e.Key) == 0 || e.Key[0] == 0 || m.Kv.ModRevision != en.Rev || e.Delete != (m.Type == mvccpb.DELETE) {
						t.Fatalf("%+v at %d is %v", e, en.Rev, &m)
					}
					if e.NoPrev < 0 || e.NoPrev > len(e.Body) || en.Size < 0 || en.Size > math.MaxInt32 {
						t.Fatalf("%+v", e)
					}
					var bare mvccpb.Event
					if err := proto.Unmarshal(e.Body[:e.NoPrev], &bare); err != nil || bare.PrevKv != nil || !proto.Equal(bare.Kv, m.Kv) {
						t.Fatalf("without prev_kv: %v %v", err, &bare)
					}
				}
			}
		}
	})
}
