package shard

import (
	"slices"
	"strings"
	"time"

	"spindle/codec"
	"spindle/revclock"
)

// This file has a running proxy notice that another one has accepted what a member has lost (accept.go). What this one
// knows of the member may be of the lost time then: where its stream is, what it keeps in the ring, create revisions, answers
// that are under way. Nothing of that may meet the member's new state, and its watches must not be led past what is missing. A start
// has all of that right, so the proxy is started again, within its process, once all clusters answer; its clients connect anew. Until
// then the member is refused.
//
// The fence that ends an acceptance is a clock record in whose Txn the compaction record was put; no other is. So every look
// at a connection (verify.go) reads the compaction record, and if this proxy has not seen that, the clock where it was put:
//
//   - A member that does not hold what is known was accepted if the fence is at or above that, and the clock at or above the
//     floor: else something was lost once more. From then on the fence is what the member has to hold. Without it the member stays
//     refused. A later compaction takes the fence's place; where this proxy has not seen it before, the operator has to start the proxy.
//   - A member that holds what is known may have lost what others know: so it is the fence that counts, too. If it was refused before,
//     and has been compacted since, the fence may be gone: a start decides, which costs little.
//
// While the mark is there nothing is decided.
//
// A look may have passed before the mark was put, of a proxy that lacks only what others know. Its stream shows it the fence then, which
// must not become history either. What is news there, and to a look, is measured by the compaction record with which the shard was taken into
// use: a read may have brought a larger one since, and a shard that returns shows its past once more.

// lookStep is how far the look at a running proxy's connection has come.
type lookStep uint8

const (
	lookWhole lookStep = iota
	lookAside          // what is known is not there: what else is?
	lookFence          // the compaction record is news: is it of an accepted loss?
)

const (
	whyAccepted  = "another proxy has accepted what it had lost"
	whyCompacted = "it was refused, and has been compacted since"
)

// mended says that a start is all that it takes, where a shard is refused for a reason.
func mended(why string) bool { return why == whyAccepted || why == whyCompacted }

const (
	// outdateWithin is the time within which the proxies that have noticed the same start again, each at a moment of its own.
	outdateWithin = time.Second
	// outdateRetry is the mean pause until all clusters are asked again.
	outdateRetry = 500 * time.Millisecond
)

// Outdated says why this proxy is to be started again now, "" if it is not. It serves what it can until then.
func (c *Core) Outdated() string {
	if c.leaving != leaveNow {
		return ""
	}
	return c.outdated
}

// outdate has the proxy started again.
func (s *shardState) outdate(why string) {
	if c := s.c; c.outdated == "" {
		c.outdated = "member cluster " + s.name + ": " + why
		c.log.Warn("what this proxy knows of a member cluster counts no more: it starts again once every cluster answers", "shard", s.name, "why", why)
		c.after(time.Duration(c.cfg.Rand.Int64N(int64(outdateWithin))), c.leaveWhenAllAnswer)
	}
}

// leaveStep is how far a proxy has come that is to be started again.
type leaveStep uint8

const (
	leaveLater leaveStep = iota
	leaveAsks            // every member cluster has answered; the coordinator is asked
	leaveNow
)

// leaveWhenAllAnswer asks every cluster for something, as a start does, which waits for each of them: begun while one is away it would
// make nothing served of one shard that is refused. A shard that is refused has answered the look that says so; they go on.
func (c *Core) leaveWhenAllAnswer() {
	if c.state != stateReady {
		return
	}
	if len(c.lacking()) == 0 {
		c.stay(nil)
	}
	open, all := 1, true
	answered := func(ok bool) {
		all = all && ok
		switch open--; {
		case open > 0:
		case all:
			c.leaveUnlessLast()
		default:
			c.after(c.jitter(outdateRetry), c.leaveWhenAllAnswer)
		}
	}
	for _, s := range c.shards {
		if s.banned == "" {
			open++
			c.tr.Call(s.cluster, codec.MethodRange, codec.AppendString(nil, rangeKey, KeyClock), c.cfg.ShardTimeout, completion(func(_ []byte, st codec.Status, _ bool) {
				answered(st.Code == codec.OK)
			}))
		} else if c.cfg.Now()-s.refusedAt > int64(c.cfg.ShardTimeout) {
			all = false
		}
	}
	answered(true)
}

// leaveUnlessLast asks the coordinator, last of all, so that what it says is as young as it can be when it counts.
//
// A start knows of a member only what the coordinator says. While that has lost its data it would rebuild it from a member that this proxy
// refuses for good reason, so what this proxy knows must not end then: it stays until the coordinator has an epoch again, or the member is
// refused for nothing but what a start is to mend.
func (c *Core) leaveUnlessLast() {
	if c.state != stateReady {
		return
	}
	c.leaving = leaveAsks
	c.tr.Call(codec.Coordinator, codec.MethodTxn, revclock.AppendFoundTxn(nil), c.cfg.ShardTimeout, completion(func(resp []byte, st codec.Status, _ bool) {
		c.leaving = leaveLater
		if c.state != stateReady {
			return
		}
		if f, ok := revclock.ParseFound(resp); st.Code == codec.OK && ok {
			lacking := c.lacking()
			if len(lacking) == 0 || c.believedOnce(&f) {
				c.leaving = leaveNow
				return
			}
			c.stay(lacking)
		}
		c.after(c.jitter(outdateRetry), c.leaveWhenAllAnswer)
	}))
}

// What an operator has to know while this proxy stays.
const (
	stayWhy  = "do not stop this proxy, and start no other one: the coordinator does not hold this system's data any more, and nobody who starts now can know what a refused member cluster lacks"
	stayHelp = "give the member cluster its newest state, and this proxy goes on by itself; if that is gone for good, see Restored members in the README"
)

// stay tells the operator, once, that this proxy must not end while shards lack something; none says that it may.
func (c *Core) stay(lacking []string) {
	why := ""
	if len(lacking) > 0 {
		why = stayWhy + " (" + strings.Join(lacking, ", ") + "); " + stayHelp
	}
	if why == c.staying {
		return
	}
	if c.staying = why; why != "" {
		c.log.Error(stayWhy+". To go on: "+stayHelp, "shards", lacking)
	}
	c.explainRefusals()
}

// believedOnce says that the coordinator has an epoch of this system which somebody has believed.
func (c *Core) believedOnce(f *revclock.Found) bool {
	epoch, err := revclock.ParseEpoch(f.Epoch)
	return err == nil && f.Believed && c.made(epoch)
}

// lacking names the shards that are refused because they lack something which nobody has accepted.
func (c *Core) lacking() (names []string) {
	for _, s := range c.shards {
		if s.banned != "" && !mended(s.banned) {
			names = append(names, s.name)
		}
	}
	return names
}

// readCompaction takes the mark and the compaction record. It returns what the shard is refused for, "" for nothing.
func (k *Check) readCompaction(mark, compact []byte) string {
	k.compact, k.compactAt = -1, 0
	if kv, found := firstKV(compact); found {
		var ok bool
		if k.compact, ok = ParseCompaction(kv.Value); !ok {
			return "it has a compaction record that this version of spindle cannot read: upgrade spindle"
		}
		k.compactAt = kv.ModRevision
	}
	if _, marked := firstKV(mark); marked {
		return "it has the mark of an accepted loss without the fence that ends that: restart a proxy; if that refuses it, too, it was restored from an older backup"
	}
	return ""
}

// goesOn says whether a running proxy has to ask for more, and for what.
func (k *Check) goesOn() bool {
	switch k.step {
	case lookWhole:
		switch {
		case k.why != "":
			k.lacks, k.step = k.why, lookAside
			return true
		case k.compact > k.s.compactOf:
			k.step = lookFence
			return true
		}
	case lookAside:
		if k.why == "" && k.compact >= k.known.last {
			k.step = lookFence
			return true
		}
		k.why = k.lacks
	}
	return false
}

// sawFence takes the clock as it was where the compaction record was put. It returns false if that has told nothing.
func (k *Check) sawFence(resp []byte, st codec.Status) bool {
	k.why = k.lacks
	switch {
	case st == codec.ErrCompacted || st == codec.ErrFutureRev:
		return true
	case st.Code != codec.OK:
		return false
	}
	t, ok := parseTxnReply(resp, nil)
	if !ok || len(t.resps) == 0 {
		return false
	}
	kv, found := firstKV(t.resps[0])
	rec, ok := ParseRecord(kv.Value)
	if found && ok && kv.ModRevision == k.compactAt && rec.Last == k.compact {
		k.why, k.fence = whyAccepted, point{rec.First, rec.Last, k.compactAt}
	}
	return true
}

// lossEndedAt has the fence of an accepted loss count as what is known of a shard, in the place of what is lost: if it holds that, nothing but an
// accepted loss is what it is refused for, also when the compaction record is of a later compaction.
func (s *shardState) lossEndedAt(fence point) {
	if s.lossSeen = true; fence.last >= s.known.last { // else it is from behind the fence
		s.known = fence
	}
}

// endsLoss says that a group is the fence of another proxy that has accepted a loss under this one, which has not noticed. Nothing of
// it counts, and the shard is refused.
func (s *shardState) endsLoss(rec *Record, local int64, events [][]byte) bool {
	c := s.c
	if rec.Kind != KindFence || rec.Proxy == c.cfg.Proxy || rec.Last <= s.compactOf || c.state != stateReady {
		return false
	}
	t, ok := c.tr.(checking)
	if !ok || c.cfg.Sabotage.TrustConnections || !slices.ContainsFunc(events, func(e []byte) bool {
		kv, _, del := eventKVs(e)
		rev, ok := ParseCompaction(kv.Value)
		return string(kv.Key) == KeyCompact && !del && ok && rev == rec.Last
	}) {
		return false
	}
	s.lossEndedAt(point{rec.First, rec.Last, local})
	s.outdate(whyAccepted)
	t.Distrust(s.cluster)
	s.reopen()
	return true
}

// refusedOnce says that a shard which was refused holds all that can be compared, and has been compacted since: its loss may have been
// accepted between.
func (k *Check) refusedOnce() bool {
	return k.running && k.s.banned != "" && (k.compacted || k.compact > k.s.compactRec)
}
