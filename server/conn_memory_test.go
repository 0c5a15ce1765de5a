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
