package sim

import (
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/codec"
)

// This file models etcd's leases: a member's own, judged by the clock of the simulation.

// minLeaseTTL and maxLeaseTTL are etcd's bounds, in seconds.
const (
	minLeaseTTL = 1
	maxLeaseTTL = 9_000_000_000
)

// lease is one lease of a modelled cluster. The immortal ones of tests have no TTL.
type lease struct {
	ttl     int64 // seconds, 0 for never
	expires int64 // virtual ns
}

// Grant makes a lease known that never expires.
func (e *Etcd) Grant(id int64) { e.leases[id] = &lease{} }

// Revoke ends a lease: its keys go in one revision, as in etcd, without anything else. false if there is
// no such lease.
func (e *Etcd) Revoke(id int64) bool {
	if e.leases[id] == nil {
		return false
	}
	delete(e.leases, id)
	e.Expire(e.attached(id)...)
	return true
}

// attached returns the keys of a lease, in order.
func (e *Etcd) attached(id int64) (keys []string) {
	for _, k := range e.keys {
		if c := e.at([]byte(k), e.rev); c != nil && c.KV.Lease == id {
			keys = append(keys, k)
		}
	}
	return keys
}

// renew gives a lease its whole TTL, and sees to its end.
func (e *Etcd) renew(id int64, l *lease) {
	if l.ttl == 0 || e.Now == nil {
		return
	}
	d := time.Duration(min(l.ttl, int64(24*time.Hour/time.Second))) * time.Second
	l.expires = e.Now() + int64(d)
	at := l.expires
	e.After(d, func() {
		if e.leases[id] == l && l.expires == at {
			e.Revoke(id)
			if e.OnExpire != nil {
				e.OnExpire(id)
			}
		}
	})
}

func (e *Etcd) serveLease(m codec.Method, req []byte) ([]byte, codec.Status) {
	notFound := codec.ErrLeaseNotFound
	switch m {
	case codec.MethodLeaseGrant:
		r := &pb.LeaseGrantRequest{}
		return serve(req, r, func() (*pb.LeaseGrantResponse, codec.Status) {
			switch {
			case r.TTL > maxLeaseTTL:
				return nil, codec.Status{Code: codec.OutOfRange, Msg: "etcdserver: too large lease TTL"}
			case r.ID == 0:
				e.nextLease++
				r.ID = e.nextLease
			case e.leases[r.ID] != nil:
				return nil, codec.Status{Code: codec.FailedPrecondition, Msg: "etcdserver: lease already exists"}
			}
			l := &lease{ttl: max(r.TTL, minLeaseTTL)}
			e.leases[r.ID] = l
			e.renew(r.ID, l)
			return &pb.LeaseGrantResponse{Header: e.header(e.rev), ID: r.ID, TTL: l.ttl}, codec.Status{}
		})
	case codec.MethodLeaseRevoke:
		r := &pb.LeaseRevokeRequest{}
		return serve(req, r, func() (*pb.LeaseRevokeResponse, codec.Status) {
			if !e.Revoke(r.ID) {
				return nil, notFound
			}
			return &pb.LeaseRevokeResponse{Header: e.header(e.rev)}, codec.Status{}
		})
	case codec.MethodLeaseKeepAlive:
		r := &pb.LeaseKeepAliveRequest{}
		return serve(req, r, func() (*pb.LeaseKeepAliveResponse, codec.Status) {
			out := &pb.LeaseKeepAliveResponse{Header: e.header(e.rev), ID: r.ID}
			if l := e.leases[r.ID]; l != nil {
				e.renew(r.ID, l)
				out.TTL = l.ttl
			}
			return out, codec.Status{}
		})
	case codec.MethodLeaseTimeToLive:
		r := &pb.LeaseTimeToLiveRequest{}
		return serve(req, r, func() (*pb.LeaseTimeToLiveResponse, codec.Status) {
			out := &pb.LeaseTimeToLiveResponse{Header: e.header(e.rev), ID: r.ID, TTL: -1}
			if l := e.leases[r.ID]; l != nil {
				out.GrantedTTL, out.TTL = l.ttl, l.ttl
				if e.Now != nil && l.ttl > 0 {
					out.TTL = (l.expires - e.Now()) / int64(time.Second)
				}
				if r.Keys {
					for _, k := range e.attached(r.ID) {
						out.Keys = append(out.Keys, []byte(k))
					}
				}
			}
			return out, codec.Status{}
		})
	case codec.MethodLeaseLeases:
		return serve(req, &pb.LeaseLeasesRequest{}, func() (*pb.LeaseLeasesResponse, codec.Status) {
			out := &pb.LeaseLeasesResponse{Header: e.header(e.rev)}
			var ids []int64
			for id, l := range e.leases {
				if l.ttl > 0 { // the others are the tests' own
					ids = append(ids, id)
				}
			}
			slices.Sort(ids)
			for _, id := range ids {
				out.Leases = append(out.Leases, &pb.LeaseStatus{ID: id})
			}
			return out, codec.Status{}
		})
	}
	return nil, codec.Status{Code: codec.Unimplemented, Msg: "unknown method"}
}
