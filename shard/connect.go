package shard

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"spindle/codec"
	"spindle/revclock"
)

// connecting is a Core's way to an epoch that it may believe in, at its start and whenever the coordinator is not
// the one that it knew (DESIGN section 3, "Lost coordinator"):
//
//	look     the clock and the map of every shard are read; a shard that does not answer is waited for
//	believe  if all maps name one epoch, the coordinator is read after them: it is believed if it has that epoch
//	         and is not behind any clock
//	examine  else everything that the coordinator holds is read. If it is not empty somebody may be
//	         rebuilding it: then look again for a moment, and see whether that goes on
//	rebuild  else it is rebuilt (rebuild.go), and everything is looked at again: its maker does not believe a
//	         new epoch before every map names it, either
//
// Until then nothing is ticked: writes and linearizable reads wait, up to the shard timeout. What is below the
// frontier stays readable, and batches that were sent are settled as ever.
type connecting struct {
	c     *Core
	why   string
	begun int64  // ns
	turn  uint64 // answers that belong to an older one are ignored
	looks []look
	open  int // looks that are not answered
	phase connectPhase
	told  string // what the log was told last

	found  *revclock.Found // what is to be replaced
	sign   string          // what the coordinator and the maps were like when last examined,
	since  int64           // since when,
	until  int64           // and until when somebody else may change it
	wrong  string          // why the coordinator cannot be used at all
	mute   string          // why it did not answer
	now    *rebuild
	stands bool        // it waits for shards that are refused
	sure   bool        // the epoch was believed by somebody: shards that are refused may be left out
	known  revclock.ID // an epoch that was believed before the present looks began
	trust  revclock.ID // planted bugs: an epoch that is believed whatever the maps say
}

type connectPhase uint8

const (
	phaseLook connectPhase = iota
	phaseBelieve
	phaseExamine
	phaseReplace
	phaseFence
)

// Times of connecting.
const (
	// rebuildPatience is the mean time for which whoever is rebuilding may do nothing before another proxy takes over.
	rebuildPatience = 150 * time.Millisecond
	// lookAgain is the mean pause between two looks while somebody else rebuilds.
	lookAgain = 20 * time.Millisecond
	// refusedPause is the mean pause between two looks at a coordinator, or a member, that cannot be used.
	refusedPause = time.Second
	// connectCall bounds one request of connecting.
	connectCall = 2 * time.Second
)

// look is what one shard shows. It is the Completion of its read.
type look struct {
	k        *connecting
	turn     uint64
	s        *shardState
	answered bool
	out      bool // the shard is refused, and left out
	err      string
	rec      Record
	local    int64 // of the record
	m        *Map
	mapMod   int64
}

// connect begins to look for an epoch to believe in, unless that is going on.
func (c *Core) connect(why string) {
	if c.connecting != nil || c.state == stateFailed || c.state == stateClosed {
		return
	}
	c.knownN = max(c.knownN, c.clock.Log().N())
	for i, s := range c.shards {
		s.named = max(s.named, c.clock.Log().C(i))
	}
	c.clock.Stop()
	k := &connecting{c: c, why: why, begun: c.cfg.Now(), looks: make([]look, len(c.shards))}
	c.connecting = k
	if c.state == stateReady {
		c.log.Warn("the coordinator cannot be believed any more: reading it and all member clusters anew; writes and linearizable reads wait", "why", why)
	}
	for _, s := range c.shards {
		s.untick()
	}
	k.look()
}

// untick brings back what waits for revisions, or has revisions and was not sent: they belong to an epoch that
// is over.
func (s *shardState) untick() {
	for _, b := range [...]*batch{s.next, s.cur} { // the first one's writes stand in front then
		if b != nil && (b.state == batchTicking || b.state == batchGranted) {
			s.takeBack(b)
		}
	}
}

func (s *shardState) takeBack(b *batch) {
	if s.next == b {
		s.next = nil
		s.cur.lastOne = true // the former does not know any more what it may write
	}
	ws := slices.DeleteFunc(b.writes, func(w *write) bool { return w == nil })
	b.writes = nil
	s.wantFence = s.wantFence || b.fence
	s.dropBatch(b)
	s.requeue(ws)
}

// live says that an answer belongs to what is going on.
func (k *connecting) live(turn uint64) bool {
	return k.c.connecting == k && k.turn == turn && k.c.state != stateFailed && k.c.state != stateClosed
}

// waitingFor says what it is that connecting waits for.
func (k *connecting) waitingFor() string {
	if k.wrong != "" {
		return k.wrong
	}
	for i := range k.looks {
		if l := &k.looks[i]; k.phase == phaseLook && !l.answered && !l.out && l.err != "" {
			return "the coordinator is to be read anew, and that needs every shard: waiting for " + strings.Join(k.missing(), ", ")
		}
	}
	switch {
	case k.phase == phaseFence && k.now != nil:
		return "rebuilding the coordinator: waiting for " + strings.Join(k.now.missing(), ", ")
	case k.phase == phaseBelieve && k.c.clock.LastError() != "":
		return "waiting for the coordinator: " + k.c.clock.LastError()
	case k.mute != "":
		return "waiting for the coordinator: " + k.mute
	}
	return "waiting for the coordinator (" + k.why + ")"
}

// missing names the shards that have not answered.
func (k *connecting) missing() (names []string) {
	for i := range k.looks {
		if l := &k.looks[i]; !l.answered && !l.out {
			names = append(names, memberAnd(l.s, l.err))
		}
	}
	return names
}

// lacks says that a shard has been asked for something and has not answered.
func (k *connecting) lacks(s *shardState) bool {
	switch {
	case k.phase == phaseLook:
		return !k.looks[s.idx].answered && (k.looks[s.idx].out || k.looks[s.idx].err != "")
	case k.phase == phaseFence && s.idx < len(k.now.fences):
		return !k.now.fences[s.idx].done && k.now.fences[s.idx].err != ""
	}
	return false
}

func memberAnd(s *shardState, err string) string {
	if err == "" {
		return "member cluster " + s.name
	}
	return "member cluster " + s.name + " (" + err + ")"
}

// tell logs what is waited for when that has changed.
func (k *connecting) tell() {
	if s := k.waitingFor(); s != k.told && k.c.state == stateReady {
		k.told = s
		k.c.log.Warn("not serving writes and linearizable reads", "why", s)
	}
}

// lookLater looks again after d, or so.
func (k *connecting) lookLater(d time.Duration) {
	turn := k.turn
	k.found = nil
	k.c.after(k.c.jitter(d), func() {
		if k.live(turn) {
			k.look()
		}
	})
}

// look reads the clock and the map of every shard, and what is said of an accepted loss.
func (k *connecting) look() {
	k.turn++
	k.phase, k.open, k.sure = phaseLook, 0, false
	for i, s := range k.c.shards {
		k.looks[i] = look{k: k, turn: k.turn, s: s, err: k.looks[i].err, out: s.absent != ""}
		if !k.looks[i].out {
			k.open++
		}
	}
	for i := range k.looks {
		if l := &k.looks[i]; !l.out {
			l.send()
		}
	}
}

func (l *look) send() {
	body := appendGet(nil, txnSuccess, KeyID, 0)
	body = appendGet(body, txnSuccess, KeyClock, 0)
	body = appendGet(body, txnSuccess, KeyMap, 0)
	body = appendGet(body, txnSuccess, KeyCompact, 0)
	body = appendGet(body, txnSuccess, KeyLoss, 0)
	l.k.c.tr.Call(l.s.cluster, codec.MethodTxn, body, connectCall, l)
}

func (l *look) Complete(resp []byte, st codec.Status, sent bool) {
	k := l.k
	c := k.c
	if !k.live(l.turn) || l.answered {
		return
	}
	if st.Code != codec.OK {
		l.err = st.Msg
		k.tell()
		turn := l.turn
		c.after(c.jitter(5*retryDelay), func() {
			if k.live(turn) {
				l.send()
			}
		})
		return
	}
	if err := l.read(resp); err != nil {
		if c.state == stateStarting {
			c.mistaken(err)
			return
		}
		// Nothing can be rebuilt without it, and the others still serve what they may.
		l.err = err.Error()
		k.tell()
		turn := l.turn
		c.after(c.jitter(refusedPause), func() {
			if k.live(turn) {
				l.send()
			}
		})
		return
	}
	l.answered, l.err = true, ""
	if k.open--; k.open == 0 {
		k.judge()
	}
}

// read takes what the shard has shown.
func (l *look) read(resp []byte) error {
	c := l.k.c
	t, ok := parseTxnReply(resp, nil)
	if !ok || len(t.resps) < 5 {
		return fmt.Errorf("member cluster %s does not speak etcd's protocol", l.s.name)
	}
	id, _ := firstKV(t.resps[0])
	if identity, ok := ParseIdentity(id.Value); !ok || identity != c.m.Shards[l.s.idx].Identity {
		return fmt.Errorf("member cluster %s is not the one that it was: it was wiped, or its address leads to another system; give this proxy the right one, or restore it", l.s.name)
	}
	clock, _ := firstKV(t.resps[1])
	if l.rec, ok = ParseRecord(slices.Clone(clock.Value)); !ok {
		return fmt.Errorf("member cluster %s has lost its clock key, or holds one that this version of spindle cannot read", l.s.name)
	}
	if c.state == stateReady && l.rec.Last < l.s.rec.last {
		return fmt.Errorf("member cluster %s has been at revision %d and is at %d: it was restored from an older backup", l.s.name, l.s.rec.last, l.rec.Last)
	}
	l.local = clock.ModRevision
	l.s.saw(point{l.rec.First, l.rec.Last, l.local})
	kv, found := firstKV(t.resps[2])
	if !found {
		return fmt.Errorf("member cluster %s has lost its partition map: restore it", l.s.name)
	}
	m, err := ParseMap(kv.Value)
	if err != nil {
		return fmt.Errorf("member cluster %s: %w", l.s.name, err)
	}
	if !m.SameShards(c.m) {
		return fmt.Errorf("the partition map on member cluster %s was changed; restart to read it anew", l.s.name)
	}
	l.m, l.mapMod = m, kv.ModRevision
	return l.s.readMark(t.resps[3], t.resps[4])
}

// judge decides what comes next when every shard has answered.
func (k *connecting) judge() {
	c := k.c
	if k.found != nil {
		k.replace()
		return
	}
	first := k.first().m
	agreed := first.Epoch != revclock.ID{}
	clocks := make([]int64, len(k.looks))
	for i := range k.looks {
		l := &k.looks[i]
		if l.out {
			agreed = agreed && k.sure
			continue
		}
		clocks[i] = l.rec.Last
		if c.cfg.Sabotage.RebuildSkipsShard && i > 0 && i == len(k.looks)-1 {
			continue
		}
		agreed = agreed && l.m.Epoch == first.Epoch && l.m.Coordinator == first.Coordinator
	}
	if !agreed && k.trust == (revclock.ID{}) {
		k.examine()
		return
	}
	k.phase = phaseBelieve
	epoch := first.Epoch
	if k.trust != (revclock.ID{}) {
		epoch, clocks, c.knownN = k.trust, nil, 0
	}
	c.clock.Start(revclock.StartArgs{Epoch: epoch, Clocks: clocks, N: c.knownN, Cluster: first.Coordinator})
	k.tell()
}

// refused is told that the coordinator is not what all maps name.
func (k *connecting) refused(err error) {
	if !revclock.Rebuildable(err) && !revclock.Foreign(err) {
		k.c.mistaken(fmt.Errorf("coordinator: %w", err))
		return
	}
	k.why, k.trust = err.Error(), revclock.ID{}
	k.examine()
}

// examine reads what the coordinator holds.
func (k *connecting) examine() {
	c := k.c
	k.phase = phaseExamine
	turn := k.turn
	c.tr.Call(codec.Coordinator, codec.MethodTxn, revclock.AppendFoundTxn(nil), connectCall, completion(func(resp []byte, st codec.Status, _ bool) {
		if !k.live(turn) {
			return
		}
		f, ok := revclock.ParseFound(resp)
		if st.Code != codec.OK || !ok {
			k.mute = st.Msg
			k.tell()
			k.lookLater(5 * retryDelay)
			return
		}
		k.mute = ""
		k.weigh(&f)
	}))
}

var errOfNobody = errors.New("the coordinator holds keys that are not Spindle's: give Spindle an etcd of its own")

// weigh decides whether the coordinator is to be rebuilt, and whether now.
func (k *connecting) weigh(f *revclock.Found) {
	c := k.c
	known := c.cfg.ReplaceCoordinator
	for i := range k.looks {
		known = known || !k.looks[i].out && k.looks[i].m.Coordinator == f.Cluster
	}
	if !known {
		k.refuse(revclock.ErrOtherCluster(f.Cluster, k.first().m.Coordinator))
		return
	}
	if f.Epoch != nil {
		epoch, err := revclock.ParseEpoch(f.Epoch)
		if err != nil {
			c.mistaken(fmt.Errorf("coordinator: %w", err))
			return
		}
		if !k.ours(epoch) {
			k.refuse(revclock.ErrOtherSystem(epoch))
			return
		}
		if c.cfg.Sabotage.RebuildNoFence && epoch != k.trust && k.first().m.Epoch != (revclock.ID{}) {
			k.trust = epoch
			k.judge()
			return
		}
		if f.Believed && k.leaveOut(epoch) {
			return
		}
	}
	why := k.refusedShards()
	if why != "" && c.boot != nil && !c.boot.started && c.boot.adopts(0) {
		return // the coordinator is lost, too, so it cannot be known what else is
	}
	if k.stands = why != ""; k.stands {
		k.wrong = "the coordinator is to be read anew, and that needs every shard: " + why
		k.tell()
		k.lookLater(refusedPause)
		return
	}
	k.wrong = ""
	now := c.cfg.Now()
	if sign := k.signature(f); sign != k.sign {
		k.sign, k.since = sign, now
		k.until = now + int64(c.jitter(rebuildPatience))
	}
	if !f.Empty() && now < k.until {
		k.lookLater(lookAgain)
		return
	}
	k.found = f
	k.look()
}

// refuse says that the coordinator must not be used.
func (k *connecting) refuse(err error) {
	c := k.c
	if c.state == stateStarting {
		c.mistaken(fmt.Errorf("coordinator: %w", err))
		return
	}
	k.wrong = err.Error()
	k.tell()
	k.lookLater(refusedPause)
}

// ours reports whether an epoch is this system's: one that a map names, or one that was made for it.
func (k *connecting) ours(epoch revclock.ID) bool {
	for i := range k.looks {
		if !k.looks[i].out && k.looks[i].m.Epoch == epoch {
			return true
		}
	}
	return k.c.made(epoch)
}

// signature changes with every step of a rebuild.
func (k *connecting) signature(f *revclock.Found) string {
	s := string(f.Epoch)
	for i := range k.looks {
		s += fmt.Sprintf(" %d", k.looks[i].mapMod)
	}
	return s
}

// adopt believes the epoch that the clock was started with.
func (k *connecting) adopt() {
	c := k.c
	c.connecting = nil
	m := k.first().m
	if k.trust != (revclock.ID{}) {
		m.Epoch = k.trust
	}
	c.m = m
	for i, s := range c.shards {
		l := &k.looks[i]
		if l.out {
			continue
		}
		s.mapMod = l.mapMod
		// Everything up to its clock is decided: the stream only has to show it.
		s.settledTo = max(s.settledTo, l.rec.Last)
		c.maxClock = max(c.maxClock, l.rec.Last)
		if c.state == stateReady && s.begun {
			s.expectOnStream(l.local)
		}
		s.touch()
	}
	// Whoever waited for a now waits for one of this epoch.
	if len(c.nowQueue) > 0 {
		ticket := c.clock.Now()
		for i := range c.nowQueue {
			c.nowQueue[i].ticket = ticket
		}
	}
	c.stale = true
	if c.boot != nil {
		c.boot.believed(k)
		return
	}
	c.beginReturned()
	c.log.Info("the coordinator is believed", "revision", c.clock.Log().N(), "after", time.Duration(c.cfg.Now()-k.begun))
}
