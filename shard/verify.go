package shard

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"spindle/codec"
)

// This file keeps a shard that is not what it was from being used: one that was restored from an older backup or wiped,
// or another cluster at its address. Nothing that such a shard says may reach a client, and nothing may be written to
// it.
//
//   - A process of etcd never goes back to an older state: for that it must be stopped, and with it its connections
//     end. So every new connection to a member is looked at before anything else may use it (Check), the first
//     one of a stream or of a batch that is sent again as any other.
//   - A request that was sent when the shard's clock was known to have been at C is served from a state whose clock is
//     at C or above: a batch's guard demands it (floor), and the answers to reads show their clock. That finds
//     what a look at one connection cannot: an endpoint that leads to a copy, while the shard itself lives on.
//
// What this proxy knows of a shard is the newest record that anything has shown it, in its place (known), and the
// largest clock that any proxy has named in a tick. A shard that does not hold that is refused: its requests fail, others
// go on.

// Verdict is what a Check has come to.
type Verdict uint8

// Verdicts.
const (
	// CheckPassed: the connection may be used.
	CheckPassed Verdict = iota
	// CheckAgain: what AppendRequest writes now has to be sent, at once.
	CheckAgain
	// CheckLater: nothing is known yet. After a moment the connection is to be looked at again.
	CheckLater
	// CheckRefused: the connection must not be used.
	CheckRefused
)

// Check is one look at a new connection to a member cluster. It belongs to the core's goroutine.
type Check struct {
	s     *shardState
	known point // what the shard must hold
	floor int64 // what its clock must be at, at least
	// compacted says that history was compacted behind known: then the clock must be past it.
	compacted bool
	why       string
	// absent says that the shard was left out at the start: what is known of it is what the coordinator says, so its map is
	// read, too.
	absent  bool
	at      point // where an absent shard is
	mapMod  int64
	compact int64 // its compaction record, -1 for none
	// running says that this proxy serves the shard, or did: see outdated.go.
	running   bool
	step      lookStep
	lacks     string // why the shard is not what it was
	compactAt int64  // local revision of the compaction record
	fence     point  // of an accepted loss, if that is what the record is of
}

// checking is a Transport that looks at each new connection before it is used.
type checking interface {
	// CheckWith sets what makes a Check for a new connection; nil says that there is nothing to look at.
	CheckWith(func(codec.ClusterID) *Check)
	// Distrust takes all connections to a cluster out of use until they were looked at again.
	Distrust(codec.ClusterID)
}

// looking is a Transport that may have several ways to a cluster: it says whether another one than that which is judged
// is being looked at. Then the first answer does not decide for the shard.
type looking interface{ Looking(codec.ClusterID) bool }

// astrayLogs is how often the log is told of an endpoint that leads to something else.
const astrayLogs = 10 * time.Second

// NewCheck begins a look at a new connection. It returns nil if it may be used as it is: the coordinator has ways
// of its own (connect.go), and before the partition map was read nothing is known.
func (c *Core) NewCheck(to codec.ClusterID) *Check {
	if c.cfg.Sabotage.TrustConnections {
		return nil
	}
	for _, s := range c.shards {
		if s.cluster == to {
			absent := s.absent != ""
			return &Check{s: s, known: s.known, floor: s.floor(), absent: absent, running: !absent && c.state == stateReady}
		}
	}
	return nil
}

// AppendRequest appends the Txn that is sent. It is linearizable, so a node that lags comes up to the present first, and
// one without a quorum does not answer.
func (k *Check) AppendRequest(dst []byte) []byte {
	if k.step == lookFence {
		return appendGet(dst, txnSuccess, KeyClock, k.compactAt)
	}
	dst = appendGet(dst, txnSuccess, KeyID, 0)
	dst = appendGet(dst, txnSuccess, KeyClock, 0)
	if k.absent {
		dst = appendGet(dst, txnSuccess, KeyMap, 0)
	}
	if k.absent || k.running {
		dst = appendGet(dst, txnSuccess, KeyLoss, 0)
		dst = appendGet(dst, txnSuccess, KeyCompact, 0)
	}
	if k.holds() {
		dst = appendGet(dst, txnSuccess, KeyClock, k.known.local)
	}
	return dst
}

// holds says that the shard must hold the record that is known.
func (k *Check) holds() bool {
	return !k.compacted && k.step == lookWhole && (k.known.local > 0 || !k.absent)
}

// Judge takes the answer.
func (k *Check) Judge(resp []byte, st codec.Status) Verdict {
	s := k.s
	c := s.c
	switch {
	case c.state != stateReady && c.state != stateStarting, s.idx >= len(c.shards) || c.shards[s.idx] != s, k.absent != (s.absent != ""), k.absent && !k.certain():
		return CheckLater
	case k.step == lookFence:
		if !k.sawFence(resp, st) {
			return CheckLater
		}
	case st == codec.ErrCompacted && !k.compacted:
		k.compacted = true
		return CheckAgain
	case st == codec.ErrFutureRev:
		k.why = fmt.Sprintf("its own revision has been %d and is below that now: it was restored from an older backup or wiped, or is another cluster", k.known.local)
	case st.Code != codec.OK:
		return CheckLater
	default:
		k.why = k.differs(resp)
	}
	if k.running && k.goesOn() {
		return CheckAgain
	}
	switch {
	case k.why != "" || !k.running:
	case s.lossSeen:
		k.why = whyAccepted
	case k.refusedOnce():
		k.why = whyCompacted
	}
	switch {
	case k.why == "" && k.absent && k.at.last < s.floor():
		return CheckLater // more has become known meanwhile
	case k.why == "" && k.absent:
		s.returned(k)
		return CheckPassed
	case k.why == "":
		s.accept()
		return CheckPassed
	}
	banned := s.refuse(k.why)
	if mended(k.why) && (banned || k.lacks == "") { // not for a copy that some endpoint leads to, beside the shard
		if banned && k.fence.local > 0 && s.absent == "" {
			s.lossEndedAt(k.fence)
		}
		s.outdate(k.why)
	}
	return CheckRefused
}

// certain says whether it is known what an absent shard has to be compared with: an epoch is believed; or it waits for that shard,
// and what was believed last counts.
func (k *Check) certain() bool {
	c := k.s.c
	if c.connecting == nil {
		return c.state == stateReady
	}
	return c.connecting.stands
}

// Why says why the connection is refused.
func (k *Check) Why() string { return k.why }

// differs says in what the shard is not what it was, "" if it is.
func (k *Check) differs(resp []byte) string {
	t, ok := parseTxnReply(resp, nil)
	if !ok || len(t.resps) < 2 {
		return "it does not speak etcd's protocol"
	}
	kv, found := firstKV(t.resps[0])
	id, ok := ParseIdentity(kv.Value)
	switch {
	case !found:
		return "it has lost everything: it was wiped, or its address leads to another cluster"
	case !ok || id != k.s.c.m.Shards[k.s.idx].Identity:
		return "it has another identity: its address leads to another cluster, or it was set up anew"
	}
	kv, found = firstKV(t.resps[1])
	rec, ok := ParseRecord(kv.Value)
	if !found || !ok || rec.Last < max(k.floor, k.known.last) || k.step == lookWhole && kv.ModRevision < k.known.local {
		return fmt.Sprintf("it has been at revision %d and is at %d: it was restored from an older backup", max(k.floor, k.known.last), rec.Last)
	}
	rest := t.resps[2:]
	want := 0
	if k.absent {
		want++
	}
	if k.absent || k.running {
		want += 2
	}
	if k.holds() {
		want++
	}
	if len(rest) < want {
		return "it does not speak etcd's protocol"
	}
	if k.running {
		if why := k.readCompaction(rest[0], rest[1]); why != "" {
			return why
		}
		rest = rest[2:]
	}
	if k.absent {
		c := k.s.c
		k.at = point{rec.First, rec.Last, kv.ModRevision}
		if why := k.readCompaction(rest[1], rest[2]); why != "" {
			return why
		}
		kv, _ = firstKV(rest[0])
		rest = rest[3:]
		k.mapMod = kv.ModRevision
		// At a start that waits none is believed: there the look that follows compares the maps.
		started := c.boot == nil || c.boot.started
		if m, err := ParseMap(kv.Value); err != nil || !m.SameShards(c.m) || started && m.Epoch != c.m.Epoch {
			return "its partition map is missing, or not of the coordinator's epoch: it was restored from an older backup"
		}
	}
	if !k.holds() {
		return ""
	}
	kv, found = firstKV(rest[0])
	if rec, ok = ParseRecord(kv.Value); !found || !ok || rec.Last != k.known.last || kv.ModRevision != k.known.local {
		return fmt.Sprintf("it has been at revision %d and does not hold that any more: it was restored from an older backup", k.known.last)
	}
	return ""
}

// saw notes a record of the shard and its place, from whatever has shown it.
func (s *shardState) saw(p point) {
	if p.local > s.known.local && s.absent == "" && (!s.lossSeen || p.last > s.known.last) { // then an answer may be of the lost time, and come late
		s.known = p
		if s.lossy && s.c.connecting == nil && p.last >= s.c.clock.Log().C(s.idx) {
			s.lossy = false // its clock is at least where it has been
		}
		if s.c.state == stateReady {
			s.c.armNaming()
		}
	}
}

// floor returns a revision at or above which the shard's clock is, if it is what it was.
func (s *shardState) floor() int64 {
	c := s.c
	if c.cfg.Sabotage.TrustConnections {
		return 0
	}
	seen := s.named
	if c.connecting == nil { // else the log may be of another coordinator
		seen = c.clock.Log().C(s.idx)
	}
	if s.lossy || c.state == stateStarting && slices.Contains(c.cfg.AcceptDataLoss, c.cfg.Names[s.cluster]) {
		return s.known.last
	}
	return max(s.known.last, seen)
}

// accept says that a connection has shown the shard to be what it was. A stream that waits to be opened again need not
// wait any more.
func (s *shardState) accept() {
	c := s.c
	if s.returning {
		return // until its stream is open
	}
	if s.banned != "" {
		c.log.Info("a member cluster is accepted again", "shard", s.name)
		s.banned = ""
		c.explainRefusals()
		s.touch()
	}
	if gen := s.gen; s.reopening {
		c.after(0, func() { s.openAgain(gen) })
	}
}

// refuse says that a connection leads to something else. If no other one is in use or being looked at, nothing is asked of the shard until one
// has passed; it returns true then.
func (s *shardState) refuse(why string) bool {
	c := s.c
	s.refusedAt = c.cfg.Now()
	l, ok := c.tr.(liveness)
	t, others := c.tr.(looking)
	if ok && l.Connected(s.cluster) || others && t.Looking(s.cluster) {
		if now := c.cfg.Now(); s.astray == 0 || now-s.astray > int64(astrayLogs) {
			s.astray = now // its connection is made anew all the time, and the revisions in why change
			c.log.Error("an endpoint of a member cluster leads to something else, and is not used", "shard", s.name, "why", why)
		}
		return false
	}
	s.ban(why)
	if k := c.connecting; k != nil && s.absent == "" && (s.returning && s.rec.local == 0 || c.boot != nil && !c.boot.started) {
		// The others do not wait for it. What it has shown it must still hold.
		known := s.known
		s.forget(why)
		s.known = known
		if !c.allRefused() {
			k.again()
		}
	}
	return true
}

// ban fails the shard's requests.
func (s *shardState) ban(why string) {
	c := s.c
	if (s.banned == "" || mended(s.banned)) && !mended(why) { // of what a start mends, outdate tells
		c.log.Error("a member cluster is refused; requests for it fail, others go on. Restore its newest state; or, to accept what is lost, stop every proxy and start one with --accept-data-loss="+c.cfg.Names[s.cluster],
			"shard", s.name, "why", why)
	}
	s.banned = why
	c.nameClock(s) // others may not know what this proxy does
	c.explainRefusals()
	s.touch()
}

// explainRefusals says which shards are refused, for Ready, and if this proxy must not end for their sake.
func (c *Core) explainRefusals() {
	c.refusals = ""
	for _, s := range c.shards {
		if s.banned != "" {
			c.refusals += "member cluster " + s.name + " is refused: " + s.banned + "\n"
		}
	}
	c.refusals = strings.TrimSuffix(c.refusals+c.staying, "\n")
}

// wentBack is told that an answer has shown a clock below what was known when its request was sent.
func (s *shardState) wentBack(clock, known int64) {
	c := s.c
	c.log.Error("an answer of a member cluster is older than what it has shown before; all connections to it are looked at", "shard", s.name, "clock", clock, "was", known)
	if t, ok := c.tr.(checking); ok {
		t.Distrust(s.cluster)
	}
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
	if b := s.next; b != nil { // no byte of it was sent; its range is passed by an empty batch
		queue = append(b.writes, queue...)
		b.writes, b.fence = nil, true
	}
	for _, w := range queue {
		if w != nil {
			s.answer(w, st)
		}
	}
	for i := range reads {
		reads[i].fail(s, st)
	}
	return true
}
