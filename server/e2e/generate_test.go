package e2e

import (
	"fmt"
	"math/rand/v2"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// generator makes random KV requests over a small set of keys, so that they meet. Revisions in them are
// etcd's; translate makes the request for Spindle.
type generator struct {
	r      *rand.Rand
	prefix string
	keys   []string
	groups [][]string // keys that lie on one shard each, for Txns
	revs   *revMap
	mods   map[string]int64 // etcd's mod revision of each key that is there, as far as known

	// alone says that nobody else uses the systems: ranges may leave the prefix, and Compact is sent.
	alone bool
	// spans says that the groups are neighbours, so that a Txn may hold ranges.
	spans     bool
	compacted int // index in revs of the last compaction
}

const (
	noLease   = 0x7abc
	futureRev = int64(1) << 40
)

func (g *generator) key() []byte { return []byte(g.keys[g.r.IntN(len(g.keys))]) }

func (g *generator) value() []byte {
	switch g.r.IntN(10) {
	case 0:
		return nil
	case 1:
		b := make([]byte, g.r.IntN(3000))
		for i := range b {
			b[i] = byte(g.r.Uint32())
		}
		return b
	default:
		return fmt.Appendf(nil, "v%d", g.r.IntN(5))
	}
}

func (g *generator) chance(percent int) bool { return g.r.IntN(100) < percent }

// rev picks a revision that the generator knows, mostly a recent one.
func (g *generator) rev() int64 {
	n := g.revs.len()
	if n == 0 {
		return 0
	}
	low := 0
	if g.alone && !g.chance(15) {
		low = g.compacted
	}
	back := g.r.IntN(n - low)
	if g.chance(60) {
		back = min(back, g.r.IntN(20))
	}
	return g.revs.revs[0][n-1-back]
}

func prefixEnd(p string) []byte {
	b := []byte(p)
	b[len(b)-1]++ // the prefixes here never end in 0xff
	return b
}

// span picks a range of keys.
func (g *generator) span() (key, end []byte) {
	kinds := 3
	if g.alone {
		kinds = 5
	}
	switch g.r.IntN(kinds) {
	case 0:
		return []byte(g.prefix), prefixEnd(g.prefix)
	case 1:
		a, b := g.key(), g.key()
		if string(a) > string(b) && !g.chance(10) { // an empty range now and then
			a, b = b, a
		}
		return a, b
	case 2:
		k := g.key()
		return k, append(append([]byte(nil), k...), 0)
	case 3:
		return g.key(), []byte{0}
	default:
		return []byte{0}, []byte{0}
	}
}

func (g *generator) request() proto.Message {
	switch n := g.r.IntN(100); {
	case n < 33:
		return g.put(g.key())
	case n < 63:
		return g.rangeRequest()
	case n < 72:
		return g.deleteRange()
	case n < 98 || !g.alone || g.revs.len() == 0:
		return g.txn(0)
	default:
		return g.compact()
	}
}

func (g *generator) put(key []byte) *pb.PutRequest {
	r := &pb.PutRequest{Key: key, Value: g.value(), PrevKv: g.chance(30)}
	switch g.r.IntN(40) {
	case 0, 1:
		r.IgnoreValue, r.Value = true, nil
	case 2:
		r.IgnoreLease = true
	case 3:
		r.IgnoreValue = true // with a value: refused
	case 4:
		r.Lease = noLease // does not exist: refused
	case 5:
		if g.chance(30) {
			r.Key = nil
		}
	}
	return r
}

func (g *generator) rangeRequest() *pb.RangeRequest {
	r := &pb.RangeRequest{Key: g.key()}
	if g.chance(60) {
		r.Key, r.RangeEnd = g.span()
		if g.chance(50) {
			r.Limit = int64(g.r.IntN(8))
		}
		if g.chance(15) {
			r.SortOrder = pb.RangeRequest_SortOrder(g.r.IntN(3))
			r.SortTarget = pb.RangeRequest_SortTarget(g.r.IntN(5))
		}
		if g.chance(10) {
			for _, f := range []*int64{&r.MinModRevision, &r.MaxModRevision, &r.MinCreateRevision, &r.MaxCreateRevision} {
				if g.chance(30) {
					*f = g.rev()
				}
			}
		}
	}
	r.CountOnly = g.chance(8)
	r.KeysOnly = g.chance(8)
	r.Serializable = g.chance(10)
	switch n := g.r.IntN(100); {
	case n < 20:
		r.Revision = g.rev()
	case n == 20:
		r.Revision = futureRev
	case n == 21:
		r.Revision = -3
	}
	if g.chance(1) {
		r.Key = nil
	}
	return r
}

func (g *generator) deleteRange() *pb.DeleteRangeRequest {
	r := &pb.DeleteRangeRequest{Key: g.key(), PrevKv: g.chance(40)}
	if g.chance(25) {
		r.Key, r.RangeEnd = g.span()
	}
	return r
}

func (g *generator) compact() *pb.CompactionRequest {
	n := g.revs.len()
	i := g.compacted + g.r.IntN(n-g.compacted)
	rev := g.revs.revs[0][i]
	switch g.r.IntN(8) {
	case 0:
		rev = futureRev
	case 1:
		rev = g.rev()
	}
	return &pb.CompactionRequest{Revision: rev, Physical: g.chance(30)}
}

// txn makes a Txn whose keys lie on one shard, but for ranges behind all writes now and then.
func (g *generator) txn(depth int) *pb.TxnRequest {
	if depth == 0 && g.chance(12) {
		return g.wideTxn()
	}
	return g.txnOn(g.groups[g.r.IntN(len(g.groups))], depth)
}

func (g *generator) txnOn(keys []string, depth int) *pb.TxnRequest {
	key := func() []byte { return []byte(keys[g.r.IntN(len(keys))]) }
	if depth == 0 && g.chance(50) {
		return g.kubeTxn(key())
	}
	r := &pb.TxnRequest{}
	for range g.r.IntN(3) {
		c := g.compare(key())
		if g.spans && g.chance(15) {
			c.RangeEnd = g.end(keys, c.Key)
		}
		r.Compare = append(r.Compare, c)
	}
	branch := func() (ops []*pb.RequestOp) {
		for range g.r.IntN(4) {
			ops = append(ops, g.op(keys, key(), depth))
		}
		return ops
	}
	r.Success, r.Failure = branch(), branch()
	return r
}

// wideTxn makes what a mutex of clientv3/concurrency sends: writes on one shard, then ranges over all.
func (g *generator) wideTxn() *pb.TxnRequest {
	keys := g.groups[g.r.IntN(len(g.groups))]
	key := func() []byte { return []byte(keys[g.r.IntN(len(keys))]) }
	r := &pb.TxnRequest{}
	for range g.r.IntN(3) {
		r.Compare = append(r.Compare, g.compare(key()))
	}
	branch := func() (ops []*pb.RequestOp) {
		for range g.r.IntN(3) {
			op := g.op(keys, key(), 2)
			if q := op.GetRequestRange(); q != nil {
				q.Revision = 0
			}
			ops = append(ops, op)
		}
		for range g.r.IntN(3) {
			q := g.rangeRequest()
			q.Revision = 0
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: q}})
		}
		return ops
	}
	r.Success, r.Failure = branch(), branch()
	put := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key(), Value: g.value()}}}
	r.Success = append([]*pb.RequestOp{put}, r.Success...) // one that writes nothing has to stay on one shard
	return r
}

// kubeTxn makes one of the shapes that kube-apiserver sends.
func (g *generator) kubeTxn(key []byte) *pb.TxnRequest {
	get := &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: key}}}
	put := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: g.value()}}}
	del := &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: key}}}
	mod := g.mods[string(key)]
	if g.chance(20) {
		mod = g.rev()
	}
	cmp := &pb.Compare{Key: key, Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: mod}}
	r := &pb.TxnRequest{Compare: []*pb.Compare{cmp}, Failure: []*pb.RequestOp{get}}
	switch g.r.IntN(4) {
	case 0:
		cmp.TargetUnion = &pb.Compare_ModRevision{ModRevision: 0}
		r.Success, r.Failure = []*pb.RequestOp{put}, nil
	case 1:
		r.Success = []*pb.RequestOp{put}
	case 2:
		r.Success = []*pb.RequestOp{del}
	case 3:
		cmp.Target, cmp.TargetUnion = pb.Compare_VERSION, &pb.Compare_Version{Version: int64(g.r.IntN(4))}
		r.Success = []*pb.RequestOp{put}
	}
	return r
}

func (g *generator) compare(key []byte) *pb.Compare {
	c := &pb.Compare{Key: key, Result: pb.Compare_CompareResult(g.r.IntN(4))}
	rev := func() int64 {
		switch g.r.IntN(8) {
		case 0:
			return 0
		case 1:
			return -5
		case 2:
			return futureRev
		case 3, 4, 5:
			return g.mods[string(key)]
		}
		return g.rev()
	}
	switch g.r.IntN(5) {
	case 0:
		c.Target, c.TargetUnion = pb.Compare_VERSION, &pb.Compare_Version{Version: int64(g.r.IntN(5)) - 1}
	case 1:
		c.Target, c.TargetUnion = pb.Compare_CREATE, &pb.Compare_CreateRevision{CreateRevision: rev()}
	case 2:
		c.Target, c.TargetUnion = pb.Compare_MOD, &pb.Compare_ModRevision{ModRevision: rev()}
	case 3:
		c.Target, c.TargetUnion = pb.Compare_VALUE, &pb.Compare_Value{Value: g.value()}
	case 4:
		c.Target, c.TargetUnion = pb.Compare_LEASE, &pb.Compare_Lease{Lease: int64(g.r.IntN(2))}
	}
	if g.chance(5) {
		c.RangeEnd = append(append([]byte(nil), key...), 0) // one key, said as a range
	}
	return c
}

// end picks the end of a range that begins at key and stays among keys, which are ascending neighbours.
func (g *generator) end(keys []string, key []byte) []byte {
	if !g.spans || g.chance(40) {
		return append(append([]byte(nil), key...), 0)
	}
	return []byte(keys[g.r.IntN(len(keys))]) // an empty range, too
}

func (g *generator) op(keys []string, key []byte, depth int) *pb.RequestOp {
	switch n := g.r.IntN(100); {
	case n < 45:
		put := g.put(key)
		put.Lease = 0 // leases come later; a Txn that names one in any branch is refused until then
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put}}
	case n < 70:
		r := &pb.RangeRequest{Key: key, CountOnly: g.chance(10), KeysOnly: g.chance(10)}
		if g.chance(20) {
			r.RangeEnd = g.end(keys, key)
			r.Limit = int64(g.r.IntN(3))
		}
		if g.chance(10) {
			r.SortOrder = pb.RangeRequest_SortOrder(g.r.IntN(3))
			r.SortTarget = pb.RangeRequest_SortTarget(g.r.IntN(5))
		}
		if g.chance(10) {
			for _, f := range []*int64{&r.MinModRevision, &r.MaxModRevision, &r.MinCreateRevision, &r.MaxCreateRevision} {
				if g.chance(30) {
					*f = g.rev()
				}
			}
		}
		r.Serializable = g.chance(5)
		switch g.r.IntN(40) {
		case 0, 1, 2, 3, 4:
			r.Revision = g.rev()
		case 5:
			r.Revision = futureRev
		case 6:
			r.Revision = -3
		}
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}}
	case n < 90 || depth >= 2:
		r := &pb.DeleteRangeRequest{Key: key, PrevKv: g.chance(40)}
		if g.chance(20) {
			r.RangeEnd = g.end(keys, key)
		}
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: r}}
	default:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: g.txnOn(keys, depth+1)}}
	}
}

// learn follows which keys are there, so that compares hit more often. It need not be exact.
func (g *generator) learn(req, resp any, rev int64) {
	switch r := req.(type) {
	case *pb.PutRequest:
		g.mods[string(r.Key)] = rev
	case *pb.DeleteRangeRequest:
		if len(r.RangeEnd) == 0 {
			delete(g.mods, string(r.Key))
			return
		}
		for k := range g.mods {
			if k >= string(r.Key) && (string(r.RangeEnd) == "\x00" || k < string(r.RangeEnd)) {
				delete(g.mods, k)
			}
		}
	case *pb.TxnRequest:
		tr := resp.(*pb.TxnResponse)
		ops := r.Failure
		if tr.Succeeded {
			ops = r.Success
		}
		for i, op := range ops {
			if i >= len(tr.Responses) {
				return
			}
			switch o := op.Request.(type) {
			case *pb.RequestOp_RequestPut:
				g.learn(o.RequestPut, nil, rev)
			case *pb.RequestOp_RequestDeleteRange:
				g.learn(o.RequestDeleteRange, nil, rev)
			case *pb.RequestOp_RequestTxn:
				g.learn(o.RequestTxn, opResponse(tr.Responses[i]), rev)
			}
		}
	}
}

// translate returns req with etcd's revisions replaced by Spindle's.
func (m *revMap) translate(req proto.Message) proto.Message {
	out := proto.Clone(req)
	m.translateIn(out)
	return out
}

func (m *revMap) other(rev int64) int64 {
	if i, ok := m.index[0][rev]; ok {
		return m.revs[1][i]
	}
	return rev
}

func (m *revMap) translateIn(req proto.Message) {
	switch r := req.(type) {
	case *pb.RangeRequest:
		r.Revision = m.other(r.Revision)
		r.MinModRevision, r.MaxModRevision = m.other(r.MinModRevision), m.other(r.MaxModRevision)
		r.MinCreateRevision, r.MaxCreateRevision = m.other(r.MinCreateRevision), m.other(r.MaxCreateRevision)
	case *pb.CompactionRequest:
		r.Revision = m.other(r.Revision)
	case *pb.TxnRequest:
		for _, c := range r.Compare {
			switch u := c.TargetUnion.(type) {
			case *pb.Compare_ModRevision:
				u.ModRevision = m.other(u.ModRevision)
			case *pb.Compare_CreateRevision:
				u.CreateRevision = m.other(u.CreateRevision)
			}
		}
		for _, ops := range [][]*pb.RequestOp{r.Success, r.Failure} {
			for _, op := range ops {
				switch o := op.Request.(type) {
				case *pb.RequestOp_RequestRange:
					m.translateIn(o.RequestRange)
				case *pb.RequestOp_RequestTxn:
					m.translateIn(o.RequestTxn)
				}
			}
		}
	}
}
