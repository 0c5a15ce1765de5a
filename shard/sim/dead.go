package sim

import (
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// deadCluster returns the cluster that is shard 0 of the map: the place in a map is not the one in the
// configuration.
func (r *Run) deadCluster() *Cluster {
	for _, m := range r.net.Members {
		if string(mapIdentity(m)) == string(firstIdentity(r.net.Members)) {
			return m
		}
	}
	return r.net.Members[0]
}

// mapIdentity returns the value of a member's identity key; shards are numbered in its order.
func mapIdentity(m *Cluster) []byte {
	if c := m.at([]byte("\x00id"), m.Rev()); c != nil {
		return c.KV.Value
	}
	return nil
}

func firstIdentity(ms []*Cluster) []byte {
	least := mapIdentity(ms[0])
	for _, m := range ms[1:] {
		if id := mapIdentity(m); string(id) < string(least) {
			least = id
		}
	}
	return least
}

// touchesDead reports whether a request needs the shard that is dead.
func (r *Run) touchesDead(req proto.Message) bool {
	if !r.Dead {
		return false
	}
	dead := func(key, end []byte) bool { return len(end) > 0 || r.part.ShardOf(key) == 0 }
	var inTxn func(t *pb.TxnRequest) bool
	inTxn = func(t *pb.TxnRequest) bool {
		for _, c := range t.Compare {
			if dead(c.Key, c.RangeEnd) {
				return true
			}
		}
		for _, ops := range [][]*pb.RequestOp{t.Success, t.Failure} {
			for _, o := range ops {
				switch q := o.Request.(type) {
				case *pb.RequestOp_RequestRange:
					if dead(q.RequestRange.Key, q.RequestRange.RangeEnd) {
						return true
					}
				case *pb.RequestOp_RequestPut:
					if dead(q.RequestPut.Key, nil) {
						return true
					}
				case *pb.RequestOp_RequestDeleteRange:
					if dead(q.RequestDeleteRange.Key, q.RequestDeleteRange.RangeEnd) {
						return true
					}
				case *pb.RequestOp_RequestTxn:
					if inTxn(q.RequestTxn) {
						return true
					}
				}
			}
		}
		return false
	}
	switch q := req.(type) {
	case *pb.RangeRequest:
		return dead(q.Key, q.RangeEnd)
	case *pb.PutRequest:
		return dead(q.Key, nil)
	case *pb.DeleteRangeRequest:
		return dead(q.Key, q.RangeEnd)
	case *pb.TxnRequest:
		return inTxn(q)
	}
	_, compact := req.(*pb.CompactionRequest)
	return compact
}
