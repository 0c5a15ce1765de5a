package sim

import (
	"sort"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// view is the state of all keys at one moment of the true history; a request can be evaluated on it, as
// the one etcd that clients believe in would.
type view struct {
	h      *history
	rev    int64
	before bool           // without what the request at rev itself did
	missed map[*fact]bool // left out
	// writes is what the evaluated request would write, in order; it is seen by what follows in it.
	writes []*fact
}

// before is the state that the request which was given rev saw: everything up to there, also what
// happened without a record and shares rev with it.
func (c *checker) before(rev int64) *view {
	return &view{h: c.h, rev: rev, before: true, missed: c.missed}
}

// after is the state at rev.
func (c *checker) after(rev int64) *view { return &view{h: c.h, rev: rev, missed: c.missed} }

func (v *view) at(key string) *fact {
	for i := len(v.writes) - 1; i >= 0; i-- {
		if w := v.writes[i]; w.key == key {
			if w.delete {
				return nil
			}
			return w
		}
	}
	return v.base(key)
}

func (v *view) base(key string) *fact {
	fs := v.h.byKey[key]
	i := sort.Search(len(fs), func(i int) bool { return fs[i].rev > v.rev })
	for i > 0 && (v.before && fs[i-1].rev == v.rev && !fs[i-1].unrecorded || v.missed[fs[i-1]]) {
		i--
	}
	if i == 0 || fs[i-1].delete {
		return nil
	}
	return fs[i-1]
}

func (v *view) span(key, end []byte, at func(string) *fact) []*mvccpb.KeyValue {
	keys := map[string]bool{}
	for k := range v.h.byKey {
		keys[k] = true
	}
	for _, w := range v.writes {
		keys[w.key] = true
	}
	var kvs []*mvccpb.KeyValue
	for k := range keys {
		if within(k, string(key), string(end)) {
			if f := at(k); f != nil {
				kvs = append(kvs, f.kv())
			}
		}
	}
	sort.Slice(kvs, func(i, j int) bool { return string(kvs[i].Key) < string(kvs[j].Key) })
	return kvs
}

// eval evaluates a request; headers are left out of the answer.
func (v *view) eval(req proto.Message) proto.Message {
	switch q := req.(type) {
	case *pb.RangeRequest:
		if q.Revision > 0 {
			then := &view{h: v.h, rev: q.Revision}
			return assemble(q, then.span(q.Key, q.RangeEnd, then.base))
		}
		return assemble(q, v.span(q.Key, q.RangeEnd, v.at))
	case *pb.PutRequest:
		resp := &pb.PutResponse{}
		old := v.at(string(q.Key))
		f := &fact{rev: v.rev, key: string(q.Key), value: string(q.Value), create: v.rev, version: 1}
		f.lease = q.Lease
		if q.Lease == 0 {
			f.lease = leaseOf(q.Key)
		}
		if old != nil {
			if q.IgnoreLease {
				f.lease = old.lease
			}
			f.create, f.version = old.create, old.version+1
			if q.PrevKv {
				resp.PrevKv = old.kv()
			}
		}
		v.writes = append(v.writes, f)
		return resp
	case *pb.DeleteRangeRequest:
		kvs := v.span(q.Key, q.RangeEnd, v.at)
		resp := &pb.DeleteRangeResponse{Deleted: int64(len(kvs))}
		if q.PrevKv {
			resp.PrevKvs = kvs
		}
		for _, kv := range kvs {
			v.writes = append(v.writes, &fact{rev: v.rev, key: string(kv.Key), delete: true})
		}
		return resp
	case *pb.TxnRequest:
		return v.run(v.decide(q))
	}
	return nil
}

func (v *view) decide(t *pb.TxnRequest) *branch {
	b := &branch{ok: true, ops: t.Success}
	for _, c := range t.Compare {
		kvs := v.span(c.Key, c.RangeEnd, v.base)
		ok := len(kvs) > 0 || c.Target != pb.Compare_VALUE
		if len(kvs) == 0 && ok {
			ok = compareKV(c, &mvccpb.KeyValue{})
		}
		for _, kv := range kvs {
			ok = ok && compareKV(c, kv)
		}
		if !ok {
			b.ok, b.ops = false, t.Failure
			break
		}
	}
	b.nested = make([]*branch, len(b.ops))
	for i, o := range b.ops {
		if n := o.GetRequestTxn(); n != nil {
			b.nested[i] = v.decide(n)
		}
	}
	return b
}

func (v *view) run(b *branch) *pb.TxnResponse {
	resp := &pb.TxnResponse{Succeeded: b.ok}
	for i, o := range b.ops {
		out := &pb.ResponseOp{}
		switch q := o.Request.(type) {
		case *pb.RequestOp_RequestRange:
			out.Response = &pb.ResponseOp_ResponseRange{ResponseRange: v.eval(q.RequestRange).(*pb.RangeResponse)}
		case *pb.RequestOp_RequestPut:
			out.Response = &pb.ResponseOp_ResponsePut{ResponsePut: v.eval(q.RequestPut).(*pb.PutResponse)}
		case *pb.RequestOp_RequestDeleteRange:
			out.Response = &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: v.eval(q.RequestDeleteRange).(*pb.DeleteRangeResponse)}
		case *pb.RequestOp_RequestTxn:
			out.Response = &pb.ResponseOp_ResponseTxn{ResponseTxn: v.run(b.nested[i])}
		}
		resp.Responses = append(resp.Responses, out)
	}
	return resp
}
