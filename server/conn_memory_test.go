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
