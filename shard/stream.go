package shard

import (
	"fmt"
	"slices"
	"sort"
	"time"

	"spindle/codec"
	"spindle/revclock"
)

// This file reads a shard's watch stream: the whole keyspace, once per proxy, with prev_kv. All events
// of one local revision arrive together. With a clock record among them they are a batch, and each has
// its revision; without one they wait for the next record on this shard and take its first revision.

// point says that the shard's record at local revision Local ended at revision Last.
type point struct {
	first, last int64
	local       int64
}

// maxReopenDelay bounds the pause before a stream that ended is opened again.
const maxReopenDelay = time.Second

// maxPoints bounds the index of (revision, local revision) points a shard; older ones are looked up in
// the clock key's history.
const maxPoints = 1 << 15

// shardState is what a Core keeps of one shard.
type shardState struct {
	c       *Core
	idx     int // in the map
	cluster codec.ClusterID
	name    string
	mapMod  int64 // local mod revision of \0map

	// Writes.
	queue       []*write
	cur         *batch
	next        *batch // closed behind cur, and not sent before that is settled: ahead.go; nil if cur is
	pace        pace
	linger      linger
	former      former
	spareWrites []*write
	diverted    []diverted // scratch
	body        []byte
	batchID     uint64
	rejections  int
	flat        flatForm
	wantFence   bool
	absent      string // why it was left out at the start, and was not taken in since
	begun       bool   // its stream was opened once
	returning   bool   // it was left out at the start and is what it was again, but its stream was not opened
	named       int64  // the largest C_i of epochs that were believed before
	lossy       bool   // it was behind at the start, and the operator accepts that
	accepted    bool   // what it has lost is accepted at this start
	marked      int64  // local revision of the mark that says so, until the fence that ends it is seen
	mark        LossMark
	banned      string // why it is not the shard that it was
	refusedAt   int64  // ns; when a look at it has last come to that
	astray      int64  // ns; when the log was told last that one of its endpoints is not used
	known       point  // the newest record that anything has shown, for verify.go
	unnamed     int64  // its last revision when armNaming was called
	offline     bool   // without a connection when last looked at; a timer looks again
	expiring    bool
	lagLook     bool // one is under way, see stream_look.go
	quota       quota
	quotaLooks  bool   // one is under way
	quotaSoon   bool   // the next is less than quotaLookNear away
	quotaTurn   uint64 // of looks: an earlier timer is ignored
	settledTo   int64  // a batch of ours that ends here was decided on the shard: all before it is, too
	taught      int64  // a batch of ours that ends here has told the cache of create revisions what it put

	// Reads.
	reads         []readItem
	readsInFlight int
	patience      patience
	largePatience patience
	readItems     int // in them

	compactRec int64 // this shard's compaction record, -1 for none
	compactOf  int64 // the one with which it was taken into use: a loss that was accepted since has a larger one
	lossSeen   bool  // the fence of that was seen: it is refused until this proxy starts again

	// The stream.
	handle         codec.WatchHandle
	gen            uint64 // of the stream: a sink of an older one is ignored
	reopening      bool   // it waits to be opened again
	streaming      bool   // the stream has reached what the start saw
	rec            point  // the last record seen
	pos            int64  // local revision up to which everything was seen
	lastUnrecorded int64  // newest local revision at which a client's key changed without a record
	from           int64  // where the stream begins, if history was compacted behind rec; 0: behind rec
	torn           bool   // changes without a record were lost in that compaction
	pending        []pendingEvent
	pendingBytes   int
	foreign        foreignKeys
	found          map[string]int64 // foreign values that reads met: key and local revision
	rewrites       map[string]*rewrite
	rewriteTimer   bool
	foreignWarned  int64 // ns
	points         []point
	partial        [][]byte // events of a local revision that the next fragment may go on with; copies
	held           [][]byte // messages that wait for the ring to have room
	ahead          int64    // first revision of the record that waits for room in the ring, 0 for none
	holding        bool
	holdUntil      int64 // ns; then those that stand in the way do not count any more
	waits          point // the record that is held: its revisions
	heard          bool  // the stream has brought something since it was opened
	late           bool  // it was waited for in vain; until its next record nobody waits for it
	furthest       int64 // the largest pos there was
	reopens        int   // in a row, without a record
	stall          stall // what the stream lacks
	openTimer      int64
	pendingTimer   bool
	lease          leaseShard
	window         int64 // this shard's reorder window, ns
}

// pendingEvent is an event that waits for the record that gives it a revision. Its bytes are its own.
type pendingEvent struct {
	msg   []byte // the encoded mvccpb.Event
	local int64
}

// streamSink is one opening of a shard's stream.
type streamSink struct {
	s   *shardState
	gen uint64
}

// openStream begins the stream behind the record at rec.
func (s *shardState) openStream() {
	s.heard, s.partial, s.stall.opened = false, nil, s.c.cfg.Now()
	s.gen++
	s.reopening = false
	s.clearPending()
	s.held, s.holding, s.ahead = nil, false, 0
	start := max(s.rec.local+1, s.from)
	s.foreign.rewind()
	s.pos = start - 1
	s.handle = s.c.tr.Watch(s.cluster, watchAll(start), &streamSink{s, s.gen})
	s.watchStall()
}

// watchAll is the WatchRequest for a member's whole keyspace from a local revision on, with prev_kv. It asks for
// fragments: without them etcd puts up to a thousand local revisions into one message, which may be larger than
// any message that is taken.
func watchAll(start int64) []byte {
	req, m := codec.BeginMessage(nil, 1)
	req = codec.AppendString(req, 1, "\x00")
	req = codec.AppendString(req, 2, "\x00")
	req = codec.AppendInt(req, 3, start)
	req = codec.AppendBool(req, 6, true)
	req = codec.AppendBool(req, 8, true)
	return codec.EndMessage(req, m)
}

func (k *streamSink) OnEnd(st codec.Status) {
	s := k.s
	if k.gen != s.gen || s.c.state == stateFailed || s.c.state == stateClosed {
		return
	}
	if s.c.cfg.Now()-s.stall.opened >= int64(lastingStream) {
		s.reopens = 0
	}
	if s.reopens == 0 {
		s.c.log.Warn("watch stream of a member cluster ended; opening it again until it lasts", "shard", s.name, "code", st.Code, "err", st.Msg)
	}
	s.reopen()
}

// reopen opens the stream again, from the last record on: what waited for a record comes again.
func (s *shardState) reopen() {
	if s.handle != nil {
		s.handle.Close()
		s.handle = nil
	}
	s.gen++
	s.c.stale = true // it holds no other shard back any more
	gen := s.gen
	d := min(retryDelay<<min(s.reopens, 10), maxReopenDelay)
	s.reopens++
	s.reopening = true
	s.c.after(s.c.jitter(d), func() { s.openAgain(gen) })
}

// lookupForeign opens the stream again when it is known what foreign values have replaced.
func (s *shardState) lookupForeign() {
	if s.handle != nil {
		s.handle.Close()
		s.handle = nil
	}
	s.gen++
	gen := s.gen
	s.held, s.holding = nil, false // it comes again
	s.c.frontierRose, s.c.stale = true, true
	s.foreign.lookup(s, func() {
		if gen == s.gen && (s.c.state == stateReady || s.c.state == stateStarting) {
			s.openStream()
		}
	})
}

func (k *streamSink) OnMessage(msg []byte) {
	s := k.s
	if k.gen != s.gen {
		return
	}
	s.heard = true
	if len(s.held) > 0 {
		s.held = append(s.held, append([]byte(nil), msg...))
		return
	}
	s.take(msg)
}

// take works through one WatchResponse, and keeps what the ring has no room for.
func (s *shardState) take(msg []byte) {
	it := codec.Fields{Msg: msg}
	var events [][]byte
	var compacted int64
	var canceled, fragment bool
	var reason string
	for it.Next() {
		switch it.Field.Num {
		case 4:
			canceled = it.Field.Val != 0
		case 5:
			compacted = int64(it.Field.Val)
		case 6:
			reason = string(it.Field.Bytes)
		case 7:
			fragment = it.Field.Val != 0
		case 11:
			events = append(events, it.Field.Bytes)
		}
	}
	if it.Bad {
		s.c.fail(fmt.Errorf("member cluster %s sent a watch response that cannot be read", s.name))
		return
	}
	if canceled {
		if compacted > 0 {
			s.compactedUnder(compacted)
			return
		}
		s.c.log.Warn("watch was canceled by the member, opening it again", "shard", s.name, "reason", reason)
		s.reopen()
		return
	}
	if len(events) > 0 {
		s.stall.brought = s.c.cfg.Now()
	}
	if fragment || len(s.partial) > 0 {
		events = s.complete(events, fragment)
	}
	gen := s.gen
	for len(events) > 0 {
		local, n := eventLocal(events[0]), 1
		for n < len(events) && eventLocal(events[n]) == local {
			n++
		}
		if !s.group(local, events[:n]) {
			s.hold(events)
			return
		}
		if gen != s.gen { // the group made the Core give the stream up
			return
		}
		events = events[n:]
	}
}

// complete returns the events that are complete after a message, behind what earlier fragments left: those of
// its last local revision may go on in the next fragment. What is kept is bounded by what one local revision
// changes, which the ring takes as a whole anyway.
func (s *shardState) complete(events [][]byte, fragment bool) [][]byte {
	kept := len(s.partial)
	all := append(s.partial, events...)
	s.partial = nil
	if !fragment || len(all) == 0 {
		return all
	}
	local, n := eventLocal(all[len(all)-1]), len(all)
	for n > kept && eventLocal(all[n-1]) == local {
		n--
	}
	if n == kept && kept > 0 && eventLocal(all[0]) == local {
		n = 0
	}
	for i := max(n, kept); i < len(all); i++ {
		all[i] = append([]byte(nil), all[i]...)
	}
	if s.partial = all; n > 0 {
		s.partial = slices.Clone(all[n:])
	}
	return all[:n]
}

// eventLocal returns the local mod revision of an encoded mvccpb.Event.
func eventLocal(ev []byte) int64 {
	it := codec.Fields{Msg: ev}
	for it.Next() {
		if it.Field.Num == 2 {
			kv, _ := codec.ParseKV(it.Field.Bytes)
			return kv.ModRevision
		}
	}
	return 0
}

// group takes all events of one local revision. It returns false when the ring has no room for them.
func (s *shardState) group(local int64, events [][]byte) bool {
	c := s.c
	if local <= s.pos {
		return true // seen before the stream was opened again
	}
	var rec Record
	var has bool
	for i := len(events) - 1; i >= 0 && !has; i-- { // a batch puts it last
		kv, _, del := eventKVs(events[i])
		if string(kv.Key) != KeyClock {
			continue
		}
		if del {
			c.fail(fmt.Errorf("the clock key on member cluster %s was deleted by somebody else: restore it from a backup of the member, or set the cluster up anew", s.name))
			return true
		}
		var ok bool
		if rec, ok = ParseRecord(kv.Value); !ok {
			c.fail(fmt.Errorf("member cluster %s holds a clock record that this version cannot read: upgrade spindle, or see who writes there", s.name))
			return true
		}
		has = true
	}
	if !has {
		gen := s.gen
		if s.unrecorded(local, events); gen != s.gen {
			return true
		}
		s.pos, s.furthest = local, max(s.furthest, local)
		s.c.leases.streamMoved(s)
		return true
	}
	if s.endsLoss(&rec, local, events) {
		return true
	}
	if at := (point{first: rec.First, last: rec.Last}); !s.roomFor(at) && !(s.jumpTo(rec.First) && s.roomFor(at)) {
		s.waits = at
		// There is no room for it, but it says that nothing below its first revision will come. Without
		// this the shard would wait for the frontier that it holds back itself.
		if l := c.clock.Log(); (rec.Kind != KindRebuild || s.overtaken()) && l.Clock(s.idx) < rec.First-1 {
			l.SetClock(s.idx, rec.First-1)
			c.stale = true
		}
		return false
	}
	s.ahead = 0
	if !s.publish(&rec, events) {
		return true
	}
	s.pos, s.furthest = local, max(s.furthest, local)
	s.recorded(local, &rec)
	s.c.leases.streamMoved(s)
	return true
}

// unrecorded keeps a local revision without a clock record.
func (s *shardState) unrecorded(local int64, events [][]byte) {
	for _, e := range events {
		kv, prev, del := eventKVs(e)
		if len(kv.Key) == 0 || kv.Key[0] == 0 {
			s.reservedChanged(kv, prev, del)
			continue
		}
		s.lastUnrecorded = local
		s.c.stats.Unrecorded++
		if !del || prev.Key != nil && prev.Lease == 0 {
			s.sawForeign(kv.Key, del)
		}
		if ev := s.foreign.waits(e); ev != nil {
			s.addPending(ev, local)
		}
	}
	if len(s.foreign.unknown) > 0 {
		s.lookupForeign()
		return
	}
	s.armPending()
	s.armRewrites(fenceJitter)
}

// reservedChanged looks at a change of one of Spindle's own keys.
func (s *shardState) reservedChanged(kv, prev codec.KV, del bool) {
	switch string(kv.Key) {
	case KeyCompact:
		if rev, ok := ParseCompaction(kv.Value); ok && !del {
			s.sawCompaction(rev)
		}
	case KeyLoss:
		if del && kv.ModRevision > s.marked {
			s.marked = 0
		}
	case KeyMap:
		if kv.ModRevision > s.mapMod {
			s.c.connect("the partition map on member cluster " + s.name + " has changed")
		}
	default:
		if x, ok := ParseLeaseKey(kv.Key); ok && del {
			s.c.leases.keyGone(s, x, kv.ModRevision, prev)
		}
	}
}

// eventKVs reads an encoded mvccpb.Event.
func eventKVs(ev []byte) (kv, prev codec.KV, del bool) {
	it := codec.Fields{Msg: ev}
	for it.Next() {
		switch it.Field.Num {
		case 1:
			del = it.Field.Val == 1
		case 2:
			kv, _ = codec.ParseKV(it.Field.Bytes)
		case 3:
			prev, _ = codec.ParseKV(it.Field.Bytes)
		}
	}
	return kv, prev, del
}

// recorded moves the shard's clock to rec, after its events are in the ring.
func (s *shardState) recorded(local int64, rec *Record) {
	c := s.c
	s.rec = point{rec.First, rec.Last, local}
	s.saw(s.rec)
	s.reopens, s.stall.times, s.late = 0, 0, false
	if len(s.points) >= maxPoints {
		s.points = append(s.points[:0], s.points[len(s.points)/2:]...)
	}
	s.points = append(s.points, s.rec)
	s.clearPending()
	if s.torn {
		// They have this record's first revision.
		c.noteTorn(rec.First)
	}
	s.from, s.torn = 0, false
	c.clock.Log().Committed(s.idx, rec.First, rec.Last, rec.Proxy)
	c.maxClock = max(c.maxClock, rec.Last)
	c.stale = true
	c.probeClock(rec.Last)
	if rec.Proxy == c.cfg.Proxy {
		s.sawOwnRecord(rec.Batch, local)
	}
	if b := s.cur; b != nil {
		switch b.state {
		case batchGranted:
			s.sendInOrder(b)
		case batchSettling:
			s.settle(b)
		}
	}
	if c.boot != nil {
		c.boot.streamMoved(s)
	}
}

// clockLag is how long the coordinator's watch may lack the tick of a record that a stream has shown.
const clockLag = 500 * time.Millisecond

// probeClock notices a coordinator's watch that has gone silent: a record was faster than its tick, and
// stays so. A now tells the clock what it lacks.
func (c *Core) probeClock(last int64) {
	if c.probing || last <= c.clock.Log().N() {
		return
	}
	c.probing = true
	c.after(clockLag, func() {
		c.probing = false
		if c.state == stateReady && last > c.clock.Log().N() {
			c.clock.Now()
		}
	})
}

// localAt returns the newest record at or below rev that the index knows, and the one after it if there
// is one. ok is false when the index does not reach back so far.
func (s *shardState) localAt(rev int64) (base point, next point, ok bool) {
	n := sort.Search(len(s.points), func(i int) bool { return s.points[i].last > rev })
	if n == 0 {
		return point{}, point{}, false
	}
	base = s.points[n-1]
	if n < len(s.points) {
		next = s.points[n]
	}
	return base, next, true
}

// watchOpenRanges fences ranges that stay open: an own one that nobody uses at once, another proxy's
// when the reorder window has passed.
func (s *shardState) watchOpenRanges() {
	c := s.c
	open := c.clock.Log().Open(s.idx)
	if len(open) == 0 || s.wantFence {
		return
	}
	oldest := &open[0]
	if s.next != nil { // it comes behind all of them, or is the last of them
		if b := s.cur; b.seenAt > 0 && b.state == batchSent && s.windowOver(oldest) {
			s.recover(b) // its record was seen, its reply keeps the next one
		}
		return
	}
	if b := s.cur; b != nil {
		// A batch of ours is on its way: it settles everything before it.
		if b.state == batchTicking || b.first >= oldest.First {
			return
		}
	}
	if oldest.Last <= s.settledTo {
		return // a batch of ours above it was decided: the stream only has to show it
	}
	if oldest.Holder == c.cfg.Proxy {
		s.wantFence = true
		s.touch()
		return
	}
	if s.windowOver(oldest) {
		s.wantFence = true
		s.touch()
	}
}

// windowOver says that a range has been open for as long as the reorder window, and has the ranges looked at again when it will have been.
func (s *shardState) windowOver(r *revclock.Range) bool {
	c := s.c
	due, now := r.Seen+s.window, c.cfg.Now()
	if now >= due {
		return true
	}
	if s.openTimer <= now {
		s.openTimer = due
		c.at(due, func() { c.stale = true })
	}
	return false
}

// compactedUnder handles that the member compacted what the stream was to read: somebody else did, or
// this proxy was away for long. Everything up to there is gone for watchers.
func (s *shardState) compactedUnder(local int64) {
	s.c.log.Warn("history was compacted on the member before it was read here; watchers behind are canceled", "shard", s.name)
	s.c.restartStreamAt(s, local)
}

// stop ends everything of the shard with st.
func (s *shardState) stop(st codec.Status) {
	s.gen++
	if s.handle != nil {
		s.handle.Close()
		s.handle = nil
	}
	queue, closed, reads := s.queue, [...]*batch{s.cur, s.next}, s.reads
	s.queue, s.cur, s.next, s.reads = nil, nil, nil, nil
	for _, w := range queue {
		s.answer(w, st)
	}
	for _, b := range closed {
		if b == nil {
			continue
		}
		for _, w := range b.writes {
			if w != nil {
				s.answer(w, st)
			}
		}
	}
	for _, r := range reads {
		r.fail(s, st)
	}
}
