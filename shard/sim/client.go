package sim

import (
	"bytes"
	"fmt"
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
	call   int64 // the event of the world in which it began
	ret    int64 // the one in which it ended
	stream bool  // a RangeStream
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
	case codec.OK, codec.InvalidArgument, codec.NotFound, codec.OutOfRange, codec.FailedPrecondition, codec.AlreadyExists:
		return false
	}
	return true
}

// client issues one operation after another.
type client struct {
	p     *proxy
	name  string
	cur   *op
	sop   *shard.Op
	list  *shard.RangeStream
	idle  bool // waits for the proxy to be ready
	alive bool // keeps away from a dead shard
	n     int
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
	if r.net.Chance(0.03) && len(c.p.viewers) < maxViewers {
		c.p.watchNow()
	}
	kind, req := c.make()
	for c.alive && r.touchesDead(req) {
		kind, req = c.make()
	}
	o := &op{id: len(r.ops), client: c, req: req, begin: r.net.now, call: r.net.Event(), floor: r.shown}
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
	if q, ok := req.(*pb.RangeRequest); ok && streams(q) && r.net.Chance(0.3) {
		o.stream = true
		c.openStream(o, msg)
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
		o.ended, o.end, o.ret, o.st, o.rev = true, r.net.now, r.net.Event(), st, rev
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
	o.ended, o.end, o.ret, o.st = true, r.net.now, r.net.Event(), s.Status
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
		if q, ok := o.req.(*pb.CompactionRequest); ok {
			if q.Revision > r.compacted {
				r.compacted, r.compactedAt = q.Revision, r.net.now
			}
		}
		c.learn(o)
	} else {
		r.stats.Unknown++
		if s.Status.Code == codec.Canceled {
			r.stats.Withdrawn++
		}
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
		c.cur, c.sop, c.list = nil, nil, nil
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
	case *pb.LeaseGrantRequest:
		return &pb.LeaseGrantResponse{}
	case *pb.LeaseRevokeRequest:
		return &pb.LeaseRevokeResponse{}
	case *pb.LeaseKeepAliveRequest:
		return &pb.LeaseKeepAliveResponse{}
	case *pb.LeaseTimeToLiveRequest:
		return &pb.LeaseTimeToLiveResponse{}
	case *pb.LeaseLeasesRequest:
		return &pb.LeaseLeasesResponse{}
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
	case *pb.LeaseGrantResponse:
		c.p.r.leaseIDs = append(c.p.r.leaseIDs, v.ID)
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
