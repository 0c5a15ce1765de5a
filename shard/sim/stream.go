package sim

import (
	"bytes"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/shard"
)

// This file is a client's RangeStream: it takes chunk after chunk, slowly now and then, gives some streams
// up, and puts the chunks together to the answer that a Range would have given.

// streams says that q may be sent as a RangeStream.
func streams(q *pb.RangeRequest) bool {
	return q.SortOrder == pb.RangeRequest_NONE && q.SortTarget == pb.RangeRequest_KEY && q.MinModRevision == 0 && q.MaxModRevision == 0 &&
		q.MinCreateRevision == 0 && q.MaxCreateRevision == 0
}

func (c *client) openStream(o *op, msg []byte) {
	r := c.p.r
	core := c.p.core
	all, ended := &pb.RangeResponse{}, false
	s := &shard.RangeStream{Msg: msg}
	c.list = s
	pull := func() {
		if c.list == s && c.p.core == core {
			core.PullRange(s)
			c.p.turn()
		}
	}
	s.Chunk = func(_ *shard.RangeStream, chunk []byte) {
		m := &pb.RangeStreamResponse{}
		if err := proto.Unmarshal(chunk, m); err != nil || m.RangeResponse == nil {
			r.fail("%s: a chunk of op%d cannot be read: %v", c.name, o.id, err)
			return
		}
		v := m.RangeResponse
		r.stats.Chunks++
		if ended || v.Header == nil && (v.More || v.Count != 0 || len(v.Kvs) == 0) {
			r.fail("%s: a chunk of op%d is out of shape: {%v}", c.name, o.id, v)
		}
		for _, kv := range v.Kvs {
			if n := len(all.Kvs); n > 0 && bytes.Compare(kv.Key, all.Kvs[n-1].Key) <= 0 {
				r.fail("%s: op%d: key %q behind %q", c.name, o.id, kv.Key, all.Kvs[n-1].Key)
			}
		}
		all.Kvs = append(all.Kvs, v.Kvs...)
		all.Header, all.More, all.Count, ended = v.Header, v.More, v.Count, v.Header != nil
		switch {
		case ended: // nothing will come
		case r.net.Chance(0.02):
			r.net.After(0, func() {
				if c.list == s && c.p.core == core {
					core.CancelRange(s)
					c.doneStream(o, nil, codec.Status{Code: codec.Canceled})
				}
			})
		case r.Chaos > 0 && r.net.Chance(0.1):
			r.net.After(r.net.Between(0, 300*time.Millisecond), pull)
		default:
			r.net.After(r.net.Between(0, time.Millisecond), pull)
		}
	}
	s.Done = func(s *shard.RangeStream) {
		if s.Status.Code == codec.OK && !ended {
			r.fail("%s: op%d ended well without a last chunk", c.name, o.id)
		}
		c.doneStream(o, all, s.Status)
	}
	core.OpenRange(s)
	c.p.turn()
}

func (c *client) doneStream(o *op, all *pb.RangeResponse, st codec.Status) {
	r := c.p.r
	if o.ended {
		r.fail("%s: op%d ended twice", c.name, o.id)
		return
	}
	o.ended, o.end, o.ret, o.st = true, r.net.now, r.net.Event(), st
	r.open--
	c.cur, c.list = nil, nil
	switch st.Code {
	case codec.OK:
		r.stats.OK++
		r.stats.Streams++
		o.resp, o.rev = all, all.Header.Revision
		r.show(o.rev)
		c.learn(o)
	case codec.Canceled:
		r.stats.Withdrawn++
		r.stats.Unknown++
	default:
		r.stats.Unknown++
	}
	r.net.tracef("%s: op%d, a stream, ends: %v %q R%d %v", c.name, o.id, st.Code, st.Msg, o.rev, all)
	c.next()
}
