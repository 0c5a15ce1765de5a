package e2e

import (
	"fmt"
	"sort"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/status"
)

// revMap pairs the revisions of etcd (0) and Spindle (1). One goroutine writes a set of keys of its own and
// learns a pair with every write; everything that ever shows one of those keys can then be compared.
// Pairs are in order on both sides, or add says that they are not.
type revMap struct {
	revs  [2][]int64
	index [2]map[int64]int
}

func newRevMap() *revMap {
	m := &revMap{}
	for i := range m.index {
		m.index[i] = map[int64]int{}
	}
	return m
}

func (m *revMap) len() int { return len(m.revs[0]) }

func (m *revMap) add(etcd, spindle int64) error {
	if n := m.len(); n > 0 && (etcd <= m.revs[0][n-1] || spindle <= m.revs[1][n-1]) {
		return fmt.Errorf("a later write got revision %d after %d (etcd: %d after %d)", spindle, m.revs[1][n-1], etcd, m.revs[0][n-1])
	}
	n := m.len()
	for side, r := range [2]int64{etcd, spindle} {
		m.index[side][r] = n
		m.revs[side] = append(m.revs[side], r)
	}
	return nil
}

func (m *revMap) last(side int) int64 {
	if n := m.len(); n > 0 {
		return m.revs[side][n-1]
	}
	return 0
}

// name writes a revision in the same letters for both sides.
func (m *revMap) name(side int, rev int64) string {
	if i, ok := m.index[side][rev]; ok {
		return fmt.Sprintf("#%d", i)
	}
	if rev == 0 {
		return "0"
	}
	return fmt.Sprintf("unknown(%d)", rev)
}

func (m *revMap) kv(side int, kv *mvccpb.KeyValue) string {
	if kv == nil {
		return "nil"
	}
	return fmt.Sprintf("{%q=%s create %s mod %s version %d lease %d}", kv.Key, shortValue(kv.Value),
		m.name(side, kv.CreateRevision), m.name(side, kv.ModRevision), kv.Version, kv.Lease)
}

func shortValue(v []byte) string {
	if len(v) > 40 {
		return fmt.Sprintf("%q...(%d)", v[:40], len(v))
	}
	return fmt.Sprintf("%q", v)
}

func (m *revMap) kvs(side int, kvs []*mvccpb.KeyValue) string {
	var b strings.Builder
	for _, kv := range kvs {
		b.WriteString(m.kv(side, kv))
	}
	return "[" + b.String() + "]"
}

// response writes what a response says, without its header, in the same letters for both sides.
func (m *revMap) response(side int, resp any) string {
	switch r := resp.(type) {
	case *pb.RangeResponse:
		return fmt.Sprintf("range(count %d more %v %s)", r.Count, r.More, m.kvs(side, r.Kvs))
	case *pb.PutResponse:
		return fmt.Sprintf("put(prev %s)", m.kv(side, r.PrevKv))
	case *pb.DeleteRangeResponse:
		prev := append([]*mvccpb.KeyValue(nil), r.PrevKvs...)
		sort.Slice(prev, func(i, j int) bool { return string(prev[i].Key) < string(prev[j].Key) })
		order := ""
		for i := range prev {
			if prev[i] != r.PrevKvs[i] {
				order = " out of order"
			}
		}
		return fmt.Sprintf("delete(%d prev %s%s)", r.Deleted, m.kvs(side, prev), order)
	case *pb.TxnResponse:
		var b strings.Builder
		fmt.Fprintf(&b, "txn(%v", r.Succeeded)
		for _, op := range r.Responses {
			b.WriteString(" ")
			b.WriteString(m.response(side, opResponse(op)))
		}
		return b.String() + ")"
	case *pb.CompactionResponse:
		return "compacted"
	}
	return fmt.Sprintf("%T", resp)
}

func opResponse(op *pb.ResponseOp) any {
	switch r := op.Response.(type) {
	case *pb.ResponseOp_ResponseRange:
		return r.ResponseRange
	case *pb.ResponseOp_ResponsePut:
		return r.ResponsePut
	case *pb.ResponseOp_ResponseDeleteRange:
		return r.ResponseDeleteRange
	case *pb.ResponseOp_ResponseTxn:
		return r.ResponseTxn
	}
	return nil
}

// changed says whether the request that was answered by resp changed anything, so has a revision.
func changed(resp any) bool {
	switch r := resp.(type) {
	case *pb.PutResponse:
		return true
	case *pb.DeleteRangeResponse:
		return r.Deleted > 0
	case *pb.TxnResponse:
		for _, op := range r.Responses {
			if changed(opResponse(op)) {
				return true
			}
		}
	}
	return false
}

func header(resp any) *pb.ResponseHeader {
	switch r := resp.(type) {
	case *pb.RangeResponse:
		return r.Header
	case *pb.PutResponse:
		return r.Header
	case *pb.DeleteRangeResponse:
		return r.Header
	case *pb.TxnResponse:
		return r.Header
	case *pb.CompactionResponse:
		return r.Header
	}
	return nil
}

// checkHeader looks at what every header must hold.
func checkHeader(h *pb.ResponseHeader) error {
	switch {
	case h == nil:
		return fmt.Errorf("no header")
	case h.ClusterId == 0 || h.MemberId == 0 || h.RaftTerm == 0:
		return fmt.Errorf("header is not filled: %v", h)
	case h.Revision <= 0:
		return fmt.Errorf("header without a revision: %v", h)
	}
	return nil
}

func errText(err error) string {
	st, _ := status.FromError(err)
	return fmt.Sprintf("%v: %s", st.Code(), st.Message())
}
