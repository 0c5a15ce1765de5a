package shard

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"spindle/codec"
	"spindle/revclock"
)

// This file is the life of a batch on one shard:
//
//	queue -> closed (its tick is asked for) -> granted (it has its revisions and its bytes)
//	      -> sent, perhaps more than once -> committed | void | refused | unknown
//
// One batch per shard is between closed and its end, and perhaps one more is closed behind it, which is not made and sent before the
// first one has ended (ahead.go). What a batch says never changes once its bytes are made: whatever
// must change goes into a new batch with a new tick. (Its bytes may, once: flat.go.)

// retryDelay is the pause before a batch or a read that told nothing is sent again.
const (
	retryDelay    = 10 * time.Millisecond
	maxRetryDelay = 200 * time.Millisecond // for a batch: the pause doubles
	// fenceJitter delays the empty batch that gives waiting unrecorded events a revision, so that of
	// several proxies mostly one sends it.
	fenceJitter = 10 * time.Millisecond
	// turnAfter is the number of rejections in a row after which a batch asks the others to wait.
	turnAfter = 2
)

type batchState uint8

const (
	batchTicking    batchState = iota // closed, waits for its range
	batchGranted                      // has its range, waits for the batch before it to be settled or for its turn to be sent
	batchSent                         // a copy is under way
	batchWaiting                      // between two sends
	batchSettling                     // rejected after an unknown outcome: waits for the stream
	batchRecovering                   // committed, its answers are computed from history
)

// batch is one write batch of this proxy on one shard. It is the Completion of its own call.
type batch struct {
	s      *shardState
	id     uint64
	state  batchState
	token  uint64 // of its tick
	closed int64  // ns
	// lastOne says that nothing of what waits may be closed behind it.
	lastOne bool
	tries   int // sends that told nothing
	writes  []*write
	fence   bool
	loss    bool // a fence that ends an accepted loss
	filter  []byte
	first   int64
	last    int64
	spare   bool
	record  Record
	flat    bool // the form of its bytes (flat.go)
	again   bool // its flat form has failed
	body    []byte
	mapMod  int64 // that its guard names
	floor   int64 // and the clock that the shard has been at
	// unknown says that an earlier copy's outcome was not learned: a rejection proves nothing then.
	unknown bool
	// blind says that the stream skipped records while this batch was on its way: not seeing its record
	// proves nothing.
	blind bool
	// seenAt is the shard's local revision at which the stream showed this batch's record, 0 before.
	seenAt int64
	// settleAt is the local revision through which the stream must come before a rejection counts.
	settleAt int64
	deadline int64
	sentAt   int64 // the first copy, 0 before
	slotAt   int64 // a timer is set for this moment to look again whether b may be sent
}

// dropBatch ends b without a further look at its writes.
func (s *shardState) dropBatch(b *batch) {
	if s.cur == b {
		s.cur = nil
		s.touch()
		s.promote()
	}
}

// granted takes the range of a closed batch.
func (s *shardState) granted(token uint64, r revclock.Range) {
	b := s.cur
	if s.next != nil {
		b = s.next // that one has its range
	}
	if b == nil || token != b.token || b.state != batchTicking {
		s.wantFence = true // a range that nobody uses must not stay open
		s.touch()
		return
	}
	b.first, b.last, b.state = r.First, r.Last, batchGranted
	s.pace.ticked(s.c.cfg.Now() - b.closed)
	if b == s.cur {
		s.make(b)
	}
}

// make makes the bytes of b, which has its range and no other batch before it, and sends it.
func (s *shardState) make(b *batch) {
	next := b.first
	if b.spare {
		next++
	}
	b.record = Record{Last: b.last, First: b.first, Spare: b.spare, Kind: KindBatch, Epoch: s.c.m.Epoch,
		Proxy: s.c.cfg.Proxy, Batch: b.id}
	if b.fence {
		b.record.Kind = KindFence
	}
	live := 0
	var canceled []*write
	for i, w := range b.writes {
		rev := next
		next++
		if w.op.canceled { // since it was closed
			canceled = append(canceled, w)
			b.writes[i] = nil
			continue
		}
		w.rev, w.flat = rev, false
		live++
		w.plan.RecordDeletes(func(key, end []byte) {
			b.record.Deletes = append(b.record.Deletes, RecordDelete{Rev: rev, Key: key, End: end})
		})
	}
	s.c.stats.Batches++
	s.c.stats.BatchedWrites += uint64(live)
	b.mapMod, b.floor = s.mapMod, s.floor()
	b.flat = s.flat.next() && flatten(b.writes, s.c.cfg.MemberMaxTxnOps)
	b.body = s.appendBatch(s.body[:0], b)
	s.body = nil
	b.lastOne = b.lastOne || len(canceled) > 0 // the former's claims lie in their requests, which go back to their owners
	s.sentBytes(len(b.body))
	for _, w := range canceled {
		s.answer(w, statusCanceled)
	}
	s.sendInOrder(b)
}

func (s *shardState) appendBatch(dst []byte, b *batch) []byte {
	return appendBatch(dst, &batchTxn{record: &b.record, mapMod: b.mapMod, floor: b.floor, loss: b.loss,
		noGuard: s.c.cfg.Sabotage.DropGuard || s.c.cfg.Sabotage.FlatTwice && b.again, bareFlat: s.c.cfg.Sabotage.BareFlat}, b.writes)
}

// sendInOrder sends b when it is its turn among the proxies.
func (s *shardState) sendInOrder(b *batch) {
	if s.cur != b || b.state != batchGranted {
		return
	}
	now := s.c.cfg.Now()
	if at := s.c.clock.Log().Earliest(s.idx, b.first, now); at > now {
		if at != b.slotAt {
			b.slotAt = at
			s.c.at(at, func() { s.sendInOrder(b) })
		}
		return
	}
	b.send()
}

func (b *batch) send() {
	b.state = batchSent
	b.s.touch() // those that wait may be enough for the next one
	if b.sentAt == 0 {
		b.sentAt = b.s.c.cfg.Now()
	}
	b.s.call(codec.MethodTxn, b.body, b)
}

// Complete is what became of one copy of b.
func (b *batch) Complete(resp []byte, st codec.Status, sent bool) {
	s := b.s
	c := s.c
	if s.cur != b || b.state != batchSent {
		return // given up, or settled from the stream meanwhile
	}
	switch {
	case st.Code == codec.OK:
		t, ok := parseTxnReply(resp, c.resps)
		c.resps = t.resps[:0]
		if !ok {
			c.fail(fmt.Errorf("member cluster %s gave an answer that is not a TxnResponse", s.name))
			return
		}
		s.expectOnStream(t.rev)
		if t.succeeded {
			s.committed(b, t)
		} else {
			s.rejected(b, t)
		}
	case !sent, st == codec.ErrTooManyRequests && !b.unknown:
		s.retry(b)
	case (definite(st) || b.tooLarge(st) || c.cfg.Sabotage.NoSpaceUnapplied && st == codec.ErrNoSpace) && !b.unknown:
		s.refused(b, st)
	default:
		if st == codec.ErrNoSpace {
			s.noSpace()
		}
		b.unknown = true
		c.stats.LostReplies++
		if c.cfg.Sabotage.AheadUnsettled && s.next != nil {
			s.void(b)
			return
		}
		if b.seenAt > 0 {
			s.recover(b)
			return
		}
		s.retry(b)
	}
}

// definite reports whether a member's error proves that the Txn was not applied. ErrNoSpace is not
// among them: etcd may have applied what it refuses with it.
func definite(st codec.Status) bool {
	switch st.Code {
	case codec.InvalidArgument, codec.NotFound, codec.OutOfRange, codec.PermissionDenied, codec.Unauthenticated:
		return true
	case codec.ResourceExhausted:
		return st.Msg == codec.ErrTooManyRequests.Msg
	}
	return false
}

// tooLarge says that the member's gRPC refused b by its size, which is more than 512 KiB above what etcd accepts. The text names the size: a proxy
// in between says the same of an answer, and then b is applied.
func (b *batch) tooLarge(st codec.Status) bool {
	size, ok := strings.CutPrefix(st.Msg, codec.ReceivedLargerThanMax)
	return ok && st.Code == codec.ResourceExhausted && strings.HasPrefix(size, strconv.Itoa(len(b.body))+" ")
}

func (s *shardState) retry(b *batch) {
	b.state = batchWaiting
	d := min(retryDelay<<min(b.tries, 7), maxRetryDelay)
	b.tries++
	s.c.after(s.c.jitter(d), func() {
		if s.cur == b && b.state == batchWaiting {
			b.send()
		}
	})
}

// committed answers everything in b from the member's reply.
func (s *shardState) committed(b *batch, t txnReply) {
	c := s.c
	s.rejections = 0
	if b.flat {
		s.flat.held()
	}
	s.settledTo = b.last
	if b.loss {
		s.sawCompaction(b.last)
		s.marked = 0
	}
	s.saw(point{b.first, b.last, t.rev})
	s.body = b.body[:0]
	s.lingerBehind(len(b.writes), b.sentAt)
	s.pace.flew(c.cfg.Now() - b.sentAt)
	hdr := c.hdr
	var again []*write
	var learn Learner // of flat requests: nothing if the stream was faster, which shows all of it
	if b.seenAt == 0 {
		learn, s.taught = c.creates, b.last
	}
	i := 0
	for at, w := range b.writes {
		if w == nil {
			continue
		}
		if i >= len(t.resps) {
			c.fail(fmt.Errorf("member cluster %s answered a batch with too few responses", s.name))
			return
		}
		payload := t.resps[i]
		i++
		hdr.Revision = w.rev
		b.writes[at] = nil // from here on somebody else may use it
		var out []byte
		var oc Outcome
		var st codec.Status
		if w.flat {
			out, oc, st = w.plan.AnswerFlat(w.buffer(), payload, hdr, learn)
		} else {
			out, oc, st = w.plan.Answer(w.buffer(), payload, hdr, c.creates)
		}
		if oc != Answered {
			again = append(again, w)
			continue
		}
		s.answerWith(w, out, st)
	}
	s.spareWrites = b.writes[:0]
	s.dropBatch(b)
	for _, w := range again {
		s.again(w)
	}
}

// again brings back a write whose guard failed: what the proxy believed of its keys was wrong. It was
// not applied.
func (s *shardState) again(w *write) {
	if w.once {
		s.answer(w, statusOvertaken)
		return
	}
	s.c.stats.WrongCreates++
	w.rev = 0
	if s.c.cfg.Now()-w.since > int64(s.c.cfg.ShardTimeout) {
		s.answer(w, codec.ErrTimeout)
		return
	}
	if w.plan.HasLease() {
		s.c.resolveAgain(s, w)
		return
	}
	if w.plan.Slow() || !w.plan.Ready() {
		s.lookup(w)
		return
	}
	s.enqueue(w)
}

// rejected is told that the guard failed. That proves b void if exactly one copy of it was ever sent;
// otherwise the stream must show whether its record is there.
func (s *shardState) rejected(b *batch, t txnReply) {
	c := s.c
	var clock, pmap codec.KV
	if len(t.resps) >= 2 {
		clock, _ = firstKV(t.resps[0])
		pmap, _ = firstKV(t.resps[1])
	}
	rec, ok := ParseRecord(clock.Value)
	remapped := pmap.ModRevision != b.mapMod
	if b.flat && ok && b.floor <= rec.Last && rec.Last < b.first && !remapped {
		s.flatFailed(b)
		return
	}
	if b.loss && ok && b.floor <= rec.Last && rec.Last < b.first && !remapped {
		s.lossEnded(b, t.resps[2:])
		return
	}
	c.stats.Rejected++
	if rec.Last < b.floor {
		s.wentBack(rec.Last, b.floor)
		s.retry(b) // this copy was not applied, whatever became of others
		return
	}
	if ok {
		s.saw(point{rec.First, rec.Last, clock.ModRevision})
	}
	if pmap.ModRevision > s.mapMod {
		c.connect("the partition map on member cluster " + s.name + " has changed")
	}
	if !ok || rec.Last < b.first && !remapped {
		c.fail(fmt.Errorf("the clock record on member cluster %s is missing or not readable by this version", s.name))
		return
	}
	if !b.unknown || c.cfg.Sabotage.RetickWithoutLooking {
		s.void(b)
		return
	}
	b.state, b.settleAt = batchSettling, clock.ModRevision
	s.settle(b)
}

// void takes new revisions for everything in b, which certainly was not applied.
func (s *shardState) void(b *batch) {
	s.rejections++
	s.settledTo = b.last
	var ws []*write
	for _, w := range b.writes {
		if w != nil {
			ws = append(ws, w)
		}
	}
	s.dropBatch(b)
	s.requeue(ws)
}

// refused handles an error that proves b unapplied: one request in it is at fault. Alone it gets the
// error; among others each goes by itself.
func (s *shardState) refused(b *batch, st codec.Status) {
	// The range stays open: something must follow it at once, or soon if it is the fence that is refused.
	if s.next != nil {
		// That does.
	} else if b.fence {
		s.c.after(s.c.jitter(20*retryDelay), func() { s.wantFence = true; s.touch() })
	} else {
		s.wantFence = true
	}
	if b.tooLarge(st) && len(b.writes) <= 1 {
		st = codec.ErrRequestTooLarge // to the client its own request is: Spindle's names some keys more often
	}
	s.dropBatch(b)
	if len(b.writes) <= 1 {
		for _, w := range b.writes {
			if w != nil {
				s.answer(w, st)
			}
		}
		if b.fence {
			s.c.log.Warn("a fence was refused", "shard", s.name, "code", st.Code, "err", st.Msg)
		}
		return
	}
	var ws []*write
	for _, w := range b.writes {
		if w != nil {
			w.alone = true
			ws = append(ws, w)
		}
	}
	s.requeue(ws)
}
