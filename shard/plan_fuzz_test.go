package shard

import (
	"math/rand/v2"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// parsesLikeProto checks that Parse takes for protobuf what Go's protobuf does, and that nothing that can
// be done with an accepted request panics.
func parsesLikeProto(t *testing.T, kind OpKind, msg []byte) {
	var p Plan
	st := p.Parse(kind, msg, nil)
	req := [...]proto.Message{OpRange: &pb.RangeRequest{}, OpPut: &pb.PutRequest{}, OpDeleteRange: &pb.DeleteRangeRequest{}, OpTxn: &pb.TxnRequest{}}[kind]
	if err := proto.Unmarshal(msg, req); (err != nil) != (st == errUnmarshal) {
		t.Fatalf("%x: protobuf says %v, Parse %v", msg, err, st)
	}
	if st.Code != codec.OK {
		return
	}
	// What protobuf writes of the same message must mean the same.
	var q Plan
	if st := q.Parse(kind, mustMarshal(t, req), nil); st.Code != codec.OK {
		t.Fatalf("%x again: %v", msg, st)
	}
	empty := &Snapshot{}
	forms := func(p *Plan) string {
		for i := range p.PutSlots {
			p.PutSlots[i].Known, p.PutSlots[i].Guard = true, true
		}
		b := p.AppendRequestOp(nil, 9)
		b, _ = p.AppendSnapshotOps(b, 0)
		b = p.AppendReadOp(b, 3)
		b, _, _ = p.Evaluate(b, empty, codec.Header{Revision: 9})
		p.Answer(nil, nil, codec.Header{}, nil)
		if st := p.Decide(empty, 5); st.Code == codec.OK {
			b = p.AppendRequestOp(b, 9)
			p.Answer(nil, msg, codec.Header{}, nil)
		}
		return string(p.AnswerRange(b, [][]byte{msg}, codec.Header{}, nil))
	}
	if forms(&p) != forms(&q) {
		t.Fatalf("%x means something else to Parse than to protobuf: %v", msg, req)
	}
}

func FuzzPlanParse(f *testing.F) {
	g := &planGen{rng: rand.New(rand.NewPCG(planSeed, 4)), odd: true, know: func([]byte) *mvccpb.KeyValue { return nil }}
	for range 200 {
		req := g.request()
		f.Add(uint8(kindOf(req)), mustMarshal(f, req))
	}
	f.Fuzz(func(t *testing.T, kind uint8, msg []byte) { parsesLikeProto(t, OpKind(kind%4), msg) })
}

// TestPlanParseDamaged cuts, repeats and changes parts of good messages.
func TestPlanParseDamaged(t *testing.T) {
	rng := rand.New(rand.NewPCG(planSeed, 5))
	g := &planGen{rng: rng, odd: true, know: func([]byte) *mvccpb.KeyValue { return nil }}
	for range 20000 {
		req := g.request()
		msg := mustMarshal(t, req)
		for range g.n(3) {
			if len(msg) == 0 {
				break
			}
			i, j := g.n(len(msg)), g.n(len(msg)+1)
			switch g.n(3) {
			case 0:
				msg[i] ^= byte(1 << g.n(8))
			case 1:
				msg = msg[:i]
			default:
				if i < j {
					msg = append(msg, msg[i:j]...)
				}
			}
		}
		parsesLikeProto(t, kindOf(req), msg)
	}
	// The same member of a oneof twice is merged; another one replaces it, but must be well-formed.
	for _, ops := range [][]byte{
		{1<<3 | 2, 3, 1<<3 | 2, 1, 'a', 1<<3 | 2, 3, 2<<3 | 2, 1, 'b'},
		{4<<3 | 2, 0, 4<<3 | 2, 4, 2<<3 | 2, 2, 1<<3 | 2, 0},
		{1<<3 | 2, 1, 0xff, 3<<3 | 2, 3, 1<<3 | 2, 1, 'b'},
		{4<<3 | 2, 3, 2<<3 | 2, 1, 0xff, 3<<3 | 2, 3, 1<<3 | 2, 1, 'b'},
		{4<<3 | 2, 3, 1<<3 | 2, 1, 0xff, 3<<3 | 2, 3, 1<<3 | 2, 1, 'b'},
	} {
		parsesLikeProto(t, OpTxn, codec.AppendBytes(nil, 2, ops))
	}
}
