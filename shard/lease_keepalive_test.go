package shard

import (
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// awayRig is a leaseRig whose members may have no connection.
type awayRig struct {
	*leaseRig
	away map[codec.ClusterID]bool
}

func (r *awayRig) Connected(id codec.ClusterID) bool { return !r.away[id] }

func newAwayRig(t *testing.T, away codec.ClusterID) *awayRig {
	r := &awayRig{newLeaseRig(t, 2), map[codec.ClusterID]bool{away: true}}
	r.c.tr = r
	return r
}

// TestLeaseKeepAliveHomeAway: a home without a connection is no wait.
func TestLeaseKeepAliveHomeAway(t *testing.T) {
	r := newAwayRig(t, 1)
	a := r.submit(OpLeaseKeepAlive, &pb.LeaseKeepAliveRequest{ID: r.leaseAt(1, 0)})
	if !a.done || a.st.Code != codec.Unavailable {
		t.Errorf("%+v", a)
	}
	if a = r.submit(OpLeaseKeepAlive, &pb.LeaseKeepAliveRequest{ID: r.leaseAt(0, 0)}); a.done {
		t.Errorf("the other home: %+v", a)
	}
}

// keptRig is a leaseRig whose homes answer about leases as etcd does: on a stream in order, and not for a lease whose
// time is over and which has not been revoked.
type keptRig struct {
	*leaseRig
	mute map[int]bool
	left map[int64]time.Duration // by M: life left; <= 0 until it is revoked; gone without
	seen map[*leaseRigStream]int // of sent: those that were answered
}

func newKeptRig(t *testing.T, shards int) *keptRig {
	return &keptRig{newLeaseRig(t, shards), map[int]bool{}, map[int64]time.Duration{}, map[*leaseRigStream]int{}}
}

// ask keeps a lease alive, which this proxy knows.
func (r *keptRig) ask(x int64) *rigAnswer {
	r.c.leases.table.learn(x, x, r.c.part.HomeOf(x), 3)
	return r.submit(OpLeaseKeepAlive, &pb.LeaseKeepAliveRequest{ID: x})
}

// serve lets homes answer until they have nothing to say.
func (r *keptRig) serve() {
	for more := true; more; {
		more = false
		var wait []*leaseRigCall
		calls := r.calls
		r.calls = nil
		for _, q := range calls {
			switch {
			case r.mute[q.to]:
				wait = append(wait, q)
				continue
			case q.m == codec.MethodLeaseTimeToLive:
				var req pb.LeaseTimeToLiveRequest
				if err := proto.Unmarshal(q.req, &req); err != nil {
					r.t.Fatal(err)
				}
				resp := &pb.LeaseTimeToLiveResponse{Header: &pb.ResponseHeader{Revision: 50}, ID: req.ID, TTL: -1}
				if left, ok := r.left[req.ID]; ok {
					resp.TTL, resp.GrantedTTL = int64(left.Seconds()), 20
				}
				q.ok(resp)
			default:
				q.key() // the marker
			}
			more = true
		}
		r.calls = append(wait, r.calls...)
		for _, s := range r.alive {
			for !s.closed && !r.mute[s.to] && r.seen[s] < len(s.sent) {
				m := s.sent[r.seen[s]]
				left, ok := r.left[m]
				if ok && left <= 0 {
					break
				}
				r.seen[s]++
				resp := &pb.LeaseKeepAliveResponse{ID: m}
				if ok {
					resp.TTL = 20
				}
				more = true
				s.sink.OnMessage(mustMarshal(r.t, resp))
			}
		}
	}
}

// pass lets time pass, and homes answer.
func (r *keptRig) pass(d time.Duration) {
	const step = 10 * time.Millisecond
	for ; d > 0; d -= step {
		r.serve()
		r.tick(step)
		for m := range r.left {
			r.left[m] -= step
		}
	}
	r.serve()
}

func (r *keptRig) open() (n int) {
	for _, s := range r.alive {
		if !s.closed {
			n++
		}
	}
	return n
}

func (r *keptRig) alive20(a *rigAnswer) bool {
	return a.done && a.st.Code == codec.OK && unmarshal(r.t, a.resp, &pb.LeaseKeepAliveResponse{}).TTL == 20
}

// TestLeaseKeepAliveIsNotHeldUp: many leases whose time is over (etcd answers for them once they have been revoked, one
// after the other) hold up none that lives: not those that were asked for together with them, not later ones.
func TestLeaseKeepAliveIsNotHeldUp(t *testing.T) {
	r := newKeptRig(t, 1)
	const over = 1000
	var ended, lives []*rigAnswer
	for x := int64(1); x <= over; x++ {
		r.left[x] = -5 * time.Second
		ended = append(ended, r.ask(x))
		if x%100 == 0 {
			r.left[over+x] = 3 * time.Second
			lives = append(lives, r.ask(over+x))
		}
	}
	r.pass(4 * keeperStall)
	for i, a := range lives {
		if !r.alive20(a) {
			t.Errorf("behind %d leases that are over: %+v", (i+1)*100, a)
		}
	}
	for i, a := range ended {
		if !a.done || a.st != codec.ErrTimeout { // its places are free for others
			t.Fatalf("lease %d, which is over: %+v", i+1, a)
		}
	}
	// Later ones are behind further leases that are over, again and again.
	for round := range int64(20) {
		for x := int64(1); x <= 30; x++ {
			r.ask(x)
		}
		x := 5000 + round
		r.left[x] = 3 * time.Second
		a := r.ask(x)
		if r.serve(); !r.alive20(a) {
			t.Errorf("round %d: %+v", round, a)
		}
		r.pass(50 * time.Millisecond)
	}
	if n := r.open(); n > 1+maxEdgeStreams {
		t.Errorf("%d streams are open", n)
	}
	// Once they are revoked they are gone.
	for x := int64(1); x <= over; x++ {
		delete(r.left, x)
	}
	a := r.ask(7)
	if r.serve(); !a.done || a.st.Code != codec.OK || unmarshal(t, a.resp, &pb.LeaseKeepAliveResponse{}).TTL != 0 {
		t.Errorf("revoked: %+v", a)
	}
	r.pass(2 * keeperCareful)
	if n := len(r.c.leases.keeping); n != 0 || r.c.shards[0].lease.keeper.waiting != 0 {
		t.Errorf("%d wait, %d are counted", n, r.c.shards[0].lease.keeper.waiting)
	}
	before := len(r.calls)
	if a := r.ask(5000); len(r.calls) != before || a.done {
		t.Error("long after the last one that was over leases are still probed")
	}
}

// TestLeaseKeepAliveAtTheEdge: a lease in its last second looks like one that has just ended; it is asked for, and not
// behind others.
func TestLeaseKeepAliveAtTheEdge(t *testing.T) {
	r := newKeptRig(t, 1)
	r.left[1] = -5 * time.Second
	r.ask(1)
	r.pass(2 * keeperStall) // from here on all are probed
	for x := int64(10); x < 10+4*maxEdgeStreams; x++ {
		r.left[x] = -10 * time.Millisecond
		r.ask(x)
	}
	r.left[2] = 900 * time.Millisecond
	a := r.ask(2)
	r.pass(3 * keeperStall)
	if !r.alive20(a) {
		t.Errorf("the one that lives: %+v", a)
	}
	if n := r.open(); n > 1+maxEdgeStreams {
		t.Errorf("%d streams are open", n)
	}
	r.pass(2 * time.Second) // now it is clear that they are over
	if n := len(r.c.leases.keeping); n != 0 || r.open() > 1 {
		t.Errorf("%d wait, %d streams are open", n, r.open())
	}
}

// TestLeaseKeepAliveMuteHome: a home that is connected and says nothing keeps one who asks, and answers the others at
// once, so that their places are free for leases of other homes. When it is back it is asked again.
func TestLeaseKeepAliveMuteHome(t *testing.T) {
	r := newKeptRig(t, 2)
	r.mute[0] = true
	var as []*rigAnswer
	for n := range 300 {
		x := r.leaseAt(0, n)
		r.left[x] = time.Hour
		as = append(as, r.ask(x))
	}
	r.pass(keeperMute + 2*keeperLook)
	waiting := 0
	for _, a := range as {
		if !a.done {
			waiting++
		} else if a.st != codec.ErrTimeout {
			t.Fatalf("%+v", a)
		}
	}
	if waiting != 1 {
		t.Errorf("%d wait for a home that says nothing", waiting)
	}
	if a := r.ask(r.leaseAt(0, 5)); !a.done || a.st != codec.ErrTimeout {
		t.Errorf("one more: %+v", a)
	}
	other := r.leaseAt(1, 0)
	r.left[other] = time.Hour
	a := r.ask(other)
	if r.serve(); !r.alive20(a) {
		t.Errorf("the other home: %+v", a)
	}
	r.pass(r.c.cfg.ShardTimeout)
	if n := len(r.c.leases.keeping); n != 0 {
		t.Errorf("%d wait after the timeout", n)
	}
	r.ask(r.leaseAt(0, 6))
	delete(r.mute, 0)
	r.pass(2 * time.Second) // a probe that was lost has its time
	for n := range 10 {
		a := r.ask(r.leaseAt(0, n))
		if r.serve(); !r.alive20(a) {
			t.Errorf("when it is back: %+v", a)
		}
	}
}

// TestLeaseKeepAliveBound: one home's leases under way are bounded.
func TestLeaseKeepAliveBound(t *testing.T) {
	r := newKeptRig(t, 1)
	r.mute[0] = true
	for x := int64(1); x <= maxKeptAtHome; x++ {
		if a := r.ask(x); a.done {
			t.Fatalf("%d: %+v", x, a)
		}
	}
	if a := r.ask(maxKeptAtHome + 1); !a.done || a.st != codec.ErrTimeout {
		t.Errorf("%+v", a)
	}
	if a := r.ask(1); a.done { // no further request
		t.Errorf("%+v", a)
	}
}
