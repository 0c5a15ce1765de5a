package shard

import (
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/codec"
)

// roomRig is a Core of one shard with a Memory, and lists whose first pages have come.
type roomRig struct {
	*leaseRig
	m *Memory
}

func newRoomRig(t *testing.T, limit int64) roomRig {
	r := roomRig{newLeaseRig(t, 1), NewMemory(limit)}
	r.c.cfg.Memory = r.m
	return r
}

// list asks for room for a list that its first page makes seem to have size bytes.
func (r roomRig) list(size int64) (*pagedRead, *rigAnswer) {
	r.t.Helper()
	a := &rigAnswer{}
	op := &Op{Kind: OpRange, Done: func(op *Op) { *a = rigAnswer{true, op.Status, nil} },
		Msg: mustMarshal(r.t, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")})}
	if st := op.core.plan.Parse(OpRange, op.Msg, &r.c.cfg.Limits); st.Code != codec.OK {
		r.t.Fatal(st)
	}
	p := r.c.newPagedRead(op, nil)
	p.latest, p.fixed = true, true
	p.parts[0].more, p.parts[0].total, p.parts[0].perKey = true, size/1024, 1024
	p.admit()
	return p, a
}

// TestLargeListsWaitForEachOther: a list that has no room waits as long as others get on: one gets a page, one is given room, or a client
// takes what it has. (It got "too many requests" after the shard timeout.)
func TestLargeListsWaitForEachOther(t *testing.T) {
	const limit = 64 << 20
	for name, move := range map[string]func(r roomRig, first *pagedRead){
		"nobody": nil,
		"page":   func(r roomRig, first *pagedRead) { r.c.listMoves(first.op) },
		"room":   func(r roomRig, _ *pagedRead) { p, _ := r.list(largeAnswer / 4); p.hold(1); p.release() },
		"client": func(r roomRig, _ *pagedRead) { r.m.Add(-limit/roomStep - 1) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRoomRig(t, limit)
			timeout := r.c.cfg.ShardTimeout
			r.m.Add(limit / 2) // what others hold
			first, _ := r.list(limit / 6)
			second, a := r.list(limit / 3)
			if !first.admitted || !second.waiting || second.held != 0 {
				t.Fatalf("the first has room: %v, the second waits: %v, with %d bytes", first.admitted, second.waiting, second.held)
			}
			for range 4 {
				r.tick(timeout * 2 / 3)
				if move != nil && !a.done {
					move(r, first)
				}
			}
			if move == nil {
				if !a.done || a.st != codec.ErrTooManyRequests {
					t.Fatalf("it waits though nobody gets on: %+v", a)
				}
				return
			}
			if a.done || !second.waiting {
				t.Fatalf("it does not wait for others: %+v", a)
			}
			r.m.Add(-r.m.Used())
			if r.tick(largeRetry); second.waiting || second.held == 0 || r.m.Awaited() {
				t.Error("it does not begin when there is room")
			}
		})
	}
}

// TestListThatGrowsWaits: a list that turns out to be larger than its first page made it seem, and has no room for that beside others, begins
// anew when it has; alone it goes on. (It got "too many requests", when most of it was there.)
func TestListThatGrowsWaits(t *testing.T) {
	const limit = 64 << 20
	r := newRoomRig(t, limit)
	first, a := r.list(limit / 4)
	second, _ := r.list(limit / 4)
	if !first.admitted || !second.admitted {
		t.Fatal("there is room for both")
	}
	if first.grownTo(limit/2, 0) || !first.waiting || first.held != 0 || first.op.admitted || a.done {
		t.Fatalf("waits: %v, has %d bytes, ended: %+v", first.waiting, first.held, a)
	}
	if first.expected < limit/2 {
		t.Errorf("it is expected to be as small as before: %d", first.expected)
	}
	if !second.grownTo(limit, 0) || second.held < limit {
		t.Error("the only one with room does not go on")
	}
	second.release()
	if r.tick(largeRetry); first.waiting || first.held < limit/2 {
		t.Errorf("it has room for %d bytes", first.held)
	}
}

// TestCanceledListWaitsNoMore: nor does it keep its place.
func TestCanceledListWaitsNoMore(t *testing.T) {
	r := newRoomRig(t, 1<<20)
	r.m.Add(1 << 20)
	_, a := r.list(1 << 20)
	second, b := r.list(1 << 20)
	r.c.Cancel(second.op)
	if r.tick(2 * time.Duration(largeRetry)); a.done || b.st != statusCanceled || len(r.c.large.waiting) != 1 {
		t.Errorf("%+v, %+v, %d wait", a, b, len(r.c.large.waiting))
	}
}
