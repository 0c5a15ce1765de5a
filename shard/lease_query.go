package shard

import (
	"bytes"
	"slices"

	"spindle/codec"
)

// This file answers questions about leases: LeaseTimeToLive and LeaseLeases.

// leaseQuery is one question under way.
type leaseQuery struct {
	c        *Core
	op       *Op
	req      leaseRequest
	deadline int64
	rev      int64
	waiting  int
	done     bool
	reply    leaseReply // of home; its keys are those of all shards
	leases   []int64
}

func (c *Core) newLeaseQuery(op *Op, r *leaseRequest) *leaseQuery {
	q := &leaseQuery{c: c, op: op, req: *r, deadline: c.leaseDeadline(op), waiting: 2}
	c.Now(func(rev int64, st codec.Status) {
		q.rev = rev
		q.part(st)
	})
	return q
}

// part takes one of the things that the answer needs.
func (q *leaseQuery) part(st codec.Status) {
	if q.waiting--; q.done || q.waiting > 0 && st.Code == codec.OK {
		return
	}
	q.done = true
	if st.Code != codec.OK {
		q.c.finish(q.op, st)
		return
	}
	hdr := q.c.hdr
	hdr.Revision = q.rev
	b := codec.AppendHeaderField(q.op.Resp[:0], &hdr)
	if q.op.Kind == OpLeaseTimeToLive {
		b = codec.AppendInt(b, 2, q.req.id)
		b = codec.AppendInt(b, 3, q.reply.ttl)
		b = codec.AppendInt(b, 4, q.reply.granted)
		slices.SortFunc(q.reply.keys, bytes.Compare)
		for _, key := range q.reply.keys {
			b = codec.AppendBytes(b, 5, key)
		}
	} else {
		slices.Sort(q.leases)
		for _, x := range q.leases {
			var m int
			b, m = codec.BeginMessage(b, 2)
			b = codec.AppendInt(b, 1, x)
			b = codec.EndMessage(b, m)
		}
	}
	q.op.Resp = b
	q.c.finish(q.op, codec.Status{})
}

func (c *Core) submitLeaseTimeToLive(op *Op, r *leaseRequest) {
	q := c.newLeaseQuery(op, r)
	if e := c.leases.table.get(r.id); e != nil && !r.keys {
		q.askHome(e.m, nil, true)
		return
	}
	q.find()
}

// find reads the marker: who the lease is on the members, and who has keys of it.
func (q *leaseQuery) find() {
	q.c.readMarker(q.req.id, q.deadline, func(kv codec.KV, mk LeaseMarker, found bool, st codec.Status) {
		switch {
		case st.Code != codec.OK:
			q.part(st)
		case !found:
			q.reply.ttl = -1
			q.part(st)
		default:
			q.c.leases.table.learn(q.req.id, mk.Member, q.c.part.HomeOf(q.req.id), kv.CreateRevision)
			q.askHome(mk.Member, mk.Shards, false)
		}
	})
}

// askHome asks home, and the holders for keys. cached says that M may be an older lease than the one that X is now.
func (q *leaseQuery) askHome(m int64, holders []int, cached bool) {
	c := q.c
	c.home(q.req.id).ask(codec.MethodLeaseTimeToLive, timeToLiveRequest(m, q.req.keys), q.deadline, func(resp []byte, st codec.Status, _ bool) {
		if st.Code != codec.OK {
			q.part(st)
			return
		}
		r := parseLeaseReply(resp)
		if r.ttl < 0 && cached {
			c.leases.table.ended(q.req.id, m)
			q.find()
			return
		}
		q.reply.ttl, q.reply.granted = r.ttl, r.granted
		if r.ttl < 0 {
			q.reply.keys = nil
		} else {
			q.reply.keys = append(q.reply.keys, r.keys...)
		}
		if !q.req.keys || r.ttl < 0 {
			q.part(st)
			return
		}
		for _, i := range holders {
			if i < len(c.shards) {
				q.waiting++
				q.askHolder(c.shards[i], m)
			}
		}
		q.part(st)
	})
}

func (q *leaseQuery) askHolder(s *shardState, m int64) {
	s.ask(codec.MethodLeaseTimeToLive, timeToLiveRequest(m, true), q.deadline, func(resp []byte, st codec.Status, _ bool) {
		if st.Code == codec.OK {
			q.reply.keys = append(q.reply.keys, parseLeaseReply(resp).keys...)
		}
		q.part(st)
	})
}

// submitLeases lists the markers of all homes.
func (c *Core) submitLeases(op *Op, r *leaseRequest) {
	q := c.newLeaseQuery(op, r)
	q.waiting += len(c.shards) - 1
	body := codec.AppendString(nil, rangeKey, KeyLeases)
	body = codec.AppendString(body, rangeEnd, KeyLeaseEnd)
	body = codec.AppendBool(body, rangeKeysOnly, true)
	for _, s := range c.shards {
		s.ask(codec.MethodRange, body, q.deadline, func(resp []byte, st codec.Status, _ bool) {
			it := codec.Fields{Msg: resp}
			for st.Code == codec.OK && it.Next() {
				if it.Field.Num != 2 {
					continue
				}
				kv, _ := codec.ParseKV(it.Field.Bytes)
				if x, ok := ParseLeaseKey(kv.Key); ok && c.part.HomeOf(x) == s.idx { // else it is a copy's key
					q.leases = append(q.leases, x)
				}
			}
			q.part(st)
		})
	}
}
