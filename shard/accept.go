package shard

import (
	"fmt"

	"spindle/codec"
)

// This file accepts what a member cluster has lost, because an operator said so (--accept-data-loss). What clients saw of
// the lost time is neither in the state nor in the history, and no event takes it back. So the shard's clock is fenced
// above everything that was handed out, and all that is below the fence counts as compacted: whoever needs it is told so,
// and lists anew. Nobody is served before that.
//
// It may be cut short anywhere. What shows that something is missing (a clock below C_i, an older epoch, an empty member)
// is soon gone, so first of all the shard gets a mark (KeyLoss). A start that finds it goes on, with or without the
// flag, unless more is missing than the mark says: then the shard is an older copy, made while the mark was there. The
// fence takes the mark away, and in the same Txn puts the compaction record, of its own last revision: the largest record
// counts for all shards, at every start and on every stream, and what the other shards lack of it is brought to them by
// anybody (armCompactionLags).

// lossFence is how many revisions such a fence has. A watch may begin at a compacted revision itself, and one of who had
// seen everything begins at the next revision that is handed out, the fence's first.
const lossFence = 2

// markLoss puts the mark on a shard whose clock was last put at local, and calls f, whether it is there now or not.
func (s *shardState) markLoss(local int64, mark LossMark, f func()) {
	c := s.c
	body := appendCompareValue(nil, KeyID, resultEqual, AppendIdentity(nil, c.m.Shards[s.idx].Identity))
	body = appendCompareInt(body, KeyClock, "", resultEqual, targetMod, cmpMod, local)
	body = appendPutOp(body, txnSuccess, KeyLoss, AppendLossMark(nil, mark))
	c.tr.Call(s.cluster, codec.MethodTxn, body, c.cfg.ShardTimeout, completion(func(resp []byte, st codec.Status, _ bool) {
		if t, ok := parseTxnReply(resp, nil); st.Code == codec.OK && ok && t.succeeded {
			s.lossy, s.accepted, s.marked, s.mark = true, true, t.rev, mark
			f()
			return
		}
		c.after(c.jitter(20*retryDelay), f) // it is looked at again
	}))
}

// readMark takes a shard's compaction record and its mark, as they were read together with its clock. Until the epoch is believed
// a start knows no better: the mark that its probe has shown may have been fenced since, and one may have been put.
func (s *shardState) readMark(compact, mark []byte) error {
	c := s.c
	if kv, found := firstKV(compact); found {
		rev, ok := ParseCompaction(kv.Value)
		if !ok {
			return fmt.Errorf("member cluster %s has a compaction record that this version of spindle cannot read: upgrade spindle", s.name)
		}
		s.sawCompaction(rev)
	}
	kv, found := firstKV(mark)
	m, ok := ParseLossMark(kv.Value)
	if found && !ok {
		return fmt.Errorf("member cluster %s has a mark of an accepted loss that this version of spindle cannot read: upgrade spindle", s.name)
	}
	if c.state == stateStarting && c.ring == nil {
		s.marked, s.mark = kv.ModRevision, m
		s.lossy, s.accepted = found, found
	}
	return nil
}

// appendLossEnd appends what the fence that ends with a revision does besides.
func appendLossEnd(dst []byte, last int64) []byte {
	dst = appendPutOp(dst, txnSuccess, KeyCompact, AppendCompaction(nil, last))
	dst, m := codec.BeginMessage(dst, txnSuccess)
	dst, m2 := codec.BeginMessage(dst, opDelete)
	dst = codec.AppendString(dst, 1, KeyLoss)
	dst = codec.EndMessage(dst, m2)
	return codec.EndMessage(dst, m)
}

// lossEnded is told that b, a fence of a loss, was not applied because the mark is gone: another proxy's fence has ended
// the acceptance, and what clients were told since then is not lost. b's range is still to be closed. compact has the compaction record
// of that fence, or of a later compaction: the start must not serve without it, and the stream may be far behind.
func (s *shardState) lossEnded(b *batch, compact [][]byte) {
	rev, known := int64(0), false
	if len(compact) > 0 {
		if kv, found := firstKV(compact[0]); found {
			rev, known = ParseCompaction(kv.Value)
		}
	}
	if !known {
		s.c.fail(fmt.Errorf("the compaction record on member cluster %s is missing or not readable by this version, though an accepted loss has ended there", s.name))
		return
	}
	s.sawCompaction(rev)
	s.marked = 0
	s.dropBatch(b)
	s.wantFence = true
}

// awaitFences ends the start when no shard has the mark any more.
func (b *bootstrap) awaitFences() {
	c := b.c
	accepted := false
	for _, s := range c.shards {
		switch {
		case s.absent != "":
		case s.marked > 0:
			if s.cur == nil { // one fence does it
				s.wantFence = true
				s.touch()
			}
			b.later(retryDelay, b.awaitFences)
			return
		default:
			accepted = accepted || s.accepted
		}
	}
	if accepted {
		c.frontier.SetCompacted(c.compacted) // wherever the frontier is: no watch has come this far
	}
	b.ready()
	if !accepted {
		return
	}
	for _, s := range c.shards {
		if s.accepted {
			s.accepted = false
			c.log.Info("what a member cluster has lost is accepted; revisions before are compacted. Start the other proxies now, and this one again without --accept-data-loss", "shard", s.name, "revision", s.compactRec)
		}
	}
	c.completeCompaction(c.shards)
}
