package chaos

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// leaseTTL is how long a lease lives without a keepalive, in seconds.
const leaseTTL = 3

// keepLeases is a client that has one lease after the other: it puts keys on all shards with it, keeps it alive for a
// while, and revokes it or lets it end.
func (l *load) keepLeases(r *rand.Rand, p int) {
	for l.pause(think) {
		id := int64(0)
		if r.IntN(2) == 0 {
			id = 1 + r.Int64N(1<<60)
		}
		life := l.grant(p, id)
		if life == nil {
			continue
		}
		prefix := fmt.Sprintf("%slease/%x/", root, life.id)
		alive := true
		for turns := 1 + r.IntN(6); alive && turns > 0; turns-- {
			s := r.IntN(shards)
			alive = l.putLeased(p, l.sys.keyOn(s, fmt.Sprintf("%s%d", prefix, l.ids.Add(1))), life) && l.pause(think)
			if alive && r.IntN(2) == 0 {
				alive = l.keepAlive(p, life)
			}
		}
		if r.IntN(2) == 0 {
			l.revoke(p, life, prefix)
		}
	}
}

func (l *load) lease(p int) pb.LeaseClient { return pb.NewLeaseClient(l.conn[p]) }

// grant makes a lease, nil if that failed. An ID of 0 lets the server choose.
func (l *load) grant(p int, id int64) *leaseLife {
	q := &request{proxy: p, shard: -1, what: "grant", stale: true}
	life := &leaseLife{}
	err := l.do(q, func(ctx context.Context, q *request) error {
		resp, err := l.lease(p).LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: id, TTL: leaseTTL})
		if err != nil {
			return err
		}
		q.rev, life.id, life.alive = resp.Header.Revision, resp.ID, q.call+time.Duration(resp.TTL)*time.Second
		return nil
	})
	if err != nil {
		return nil
	}
	l.rec.mu.Lock()
	defer l.rec.mu.Unlock()
	if l.rec.leases[life.id] != nil {
		l.rec.wrong = append(l.rec.wrong, fmt.Sprintf("lease %x was granted twice", life.id))
	}
	l.rec.leases[life.id] = life
	return life
}

// putLeased puts a key with a lease, and reports whether the lease was still there.
func (l *load) putLeased(p int, key string, life *leaseLife) bool {
	w := write{key: key, value: l.value(), lease: life.id}
	q := &request{proxy: p, shard: -1, what: "put with lease", writes: []write{w}}
	err := l.do(q, func(ctx context.Context, q *request) error {
		resp, err := l.kv(p).Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(w.value), Lease: life.id})
		if err != nil {
			return err
		}
		q.rev, q.acked = resp.Header.Revision, true
		return nil
	})
	ended := status.Code(err) == codes.NotFound
	if ended && q.ret < life.alive {
		l.rec.complain("lease %x has ended: %v; it lives until %.3f at least", life.id, q, life.alive.Seconds())
	}
	return !ended
}

// keepAlive renews a lease, and reports false if it has ended.
func (l *load) keepAlive(p int, life *leaseLife) bool {
	q := &request{proxy: p, shard: -1, what: "keepalive", stale: true}
	ttl := int64(-1)
	_ = l.do(q, func(ctx context.Context, q *request) error {
		stream, err := l.lease(p).LeaseKeepAlive(ctx)
		if err != nil {
			return err
		}
		if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: life.id}); err != nil && err != io.EOF {
			return err
		}
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		q.rev, ttl = resp.Header.Revision, resp.TTL
		return nil
	})
	l.rec.mu.Lock()
	defer l.rec.mu.Unlock()
	if ttl > 0 {
		life.alive = max(life.alive, q.call+time.Duration(ttl)*time.Second)
	}
	if ttl == 0 && q.ret < life.alive {
		l.rec.wrong = append(l.rec.wrong, fmt.Sprintf("lease %x has ended at %.3f, it lives until %.3f at least", life.id, q.ret.Seconds(), life.alive.Seconds()))
	}
	return ttl != 0
}

// revoke ends a lease; if that is answered its keys are gone.
func (l *load) revoke(p int, life *leaseLife, prefix string) {
	l.rec.mu.Lock()
	life.revoked = l.rec.now()
	l.rec.mu.Unlock()
	q := &request{proxy: p, shard: -1, what: "revoke", stale: true}
	err := l.do(q, func(ctx context.Context, q *request) error {
		resp, err := l.lease(p).LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: life.id})
		if err != nil {
			return err
		}
		q.rev = resp.Header.Revision
		return nil
	})
	if err != nil {
		return
	}
	l.rec.mu.Lock()
	life.ended, life.endedRev = q.ret, q.rev
	l.rec.mu.Unlock()
	l.listPage((p+1)%proxies, &pb.RangeRequest{Key: []byte(prefix), RangeEnd: prefixEnd(prefix)})
}
