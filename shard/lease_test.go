package shard

import (
	"bytes"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"spindle/codec"
)

// TestLeaseAttach walks the four steps, with one put more that waits.
func TestLeaseAttach(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(0, 0)
	put := &pb.PutRequest{Key: r.keyOn(1), Lease: x}
	one, two := r.submit(OpPut, put), r.submit(OpPut, put)
	r.next(0, codec.MethodRange).key(leaseKey(x, x, 3, 4))
	hold := r.next(0, codec.MethodTxn)
	if mk := leaseKey(x, x, 3, 4, 1); !bytes.Contains(hold.req, mk.Value) {
		t.Error("the marker does not name the holder")
	}
	hold.txn(5)
	grant := r.next(1, codec.MethodLeaseGrant)
	if grant.id() != x {
		t.Errorf("granted %d", grant.id())
	}
	grant.fail(codec.ErrLeaseExist, true)
	r.next(1, codec.MethodTxn).txn(9)
	if r.known(x, 1) != 0 {
		t.Error("known before the marker was looked at again")
	}
	r.next(0, codec.MethodRange).key(leaseKey(x, x, 3, 5, 1))
	if c := r.known(x, 1); c != 9 {
		t.Errorf("c is %d", c)
	}
	r.quiet()
	if one.done || two.done {
		t.Error("answered before it was written")
	}
	if r.submit(OpPut, put); len(r.c.leases.attaches) > 0 {
		t.Error("attached again")
	}
}

// TestLeaseGoneBehindTheAttach: whoever finds the marker gone ends what was just made.
func TestLeaseGoneBehindTheAttach(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(0, 0)
	a := r.submit(OpPut, &pb.PutRequest{Key: r.keyOn(1), Lease: x})
	r.next(0, codec.MethodRange).key(leaseKey(x, x, 3, 4, 1))
	r.next(1, codec.MethodLeaseGrant).ok(&pb.LeaseGrantResponse{})
	r.next(1, codec.MethodTxn).txn(9)
	r.next(0, codec.MethodRange).key()
	if !a.done || a.st != codec.ErrLeaseNotFound {
		t.Errorf("%+v", a)
	}
	if r.known(x, 1) != 0 {
		t.Error("c counts as known")
	}
	r.tick(2 * vanishJitter)
	if q := r.next(1, codec.MethodLeaseRevoke); q.id() != x {
		t.Errorf("revoked %d", q.id())
	}
}

// TestLeaseAttachMeetsAnOlderCopy: the key on the shard is attached to a lease that once stood for the same ID.
// A guard on it would let puts pass on a lease that is gone.
func TestLeaseAttachMeetsAnOlderCopy(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(0, 0)
	older, newer := r.leaseAt(0, 1), r.leaseAt(0, 2)
	start := func(m int64) {
		r.submit(OpPut, &pb.PutRequest{Key: r.keyOn(1), Lease: x})
		r.next(0, codec.MethodRange).key(leaseKey(x, m, 3, 4, 1))
		r.next(1, codec.MethodLeaseGrant).ok(&pb.LeaseGrantResponse{})
	}
	start(newer)
	r.next(1, codec.MethodTxn).txn(9, leaseKey(x, older, 2, 2))
	r.next(0, codec.MethodRange).key(leaseKey(x, newer, 3, 4, 1))
	if q := r.next(1, codec.MethodLeaseRevoke); q.id() != older {
		t.Errorf("revoked %d", q.id())
	} else {
		q.ok(&pb.LeaseRevokeResponse{})
	}
	r.next(0, codec.MethodRange).key(leaseKey(x, newer, 3, 4, 1))
	r.next(1, codec.MethodLeaseGrant).fail(codec.ErrLeaseExist, true)
	r.next(1, codec.MethodTxn).txn(11)
	r.next(0, codec.MethodRange).key(leaseKey(x, newer, 3, 4, 1))
	if c := r.known(x, 1); c != 11 {
		t.Errorf("c is %d", c)
	}
	// The other way round: it is this proxy that is late, and what it met is alive.
	r.c.leases.table.forget(x)
	start(older)
	r.next(1, codec.MethodTxn).txn(9, leaseKey(x, newer, 11, 11))
	r.next(0, codec.MethodRange).key(leaseKey(x, newer, 10, 10, 1))
	if q := r.next(1, codec.MethodLeaseGrant); q.id() != newer {
		t.Errorf("granted %d", q.id())
	} else {
		q.fail(codec.ErrLeaseExist, true)
	}
	r.next(1, codec.MethodTxn).txn(12, leaseKey(x, newer, 11, 11))
	r.next(0, codec.MethodRange).key(leaseKey(x, newer, 10, 10, 1))
	if c := r.known(x, 1); c != 11 {
		t.Errorf("c is %d", c)
	}
	r.tick(time.Second)
	r.quiet()
}

// TestLeaseGrantSendsNothingTwice: a copy that came late would bring back a lease that was revoked meanwhile.
func TestLeaseGrantSendsNothingTwice(t *testing.T) {
	lost := codec.Status{Code: codec.Unavailable, Msg: "connection lost"}
	for _, x := range []int64{0, 77} {
		r := newLeaseRig(t, 2)
		home := func(id int64) int { return r.c.part.HomeOf(id) }
		a := r.submit(OpLeaseGrant, &pb.LeaseGrantRequest{TTL: 30, ID: x})
		var ids []int64
		grant := func() *leaseRigCall {
			q := r.calls[0]
			r.next(home(q.id()), codec.MethodLeaseGrant)
			for _, id := range ids {
				if id == q.id() {
					t.Errorf("ID %d is used twice", id)
				}
			}
			if (q.id()&aliasBit != 0) != (x != 0) || x != 0 && home(x) != home(q.id()) {
				t.Errorf("%x stands for %x", q.id(), x)
			}
			ids = append(ids, q.id())
			return q
		}
		grant().fail(lost, true)
		r.tick(50 * time.Millisecond)
		q := grant()
		q.fail(lost, false) // certainly not seen by anybody: it may go again
		r.tick(50 * time.Millisecond)
		q = r.next(home(q.id()), codec.MethodLeaseGrant)
		q.ok(&pb.LeaseGrantResponse{ID: q.id(), TTL: 31})
		r.next(home(q.id()), codec.MethodTxn).fail(lost, true)
		r.next(home(q.id()), codec.MethodRange).key()
		if end := r.next(home(q.id()), codec.MethodLeaseRevoke); end.id() != q.id() {
			t.Errorf("%d was ended", end.id())
		} else {
			end.ok(&pb.LeaseRevokeResponse{})
		}
		r.tick(50 * time.Millisecond)
		q = grant()
		q.ok(&pb.LeaseGrantResponse{ID: q.id(), TTL: 31})
		r.next(home(q.id()), codec.MethodTxn).txn(8)
		r.answerNow(44)
		got := unmarshal(t, a.resp, &pb.LeaseGrantResponse{})
		if want := max(x, 0); !a.done || a.st.Code != codec.OK || got.TTL != 31 || got.Header.Revision != 44 || want != 0 && got.ID != want || want == 0 && got.ID != q.id() {
			t.Errorf("%+v: %v", a.st, got)
		}
		if r.known(got.ID, home(got.ID)) != 8 {
			t.Error("home's c is not known after the grant")
		}
	}
}

// TestLeaseKeepAliveIsOneRequest: many who ask at once cost home one request; an ID that is another lease by now is
// looked up.
func TestLeaseKeepAliveIsOneRequest(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(1, 0)
	req := &pb.LeaseKeepAliveRequest{ID: x}
	var as []*rigAnswer
	for range 3 {
		as = append(as, r.submit(OpLeaseKeepAlive, req))
	}
	r.next(1, codec.MethodRange).key(leaseKey(x, 1000, 3, 3))
	r.quiet()
	if len(r.alive) != 1 || r.alive[0].to != 1 || len(r.alive[0].sent) != 1 || r.alive[0].sent[0] != 1000 {
		t.Fatalf("%+v", r.alive)
	}
	s := r.alive[0]
	reply := func(m, ttl int64) { s.sink.OnMessage(mustMarshal(t, &pb.LeaseKeepAliveResponse{ID: m, TTL: ttl})) }
	reply(1000, 30)
	for _, a := range as {
		if got := unmarshal(t, a.resp, &pb.LeaseKeepAliveResponse{}); !a.done || got.ID != x || got.TTL != 30 {
			t.Errorf("%v", got)
		}
	}
	a := r.submit(OpLeaseKeepAlive, req) // from memory, but it is another one now
	if reply(1000, 0); a.done {
		t.Fatal("a lease that was granted again is said to be gone")
	}
	r.next(1, codec.MethodRange).key(leaseKey(x, 1001, 9, 9))
	reply(1001, 20)
	if got := unmarshal(t, a.resp, &pb.LeaseKeepAliveResponse{}); !a.done || got.TTL != 20 {
		t.Errorf("%v", got)
	}
	// The stream ends: what is under way is asked on the next one.
	a = r.submit(OpLeaseKeepAlive, req)
	s.sink.OnEnd(codec.ErrNoLeader)
	r.tick(keeperStall / 2)
	if len(r.alive) != 2 || len(r.alive[1].sent) != 1 {
		t.Fatalf("%+v", r.alive)
	}
	s = r.alive[1]
	reply(1001, 20)
	if !a.done || a.st.Code != codec.OK {
		t.Errorf("%+v", a)
	}
	// Nobody answers.
	a = r.submit(OpLeaseKeepAlive, req)
	if r.tick(2 * r.c.cfg.ShardTimeout); a.st != codec.ErrTimeout || len(r.c.leases.keeping) != 0 {
		t.Errorf("%+v", a)
	}
}

func gone(kv *mvccpb.KeyValue) codec.KV {
	return codec.KV{Key: kv.Key, Value: kv.Value, Lease: kv.Lease, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision}
}

// TestLeaseVanishes: a marker's end makes this proxy revoke the copies, a bounded number at once, unless another
// proxy did.
func TestLeaseVanishes(t *testing.T) {
	r := newLeaseRig(t, 2)
	l := &r.c.leases
	for n := range 3 * maxRevokesInFlight {
		x := r.leaseAt(0, n)
		l.keyGone(r.c.shards[0], x, 10, gone(leaseKey(x, x, 3, 4, 1)))
		if n%3 == 0 {
			l.keyGone(r.c.shards[1], x, 10, gone(leaseKey(x, x, 3, 4)))
		}
	}
	r.quiet()
	r.tick(2 * vanishJitter)
	if len(r.calls) != maxRevokesInFlight {
		t.Fatalf("%d revokes at once", len(r.calls))
	}
	away := codec.Status{Code: codec.Unavailable, Msg: "away"}
	for range maxRevokesInFlight {
		r.next(1, codec.MethodLeaseRevoke).fail(away, true)
	}
	for n := 0; n < 2*maxRevokesInFlight; n++ { // the others, then those again
		if len(r.calls) == 0 {
			r.tick(2 * vanishJitter)
		}
		r.next(1, codec.MethodLeaseRevoke).ok(&pb.LeaseRevokeResponse{})
	}
	r.tick(time.Second)
	r.quiet()
	if s := &r.c.shards[1].lease; len(s.queue)+len(s.queued)+s.ready+s.inFlight != 0 {
		t.Errorf("%+v", s)
	}
}

// TestLeaseRevokeWithoutAHolder: a holder that does not answer costs the client a timeout, and the copy is revoked
// when it is back.
func TestLeaseRevokeWithoutAHolder(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(0, 0)
	a := r.submit(OpLeaseRevoke, &pb.LeaseRevokeRequest{ID: x})
	r.answerNow(40)
	marker := leaseKey(x, x, 3, 4, 1)
	r.next(0, codec.MethodRange).key(marker)
	r.next(0, codec.MethodLeaseRevoke).ok(&pb.LeaseRevokeResponse{Header: &pb.ResponseHeader{Revision: 9}})
	r.quiet()
	// The stream shows it.
	s := r.c.shards[0]
	s.pos = 9
	r.c.leases.keyGone(s, x, 9, gone(marker))
	r.c.leases.streamMoved(s)
	away := codec.Status{Code: codec.Unavailable, Msg: "away"}
	for !a.done {
		r.next(1, codec.MethodLeaseRevoke).fail(away, true)
		r.tick(maxRetryDelay * 2)
	}
	if a.st != codec.ErrTimeout {
		t.Errorf("%+v", a)
	}
	r.tick(2 * vanishJitter)
	if q := r.next(1, codec.MethodLeaseRevoke); q.id() != x {
		t.Errorf("revoked %d", q.id())
	}
}

// TestLeaseRevokeWaitsForTheRecord: the answer comes when all deletes have their revision, and is not below it.
func TestLeaseRevokeWaitsForTheRecord(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(0, 0)
	a := r.submit(OpLeaseRevoke, &pb.LeaseRevokeRequest{ID: x})
	r.answerNow(40)
	marker := leaseKey(x, x, 3, 4, 1)
	r.next(0, codec.MethodRange).key(marker)
	home, holder := r.c.shards[0], r.c.shards[1]
	r.next(0, codec.MethodLeaseRevoke).ok(&pb.LeaseRevokeResponse{Header: &pb.ResponseHeader{Revision: 9}})
	home.pos = 9
	r.c.leases.keyGone(home, x, 9, gone(marker))
	r.c.leases.streamMoved(home)
	r.next(1, codec.MethodLeaseRevoke).ok(&pb.LeaseRevokeResponse{Header: &pb.ResponseHeader{Revision: 7}})
	holder.pos = 7
	holder.pending = append(holder.pending, pendingEvent{local: 7})
	r.c.leases.streamMoved(holder)
	if a.done {
		t.Fatal("answered before a record covers the deletes")
	}
	if !holder.wantFence {
		t.Error("nobody sees to it that there is one")
	}
	holder.pos, holder.rec, holder.pending = 8, point{45, 46, 8}, nil
	r.c.leases.streamMoved(holder)
	if got := unmarshal(t, a.resp, &pb.LeaseRevokeResponse{}); !a.done || a.st.Code != codec.OK || got.Header.Revision != 46 {
		t.Errorf("%+v %v", a, got)
	}
	r.tick(2 * r.c.cfg.ShardTimeout)
	r.quiet()
}

// TestLeaseTable: the table is bounded, forgets what was not used, and believes no older facts.
func TestLeaseTable(t *testing.T) {
	tab := newLeaseTable(3)
	for x := int64(1); x <= 3; x++ {
		tab.learn(x, x+100, 0, x)
	}
	tab.get(1)
	tab.learn(4, 104, 0, 4)
	if tab.get(2) != nil || tab.get(1) == nil || len(tab.entries) != 3 {
		t.Error("the wrong one was forgotten")
	}
	tab.learn(1, 101, 1, 50)
	if tab.gone(1, 1, 40); tab.get(1).create(1) != 50 {
		t.Error("the end of an older copy counts")
	}
	if tab.gone(1, 1, 60); tab.get(1).create(1) != 0 || tab.get(1).create(0) != 1 {
		t.Error("the end of the copy does not count")
	}
	if tab.ended(1, 99); tab.get(1) == nil {
		t.Error("the end of an older lease counts")
	}
	if tab.learn(1, 102, 1, 70); tab.get(1).create(0) != 0 || tab.get(1).m != 102 {
		t.Error("what is known of an older lease is kept")
	}
	for _, x := range []int64{1, 3, 4} {
		tab.forget(x)
	}
	if tab.newest != nil || tab.oldest != nil || len(tab.entries) != 0 {
		t.Error("not empty")
	}
}

// TestLeaseGrantRevokedBeforeItSettles: the marker's reply is lost, and somebody revokes the lease before it is looked
// at. It was granted and revoked, so it is not granted once more.
func TestLeaseGrantRevokedBeforeItSettles(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(1, 0)
	a := r.submit(OpLeaseGrant, &pb.LeaseGrantRequest{TTL: 30, ID: x})
	r.next(1, codec.MethodLeaseGrant).ok(&pb.LeaseGrantResponse{TTL: 31})
	r.next(1, codec.MethodTxn).fail(codec.Status{Code: codec.Unavailable, Msg: "connection lost"}, true)
	r.next(1, codec.MethodRange).key()
	r.next(1, codec.MethodLeaseRevoke).fail(codec.ErrLeaseNotFound, true)
	r.tick(50 * time.Millisecond)
	r.quiet()
	if !a.done || a.st != codec.ErrTimeout {
		t.Errorf("%+v", a)
	}
}

// TestLeaseRevokesWaitForTheShard: many copies on a shard that is away cost one look a second, not all of them.
func TestLeaseRevokesWaitForTheShard(t *testing.T) {
	r := newAwayRig(t, 1)
	s := r.c.shards[1]
	const n = 1000
	for m := range int64(n) {
		r.c.leases.revokeLater(s, m+1)
	}
	r.tick(10 * time.Second)
	r.quiet()
	// Connected, as far as anybody knows, but nothing leaves.
	r.away[1] = false
	tried := 0
	for range 10 {
		r.tick(2 * awayRevokes)
		for len(r.calls) > 0 {
			r.next(1, codec.MethodLeaseRevoke).fail(codec.Status{Code: codec.Unavailable, Msg: "no connection"}, false)
			tried++
		}
	}
	if tried == 0 || tried > 20*maxRevokesInFlight {
		t.Errorf("%d tries in 20 seconds", tried)
	}
	if len(s.lease.queue)+s.lease.inFlight != n {
		t.Errorf("%d wait, %d under way", len(s.lease.queue), s.lease.inFlight)
	}
	for i := 0; len(s.lease.queued) > 0 && i < n; i++ {
		r.tick(2 * awayRevokes)
		for len(r.calls) > 0 {
			r.next(1, codec.MethodLeaseRevoke).ok(&pb.LeaseRevokeResponse{})
		}
	}
	if len(s.lease.queued) > 0 || len(s.lease.queue) > 0 {
		t.Errorf("%d are left", len(s.lease.queued))
	}
}
