package shard

import (
	"math/rand/v2"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"spindle/codec"
)

// TestListGateLines compares a gate with what it is to be: each client's lists in their order, clients by turns, and none
// of whom may not.
func TestListGateLines(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	g := newListGate(gateKey{})
	clients := make([]*Client, 6)
	for i := 1; i < len(clients); i++ { // the first is nobody
		clients[i] = new(Client)
	}
	waiting := map[*Client][]*Op{}
	n, served := 0, map[*Client]int{} // since when it was passed over, how many others' turns came
	for now := int64(0); now < 20_000; now++ {
		switch k := rnd.IntN(10); {
		case k < 5:
			op := &Op{Client: clients[rnd.IntN(len(clients))]}
			op.core.gateUntil = now + 1 + rnd.Int64N(60)
			g.add(g.lines[op.Client], op)
			waiting[op.Client] = append(waiting[op.Client], op)
			n++
		case k < 9:
			barred := clients[rnd.IntN(len(clients))]
			may := func(cl *Client) bool { return cl != barred }
			op := g.take(may)
			if op == nil {
				if n > len(waiting[barred]) {
					t.Fatalf("seed %d: nothing is taken of %d", seed, n)
				}
				break
			}
			cl := op.Client
			if !may(cl) || waiting[cl][0] != op {
				t.Fatalf("seed %d: not the oldest of one who may", seed)
			}
			waiting[cl] = waiting[cl][1:]
			n--
			for _, other := range clients {
				if other == cl || other == barred || len(waiting[other]) == 0 {
					served[other] = 0
				} else if served[other]++; served[other] >= 2*len(clients) {
					t.Fatalf("seed %d: a client waits for %d turns of others", seed, served[other])
				}
			}
		default:
			over := func(op *Op) bool { return op.core.gateUntil <= now }
			want := 0
			for cl, ops := range waiting {
				left := slices.DeleteFunc(slices.Clone(ops), over)
				want += len(ops) - len(left)
				waiting[cl] = left
			}
			if late := g.drop(over); len(late) != want || slices.ContainsFunc(late, func(op *Op) bool { return !over(op) }) {
				t.Fatalf("seed %d: %d are late, want %d", seed, len(late), want)
			}
			n -= want
		}
		if g.n != n || (g.last == nil) != (n == 0) {
			t.Fatalf("seed %d: %d wait, want %d", seed, g.n, n)
		}
	}
}

// listRig is a Core that is asked for lists.
type listRig struct {
	*leaseRig
}

// list asks for a list on behalf of cl, and says whether it was refused at once.
func (r listRig) list(cl *Client) (refused bool) {
	op := &Op{Kind: OpRange, Client: cl, Msg: mustMarshal(r.t, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")})}
	op.Done = func(*Op) { refused = true }
	r.c.Submit(op)
	return refused
}

// TestListGateTurns: one who asks for much does not stand before one who asks for little, nor takes all places to wait.
func TestListGateTurns(t *testing.T) {
	r := listRig{newLeaseRig(t, 1)}
	greedy, modest := new(Client), new(Client)
	n := 0
	for n < maxListsWaiting && !r.list(greedy) {
		n++
	}
	if n < maxListsWaiting/3 || n > maxListsWaiting/3+1 { // half of what is free when it has them
		t.Errorf("a client alone may have %d lists wait", n)
	}
	if r.list(modest) {
		t.Fatal("another has no place")
	}
	begun := len(r.calls)
	r.c.Flush()
	if g := r.c.gates[0]; g.out != maxLists || g.lines[modest] != nil || len(r.calls) != begun+maxLists {
		t.Errorf("%d under way; the other waits: %v", g.out, g.lines[modest] != nil)
	}
}

// TestListGateWidth: the larger the pages, the fewer lists.
func TestListGateWidth(t *testing.T) {
	g := newListGate(gateKey{})
	c := &Core{gates: []*listGate{g}}
	op := new(Op)
	op.core.gate = 1
	for _, w := range []struct{ page, want int }{{0, maxLists}, {1000, maxLists}, {1 << 20, 8}, {16 << 20, minLists}, {100, maxLists}} {
		for range 200 {
			c.listPage(op, w.page)
		}
		if got := g.width(); got < w.want || got > w.want+1 {
			t.Errorf("pages of %d bytes: %d lists", w.page, got)
		}
	}
}

// TestListsOfWhoDoesNotRead: once half of the memory is used, who holds much, or has a list that waits for room, gets no
// further list begun until that is over; others do.
func TestListsOfWhoDoesNotRead(t *testing.T) {
	for name, much := range map[string]func(*Client, int64){
		"unread":  func(cl *Client, n int64) { cl.SetHeld(n) },
		"granted": func(cl *Client, n int64) { cl.granted = n },
		"room":    func(cl *Client, n int64) { cl.room = int(min(n, 1)) },
	} {
		t.Run(name, func(t *testing.T) {
			const limit = 64 << 20
			r := listRig{newLeaseRig(t, 1)}
			m := NewMemory(limit)
			r.c.cfg.Memory = m
			deaf, good := new(Client), new(Client)
			much(deaf, limit/clientShare+1)
			ask := func(cl *Client, want int) {
				t.Helper()
				begun := len(r.calls)
				r.list(cl)
				r.c.Flush()
				if n := len(r.calls) - begun; n != want {
					t.Errorf("%d begun, want %d", n, want)
				}
			}
			ask(deaf, 1) // there is room for all
			m.Add(limit/2 + 1)
			ask(deaf, 0)
			ask(good, 1)
			much(deaf, 0)
			begun := len(r.calls)
			r.tick(largeRetry)
			r.c.Flush()
			if len(r.calls) != begun+1 {
				t.Error("it has taken all, and waits on")
			}
		})
	}
}

// TestListWithoutRoomReadsOnePage: no page but the first is asked for before the answer has room; with room all go on.
func TestListWithoutRoomReadsOnePage(t *testing.T) {
	for _, full := range []bool{true, false} {
		r := newLeaseRig(t, 2)
		m := NewMemory(1 << 30)
		if full {
			m.Add(1 << 30)
		}
		r.c.cfg.Memory = m
		op := &Op{Kind: OpRange, Done: func(*Op) {}, Msg: mustMarshal(t, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")})}
		if st := op.core.plan.Parse(OpRange, op.Msg, &r.c.cfg.Limits); st.Code != codec.OK {
			t.Fatal(st)
		}
		p := r.c.newPagedRead(op, nil)
		p.fix(7)
		for i := range p.parts {
			kv := &mvccpb.KeyValue{Key: []byte{'b', byte(i)}, Value: append(AppendStamp(nil, 5, 5), 'v'), ModRevision: 3, CreateRevision: 3, Version: 1}
			part := &p.parts[i]
			part.located, part.local, part.counted, part.full, part.more = true, 5, true, true, true
			part.total, part.perKey, part.limit = 3000, 1<<10, 1024
			part.ahead = mustMarshal(t, &pb.RangeResponse{Header: &pb.ResponseHeader{}, Kvs: []*mvccpb.KeyValue{kv}, More: true, Count: 3000})
		}
		p.merge()
		if n, want := len(r.calls), map[bool]int{true: 0, false: 2}[full]; n != want || p.waiting != full {
			t.Errorf("without room: %v: %d pages are asked for, want %d; waits: %v", full, n, want, p.waiting)
		}
	}
}
