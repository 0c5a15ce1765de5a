package sim

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/shard"
)

// make chooses an operation. What it writes is a value that no other operation writes.
func (c *client) make() (shard.OpKind, proto.Message) {
	r := c.p.r
	g := r.net.Rand
	key := r.key()
	c.n++
	serial := 0
	value := func() []byte {
		serial++
		v := fmt.Appendf(nil, "%s.%d.%d", c.name, c.n, serial)
		if r.Pad > 0 {
			v = append(append(v, '.'), bytes.Repeat([]byte{'z'}, g.IntN(r.Pad))...)
		}
		return v
	}
	mod := int64(0)
	kv := c.known[key]
	if kv != nil {
		mod = kv.ModRevision
	}
	put := func(k string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(k), Value: value(), PrevKv: g.IntN(6) == 0, Lease: c.someLease(g)}}}
	}
	get := func(k string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(k)}}}
	}
	del := func(k string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(k), PrevKv: g.IntN(3) == 0}}}
	}
	modIs := func(k string, m int64) *pb.Compare {
		return &pb.Compare{Key: []byte(k), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: m}}
	}
	// Just below what was compacted a moment ago: some proxy's streams may not have shown that yet.
	if r.compacted > 1 && r.net.now-r.compactedAt < int64(200*time.Millisecond) && g.IntN(4) == 0 {
		return c.past(key, max(1, r.compacted-1-int64(g.IntN(3))), put(key), g)
	}
	if r.Leases && (g.IntN(6) == 0 || r.OneLease && g.IntN(2) == 0) {
		return c.leaseOp(g)
	}
	if r.Swaps && g.IntN(10) < 7 {
		t := &pb.TxnRequest{Compare: []*pb.Compare{modIs(key, mod)}, Success: []*pb.RequestOp{put(key)}, Failure: []*pb.RequestOp{get(key)}}
		switch g.IntN(8) {
		case 0:
			t.Success[0] = del(key)
		case 1:
			t.Failure = nil
		}
		return shard.OpTxn, t
	}
	switch k := g.IntN(103); {
	case k >= 101:
		return 0, &pb.WatchProgressRequest{}
	case k == 100 && r.Events.Foreign:
		return 0, &pb.WatchProgressRequest{}
	case k == 100:
		q := &pb.CompactionRequest{Revision: r.shown - int64(g.IntN(60))}
		switch g.IntN(8) {
		case 0:
			q.Revision = r.shown
		case 1:
			q.Revision = r.shown + 10000
		}
		return shard.OpCompact, q
	case k < 12:
		return shard.OpPut, &pb.PutRequest{Key: []byte(key), Value: value(), PrevKv: g.IntN(4) == 0, Lease: c.someLease(g)}
	case k < 26:
		q := &pb.RangeRequest{Key: []byte(key)}
		switch g.IntN(12) {
		case 0:
			q.CountOnly = true
		case 1:
			q.KeysOnly = true
		case 2:
			q.Limit = 1
		}
		return shard.OpRange, q
	case k < 30:
		return shard.OpRange, &pb.RangeRequest{Key: []byte(key), Serializable: true}
	case k < 40: // T1
		return shard.OpTxn, &pb.TxnRequest{Compare: []*pb.Compare{modIs(key, 0)}, Success: []*pb.RequestOp{put(key)}}
	case k < 54: // T2
		return shard.OpTxn, &pb.TxnRequest{Compare: []*pb.Compare{modIs(key, mod)}, Success: []*pb.RequestOp{put(key)}, Failure: []*pb.RequestOp{get(key)}}
	case k < 62: // T3
		return shard.OpTxn, &pb.TxnRequest{Compare: []*pb.Compare{modIs(key, mod)}, Success: []*pb.RequestOp{del(key)}, Failure: []*pb.RequestOp{get(key)}}
	case k < 66:
		return shard.OpDeleteRange, &pb.DeleteRangeRequest{Key: []byte(key), PrevKv: g.IntN(2) == 0}
	case k < 68: // over all shards
		return shard.OpDeleteRange, &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(r.key()), PrevKv: g.IntN(2) == 0}
	case k < 78: // a list over all shards
		q := &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("y")}
		if g.IntN(4) == 0 {
			q.Key = []byte(key)
		}
		c.shape(q, g)
		return shard.OpRange, q
	case k < 80:
		q := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Serializable: g.IntN(2) == 0}
		if g.IntN(4) > 0 {
			return shard.OpRange, q
		}
		q.RangeEnd = []byte{1} // nothing that a client can see
		if g.IntN(2) == 0 {
			return shard.OpRange, q
		}
		return shard.OpTxn, &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: q}}}}
	case k < 88: // at a revision
		q := &pb.RangeRequest{Key: []byte(key), Revision: max(1, r.shown-int64(g.IntN(40)))}
		if r.compacted > 1 && g.IntN(4) == 0 {
			q.Revision = max(1, r.compacted-int64(g.IntN(3)))
		}
		if g.IntN(3) == 0 {
			q.Key, q.RangeEnd = []byte("k"), []byte("y")
			c.shape(q, g)
		}
		return shard.OpRange, q
	}
	return shard.OpTxn, c.txn(key, value, g)
}

// widen gives a Txn ranges that lie on other shards: behind everything that it writes, or of a key that it does not
// write. One that only reads, or reads the past, has its ranges on one shard.
func (c *client) widen(t *pb.TxnRequest, g *rand.Rand) bool {
	r := c.p.r
	if r.Shards == 1 || g.IntN(3) > 0 || !mayWrite(t) || oldest(t, math.MaxInt64) != math.MaxInt64 {
		return false
	}
	for _, ops := range []*[]*pb.RequestOp{&t.Success, &t.Failure} {
		for range g.IntN(3) {
			q := &pb.RangeRequest{Key: []byte(r.key())}
			at := len(*ops)
			switch g.IntN(3) {
			case 0:
				for i, o := range *ops {
					if o.GetRequestRange() == nil && mentions(requestOf(o), string(q.Key)) {
						at = -1
					} else if at == len(*ops) && g.IntN(3) == 0 {
						at = i
					}
				}
			case 1:
				q.RangeEnd = []byte("y")
				if c.shape(q, g); q.SortTarget == pb.RangeRequest_MOD {
					q.SortTarget = pb.RangeRequest_KEY // ties may come in any order
				}
			}
			if at >= 0 {
				*ops = slices.Insert(*ops, at, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: q}})
			}
		}
	}
	return true
}

// past makes a read at a revision: of a key, of all, of nothing, or beside what a transaction writes.
func (c *client) past(key string, rev int64, write *pb.RequestOp, g *rand.Rand) (shard.OpKind, proto.Message) {
	q := &pb.RangeRequest{Key: []byte(key), Revision: rev}
	switch g.IntN(4) {
	case 0:
		q.RangeEnd = []byte("y")
		c.shape(q, g)
	case 1:
		q.RangeEnd = q.Key // empty
	case 2:
		read := &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: q}}
		if g.IntN(2) == 0 {
			q.RangeEnd = q.Key
		}
		t := &pb.TxnRequest{Success: []*pb.RequestOp{read}}
		if g.IntN(2) == 0 {
			t.Success = append(t.Success, write)
		}
		return shard.OpTxn, t
	}
	return shard.OpRange, q
}

// shape gives a list limits, sort orders and filters.
func (c *client) shape(q *pb.RangeRequest, g *rand.Rand) {
	if g.IntN(3) == 0 {
		q.Limit = int64(1 + g.IntN(4+c.p.r.Keys))
	}
	switch g.IntN(10) {
	case 0:
		q.CountOnly = true
	case 1:
		q.KeysOnly = true
	case 2:
		q.SortOrder, q.SortTarget = pb.RangeRequest_DESCEND, pb.RangeRequest_KEY
	case 3:
		q.SortOrder, q.SortTarget = pb.RangeRequest_DESCEND, pb.RangeRequest_MOD
	case 4:
		q.MinModRevision = max(0, c.p.r.shown-int64(g.IntN(30)))
	case 5:
		q.MaxCreateRevision = max(0, c.p.r.shown-int64(g.IntN(30)))
	}
}

// txn makes a transaction over keys of one shard, of many shapes: the fast road and the slow one.
func (c *client) txn(key string, value func() []byte, g *rand.Rand) *pb.TxnRequest {
	r := c.p.r
	var keys []string
	for i := range r.Keys {
		k := keyName(i)
		if r.part.ShardOf([]byte(k)) == r.part.ShardOf([]byte(key)) {
			keys = append(keys, k)
		}
	}
	any := func() string { return keys[g.IntN(len(keys))] }
	t := &pb.TxnRequest{}
	for range g.IntN(3) {
		k := any()
		cmp := &pb.Compare{Key: []byte(k), Result: pb.Compare_CompareResult(g.IntN(4))}
		kv := c.known[k]
		if kv == nil {
			kv = &mvccpb.KeyValue{Value: []byte("none")}
		}
		switch g.IntN(5) {
		case 0:
			cmp.Target, cmp.TargetUnion = pb.Compare_VALUE, &pb.Compare_Value{Value: kv.Value}
		case 1:
			cmp.Target, cmp.TargetUnion = pb.Compare_VERSION, &pb.Compare_Version{Version: kv.Version}
		case 2:
			cmp.Target, cmp.TargetUnion = pb.Compare_CREATE, &pb.Compare_CreateRevision{CreateRevision: kv.CreateRevision}
		case 3:
			cmp.Target, cmp.TargetUnion = pb.Compare_MOD, &pb.Compare_ModRevision{ModRevision: max(0, r.shown-int64(g.IntN(30)))}
		default:
			cmp.Target, cmp.TargetUnion = pb.Compare_MOD, &pb.Compare_ModRevision{ModRevision: kv.ModRevision}
		}
		if r.Shards == 1 && g.IntN(6) == 0 {
			cmp.RangeEnd = []byte(any())
		}
		t.Compare = append(t.Compare, cmp)
	}
	branch := func() (ops []*pb.RequestOp) {
		used := map[string]bool{}
		for range g.IntN(4) {
			k := any()
			switch n := g.IntN(6); {
			case n < 3 && !used[k]:
				used[k] = true
				p := &pb.PutRequest{Key: []byte(k), Value: value(), PrevKv: g.IntN(4) == 0}
				if g.IntN(8) == 0 {
					p.IgnoreLease = true
				} else {
					p.Lease = c.someLease(g)
				}
				ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: p}})
			case n < 4 && !used[k]:
				used[k] = true
				ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(k), PrevKv: g.IntN(3) == 0}}})
			default:
				q := &pb.RangeRequest{Key: []byte(k)}
				if g.IntN(4) == 0 {
					q.Revision = max(1, r.shown-int64(g.IntN(40)))
				}
				if r.Shards == 1 && g.IntN(3) == 0 {
					q.RangeEnd = []byte{0}
					if c.shape(q, g); q.SortTarget == pb.RangeRequest_MOD {
						q.SortTarget = pb.RangeRequest_KEY // ties may come in any order
					}
				}
				ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: q}})
			}
		}
		return ops
	}
	t.Success, t.Failure = branch(), branch()
	if r.Wide && c.widen(t, g) {
		return t
	}
	if g.IntN(8) == 0 {
		inner := &pb.TxnRequest{Compare: t.Compare, Success: branch()}
		seen := map[string]bool{}
		for _, ops := range [][]*pb.RequestOp{t.Success} {
			for _, op := range ops {
				if p := op.GetRequestPut(); p != nil {
					seen[string(p.Key)] = true
				}
				if d := op.GetRequestDeleteRange(); d != nil {
					seen[string(d.Key)] = true
				}
			}
		}
		ok := true
		for _, op := range inner.Success {
			if p := op.GetRequestPut(); p != nil && seen[string(p.Key)] {
				ok = false
			}
			if d := op.GetRequestDeleteRange(); d != nil && seen[string(d.Key)] {
				ok = false
			}
		}
		if ok {
			t.Success = append(t.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: inner}})
		}
	}
	return t
}
