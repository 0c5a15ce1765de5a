package sim

import (
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// This file says where the check must be lenient because somebody else wrote to a member: see docs/design.md on
// what clients may notice.

// meets reports whether some window fits.
func (c *checker) meets(fits func(*window) bool) bool {
	for _, w := range c.h.windows {
		if fits(w) {
			return true
		}
	}
	return false
}

// hidden reports whether the range may hold, at a revision, a key that is on the member and that clients do not see.
func (c *checker) hidden(q *pb.RangeRequest, at int64) bool {
	return c.meets(func(w *window) bool {
		return w.hidden && w.after <= at && w.until >= at && within(w.key, string(q.Key), string(q.RangeEnd))
	})
}

// countsHidden reports whether a Txn has a range of the past whose count may have such a key.
func (c *checker) countsHidden(t *pb.TxnRequest) bool {
	for _, ops := range [][]*pb.RequestOp{t.Success, t.Failure} {
		for _, o := range ops {
			if q := o.GetRequestRange(); q != nil && q.Revision > 0 && (q.CountOnly || q.Limit > 0) && c.hidden(q, q.Revision) {
				return true
			}
			if n := o.GetRequestTxn(); n != nil && c.countsHidden(n) {
				return true
			}
		}
	}
	return false
}

// metForeign reports whether a request that went to a shard in a batch touched a key whose value was foreign
// then.
func (c *checker) metForeign(o *op) bool { return c.metForeignAt(o, o.rev) }

func (c *checker) metForeignAt(o *op, rev int64) bool {
	if len(c.h.windows) == 0 || !mayWrite(o.req) {
		return false
	}
	for _, r := range c.h.ranges {
		if rev < r.first || rev > r.last {
			continue
		}
		return c.meets(func(w *window) bool {
			return w.shard == r.shard && w.from < r.local && (w.to == 0 || w.to >= r.local) && mentions(o.req, w.key)
		})
	}
	return false
}

// maxMissed bounds what a read may have missed: all of it, and any part, is tried.
const maxMissed = 6

// mayMiss returns the deletes of keys without a lease, by somebody else, that a read may not know: it may have
// overtaken the batch in flight that gave them their revision.
func (c *checker) mayMiss(o *op) (facts []*fact) {
	if q, ok := o.req.(*pb.RangeRequest); ok && (q.Serializable || q.Revision > 0) {
		return nil
	}
	for _, r := range c.h.ranges {
		if r.first > o.rev || r.at < o.begin {
			continue
		}
		for _, f := range c.h.byRev[r.first] {
			if f.unrecorded && f.delete && leaseOf([]byte(f.key)) == 0 && mentions(o.req, f.key) && len(facts) < maxMissed {
				facts = append(facts, f)
			}
		}
	}
	return facts
}

// own makes everything that happened at o's revision o's.
func (c *checker) own(o *op) {
	for _, f := range c.h.byRev[o.rev] {
		if !f.unrecorded && (f.delete && deletes(o.req, f.key) || c.writer[f.value] == o) {
			c.owner[f] = o
		}
	}
}

// told returns the values that a request was told it has put.
func told(req, resp proto.Message) (values []string) {
	switch q := req.(type) {
	case *pb.PutRequest:
		if !q.IgnoreValue {
			values = append(values, string(q.Value))
		}
	case *pb.TxnRequest:
		t := resp.(*pb.TxnResponse)
		ops := q.Failure
		if t.Succeeded {
			ops = q.Success
		}
		for i, o := range ops {
			if p := o.GetRequestPut(); p != nil {
				values = append(values, told(p, nil)...)
			}
			if n := o.GetRequestTxn(); n != nil && i < len(t.Responses) {
				values = append(values, told(n, t.Responses[i].GetResponseTxn())...)
			}
		}
	}
	return values
}

// mayWrite reports whether a request has a put or a delete.
func mayWrite(req proto.Message) bool {
	switch q := req.(type) {
	case *pb.PutRequest, *pb.DeleteRangeRequest:
		return true
	case *pb.TxnRequest:
		for _, ops := range [][]*pb.RequestOp{q.Success, q.Failure} {
			for _, o := range ops {
				if o.GetRequestPut() != nil || o.GetRequestDeleteRange() != nil || o.GetRequestTxn() != nil && mayWrite(o.GetRequestTxn()) {
					return true
				}
			}
		}
	}
	return false
}

// mentions reports whether a request names key, or a range that holds it.
func mentions(req proto.Message, key string) bool {
	in := func(k, end []byte) bool { return within(key, string(k), string(end)) }
	switch q := req.(type) {
	case *pb.RangeRequest:
		return in(q.Key, q.RangeEnd)
	case *pb.PutRequest:
		return in(q.Key, nil)
	case *pb.DeleteRangeRequest:
		return in(q.Key, q.RangeEnd)
	case *pb.TxnRequest:
		for _, c := range q.Compare {
			if in(c.Key, c.RangeEnd) {
				return true
			}
		}
		for _, ops := range [][]*pb.RequestOp{q.Success, q.Failure} {
			for _, o := range ops {
				switch v := o.Request.(type) {
				case *pb.RequestOp_RequestRange:
					if mentions(v.RequestRange, key) {
						return true
					}
				case *pb.RequestOp_RequestPut:
					if mentions(v.RequestPut, key) {
						return true
					}
				case *pb.RequestOp_RequestDeleteRange:
					if mentions(v.RequestDeleteRange, key) {
						return true
					}
				case *pb.RequestOp_RequestTxn:
					if mentions(v.RequestTxn, key) {
						return true
					}
				}
			}
		}
	}
	return false
}
