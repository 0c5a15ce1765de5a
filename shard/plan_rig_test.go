package shard

import (
	"bytes"
	"context"
	"math/rand/v2"
	"path/filepath"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver/txn"
	"go.etcd.io/etcd/server/v3/lease"
	"go.etcd.io/etcd/server/v3/storage/backend"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// etcdStore is etcd's own storage and transaction code without its sockets and raft.
type etcdStore struct {
	t      testing.TB
	kv     mvcc.KV
	lessor *lease.FakeLessor
}

func newEtcdStore(t testing.TB) *etcdStore {
	cfg := backend.DefaultBackendConfig(zap.NewNop())
	cfg.Path = filepath.Join(t.TempDir(), "db")
	cfg.UnsafeNoFsync = true
	be := backend.New(cfg)
	lessor := &lease.FakeLessor{LeaseSet: map[lease.LeaseID]struct{}{}}
	kv := mvcc.NewStore(zap.NewNop(), be, lessor, mvcc.StoreConfig{})
	t.Cleanup(func() { kv.Close(); be.Close() })
	return &etcdStore{t, kv, lessor}
}

var testHdr = codec.Header{ClusterID: 7, MemberID: 8, RaftTerm: 9}

func fillHdr(h *pb.ResponseHeader) { h.ClusterId, h.MemberId, h.RaftTerm = 7, 8, 9 }

// do executes one request and returns the encoded response with a filled header.
func (s *etcdStore) do(req proto.Message) ([]byte, error) {
	ctx, lg := context.Background(), zap.NewNop()
	req = proto.Clone(req)
	var resp proto.Message
	var err error
	switch r := req.(type) {
	case *pb.RangeRequest:
		var x *pb.RangeResponse
		if x, _, err = txn.Range(ctx, lg, s.kv, r, true); err == nil {
			fillHdr(x.Header)
		}
		resp = x
	case *pb.PutRequest:
		var x *pb.PutResponse
		if x, _, err = txn.Put(ctx, lg, s.lessor, s.kv, r); err == nil {
			fillHdr(x.Header)
		}
		resp = x
	case *pb.DeleteRangeRequest:
		var x *pb.DeleteRangeResponse
		if x, _, err = txn.DeleteRange(ctx, lg, s.kv, r); err == nil {
			fillHdr(x.Header)
		}
		resp = x
	case *pb.TxnRequest:
		var x *pb.TxnResponse
		if x, _, err = txn.Txn(ctx, lg, r, false, s.kv, s.lessor, false); err == nil {
			fillHdr(x.Header)
		}
		resp = x
	}
	if err != nil {
		return nil, err
	}
	return mustMarshal(s.t, resp), nil
}

func mustMarshal(t testing.TB, m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func kindOf(req proto.Message) OpKind {
	switch req.(type) {
	case *pb.RangeRequest:
		return OpRange
	case *pb.PutRequest:
		return OpPut
	case *pb.DeleteRangeRequest:
		return OpDeleteRange
	}
	return OpTxn
}

// responsesOf returns the payloads of a TxnResponse's operations.
func responsesOf(t testing.TB, resp []byte) [][]byte {
	r, ok := parseTxnReply(resp, nil)
	if !ok {
		t.Fatal("the member's answer is not well-formed")
	}
	return r.resps
}

// planRig runs requests against a plain store and, in member form, against a second one, and compares.
type planRig struct {
	t       testing.TB
	rng     *rand.Rand
	plain   *etcdStore
	member  *etcdStore
	creates *CreateCache
	localOf map[int64]int64 // meta revision -> local revision
	plan    Plan
	stats   map[string]int
	leases  map[int64]planLease // those that exist, with the truth on the member
}

func newPlanRig(t testing.TB, seed uint64) *planRig {
	r := &planRig{t: t, rng: rand.New(rand.NewPCG(seed, 1)), plain: newEtcdStore(t), member: newEtcdStore(t),
		creates: NewCreateCache(64), localOf: map[int64]int64{}, stats: map[string]int{}, leases: map[int64]planLease{}}
	// An alias, and a lease that has the same ID everywhere. Clients name a third one, which does not exist.
	for _, l := range []planLease{{id: 1, member: 101}, {id: 2, member: 2}} {
		r.plain.lessor.LeaseSet[lease.LeaseID(l.id)] = struct{}{}
		r.member.lessor.LeaseSet[lease.LeaseID(l.member)] = struct{}{}
		r.memberTxn(createLeaseKey(l.id, l.member))
		l.create, l.state = r.member.kv.Rev(), leaseKnown
		r.leases[l.id] = l
	}
	return r
}

// fillLeases does what the Core does when leases are resolved, sometimes with an older instance of one. It
// returns what a put gets at once.
func (r *planRig) fillLeases() codec.Status {
	p := &r.plan
	for i := range p.leases {
		l := &p.leases[i]
		if l.lost {
			r.stats["lease lost"]++
		}
		truth, ok := r.leases[l.id]
		switch {
		case !ok:
			l.state = leaseGone
			r.stats["lease gone"]++
			if st := p.errLeaseOf(); st.Code != codec.OK {
				return st
			}
		case l.state == leaseUnknown && r.rng.IntN(4) == 0:
			*l = truth
			l.create += 1000
		case l.state == leaseUnknown || l.lost:
			*l = truth
		}
	}
	return codec.Status{}
}

// memberTxn sends a Txn of the given fields to the member.
func (r *planRig) memberTxn(body []byte) []byte {
	r.t.Helper()
	req := &pb.TxnRequest{}
	if err := proto.Unmarshal(body, req); err != nil {
		r.t.Fatalf("member form: %v", err)
	}
	resp, err := r.member.do(req)
	if err != nil {
		r.t.Fatalf("member form refused: %v\n%v", err, req)
	}
	return resp
}

func (r *planRig) snapshot(local int64) *Snapshot {
	r.t.Helper()
	ops, n := r.plan.AppendSnapshotOps(nil, local)
	parts := responsesOf(r.t, r.memberTxn(ops))
	if len(parts) != n {
		r.t.Fatalf("%d parts of %d", len(parts), n)
	}
	return NewSnapshot(parts)
}

func headerAt(rev int64) codec.Header {
	h := testHdr
	h.Revision = rev
	return h
}

// same fails the test unless out is want.
func (r *planRig) same(what string, req proto.Message, out, want []byte) {
	r.t.Helper()
	if bytes.Equal(out, want) {
		return
	}
	show := func(b []byte) proto.Message {
		var m proto.Message
		switch kindOf(req) {
		case OpRange:
			m = &pb.RangeResponse{}
		case OpPut:
			m = &pb.PutResponse{}
		case OpDeleteRange:
			m = &pb.DeleteRangeResponse{}
		default:
			m = &pb.TxnResponse{}
		}
		if err := proto.Unmarshal(b, m); err != nil {
			r.t.Errorf("not protobuf: %v", err)
		}
		return m
	}
	r.t.Fatalf("%s differs\nrequest %v\nspindle %v\netcd    %v\nspindle %x\netcd    %x", what, req, show(out), show(want), out, want)
}

// run executes one request on both sides.
func (r *planRig) run(req proto.Message) {
	r.t.Helper()
	msg := mustMarshal(r.t, req)
	p := &r.plan
	if st := p.Parse(kindOf(req), msg, nil); st.Code != codec.OK {
		r.stats["refused: "+st.Msg]++
		return
	}
	switch {
	case p.NeedsHistory():
		r.stats["needs history"]++
	case p.Kind == OpRange:
		r.runRange(req.(*pb.RangeRequest))
	case p.ReadOnly():
		r.runRead(req)
	default:
		r.runWrite(req)
	}
}

func (r *planRig) runRead(req proto.Message) {
	r.stats["read txn"]++
	p := &r.plan
	rev := r.plain.kv.Rev()
	want, err := r.plain.do(req)
	out, wrote, st := p.Evaluate(nil, r.snapshot(0), headerAt(rev))
	r.sameError(req, st, err)
	if err != nil {
		return
	}
	if wrote {
		r.t.Fatalf("a read wrote: %v", req)
	}
	r.same("Evaluate of a read", req, out, want)
	if p.Slow() || !p.Ready() {
		return
	}
	body, m := codec.BeginMessage(nil, 2)
	body = codec.EndMessage(p.AppendRequestOp(body, 0), m)
	out, oc, st := p.Answer(nil, responsesOf(r.t, r.memberTxn(body))[0], headerAt(rev), r.creates)
	if oc != Answered || st.Code != codec.OK {
		r.t.Fatalf("%v: outcome %v, %v", req, oc, st)
	}
	r.same("Answer of a read", req, out, want)
}

func (r *planRig) sameError(req proto.Message, st codec.Status, err error) {
	r.t.Helper()
	text := ""
	if err != nil {
		text = err.Error()
	}
	if err == lease.ErrLeaseNotFound { // etcd gives it its text above this level
		text = codec.ErrLeaseNotFound.Msg
	}
	if st.Msg != text {
		r.t.Fatalf("%v\nspindle: %q, etcd: %q", req, st.Msg, text)
	}
}

// fillSlots does what the Core does from its cache, sometimes with what is wrong.
func (r *planRig) fillSlots() {
	p := &r.plan
	wrong := r.rng.IntN(4) == 0
	for i := range p.PutSlots {
		s := &p.PutSlots[i]
		local, meta, mod, ok := r.creates.Get(s.Key)
		switch {
		case s.Proven == 0:
			s.Create, s.Guard = Create{5, 5}, true // not to be looked at
		case wrong && r.rng.IntN(2) == 0:
			s.Create, s.Known, s.Guard = Create{}, true, true
			if r.rng.IntN(2) == 0 {
				s.Create = Create{Local: r.member.kv.Rev() + 1000, Meta: 1}
			}
		case ok && r.rng.IntN(3) > 0:
			s.Create, s.Known = Create{local, meta}, true
			s.Guard = !(s.Proven > 0 && local > 0 && meta <= s.Proven && s.Proven <= mod)
			if !s.Guard {
				r.stats["create proven"]++
			}
		}
	}
	if !p.Ready() {
		p.LearnCreates(r.snapshot(0))
	}
	if !p.Ready() {
		r.t.Fatal("LearnCreates left something out")
	}
}

func (r *planRig) runWrite(req proto.Message) {
	if r.runDoomed(req) {
		return
	}
	p := &r.plan
	before := r.plain.kv.Rev()
	rev, localBefore := before+1, r.member.kv.Rev()
	// The state before, for Evaluate: it must live on while the member changes.
	want, err := r.plain.do(req)
	changed := r.plain.kv.Rev() != before
	shown := before
	if changed {
		shown = rev
	}
	if st := r.fillLeases(); st.Code != codec.OK {
		r.sameError(req, st, err)
		return
	}
	if p.Slow() {
		r.stats["slow"]++
	} else {
		r.stats["fast"]++
		r.fillSlots()
	}
	stale := p.Slow() && r.rng.IntN(2) == 0
	for try := 0; ; try++ {
		if try > 3 {
			r.t.Fatalf("%v: guards fail for ever", req)
		}
		if p.Slow() {
			at := r.member.kv.Rev()
			if stale && try == 0 {
				at = max(at-r.rng.Int64N(6), 1)
			}
			st := p.Decide(r.snapshot(at), at)
			if st.Code != codec.OK {
				if at != r.member.kv.Rev() {
					continue // the error of an older state
				}
				r.sameError(req, st, err)
				r.stats["error "+st.Msg]++
				_, _, st = p.Evaluate(nil, r.snapshot(localBefore), headerAt(rev))
				r.sameError(req, st, err)
				return
			}
		}
		if err != nil {
			if stale && try == 0 {
				continue
			}
			r.t.Fatalf("%v\netcd: %v, spindle: decided", req, err)
		}
		op, m := codec.BeginMessage(nil, 2)
		op = codec.EndMessage(p.AppendRequestOp(op, rev), m)
		if len(op) > p.Size() {
			r.t.Fatalf("%v: %d bytes, Size says %d", req, len(op), p.Size())
		}
		r.checkCost(op)
		snap := r.snapshot(r.member.kv.Rev())
		held := p.GuardsHold(snap)
		answer := p.AnswerFlat
		reply, flat := r.flatForm(rev)
		if !flat {
			answer = p.Answer
			reply = responsesOf(r.t, r.memberTxn(appendPutOp(op, txnSuccess, KeyClock, []byte("record"))))[0]
		}
		out, oc, st := answer(nil, reply, headerAt(rev), nil)
		if held != (oc == Answered) {
			r.t.Fatalf("%v: GuardsHold %v, outcome %v", req, held, oc)
		}
		if oc != Answered {
			r.stats[[]string{"", "wrong create", "guard failed"}[oc]]++
			if len(out) != 0 {
				r.t.Fatal("bytes of a request that was not executed")
			}
			r.fillLeases()
			continue
		}
		if st.Code != codec.OK {
			r.t.Fatalf("%v: %v", req, st)
		}
		if changed {
			r.same("Answer", req, out, want)
		}
		out, _, _ = answer(nil, reply, headerAt(shown), r.creates)
		r.same("Answer", req, out, want)
		out, wrote, st := p.Evaluate(nil, snap, headerAt(shown))
		if st.Code != codec.OK || wrote != changed {
			r.t.Fatalf("%v: Evaluate: %v, wrote %v", req, st, wrote)
		}
		r.same("Evaluate", req, out, want)
		break
	}
	if changed {
		r.localOf[rev] = r.member.kv.Rev()
		r.stats["changes"]++
	} else {
		r.localOf[before] = r.member.kv.Rev()
		r.stats["no change"]++
	}
}

// flatForm sends the request without a Txn of its own, if it may go so, every other time. ok is false if it did not or if a
// compare failed: nothing was done then.
func (r *planRig) flatForm(rev int64) (reply []byte, ok bool) {
	p := &r.plan
	n, ok := p.flat()
	if !ok || r.rng.IntN(2) == 0 {
		return nil, false
	}
	body := p.appendFlatCompares(nil)
	req := &pb.TxnRequest{}
	unmarshal(r.t, body, req)
	body = p.appendFlatOp(body, rev)
	if len(req.Compare) != n || len(body) > p.Size() {
		r.t.Fatalf("%d compares and %d bytes, %d and at most %d were announced", len(req.Compare), len(body), n, p.Size())
	}
	before := r.member.kv.Rev()
	resp := &pb.TxnResponse{}
	raw := r.memberTxn(appendPutOp(body, txnSuccess, KeyClock, []byte("record")))
	unmarshal(r.t, raw, resp)
	if !resp.Succeeded {
		r.stats["flat failed"]++
		if r.member.kv.Rev() != before {
			r.t.Fatal("a compare failed, and something was written")
		}
		return nil, false
	}
	r.stats["flat"]++
	return responsesOf(r.t, raw)[0], true
}

// checkCost compares OpCost with etcd's way of counting.
func (r *planRig) checkCost(op []byte) {
	req := &pb.TxnRequest{}
	if err := proto.Unmarshal(op, req); err != nil {
		r.t.Fatal(err)
	}
	if cost := costOf(req.Success[0].GetRequestTxn()); cost != r.plan.OpCost() {
		r.t.Fatalf("%v\ncosts %d, OpCost says %d", req, cost, r.plan.OpCost())
	}
}

func costOf(t *pb.TxnRequest) int {
	deepest := 0
	for _, ops := range [][]*pb.RequestOp{t.Success, t.Failure} {
		for _, op := range ops {
			if in := op.GetRequestTxn(); in != nil {
				deepest = max(deepest, costOf(in))
			}
		}
	}
	return max(len(t.Compare), len(t.Success), len(t.Failure)) + deepest
}
