package sim

import (
	"bytes"
	"cmp"
	"sort"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/pkg/v3/adt"

	"spindle/codec"
)

// This file follows etcd's server/etcdserver/txn (order of evaluation) and api/v3rpc/key.go (checks).

// Txn answers a transaction: every compare, nested ones too, is decided before the first operation; the
// operations of the paths chosen run in order, and see what earlier ones wrote.
func (e *Etcd) Txn(r *pb.TxnRequest) (*pb.TxnResponse, codec.Status) {
	if st := checkTxnRequest(r, e.MaxTxnOps); st.Code != codec.OK {
		return nil, st
	}
	for _, ops := range [][]*pb.RequestOp{r.Success, r.Failure} {
		if _, _, ok := checkIntervals(ops); !ok {
			return nil, codec.ErrDuplicateKey
		}
	}
	path := e.choose(r)
	if st := e.checkTxn(r, path); st.Code != codec.OK {
		return nil, st
	}
	e.begin()
	resp, st := e.execute(path)
	if st.Code != codec.OK {
		return nil, st
	}
	resp.Header.Revision = e.view()
	e.end()
	e.fill(resp.Header)
	return resp, st
}

// branch is a transaction whose compares are decided.
type branch struct {
	ok     bool
	ops    []*pb.RequestOp
	nested []*branch // by op, nil where the op is no transaction
}

func (e *Etcd) choose(r *pb.TxnRequest) *branch {
	b := &branch{ok: true, ops: r.Success}
	for _, c := range r.Compare {
		if !e.compare(c) {
			b.ok, b.ops = false, r.Failure
			break
		}
	}
	b.nested = make([]*branch, len(b.ops))
	for i, op := range b.ops {
		if t := op.GetRequestTxn(); t != nil {
			b.nested[i] = e.choose(t)
		}
	}
	return b
}

func (e *Etcd) compare(c *pb.Compare) bool {
	kvs := e.existing(c.Key, c.RangeEnd, e.rev)
	if len(kvs) == 0 {
		return c.Target != pb.Compare_VALUE && compareKV(c, &mvccpb.KeyValue{})
	}
	for _, kv := range kvs {
		if !compareKV(c, kv) {
			return false
		}
	}
	return true
}

func compareKV(c *pb.Compare, kv *mvccpb.KeyValue) bool {
	var d int
	switch c.Target {
	case pb.Compare_VALUE:
		d = bytes.Compare(kv.Value, c.GetValue())
	case pb.Compare_CREATE:
		d = cmp.Compare(kv.CreateRevision, c.GetCreateRevision())
	case pb.Compare_MOD:
		d = cmp.Compare(kv.ModRevision, c.GetModRevision())
	case pb.Compare_VERSION:
		d = cmp.Compare(kv.Version, c.GetVersion())
	case pb.Compare_LEASE:
		d = cmp.Compare(kv.Lease, c.GetLease())
	}
	switch c.Result {
	case pb.Compare_EQUAL:
		return d == 0
	case pb.Compare_NOT_EQUAL:
		return d != 0
	case pb.Compare_GREATER:
		return d > 0
	case pb.Compare_LESS:
		return d < 0
	}
	return true
}

// checkTxn finds the errors that depend on the state before anything is written.
func (e *Etcd) checkTxn(r *pb.TxnRequest, b *branch) codec.Status {
	for i, op := range b.ops {
		var st codec.Status
		switch v := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			switch rev := v.RequestRange.Revision; {
			case rev == 0:
			case rev > e.rev:
				st = codec.ErrFutureRev
			case rev < e.compact:
				st = codec.ErrCompacted
			}
		case *pb.RequestOp_RequestPut:
			st = e.checkPut(v.RequestPut)
		case *pb.RequestOp_RequestTxn:
			st = e.checkTxn(v.RequestTxn, b.nested[i])
		}
		if st.Code != codec.OK {
			return st
		}
	}
	return codec.Status{}
}

func (e *Etcd) checkPut(p *pb.PutRequest) codec.Status {
	if p.Lease != 0 && e.leases[p.Lease] == nil {
		return codec.ErrLeaseNotFound
	}
	if (p.IgnoreValue || p.IgnoreLease) && e.at(p.Key, e.rev) == nil {
		return codec.ErrKeyNotFound
	}
	return codec.Status{}
}

func (e *Etcd) execute(b *branch) (*pb.TxnResponse, codec.Status) {
	resp := &pb.TxnResponse{Header: &pb.ResponseHeader{}, Succeeded: b.ok, Responses: make([]*pb.ResponseOp, len(b.ops))}
	for i, op := range b.ops {
		out := &pb.ResponseOp{}
		resp.Responses[i] = out
		switch v := op.Request.(type) {
		case *pb.RequestOp_RequestRange:
			rr, st := e.rangeAt(e.view(), v.RequestRange)
			if st.Code != codec.OK {
				return nil, st
			}
			out.Response = &pb.ResponseOp_ResponseRange{ResponseRange: rr}
		case *pb.RequestOp_RequestPut:
			p := v.RequestPut
			old := e.at(p.Key, e.view())
			value, lease := p.Value, p.Lease
			pr := &pb.PutResponse{Header: &pb.ResponseHeader{Revision: e.rev + 1}}
			if old == nil && (p.IgnoreValue || p.IgnoreLease) {
				e.breaks("put of %q with ignore_* after a delete in the same transaction", p.Key)
				return nil, codec.Status{Code: codec.Unavailable, Msg: errPanics.Error()}
			}
			if p.IgnoreValue {
				value = old.KV.Value
			}
			if p.IgnoreLease {
				lease = old.KV.Lease
			}
			if p.PrevKv && old != nil {
				pr.PrevKv = old.KV
			}
			e.put(p.Key, value, lease)
			out.Response = &pb.ResponseOp_ResponsePut{ResponsePut: pr}
		case *pb.RequestOp_RequestDeleteRange:
			d := v.RequestDeleteRange
			dr := &pb.DeleteRangeResponse{Header: &pb.ResponseHeader{}}
			if d.PrevKv {
				dr.PrevKvs = e.existing(d.Key, d.RangeEnd, e.view())
			}
			dr.Deleted = e.deleteRange(d.Key, d.RangeEnd)
			dr.Header.Revision = e.view()
			out.Response = &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: dr}
		case *pb.RequestOp_RequestTxn:
			tr, st := e.execute(b.nested[i])
			if st.Code != codec.OK {
				return nil, st
			}
			out.Response = &pb.ResponseOp_ResponseTxn{ResponseTxn: tr}
		}
	}
	return resp, codec.Status{}
}

// rangeAt answers a range whose newest view is cur.
func (e *Etcd) rangeAt(cur int64, r *pb.RangeRequest) (*pb.RangeResponse, codec.Status) {
	rev := r.Revision
	if rev > cur {
		return nil, codec.ErrFutureRev
	}
	if rev <= 0 {
		rev = cur
	}
	if rev < e.compact {
		return nil, codec.ErrCompacted
	}
	resp := assemble(r, e.existing(r.Key, r.RangeEnd, rev))
	resp.Header = &pb.ResponseHeader{Revision: cur}
	return resp, codec.Status{}
}

// assemble makes the answer to r from all pairs of its range, in order of key.
func assemble(r *pb.RangeRequest, all []*mvccpb.KeyValue) *pb.RangeResponse {
	resp := &pb.RangeResponse{Count: int64(len(all))}
	if r.CountOnly {
		return resp
	}
	kvs := make([]*mvccpb.KeyValue, 0, len(all))
	for _, kv := range all {
		if passes(r, kv) {
			kvs = append(kvs, kv)
		}
	}
	sortKVs(kvs, r)
	if r.Limit > 0 && int64(len(kvs)) > r.Limit {
		kvs = kvs[:r.Limit]
		resp.More = true
	}
	if r.KeysOnly {
		for i, kv := range kvs {
			bare := &mvccpb.KeyValue{Key: kv.Key, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision, Version: kv.Version}
			if r.SortTarget == pb.RangeRequest_VALUE {
				bare.Lease = kv.Lease // only the road through the index, since 3.7, leaves it out
			}
			kvs[i] = bare
		}
	}
	resp.Kvs = kvs
	return resp
}

func passes(r *pb.RangeRequest, kv *mvccpb.KeyValue) bool {
	return !(r.MaxModRevision != 0 && kv.ModRevision > r.MaxModRevision ||
		r.MinModRevision != 0 && kv.ModRevision < r.MinModRevision ||
		r.MaxCreateRevision != 0 && kv.CreateRevision > r.MaxCreateRevision ||
		r.MinCreateRevision != 0 && kv.CreateRevision < r.MinCreateRevision)
}

// sortKVs sorts as r asks. (etcd's own sort is not stable; ties may come in any order there.)
func sortKVs(kvs []*mvccpb.KeyValue, r *pb.RangeRequest) {
	order := r.SortOrder
	if order == pb.RangeRequest_NONE {
		if r.SortTarget == pb.RangeRequest_KEY {
			return
		}
		order = pb.RangeRequest_ASCEND
	}
	by := func(a, b *mvccpb.KeyValue) int {
		switch r.SortTarget {
		case pb.RangeRequest_VERSION:
			return cmp.Compare(a.Version, b.Version)
		case pb.RangeRequest_CREATE:
			return cmp.Compare(a.CreateRevision, b.CreateRevision)
		case pb.RangeRequest_MOD:
			return cmp.Compare(a.ModRevision, b.ModRevision)
		case pb.RangeRequest_VALUE:
			return bytes.Compare(a.Value, b.Value)
		}
		return bytes.Compare(a.Key, b.Key)
	}
	sort.SliceStable(kvs, func(i, j int) bool {
		if order == pb.RangeRequest_DESCEND {
			return by(kvs[i], kvs[j]) > 0
		}
		return by(kvs[i], kvs[j]) < 0
	})
}

func readOnly(r *pb.TxnRequest) bool {
	for _, ops := range [][]*pb.RequestOp{r.Success, r.Failure} {
		for _, op := range ops {
			if op.GetRequestRange() == nil {
				return false
			}
		}
	}
	return true
}

func checkRangeRequest(r *pb.RangeRequest) codec.Status {
	if len(r.Key) == 0 {
		return codec.ErrEmptyKey
	}
	if r.SortOrder < 0 || r.SortOrder > pb.RangeRequest_DESCEND || r.SortTarget < 0 || r.SortTarget > pb.RangeRequest_VALUE {
		return codec.ErrInvalidSort
	}
	return codec.Status{}
}

func checkPutRequest(r *pb.PutRequest) codec.Status {
	switch {
	case len(r.Key) == 0:
		return codec.ErrEmptyKey
	case r.IgnoreValue && len(r.Value) != 0:
		return codec.ErrValueProvided
	case r.IgnoreLease && r.Lease != 0:
		return codec.ErrLeaseProvided
	}
	return codec.Status{}
}

func checkTxnRequest(r *pb.TxnRequest, maxOps int) codec.Status {
	n := max(len(r.Compare), len(r.Success), len(r.Failure))
	if n > maxOps {
		return errTooManyOps
	}
	for _, c := range r.Compare {
		if len(c.Key) == 0 {
			return codec.ErrEmptyKey
		}
	}
	for _, ops := range [][]*pb.RequestOp{r.Success, r.Failure} {
		for _, op := range ops {
			if st := checkRequestOp(op, maxOps-n); st.Code != codec.OK {
				return st
			}
		}
	}
	return codec.Status{}
}

func checkRequestOp(op *pb.RequestOp, maxOps int) codec.Status {
	switch v := op.Request.(type) {
	case *pb.RequestOp_RequestRange:
		return checkRangeRequest(v.RequestRange)
	case *pb.RequestOp_RequestPut:
		return checkPutRequest(v.RequestPut)
	case *pb.RequestOp_RequestDeleteRange:
		if len(v.RequestDeleteRange.Key) == 0 {
			return codec.ErrEmptyKey
		}
		return codec.Status{}
	case *pb.RequestOp_RequestTxn:
		return checkTxnRequest(v.RequestTxn, maxOps)
	}
	return codec.ErrKeyNotFound
}

// checkIntervals is etcd's search for keys that are written twice, with its own interval tree and so with its
// holes: a put and a delete in sibling transactions pass, and so does a put under a delete that has no end.
func checkIntervals(ops []*pb.RequestOp) (puts map[string]bool, dels adt.IntervalTree, ok bool) {
	dels = adt.NewIntervalTree()
	for _, op := range ops {
		if d := op.GetRequestDeleteRange(); d != nil {
			iv := adt.NewStringAffinePoint(string(d.Key))
			if len(d.RangeEnd) != 0 {
				iv = adt.NewStringAffineInterval(string(d.Key), string(d.RangeEnd))
			}
			dels.Insert(iv, struct{}{})
		}
	}
	hit := func(k string) bool { return dels.Intersects(adt.NewStringAffinePoint(k)) }
	puts = map[string]bool{}
	for _, op := range ops {
		t := op.GetRequestTxn()
		if t == nil {
			continue
		}
		putsThen, delsThen, ok := checkIntervals(t.Success)
		if !ok {
			return nil, nil, false
		}
		putsElse, delsElse, ok := checkIntervals(t.Failure)
		if !ok {
			return nil, nil, false
		}
		for k := range putsThen {
			if puts[k] || hit(k) {
				return nil, nil, false
			}
			puts[k] = true
		}
		for k := range putsElse {
			if puts[k] && !putsThen[k] || hit(k) {
				return nil, nil, false
			}
			puts[k] = true
		}
		dels.Union(delsThen, adt.NewStringAffineInterval("\x00", ""))
		dels.Union(delsElse, adt.NewStringAffineInterval("\x00", ""))
	}
	for _, op := range ops {
		p := op.GetRequestPut()
		if p == nil {
			continue
		}
		k := string(p.Key)
		if puts[k] || hit(k) {
			return nil, nil, false
		}
		puts[k] = true
	}
	return puts, dels, true
}
