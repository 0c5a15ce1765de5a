package server

import (
	"testing"
	"time"

	"spindle/shard"
)

// What the socket takes from gnet's buffer comes without an event: an idle client is not counted for ever with what
// waited when it was last heard of, nor dropped for it.
func TestChargeFollowsTheSocket(t *testing.T) {
	r := newClockRig(t)
	mem := shard.NewMemory(1 << 20)
	r.loop.eng.cfg.Memory = mem
	r.greet(1 << 20)
	r.sock.waiting = 700 << 10
	r.send(1, "/etcdserverpb.KV/Range", true, []byte("q"))
	if n := mem.Used(); n < 700<<10 {
		t.Fatalf("%d bytes are counted", n)
	}
	r.sock.waiting = 0
	r.pass(time.Second)
	if n := mem.Used(); n != 0 {
		t.Errorf("%d bytes are counted of a client that has taken everything", n)
	}
	mem.Add(1 << 20) // another client's
	if r.pass(5 * time.Second); r.conn.closed {
		t.Error("a client that holds nothing was dropped")
	}
}

// A client that takes each of many large answers but for its last bytes is counted with all of them, refused further ones,
// and dropped when it takes nothing more.
func TestAnswersTakenInPartCount(t *testing.T) {
	const size, n = 4 << 20, 100
	r := newClockRig(t)
	mem := shard.NewMemory(1 << 30)
	r.loop.eng.cfg.Memory = mem
	r.greet(size - 60)
	refused, dropped := limitHits[limitReplies].Get(), limitHits[limitNoWindow].Get()
	for i := range n {
		r.core.resp = make([]byte, size)
		r.send(uint32(1+2*i), "/etcdserverpb.KV/Range", true, []byte("q"))
	}
	if queued, used := r.conn.h2.Queued(), mem.Used(); queued > n*100 || used < maxReplyMemory {
		t.Errorf("%d bytes wait, %d are counted", queued, used)
	}
	if r.core.n*size > maxReplyMemory+2*size || limitHits[limitReplies].Get() == refused {
		t.Errorf("%d requests of %d bytes each were answered", r.core.n, size)
	}
	r.pass(2 * r.loop.eng.cfg.StallTimeout)
	if !r.conn.closed || limitHits[limitNoWindow].Get() != dropped+1 {
		t.Error("not dropped")
	}
	if mem.Used() != 0 {
		t.Errorf("%d bytes are counted afterwards", mem.Used())
	}
}

// holdingCore answers nothing.
type holdingCore struct{ n int }

func (h *holdingCore) Submit(*shard.Op) { h.n++ }
func (h *holdingCore) Cancel(*shard.Op) {}

// A connection may have many requests under way while others have many too; the last places are for those that have few.
func TestRequestsUnderWayAreShared(t *testing.T) {
	for _, tt := range []struct{ others, want int }{
		{0, maxOpsPerConn},
		{20_000, 4000},            // an honest client with much to do
		{maxOps - 1000, 1000 / 3}, // half of what is left when it has them
		{maxOps - 200, opsWhenBusy},
		{maxOps - 1, 1},
		{2 * maxOps, 1},
	} {
		r := newClockRig(t)
		core := &holdingCore{}
		r.loop.eng.core = core
		r.loop.working.Store(int64(tt.others))
		r.greet(1 << 20)
		for i := range tt.want + 100 {
			r.send(uint32(1+2*i), "/etcdserverpb.KV/Range", true, []byte("q"))
		}
		if core.n < tt.want || core.n > tt.want+100 || tt.want != 4000 && core.n != tt.want {
			t.Errorf("beside %d others: %d requests reached the core, want %d", tt.others, core.n, tt.want)
		}
		if answered := r.conn.ops != core.n; answered || r.conn.h2.Streams() != core.n {
			t.Errorf("beside %d others: %d under way, %d streams", tt.others, r.conn.ops, r.conn.h2.Streams())
		}
	}
}

// When memory is short, who takes next to nothing of much is dropped; who takes much is not, although what it holds stays
// the same, nor when two seconds of a loop that stalled come at once.
func TestSlowClientsGoBusyOnesStay(t *testing.T) {
	const held = 4 << 20
	open := func(answer int) *clockRig {
		r := newClockRig(t)
		r.loop.eng.cfg.MaxOutbound = 2 * held
		r.loop.eng.cfg.Memory = shard.NewMemory(1 << 30)
		r.loop.eng.cfg.Memory.Add(15 << 26) // others
		r.core.resp = make([]byte, answer)
		r.greet(1 << 30)
		return r
	}
	// Lists wait for room that it has: it is dropped, but not at once, also when memory is not short otherwise.
	for _, waiting := range []bool{false, true} {
		idle := open(100)
		m := idle.loop.eng.cfg.Memory
		m.Add(-6 << 26)
		if waiting {
			m.Await(1)
		}
		idle.sock.waiting = held
		for i := range 6 {
			if idle.pass(time.Second); idle.conn.closed && i < patience {
				t.Fatalf("dropped after %d s", i)
			}
		}
		if idle.conn.closed != waiting {
			t.Errorf("lists wait: %v, dropped: %v", waiting, idle.conn.closed)
		}
	}

	hits := limitHits[limitMemory].Get()
	slow := open(100)
	slow.sock.waiting = held
	for range 5 {
		slow.pass(time.Second)
		slow.sock.waiting -= 2 * chargeStep
	}
	if !slow.conn.closed || limitHits[limitMemory].Get() != hits+1 {
		t.Error("a client that takes little by little was spared")
	}

	busy := open(1 << 20)
	busy.sock.waiting = held
	for i := range 10 {
		busy.conn.charged = 0 // so that its requests are not refused
		busy.send(uint32(1+2*i), "/etcdserverpb.KV/Range", true, []byte("q"))
		busy.pass(time.Second)
		busy.loop.Post(busy.loop.secondFn)
		busy.mail()
	}
	if busy.conn.closed || busy.core.n != 10 {
		t.Errorf("a busy client was dropped: closed %v, %d requests", busy.conn.closed, busy.core.n)
	}
}
