package shard

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"spindle/codec"
	"spindle/revclock"
	"spindle/watchring"
)

// bootstrap is a Core's way from nothing to ready:
//
//	probe    every member cluster and the coordinator are read; an empty member gets its identity and its
//	         clock
//	map      the copy on the shard with the lowest identity is created first and wins; the others are
//	         copied from it; all must be the same bytes
//	connect  an epoch is looked for that the coordinator and all maps have; the very first one is made
//	         (connect.go)
//	streams  each shard's stream begins some way back, so that watchers which were connected to this
//	         proxy before a restart find their place in the ring
//
// Every step is a compare-and-create, so any number of proxies may do this at once. What does not answer
// is asked again for ever; what does not fit fails the Core with a sentence for the operator.
type bootstrap struct {
	c       *Core
	round   int // of probing; replies of older ones are ignored
	probes  []probe
	coord   probe
	waiting int
	clocks  []int64 // clock of each shard as probed, by index in the map
	started bool    // the clock is
	unread  int     // streams that have not come to the probed clock
	begun   int     // shards whose stream's start is still looked for
	tail    int64
	looked  int // rounds that have shown a map and an empty member
	stray   straying
}

// probe is what one cluster answered. It is the Completion of its call.
type probe struct {
	b        *bootstrap
	round    int
	id       codec.ClusterID
	name     string
	answered bool
	err      string // why not
	empty    bool   // there is no key at all
	why      string // it is refused
	cluster  uint64
	local    int64
	identity revclock.ID
	clock    Record
	clockAt  int64
	clockVal []byte
	mapBytes []byte
	mapMod   int64
	compact  int64
	marked   int64 // where KeyLoss was put, 0 if it is not there
	notEmpty bool  // a look for any key at all has found one
}

func newBootstrap(c *Core) *bootstrap {
	b := &bootstrap{c: c, probes: make([]probe, len(c.cfg.Names))}
	return b
}

// waitingFor says what the start is waiting for.
func (b *bootstrap) waitingFor() string {
	var missing []string
	for i := range b.probes {
		if p := &b.probes[i]; !p.answered {
			missing = append(missing, describe(p))
		}
	}
	if !b.coord.answered {
		missing = append(missing, describe(&b.coord))
	}
	switch {
	case len(missing) > 0:
		return "waiting for " + strings.Join(missing, ", ")
	case b.c.connecting != nil:
		return b.c.connecting.waitingFor()
	}
	for _, s := range b.c.shards {
		if !s.streaming && s.begins() {
			return "waiting for the watch stream of member cluster " + s.name
		}
	}
	for _, s := range b.c.shards {
		if s.accepted {
			return "waiting for member cluster " + s.name + ": its loss is accepted, and its clock is to come to where it has been"
		}
	}
	return "starting"
}

func describe(p *probe) string {
	if p.err == "" {
		return p.name
	}
	return p.name + " (" + p.err + ")"
}

func (b *bootstrap) begin() {
	b.round++
	b.waiting = len(b.probes) + 1
	for i := range b.probes {
		b.probes[i] = probe{b: b, round: b.round, id: codec.ClusterID(i), name: "member cluster " + b.c.cfg.Names[i], err: b.probes[i].err}
		b.probes[i].send()
	}
	b.coord = probe{b: b, round: b.round, id: codec.Coordinator, name: "the coordinator", err: b.coord.err}
	b.coord.send()
}

func (p *probe) send() {
	c := p.b.c
	var body []byte
	if p.id == codec.Coordinator {
		body = codec.AppendString(body, rangeKey, revclock.KeyEpoch)
		c.tr.Call(p.id, codec.MethodRange, body, c.cfg.ShardTimeout, p)
		return
	}
	for _, k := range []string{KeyID, KeyClock, KeyMap, KeyCompact, KeyLoss} {
		body = appendGet(body, txnSuccess, k, 0)
	}
	c.tr.Call(p.id, codec.MethodTxn, body, c.cfg.ShardTimeout, p)
}

// peek looks whether a member without an identity holds anything at all. The guard of firstTxn compares all keys, and
// would make a member that is full read everything it has before it does anything else.
func (p *probe) peek() {
	b := p.b
	body := codec.AppendString(nil, rangeKey, "\x00")
	body = codec.AppendString(body, rangeEnd, "\x00")
	body = codec.AppendInt(body, rangeLimit, 1)
	body = codec.AppendBool(body, 8, true)
	b.c.tr.Call(p.id, codec.MethodRange, body, b.c.cfg.ShardTimeout, completion(func(resp []byte, st codec.Status, sent bool) {
		if p.round != b.round || b.c.state != stateStarting {
			return
		}
		_, found := firstKV(resp)
		switch {
		case st.Code != codec.OK:
			p.Complete(nil, st, sent)
		case found: // another proxy may have been faster
			p.notEmpty = true
			p.send()
		default:
			p.empty, p.compact = true, -1
			p.finish()
		}
	}))
}

// firstTxn makes a shard of a member with no key at all: it gets an identity, and a clock for the guard to look at.
func (p *probe) firstTxn() []byte {
	r := p.b.c.cfg.Rand
	var id revclock.ID
	binary.BigEndian.PutUint64(id[:], r.Uint64())
	binary.BigEndian.PutUint64(id[8:], r.Uint64())
	body := appendCompareInt(nil, "\x00", "\x00", resultEqual, targetMod, cmpMod, 0)
	body = appendPutOp(body, txnSuccess, KeyID, AppendIdentity(nil, id))
	return appendPutOp(body, txnSuccess, KeyClock, AppendInitialRecord(nil, revclock.ID{}))
}

func (p *probe) Complete(resp []byte, st codec.Status, sent bool) {
	b := p.b
	c := b.c
	if p.round != b.round || c.state != stateStarting {
		return
	}
	if st.Code != codec.OK {
		if p.err == "" {
			c.log.Warn("does not answer, trying again", "who", p.name, "code", st.Code, "err", st.Msg)
		}
		p.err = st.Msg
		c.after(c.jitter(20*retryDelay), p.sendAgain)
		return
	}
	if p.id == codec.Coordinator {
		it := codec.Fields{Msg: resp}
		for it.Next() {
			if it.Field.Num == 1 {
				h, _ := codec.ParseHeader(it.Field.Bytes)
				p.cluster = h.ClusterID
			}
		}
	} else {
		t, ok := parseTxnReply(resp, nil)
		if !ok {
			c.mistaken(fmt.Errorf("%s does not speak etcd's protocol", p.name))
			return
		}
		if len(t.resps) == 5 && !p.notEmpty {
			if _, found := firstKV(t.resps[0]); !found {
				p.cluster, p.local = t.cluster, t.rev
				p.peek()
				return
			}
		}
		if err := p.read(t); err != nil {
			c.mistaken(err)
			return
		}
	}
	p.finish()
}

// finish takes what p has found for its answer.
func (p *probe) finish() {
	p.answered, p.err = true, ""
	if p.b.waiting--; p.b.waiting == 0 {
		p.b.fitMap()
	}
}

func (p *probe) sendAgain() {
	if p.round == p.b.round && p.b.c.state == stateStarting {
		p.send()
	}
}

func (p *probe) read(t txnReply) error {
	if len(t.resps) != 5 {
		return fmt.Errorf("%s does not speak etcd's protocol", p.name)
	}
	p.cluster, p.local = t.cluster, t.rev
	id, found := firstKV(t.resps[0])
	if !found {
		return fmt.Errorf("%s holds keys that are not Spindle's: give it an empty etcd, or see whether the address is right", p.name)
	}
	var ok bool
	if p.identity, ok = ParseIdentity(id.Value); !ok {
		return fmt.Errorf("%s has an identity that this version of spindle cannot read: upgrade spindle", p.name)
	}
	clock, found := firstKV(t.resps[1])
	if !found {
		return fmt.Errorf("%s has lost its clock key: restore the member from a backup", p.name)
	}
	p.clockVal = bytes.Clone(clock.Value)
	if p.clock, ok = ParseRecord(p.clockVal); !ok {
		return fmt.Errorf("%s has a clock record that this version of spindle cannot read: upgrade spindle", p.name)
	}
	p.clockAt = clock.ModRevision
	if m, found := firstKV(t.resps[2]); found {
		p.mapBytes, p.mapMod = bytes.Clone(m.Value), m.ModRevision
	}
	p.compact = -1
	if kv, found := firstKV(t.resps[3]); found {
		if p.compact, ok = ParseCompaction(kv.Value); !ok {
			return fmt.Errorf("%s has a compaction record that this version of spindle cannot read: upgrade spindle", p.name)
		}
	}
	if kv, found := firstKV(t.resps[4]); found {
		if p.marked = kv.ModRevision; !ParseLossMark(kv.Value) {
			return fmt.Errorf("%s has a mark of an accepted loss that this version of spindle cannot read: upgrade spindle", p.name)
		}
	}
	return nil
}

// fitMap looks whether all shards have the same map, and creates or copies it where there is none.
func (b *bootstrap) fitMap() {
	c := b.c
	ps := make([]*probe, len(b.probes))
	for i := range b.probes {
		ps[i] = &b.probes[i]
	}
	slices.SortFunc(ps, byIdentity)
	if text := anyMap(ps); text != nil {
		m, err := ParseMap(text)
		if err != nil {
			c.mistaken(err)
			return
		}
		if b.wiped(m, ps) {
			return
		}
		slices.SortFunc(ps, byIdentity)
	} else if b.identify() {
		return
	}
	for i := 1; i < len(ps); i++ {
		if ps[i].identity == ps[i-1].identity {
			c.mistaken(fmt.Errorf("%s and %s are the same cluster: give each --shard its own", ps[i-1].name, ps[i].name))
			return
		}
	}
	sound := soundProbes(ps)
	first := sound[0]
	if first.mapBytes == nil {
		for _, p := range sound[1:] {
			if p.mapBytes != nil {
				// Another proxy may be creating the maps right now, and first was read before it got its own.
				if m, err := ParseMap(p.mapBytes); err == nil && slices.ContainsFunc(m.Shards, func(s MapShard) bool { return s.Identity == first.identity }) {
					c.after(c.jitter(2*retryDelay), b.begin)
					return
				}
				c.mistaken(fmt.Errorf("%s is not in the partition map that %s holds: remove it from the configuration (shards cannot be added yet)", first.name, p.name))
				return
			}
		}
		shards := make([]MapShard, len(ps))
		for i, p := range ps {
			shards[i] = MapShard{Identity: p.identity, Name: strings.TrimPrefix(p.name, "member cluster ")}
		}
		m, err := c.cfg.Partition.newMap(revclock.ID{}, b.coord.cluster, shards, b.indexIn(shards))
		if err != nil {
			c.mistaken(err)
			return
		}
		b.createMap(first, AppendMap(nil, m))
		return
	}
	m, err := ParseMap(first.mapBytes)
	if err != nil {
		c.mistaken(fmt.Errorf("%s: %w", first.name, err))
		return
	}
	if err := b.checkMap(m, ps); err != nil {
		c.mistaken(err)
		return
	}
	for _, p := range sound[1:] {
		if p.mapBytes == nil {
			// Without an epoch: none can have been believed yet.
			n := *m
			if !slices.Contains(c.cfg.AcceptDataLoss, c.cfg.Names[p.id]) {
				n.Epoch = revclock.ID{}
			}
			b.createMap(p, AppendMap(nil, &n))
			return
		}
		other, err := ParseMap(p.mapBytes)
		if err != nil {
			c.mistaken(fmt.Errorf("%s: %w", p.name, err))
			return
		}
		if !other.SameShards(m) {
			c.mistaken(fmt.Errorf("%s and %s hold different partition maps: they belong to different systems; see whether the --shard addresses are right", first.name, p.name))
			return
		}
	}
	b.believe(m, ps)
}

// checkMap compares the map with the configuration. The order in a configuration means nothing.
func (b *bootstrap) checkMap(m *Map, ps []*probe) error {
	for _, p := range ps {
		if !slices.ContainsFunc(m.Shards, func(s MapShard) bool { return s.Identity == p.identity }) {
			return fmt.Errorf("%s is not in the partition map of this system: remove it from the configuration (shards cannot be added yet)", p.name)
		}
	}
	for _, s := range m.Shards {
		if !slices.ContainsFunc(ps, func(p *probe) bool { return s.Identity == p.identity }) {
			return fmt.Errorf("the partition map names a member cluster %q that the configuration does not have: add its --shard", s.Name)
		}
	}
	return b.c.cfg.Partition.check(m, b.indexIn(m.Shards), func(i int) string {
		for _, p := range ps {
			if p.identity == m.Shards[i].Identity {
				return strings.TrimPrefix(p.name, "member cluster ")
			}
		}
		return m.Shards[i].Name
	})
}

// indexIn returns which of shards a configured member is. All members must be among them.
func (b *bootstrap) indexIn(shards []MapShard) func(member int) int {
	return func(member int) int {
		return slices.IndexFunc(shards, func(s MapShard) bool { return s.Identity == b.probes[member].identity })
	}
}

// createMap writes the map to one shard unless another proxy was faster, and looks again.
func (b *bootstrap) createMap(p *probe, m []byte) {
	body := appendCompareInt(nil, KeyMap, "", resultEqual, targetMod, cmpMod, 0)
	body = appendPutOp(body, txnSuccess, KeyMap, m)
	b.c.tr.Call(p.id, codec.MethodTxn, body, b.c.cfg.ShardTimeout, completion(func(_ []byte, st codec.Status, _ bool) {
		if b.c.state != stateStarting {
			return
		}
		if st.Code != codec.OK {
			b.c.after(b.c.jitter(20*retryDelay), b.begin)
			return
		}
		b.begin()
	}))
}

// completion makes a Completion of a function, for calls that are rare.
type completion func(resp []byte, st codec.Status, sent bool)

func (f completion) Complete(resp []byte, st codec.Status, sent bool) { f(resp, st, sent) }

// believe takes the map, and starts the clock.
func (b *bootstrap) believe(m *Map, ps []*probe) {
	c := b.c
	c.m, c.part = m, NewPartition(m)
	c.shards = make([]*shardState, len(m.Shards))
	b.clocks = make([]int64, len(m.Shards))
	compact := int64(-1)
	for i, ms := range m.Shards {
		p := ps[slices.IndexFunc(ps, func(p *probe) bool { return p.identity == ms.Identity })]
		c.shards[i] = &shardState{c: c, idx: i, cluster: p.id, name: ms.Name, mapMod: p.mapMod,
			window:     int64(c.cfg.ReorderWindow),
			compactRec: p.compact,
			rec:        point{p.clock.First, p.clock.Last, p.clockAt},
			known:      point{p.clock.First, p.clock.Last, p.clockAt},
			lossy:      p.marked > 0, accepted: p.marked > 0, marked: p.marked}
		compact = max(compact, p.compact)
	}
	for _, s := range c.shards {
		if p := ps[slices.IndexFunc(ps, func(p *probe) bool { return p.id == s.cluster })]; p.why != "" {
			s.leave(p.why)
		}
	}
	c.compacted, c.compactRec = compact, compact
	c.hdr = codec.Header{
		ClusterID: binary.BigEndian.Uint64(m.Shards[0].Identity[:]) | 1,
		MemberID:  memberID(c.cfg.MemberName, c.cfg.ClientURLs),
		RaftTerm:  headerTerm,
	}
	if t, ok := c.tr.(checking); ok {
		for _, s := range c.shards {
			if len(c.waysTo(s.cluster)) > 0 {
				t.Distrust(s.cluster) // now it is known what they must lead to
			}
		}
	}
	c.connect("starting")
}

// headerTerm is the raft_term that headers carry: a fresh etcd's, and stable, for there is no raft here.
const headerTerm = 2

// believed opens the streams. Watchers that lost this proxy come back to revisions a little way in
// the past: the streams begin there.
func (b *bootstrap) believed(k *connecting) {
	if b.c.state != stateStarting || b.started {
		return
	}
	b.started = true
	for i, s := range b.c.shards {
		l := &k.looks[i]
		if l.out {
			continue
		}
		b.clocks[i], s.rec = l.rec.Last, point{l.rec.First, l.rec.Last, l.local}
	}
	// Only now is it known what the shards must hold: what was read may have come by one of several endpoints, and the
	// others may lead elsewhere.
	if t, ok := b.c.tr.(checking); ok {
		for _, s := range b.c.shards {
			t.Distrust(s.cluster)
		}
	}
	b.awaitChecks()
}

// awaitChecks goes on when every shard has a connection that was looked at, or is refused.
func (b *bootstrap) awaitChecks() {
	c := b.c
	live, ok := c.tr.(liveness)
	for _, s := range c.shards {
		if s.absent == "" && s.banned != "" {
			s.leave(s.banned)
		}
		if ok && s.absent == "" && !live.Connected(s.cluster) {
			c.after(retryDelay/4, func() {
				if c.state == stateStarting {
					b.awaitChecks()
				}
			})
			return
		}
	}
	b.compareClocks()
}

// compareClocks refuses a shard that has lost data: one whose clock is below what a proxy has seen
// committed there. A probe may merely be older than the tick that says so: then the shard is read again.
func (b *bootstrap) compareClocks() {
	c := b.c
	for i, s := range c.shards {
		seen := c.clock.Log().C(i)
		if b.clocks[i] >= seen || s.lossy || !s.begins() {
			continue
		}
		c.tr.Call(s.cluster, codec.MethodRange, codec.AppendString(nil, rangeKey, KeyClock), c.cfg.ShardTimeout, completion(func(resp []byte, st codec.Status, _ bool) {
			if c.state != stateStarting {
				return
			}
			if st.Code != codec.OK {
				c.after(c.jitter(20*retryDelay), b.compareClocks)
				return
			}
			kv, _ := firstKV(resp)
			rec, ok := ParseRecord(kv.Value)
			switch {
			case !ok:
				c.fail(fmt.Errorf("member cluster %s has lost its clock key, or holds one that this version of spindle cannot read", s.name))
			case rec.Last < seen && slices.Contains(c.cfg.AcceptDataLoss, c.cfg.Names[s.cluster]):
				c.log.Warn("a member cluster has lost data, which is accepted", "shard", s.name, "revision", rec.Last, "was", seen)
				b.clocks[i], s.rec = rec.Last, point{rec.First, rec.Last, kv.ModRevision}
				s.markLoss(kv.ModRevision, b.compareClocks)
			case rec.Last < seen:
				s.leave(fmt.Sprintf("it is at revision %d, but has been at %d: it was restored from an older backup", rec.Last, seen))
				b.compareClocks()
			default:
				b.clocks[i], s.rec = rec.Last, point{rec.First, rec.Last, kv.ModRevision}
				b.compareClocks()
			}
		}))
		return
	}
	if !c.allRefused() {
		b.findStarts()
	}
}

// begins says that the start goes on with a shard: those that were left out and have returned since come later.
func (s *shardState) begins() bool { return s.absent == "" && !s.returning }

// findStarts looks for the record behind which each stream begins.
func (b *bootstrap) findStarts() {
	c := b.c
	n := c.clock.Log().N()
	b.tail = max(n-int64(c.cfg.RingSize)/2, c.compacted-1, 0)
	b.begun = 0
	for _, s := range c.shards {
		if s.begins() {
			b.begun++
		}
	}
	for _, s := range c.shards {
		if !s.begins() {
			continue
		}
		s.streamStart(b.tail, func(p point, st codec.Status) {
			if st.Code != codec.OK {
				c.fail(fmt.Errorf("the history of member cluster %s cannot be read: %s", s.name, st.Msg))
				return
			}
			s.rec = p
			b.tail = max(b.tail, p.last)
			if b.begun--; b.begun == 0 {
				b.open()
			}
		})
	}
}

// open makes the ring and opens every stream.
func (b *bootstrap) open() {
	c := b.c
	c.ring = watchring.NewRing(c.cfg.RingSize, c.cfg.RingBytes, b.tail)
	c.frontier = watchring.NewFrontier(len(c.shards), 0)
	if c.compacted > 0 {
		c.frontier.SetCompacted(c.compacted)
	}
	for _, s := range c.shards {
		if s.begins() {
			b.unread++
		}
	}
	for _, s := range c.shards {
		if s.begins() {
			s.openFirst()
		}
	}
	for _, s := range c.shards {
		b.streamMoved(s)
	}
}

// streamMoved is told that a shard's stream has come to a record; the Core is ready once every stream
// has come to what was there at the start.
func (b *bootstrap) streamMoved(s *shardState) {
	c := b.c
	if c.state != stateStarting || s.streaming || !s.begun || s.rec.last < b.clocks[s.idx] {
		return
	}
	s.streaming = true
	c.stale = true
	if b.unread--; b.unread > 0 {
		return
	}
	b.awaitFences()
}

// ready ends the start.
func (b *bootstrap) ready() {
	c := b.c
	c.state, c.reason, c.boot = stateReady, "", nil
	c.after(0, c.beginReturned)
	c.armNaming()
	c.armCompactionLags()
	c.startAutoCompact()
	c.startLeases()
	c.startQuotas()
	c.log.Info("serving", "shards", len(c.shards), "revision", c.clock.Log().N())
}
