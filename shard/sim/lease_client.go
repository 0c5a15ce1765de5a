package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sort"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/shard"
)

// This file is what clients do with leases, and the check of it: see docs/leases.md.

// leaseOp chooses an operation on leases: IDs that Spindle chooses, and a few that clients choose again and again.
func (c *client) leaseOp(g *rand.Rand) (shard.OpKind, proto.Message) {
	id := c.someID(g)
	switch g.IntN(8) {
	case 0, 1:
		q := &pb.LeaseGrantRequest{TTL: int64(1 + g.IntN(4))}
		switch {
		case c.p.r.OneLease:
			q.ID = 100
		case g.IntN(2) == 0:
			q.ID = int64(100 + g.IntN(4))
		}
		return shard.OpLeaseGrant, q
	case 2, 3:
		return shard.OpLeaseRevoke, &pb.LeaseRevokeRequest{ID: id}
	case 4, 5:
		return shard.OpLeaseKeepAlive, &pb.LeaseKeepAliveRequest{ID: id}
	case 6:
		return shard.OpLeaseTimeToLive, &pb.LeaseTimeToLiveRequest{ID: id, Keys: g.IntN(2) == 0}
	}
	return shard.OpLeaseLeases, &pb.LeaseLeasesRequest{}
}

// someID is the ID of a lease that is, or was.
func (c *client) someID(g *rand.Rand) int64 {
	ids := c.p.r.leaseIDs
	if len(ids) == 0 || g.IntN(20) == 0 {
		return 100
	}
	return ids[len(ids)-1-g.IntN(min(len(ids), 4))]
}

// someLease is the lease of a put, mostly none. Keys that expire by themselves keep their own.
func (c *client) someLease(g *rand.Rand) int64 {
	if !c.p.r.Leases || g.IntN(3) > 0 && !c.p.r.OneLease {
		return 0
	}
	return c.someID(g)
}

func isLease(req proto.Message) bool {
	switch req.(type) {
	case *pb.LeaseGrantRequest, *pb.LeaseRevokeRequest, *pb.LeaseKeepAliveRequest, *pb.LeaseTimeToLiveRequest, *pb.LeaseLeasesRequest:
		return true
	}
	return false
}

func leaseError(st codec.Status) bool {
	return st == codec.ErrLeaseNotFound || st == codec.ErrLeaseExist || st == codec.ErrLeaseTTL
}

// leaseLife is the time during which a lease had its marker at its home.
type leaseLife struct {
	member   int64
	from, to int64 // virtual ns; to is 1<<62 for one that lives
}

// lives returns the lives of a lease, by the marker's history at its home.
func (c *checker) lives(id int64) (lives []leaseLife) {
	home := c.r.home(id)
	for _, ch := range home.hist[string(shard.AppendLeaseKey(nil, id))] {
		n := len(lives)
		alive := n > 0 && lives[n-1].to == 1<<62
		switch {
		case ch.Delete && alive:
			lives[n-1].to = ch.At
		case !ch.Delete && !alive:
			lives = append(lives, leaseLife{ch.KV.Lease, ch.At, 1 << 62})
		}
	}
	return lives
}

// home returns the cluster that judges a lease.
func (r *Run) home(id int64) *Cluster {
	ms := append([]*Cluster(nil), r.net.Members...)
	sort.Slice(ms, func(i, j int) bool { return string(mapIdentity(ms[i])) < string(mapIdentity(ms[j])) })
	return ms[r.part.HomeOf(id)]
}

// leaseEnded reports whether f, a delete without a record, is the end of a lease.
func (c *checker) leaseEnded(f *fact) bool {
	var old *fact
	for _, o := range c.h.byKey[f.key] {
		if o == f {
			break
		}
		old = o
	}
	if old == nil || old.delete || old.lease == 0 {
		return false
	}
	for _, l := range c.lives(old.lease) {
		if l.member == old.member && l.to <= f.at {
			return true
		}
	}
	return false
}

// leases checks that no key outlives its lease, and that no put got a lease whose revoke was acknowledged before.
func (c *checker) leases() error {
	for _, fs := range c.h.byKey {
		for _, f := range fs {
			if !f.delete && f.lease != 0 && f.lease != simLease {
				c.r.stats.Leased++
			}
			if f.delete && f.unrecorded && c.leaseEnded(f) {
				c.r.stats.Ended++
			}
		}
	}
	if err := c.outlived(); err != nil {
		return err
	}
	for _, o := range c.r.ops {
		q, ok := o.req.(*pb.LeaseRevokeRequest)
		if !ok || o.st.Code != codec.OK || !o.ended {
			continue
		}
		for f, w := range c.owner {
			if f.lease == q.ID && !f.delete && w.begin > o.end && !c.grantedSince(q.ID, o.begin, w.end) && !ignoresLease(w.req) {
				return fmt.Errorf("%v: by %s, after %s", f, w, o)
			}
		}
	}
	return nil
}

// outlived looks for a key that has outlived its lease.
func (c *checker) outlived() error {
	for key, fs := range c.h.byKey {
		f := fs[len(fs)-1]
		if f.delete || f.lease == 0 || f.lease == simLease {
			continue
		}
		lives := c.lives(f.lease)
		if n := len(lives); n == 0 || lives[n-1].to != 1<<62 || lives[n-1].member != f.member {
			return fmt.Errorf("key %q has outlived its lease %d (%x on the member): %v", key, f.lease, f.member, lives)
		}
	}
	return nil
}

// awaitLeases gives keys that have outlived their leases until a reconciliation has come to its end that began now or later, and
// what it has found was revoked. A calm world has no failures left for it to wait for.
func (r *Run) awaitLeases() {
	if !r.Leases {
		return
	}
	gone := func() bool {
		h, err := readHistory(logsOf(r.net.Members))
		return err != nil || (&checker{r: r, h: h}).outlived() == nil // who judges says what is wrong
	}
	if gone() {
		return
	}
	done := map[*proxy]uint64{}
	for _, p := range r.proxies {
		done[p] = p.core.Stats().LeasesReconciled
	}
	r.net.tracef("---- a key has outlived its lease: until the leases are reconciled")
	r.until(maxOutlive, func() bool {
		for _, p := range r.proxies {
			if p.core.Stats().LeasesReconciled >= done[p]+2 { // one may have begun before
				return true
			}
		}
		return false
	})
	r.until(MaxLate, func() bool { return false })
}

// ignoresLease reports whether a put keeps whatever lease its key has.
func ignoresLease(req proto.Message) bool { return mayMissKey(req) }

// grantedSince reports whether a lease may have been granted between two moments.
func (c *checker) grantedSince(id, from, to int64) bool {
	for _, l := range c.lives(id) {
		if l.from >= from && l.from <= to {
			return true
		}
	}
	return false
}

// leaseAnswer checks the answer to a request about a lease, or to a put that was told that its lease is gone.
func (c *checker) leaseAnswer(o *op) error {
	if o.st == codec.ErrLeaseNotFound {
		// One of the leases that it names must have been missing at some moment.
		for _, id := range leasesOf(o.req) {
			missing := true
			for _, l := range c.lives(id) {
				if l.from <= o.begin && l.to >= o.end {
					missing = false
				}
			}
			if missing {
				return nil
			}
		}
		return fmt.Errorf("its lease was there all the time")
	}
	if o.st == codec.ErrLeaseExist {
		q, ok := o.req.(*pb.LeaseGrantRequest)
		if !ok || q.ID == 0 {
			return fmt.Errorf("this error cannot be")
		}
		for _, l := range c.lives(q.ID) {
			if l.from <= o.end && l.to >= o.begin {
				return nil
			}
		}
		return fmt.Errorf("there is no such lease: %v", c.lives(q.ID))
	}
	if o.st.Code != codec.OK {
		return fmt.Errorf("this error cannot be")
	}
	switch q := o.req.(type) {
	case *pb.LeaseGrantRequest:
		id := o.resp.(*pb.LeaseGrantResponse).ID
		for _, l := range c.lives(id) {
			if l.from >= o.begin && l.from <= o.end {
				return nil
			}
		}
		return fmt.Errorf("lease %d was not granted: %v", id, c.lives(id))
	case *pb.LeaseRevokeRequest:
		for _, l := range c.lives(q.ID) {
			if l.to >= o.begin && l.to <= o.end {
				return nil
			}
		}
		return fmt.Errorf("the lease has not ended: %v", c.lives(q.ID))
	case *pb.LeaseKeepAliveRequest:
		dead := true
		for _, l := range c.lives(q.ID) {
			if l.from <= o.begin && l.to >= o.end {
				dead = false
			}
		}
		ttl := o.resp.(*pb.LeaseKeepAliveResponse).TTL
		if ttl <= 0 && !dead {
			return fmt.Errorf("the lease was there all the time")
		}
		if ttl > 0 && !slices.ContainsFunc(c.lives(q.ID), func(l leaseLife) bool { return l.from <= o.end && l.to >= o.begin }) {
			return fmt.Errorf("there was no such lease: %v", c.lives(q.ID))
		}
	}
	return nil
}

// leasesOf returns the leases that a request names.
func leasesOf(req proto.Message) (ids []int64) {
	switch q := req.(type) {
	case *pb.LeaseGrantRequest:
		ids = append(ids, q.ID)
	case *pb.LeaseRevokeRequest:
		ids = append(ids, q.ID)
	case *pb.LeaseKeepAliveRequest:
		ids = append(ids, q.ID)
	case *pb.LeaseTimeToLiveRequest:
		ids = append(ids, q.ID)
	case *pb.PutRequest:
		if q.Lease != 0 {
			ids = append(ids, q.Lease)
		}
	case *pb.TxnRequest:
		for _, ops := range [][]*pb.RequestOp{q.Success, q.Failure} {
			for _, o := range ops {
				if p := o.GetRequestPut(); p != nil {
					ids = append(ids, leasesOf(p)...)
				}
				if t := o.GetRequestTxn(); t != nil {
					ids = append(ids, leasesOf(t)...)
				}
			}
		}
	}
	return ids
}
