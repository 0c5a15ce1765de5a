package server

import (
	"testing"

	"spindle/shard"
)

// All that one turn has for a connection goes out in one write: answers to requests that came together, and answers that came
// together out of the mailbox.
func TestOneWriteForATurn(t *testing.T) {
	const requests = 100
	for _, later := range []bool{false, true} {
		r := newRig(t, "")
		core := &slowCore{fixed: r.core, now: !later}
		r.loop.eng.SetCore(core)
		var all []byte
		for range requests {
			all = append(all, r.next()...)
		}
		writes, written := r.sock.writes, r.sock.written
		r.feed(all)
		if later {
			if r.sock.written != written {
				t.Error("something was answered before its time")
			}
			writes = r.sock.writes
			r.loop.Post(core.answer)
			r.mail()
		}
		if n := r.sock.writes - writes; n != 1 {
			t.Errorf("later %v: %d writes for a turn", later, n)
		}
		if n := r.sock.written - written; n < requests*len(r.core.resp) {
			t.Errorf("later %v: %d bytes were written", later, n)
		}
	}
}

// slowCore answers when it is told to, all in one turn.
type slowCore struct {
	fixed *fixedCore
	now   bool
	ops   []*shard.Op
}

func (s *slowCore) Submit(op *shard.Op) {
	if s.now {
		s.fixed.Submit(op)
	} else {
		s.ops = append(s.ops, op)
	}
}

func (s *slowCore) Cancel(*shard.Op) {}

func (s *slowCore) answer() {
	for _, op := range s.ops {
		s.fixed.Submit(op)
	}
	s.ops = nil
}
