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

// TestLargeListsWaitForEachOther: a list that has no room waits as long as others get on: one gets a page, one ends well, or a client
// takes what it has. (It got "too many requests" after the shard timeout.)
func TestLargeListsWaitForEachOther(t *testing.T) {
	const limit = 64 << 20
	for name, move := range map[string]func(r roomRig, first *pagedRead){
		"nobody": nil,
		"page":   func(r roomRig, first *pagedRead) { r.c.listMoves(first.op) },
		"list":   func(r roomRig, _ *pagedRead) { p, _ := r.list(largeAnswer / 4); p.hold(1); p.end(codec.Status{}) },
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

// TestListWaitsNotForEver: others who get on all the time (what is used goes up and down) do not let a list wait that has no room itself.
func TestListWaitsNotForEver(t *testing.T) {
	const limit = 64 << 20
	r := newRoomRig(t, limit)
	timeout := r.c.cfg.ShardTimeout
	r.m.Add(limit * 55 / 100)
	_, head := r.list(limit / 4)
	_, behind := r.list(300 << 10)
	for i := range 2 * maxListWaits {
		if i < 2*maxListWaits-4 && (head.done || behind.done) {
			t.Fatalf("it ends after %d half timeouts, while others get on", i)
		}
		n := int64(limit / 32)
		if i%2 == 1 {
			n = -n
		}
		r.m.Add(n)
		r.tick(timeout / 2)
	}
	if r.tick(timeout); head.st != codec.ErrTooManyRequests || !behind.done {
		t.Errorf("after %d timeouts: %+v, the one behind it: %+v", maxListWaits, head, behind)
	}
}

// TestListsWaitNotForTheDead: lists that are given room one after the other, and run into the death of a shard, are nothing that others
// wait for: not their beginning, nor the first pages of the other shards, nor the room that they give back.
func TestListsWaitNotForTheDead(t *testing.T) {
	const limit = 64 << 20
	r := newRoomRig(t, limit)
	timeout := r.c.cfg.ShardTimeout
	first, _ := r.list(limit * 2 / 3)
	var waiting []*rigAnswer
	for range 9 {
		_, a := r.list(limit * 2 / 3)
		waiting = append(waiting, a)
	}
	r.tick(timeout * 9 / 10)
	first.end(codec.ErrTimeout)
	for range 5 {
		r.tick(timeout / 2)
	}
	for i, a := range waiting {
		if !a.done || a.st.Code == codec.OK {
			t.Errorf("list %d: %+v", i, a)
		}
	}
}

// TestListAtARevisionWaits: a list at a revision is answered at that one also when it has waited for room, serializable or not. (It was
// answered at the newest one.)
func TestListAtARevisionWaits(t *testing.T) {
	for _, serializable := range []bool{false, true} {
		r := newRoomRig(t, 1<<20)
		r.m.Add(1 << 20)
		op := &Op{Kind: OpRange, Done: func(*Op) {}, Msg: mustMarshal(t, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Revision: 3, Serializable: serializable})}
		if st := op.core.plan.Parse(OpRange, op.Msg, &r.c.cfg.Limits); st.Code != codec.OK {
			t.Fatal(st)
		}
		p := r.c.newPagedRead(op, nil)
		p.fixed, p.rev, p.h = true, 3, 9
		p.parts[0].more, p.parts[0].total, p.parts[0].perKey = true, 1024, 1024
		if p.admit(); !p.waiting {
			t.Fatal("there is room")
		}
		r.m.Add(-1 << 20)
		if r.tick(largeRetry); p.waiting || p.rev != 3 {
			t.Errorf("serializable %v: it waits: %v; it reads revision %d", serializable, p.waiting, p.rev)
		}
	}
}

// TestPartOfATxnHasItsOwnTime: a range of a Txn, which holds what it has read already, waits no longer because others get on.
func TestPartOfATxnHasItsOwnTime(t *testing.T) {
	r := newRoomRig(t, 64<<20)
	timeout := r.c.cfg.ShardTimeout
	for range maxLists {
		r.submit(OpRange, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")})
	}
	r.c.Flush()
	a, own := &rigAnswer{}, &rigAnswer{}
	for part, answer := range map[bool]*rigAnswer{true: a, false: own} {
		r.c.Submit(&Op{Kind: OpRange, part: part, Done: func(op *Op) { *answer = rigAnswer{true, op.Status, nil} },
			Msg: mustMarshal(t, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")})})
	}
	g := r.c.gates[0]
	if g.n != 2 {
		t.Fatalf("%d wait", g.n)
	}
	for range 3 {
		g.moved = r.now
		r.tick(timeout / 2)
	}
	if !a.done || a.st != codec.ErrTimeout || own.done {
		t.Errorf("the part: %+v, a list: %+v", a, own)
	}
}

// TestPagesOnTheirWayAreCounted: what a stream, or a list that was given up, has asked for comes anyway, and has its room until then.
func TestPagesOnTheirWayAreCounted(t *testing.T) {
	r := roomRig{newLeaseRig(t, 3), NewMemory(512 << 20)}
	r.c.cfg.Memory = r.m
	counted := func() (sum int64) {
		for _, q := range r.calls {
			if x, ok := q.c.(codec.Receiving); ok && x.Reserved() > 0 {
				sum++
			}
		}
		return sum * minPageBytes
	}
	s := &RangeStream{Msg: mustMarshal(t, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")}), Chunk: func(*RangeStream, []byte) {}, Done: func(*RangeStream) {}}
	r.c.OpenRange(s)
	if n := counted(); n == 0 || r.m.Used() < n {
		t.Fatalf("%d bytes are counted, at least %d are on their way", r.m.Used(), n)
	}
	before := r.m.Used()
	r.c.CancelRange(s)
	if r.m.Used() != before {
		t.Errorf("%d bytes are counted when the stream is gone, %d before", r.m.Used(), before)
	}
	calls := r.calls
	r.calls = nil
	for _, q := range calls {
		q.c.Complete(nil, codec.Status{Code: codec.Unavailable}, true)
	}
	if r.m.Used() != 0 {
		t.Errorf("%d bytes are counted at the end", r.m.Used())
	}
}
