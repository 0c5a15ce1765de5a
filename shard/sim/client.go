package sim

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/shard"
)

// op is one operation of a client, with what it was told.
type op struct {
	id     int
	client *client
	req    proto.Message
	resp   proto.Message // nil unless st is OK
	st     codec.Status
	ended  bool
	begin  int64 // virtual time
	end    int64
	floor  int64 // the largest revision that anyone had been shown when it began
	rev    int64 // header.revision of the answer
	facts  int   // of the history that belong to it
}

func (o *op) String() string {
	var b bytes.Buffer
	fmt.Fprintf(&b, "op%d of %s {%v}", o.id, o.client.name, o.req)
	if o.ended {
		fmt.Fprintf(&b, " floor=%d R=%d %v %q", o.floor, o.rev, o.st.Code, o.st.Msg)
		if o.resp != nil {
			fmt.Fprintf(&b, " {%v}", o.resp)
		}
	}
	return b.String()
}

// unknown reports whether the client cannot know if the operation happened.
func (o *op) unknown() bool {
	if !o.ended {
		return true
	}
	switch o.st.Code {
	case codec.OK, codec.InvalidArgument, codec.NotFound, codec.OutOfRange, codec.FailedPrecondition:
		return false
	}
	return true
}

// client issues one operation after another.
type client struct {
	p    *proxy
	name string
	cur  *op
	sop  *shard.Op
	idle bool // waits for the proxy to be ready
	n    int
	// known is what the client believes of keys, from answers it got.
	known map[string]*mvccpb.KeyValue
}

// next begins the next operation after a pause.
func (c *client) next() {
	r := c.p.r
	d := time.Duration(0)
	if r.Think > 0 {
		d = r.net.Between(0, r.Think)
	}
	if r.net.Chance(0.02) {
		d += r.net.Between(0, 600*time.Millisecond)
	}
	r.net.After(d, c.issue)
}

func (c *client) issue() {
	r := c.p.r
	if r.issued >= r.Ops || c.cur != nil || r.fault != nil {
		return
	}
	if !c.p.ready {
		c.idle = true
		return
	}
	kind, req := c.make()
	o := &op{id: len(r.ops), client: c, req: req, begin: r.net.now, floor: r.shown}
	r.ops = append(r.ops, o)
	r.issued++
	r.open++
	c.cur = o
	msg, err := proto.Marshal(req)
	if err != nil {
		r.fail("%v", err)
		return
	}
	r.net.tracef("%s: op%d begins, floor %d: %s", c.name, o.id, o.floor, short(req))
	if _, ok := req.(*pb.WatchProgressRequest); ok {
		c.askNow(o)
		return
	}
	s := &shard.Op{Kind: kind, Msg: msg}
	c.sop = s
	s.Done = func(s *shard.Op) { c.done(o, s) }
	core := c.p.core
	core.Submit(s)
	if r.net.Chance(0.01) {
		r.net.After(r.net.Between(0, 50*time.Millisecond), func() {
			if c.sop == s && c.cur == o && c.p.core == core {
				core.Cancel(s)
				c.p.turn()
			}
		})
	}
	c.p.turn()
}

// askNow asks the proxy for now, as a watch or a progress request does.
func (c *client) askNow(o *op) {
	r := c.p.r
	c.p.core.Now(func(rev int64, st codec.Status) {
		if c.cur != o {
			return // the proxy died
		}
		o.ended, o.end, o.st, o.rev = true, r.net.now, st, rev
		c.cur = nil
		r.open--
		if st.Code == codec.OK {
			r.stats.OK++
			r.show(rev)
		} else {
			r.stats.Unknown++
		}
		r.net.tracef("%s: op%d ends: %v now is %d", c.name, o.id, st.Code, rev)
		c.next()
	})
	c.p.turn()
}

func short(m proto.Message) string {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s{%v}", m.ProtoReflect().Descriptor().Name(), m)
	return b.String()
}

// done takes the answer.
func (c *client) done(o *op, s *shard.Op) {
	r := c.p.r
	if o.ended {
		r.fail("%s: Done was called twice for op%d", c.name, o.id)
		return
	}
	o.ended, o.end, o.st = true, r.net.now, s.Status
	r.open--
	if c.cur == o {
		c.cur, c.sop = nil, nil
	}
	if s.Status.Code == codec.OK {
		r.stats.OK++
		o.resp = answerOf(o.req)
		if err := proto.Unmarshal(s.Resp, o.resp); err != nil {
			r.fail("%s: the answer of op%d cannot be read: %v", c.name, o.id, err)
			return
		}
		h := headerOf(o.resp)
		if h == nil {
			r.fail("%s: the answer of op%d has no header", c.name, o.id)
			return
		}
		o.rev = h.Revision
		r.show(o.rev)
		c.learn(o)
	} else {
		r.stats.Unknown++
	}
	if r.net.Trace != nil {
		r.net.tracef("%s: op%d ends: %v %q R%d %v", c.name, o.id, o.st.Code, o.st.Msg, o.rev, o.resp)
	}
	c.next()
}

// proxyDied ends what was under way without an answer.
func (c *client) proxyDied() {
	if o := c.cur; o != nil {
		o.ended, o.end, o.st = true, c.p.r.net.now, codec.Status{Code: codec.Unavailable, Msg: errNoAnswer.Error()}
		c.p.r.open--
		c.p.r.stats.Unknown++
		c.cur, c.sop = nil, nil
		c.next()
	}
}

func (c *client) proxyReady() {
	if c.idle {
		c.idle = false
		c.next()
	}
}

func answerOf(req proto.Message) proto.Message {
	switch req.(type) {
	case *pb.RangeRequest:
		return &pb.RangeResponse{}
	case *pb.PutRequest:
		return &pb.PutResponse{}
	case *pb.DeleteRangeRequest:
		return &pb.DeleteRangeResponse{}
	case *pb.CompactionRequest:
		return &pb.CompactionResponse{}
	}
	return &pb.TxnResponse{}
}

func headerOf(resp proto.Message) *pb.ResponseHeader {
	return resp.(interface{ GetHeader() *pb.ResponseHeader }).GetHeader()
}

// learn keeps what an answer says of keys.
func (c *client) learn(o *op) {
	if c.known == nil {
		c.known = map[string]*mvccpb.KeyValue{}
	}
	see := func(rr *pb.RangeResponse) {
		for _, kv := range rr.Kvs {
			if kv.ModRevision > 0 {
				c.known[string(kv.Key)] = kv
			}
		}
	}
	switch v := o.resp.(type) {
	case *pb.RangeResponse:
		see(v)
		if q := o.req.(*pb.RangeRequest); len(q.RangeEnd) == 0 && len(v.Kvs) == 0 && !q.CountOnly {
			delete(c.known, string(q.Key))
		}
	case *pb.TxnResponse:
		for _, op := range v.Responses {
			if rr := op.GetResponseRange(); rr != nil {
				see(rr)
			}
		}
		if q := o.req.(*pb.TxnRequest); v.Succeeded {
			for _, op := range q.Success {
				if p := op.GetRequestPut(); p != nil {
					c.known[string(p.Key)] = &mvccpb.KeyValue{Key: p.Key, Value: p.Value, ModRevision: o.rev}
				}
				if d := op.GetRequestDeleteRange(); d != nil {
					delete(c.known, string(d.Key))
				}
			}
		}
	}
}

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
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(k), Value: value(), PrevKv: g.IntN(6) == 0}}}
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
	switch k := g.IntN(103); {
	case k >= 101:
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
		return shard.OpPut, &pb.PutRequest{Key: []byte(key), Value: value(), PrevKv: g.IntN(4) == 0}
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
		return shard.OpRange, q
	case k < 88: // at a revision
		q := &pb.RangeRequest{Key: []byte(key), Revision: max(1, r.shown-int64(g.IntN(40)))}
		if g.IntN(3) == 0 {
			q.Key, q.RangeEnd = []byte("k"), []byte("y")
			c.shape(q, g)
		}
		return shard.OpRange, q
	}
	return shard.OpTxn, c.txn(key, value, g)
}

// shape gives a list limits, sort orders and filters.
func (c *client) shape(q *pb.RangeRequest, g *rand.Rand) {
	if g.IntN(3) == 0 {
		q.Limit = int64(1 + g.IntN(4))
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
				}
				ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: p}})
			case n < 4 && !used[k]:
				used[k] = true
				ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(k), PrevKv: g.IntN(3) == 0}}})
			default:
				q := &pb.RangeRequest{Key: []byte(k)}
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
