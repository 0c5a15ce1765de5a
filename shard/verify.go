package shard

import (
	"fmt"
	"time"

	"spindle/codec"
)

// This file looks, before a shard's stream is opened again, whether the shard still is the one that it was. One that
// was restored from an older backup, or was wiped, would let the stream wait for local revisions that it gives a
// second time, and its events would be skipped in silence. Such a shard is refused: its requests fail, its stream
// stays closed, and it is looked at again now and then. Other shards go on.

// refusedAgain is the mean pause between two looks at a shard that is refused.
const refusedAgain = time.Second

// verify opens the stream if the shard holds the last record that the stream has shown, in its place.
func (s *shardState) verify(gen uint64, compacted bool) {
	c := s.c
	body := appendGet(nil, txnSuccess, KeyID, 0)
	body = appendGet(body, txnSuccess, KeyClock, 0)
	if !compacted {
		body = appendGet(body, txnSuccess, KeyClock, s.rec.local)
	}
	s.call(codec.MethodTxn, body, completion(func(resp []byte, st codec.Status, _ bool) {
		if gen != s.gen || c.state != stateReady && c.state != stateStarting {
			return
		}
		switch {
		case st == codec.ErrCompacted && !compacted:
			s.verify(gen, true)
			return
		case st == codec.ErrFutureRev:
			s.refuse(fmt.Sprintf("its own revision has been %d and is below that now: it was restored from an older backup, or is another cluster", s.rec.local))
			return
		case st.Code != codec.OK:
			s.reopen()
			return
		}
		if why := s.differs(resp, compacted); why != "" {
			s.refuse(why)
			return
		}
		if s.banned != "" {
			c.log.Info("a member cluster is accepted again", "shard", s.name)
		}
		s.banned, s.unsure = "", false
		s.touch()
		s.openStream()
	}))
}

// differs says in what the shard is not what it was, "" if it is.
func (s *shardState) differs(resp []byte, compacted bool) string {
	t, ok := parseTxnReply(resp, nil)
	if !ok || len(t.resps) < 2 {
		return "it does not speak etcd's protocol"
	}
	kv, found := firstKV(t.resps[0])
	id, ok := ParseIdentity(kv.Value)
	switch {
	case !found:
		return "it has lost everything: it was wiped, or its address leads to another cluster"
	case !ok || id != s.c.m.Shards[s.idx].Identity:
		return "it has another identity: its address leads to another cluster"
	}
	at := t.resps[1]
	if !compacted && len(t.resps) > 2 {
		at = t.resps[2]
	}
	kv, found = firstKV(at)
	rec, ok := ParseRecord(kv.Value)
	same := rec.Last == s.rec.last && kv.ModRevision == s.rec.local
	if compacted {
		same = rec.Last >= s.rec.last && kv.ModRevision >= s.rec.local
	}
	if !found || !ok || !same {
		return fmt.Sprintf("it has been at revision %d and does not hold that any more: it was restored from an older backup", s.rec.last)
	}
	return ""
}

// refuse lets nothing to the shard until it is what it was.
func (s *shardState) refuse(why string) {
	c := s.c
	if s.banned == "" {
		c.log.Error("a member cluster is refused; requests for it fail, others go on. Restore its newest state; or, to accept what is lost, stop every proxy and start one with --accept-data-loss", "shard", s.name, "why", why)
	}
	s.banned, s.unsure = why, true
	s.touch()
	gen := s.gen
	c.after(c.jitter(refusedAgain), func() {
		if gen == s.gen && (c.state == stateReady || c.state == stateStarting) {
			s.verify(gen, false)
		}
	})
}

// failRefused answers what waits for a shard that is refused, or dead. It returns false for any other.
func (s *shardState) failRefused() bool {
	why := s.dead()
	if s.banned != "" {
		why = "member cluster " + s.name + " is refused: " + s.banned
	}
	if why == "" {
		return false
	}
	st := codec.Status{Code: codec.Unavailable, Msg: "etcdserver: " + why}
	queue, reads := s.queue, s.reads
	s.queue, s.reads = nil, nil
	for _, w := range queue {
		s.answer(w, st)
	}
	for i := range reads {
		reads[i].fail(s, st)
	}
	return true
}
