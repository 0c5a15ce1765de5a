package shard

import (
	"math/rand/v2"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// planGen makes random requests on few keys. know returns a key's present state, nil if it is absent, so
// that compares are often true.
type planGen struct {
	rng  *rand.Rand
	rev  int64
	know func(key []byte) *mvccpb.KeyValue
	// odd adds what is wrong: empty and reserved keys, unknown enums, overlapping writes.
	odd bool
}

func (g *planGen) n(n int) int        { return g.rng.IntN(n) }
func (g *planGen) one(n int) bool     { return g.rng.IntN(n) == 0 }
func (g *planGen) key() []byte        { return []byte{byte('a' + g.n(7))} }
func (g *planGen) oddly(n int) bool   { return g.odd && g.one(n) }
func (g *planGen) value() []byte      { return []byte{byte('0' + g.n(4)), 'v'}[:g.n(3)] }
func (g *planGen) number() int64      { return []int64{-1, 0, 1, 2, g.rev, g.rev + 1, g.rev - 1}[g.n(7)] }
func (g *planGen) near(x int64) int64 { return x + int64(g.n(3)) - 1 }

func (g *planGen) named() []byte {
	switch {
	case g.oddly(30):
		return nil
	case g.oddly(30):
		return []byte("\x00x")
	}
	return g.key()
}

// interval returns a key, or a range: to another key, inverted, to infinity, from reserved keys.
func (g *planGen) interval() (key, end []byte) {
	if g.one(3) {
		return g.named(), nil
	}
	key, end = g.named(), g.key()
	switch g.n(8) {
	case 0:
		end = []byte{0}
	case 1:
		key = []byte{0}
	case 2:
		key, end = []byte{0}, []byte{0}
	case 3:
		end = append(append([]byte(nil), key...), 0)
	case 4:
		if g.one(4) {
			key, end = []byte("\x00a"), []byte("\x00b")
		}
	}
	return key, end
}

func (g *planGen) rangeReq() *pb.RangeRequest {
	r := &pb.RangeRequest{Serializable: g.one(4), KeysOnly: g.one(4), CountOnly: g.one(6)}
	r.Key, r.RangeEnd = g.interval()
	if g.one(2) {
		r.Limit = int64(g.n(5)) - 1
	}
	if g.one(50) {
		r.Limit = 1<<63 - 1
	}
	if g.one(3) {
		r.SortOrder = pb.RangeRequest_SortOrder(g.n(3))
		r.SortTarget = pb.RangeRequest_SortTarget(g.n(5))
	}
	if g.oddly(30) {
		r.SortOrder = pb.RangeRequest_SortOrder(g.n(9) - 4)
	}
	if g.oddly(30) {
		r.SortTarget = pb.RangeRequest_SortTarget(g.n(9) - 2)
	}
	if g.one(4) {
		for _, f := range []*int64{&r.MinModRevision, &r.MaxModRevision, &r.MinCreateRevision, &r.MaxCreateRevision} {
			if g.one(3) {
				*f = g.near(g.rev - int64(g.n(12)))
			}
		}
	}
	return r
}

func (g *planGen) put() *pb.PutRequest {
	r := &pb.PutRequest{Key: g.named(), Value: g.value(), PrevKv: g.one(3)}
	if g.one(3) {
		r.Lease = int64(g.n(4))
	}
	if g.one(6) {
		r.IgnoreValue = true
		if !g.oddly(2) {
			r.Value = nil
		}
	}
	if g.one(6) {
		r.IgnoreLease = true
		if !g.oddly(2) {
			r.Lease = 0
		}
	}
	return r
}

func (g *planGen) del() *pb.DeleteRangeRequest {
	r := &pb.DeleteRangeRequest{PrevKv: g.one(2)}
	r.Key, r.RangeEnd = g.interval()
	return r
}

func (g *planGen) compare() *pb.Compare {
	c := &pb.Compare{Result: pb.Compare_CompareResult(g.n(4)), Target: pb.Compare_CompareTarget(g.n(5))}
	if g.one(2) {
		c.Result = pb.Compare_EQUAL
	}
	if g.one(3) {
		c.Target = pb.Compare_MOD
	}
	if g.one(25) {
		c.Result = 4
	}
	if g.one(25) {
		c.Target = 5
	}
	c.Key = g.named()
	if g.one(4) {
		c.Key, c.RangeEnd = g.interval()
	}
	kv := g.know(c.Key)
	if kv == nil {
		kv = &mvccpb.KeyValue{}
	}
	pick := func(real int64) int64 {
		if g.one(3) {
			return g.number()
		}
		if g.one(4) {
			return g.near(real)
		}
		return real
	}
	target := c.Target
	if g.one(20) {
		target = pb.Compare_CompareTarget(g.n(5)) // a union of another target
	}
	switch target {
	case pb.Compare_VERSION:
		c.TargetUnion = &pb.Compare_Version{Version: pick(kv.Version)}
	case pb.Compare_CREATE:
		c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: pick(kv.CreateRevision)}
	case pb.Compare_MOD:
		c.TargetUnion = &pb.Compare_ModRevision{ModRevision: pick(kv.ModRevision)}
	case pb.Compare_VALUE:
		v := kv.Value
		if g.one(3) {
			v = g.value()
		}
		c.TargetUnion = &pb.Compare_Value{Value: v}
	case pb.Compare_LEASE:
		c.TargetUnion = &pb.Compare_Lease{Lease: pick(kv.Lease)}
	}
	return c
}

func (g *planGen) op(depth int) *pb.RequestOp {
	if g.oddly(60) {
		return &pb.RequestOp{}
	}
	n := 12
	if depth > 0 {
		n = 15
	}
	switch k := g.n(n); {
	case k < 4:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: g.rangeReq()}}
	case k < 8:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: g.put()}}
	case k < 12:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: finite(g.del())}}
	}
	return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: g.txn(depth - 1)}}
}

// finite keeps deletes to infinity out of Txns: with a put behind one, etcd can be killed for good, and
// Spindle refuses it (deletesFirst).
func finite(d *pb.DeleteRangeRequest) *pb.DeleteRangeRequest {
	if string(d.RangeEnd) == "\x00" {
		d.RangeEnd = []byte("\xff\xff")
	}
	return d
}

func (g *planGen) txn(depth int) *pb.TxnRequest {
	r := &pb.TxnRequest{}
	for range g.n(3) {
		r.Compare = append(r.Compare, g.compare())
	}
	for range g.n(4) {
		r.Success = append(r.Success, g.op(depth))
	}
	for range g.n(3) {
		r.Failure = append(r.Failure, g.op(depth))
	}
	return r
}

// kube returns what kube-apiserver sends: create, update or delete of one key, mostly with what it is.
func (g *planGen) kube() *pb.TxnRequest {
	key, mod := g.key(), int64(0)
	if kv := g.know(key); kv != nil && !g.one(5) {
		mod = kv.ModRevision
	}
	r := &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: key, Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: mod}}},
		Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: key}}}},
	}
	switch {
	case mod == 0:
		r.Failure = nil
		fallthrough
	case !g.one(3):
		r.Success = []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: g.value()}}}}
	default:
		r.Success = []*pb.RequestOp{{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: key}}}}
	}
	return r
}

func nestedOp(t *pb.TxnRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: t}}
}

// siblings returns what etcd's check of overlaps is leaky about: puts and deletes of two keys in nested
// Txns beside each other.
func (g *planGen) siblings() *pb.TxnRequest {
	op := func() *pb.RequestOp {
		key := []byte{byte('a' + g.n(2))}
		if g.one(2) {
			return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: g.value(), IgnoreLease: g.one(8)}}}
		}
		d := &pb.DeleteRangeRequest{Key: key, PrevKv: g.one(3)}
		if g.one(3) {
			d.RangeEnd = []byte{0}
		}
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: finite(d)}}
	}
	r := &pb.TxnRequest{}
	for range 1 + g.n(3) {
		if g.one(3) {
			r.Success = append(r.Success, op())
			continue
		}
		in := &pb.TxnRequest{}
		for range g.n(2) {
			in.Compare = append(in.Compare, g.compare())
		}
		for range g.n(3) {
			in.Success = append(in.Success, op())
		}
		for range g.n(2) {
			in.Failure = append(in.Failure, op())
		}
		r.Success = append(r.Success, nestedOp(in))
	}
	return r
}

// undecided returns what must be decided on a state that may be gone when it is written: compares of
// ranges, and writes beside them.
func (g *planGen) undecided() *pb.TxnRequest {
	c := g.compare()
	c.Key, c.RangeEnd = g.interval()
	r := &pb.TxnRequest{Compare: []*pb.Compare{c}}
	put := func(value string) []*pb.RequestOp {
		return []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: g.key(), Value: []byte(value)}}}}
	}
	r.Success, r.Failure = put("yes"), put("no")
	return r
}

func (g *planGen) request() proto.Message {
	switch k := g.n(16); {
	case k > 13:
		return g.siblings()
	case k > 11:
		return g.undecided()
	case k > 9:
		return g.kube()
	case k < 2:
		return g.rangeReq()
	case k < 4:
		return g.put()
	case k < 5:
		return g.del()
	}
	return g.txn(2)
}
