package shard

import (
	"slices"
	"time"

	"spindle/codec"
)

// This file is about values that somebody else put on a member: a put in a local revision without a clock
// record is foreign. Clients go on seeing what was there before, until a batch has put the value again with a
// stamp (guarded by the local revision of the foreign put); then they see a PUT with that batch's
// revision. So every proxy shows the same, whoever rewrites it.

// Bounds of foreign values.
const (
	// maxForeignKeys is how many keys with foreign values are remembered on a shard. Further ones are not
	// rewritten until a read or a write meets them.
	maxForeignKeys = 4096
	// maxForeignBytes is what may be kept of values that clients still see. Beyond it events that replace a
	// foreign value have no prev_kv.
	maxForeignBytes = 16 << 20
	// maxRewrites is how many rewrites of a shard are under way at a time.
	maxRewrites = 16
	// rewriteRetry is the pause before a rewrite that failed is tried again.
	rewriteRetry = 500 * time.Millisecond
	// foreignWarning is the time between two warnings about one shard.
	foreignWarning = 10 * time.Second
)

// foreignKey is a key whose value on the shard is foreign.
type foreignKey struct {
	local int64  // its mod revision on the shard
	known bool   // old is known
	old   []byte // what clients see meanwhile: a KeyValue in member form; nil for nothing
	tried bool   // it was rewritten, or has changed: the stream will show it
}

// foreignKeys are the keys of a shard with foreign values, as one reader of its events knows them.
type foreignKeys struct {
	keys  map[string]foreignKey
	bytes int
	undo  []foreignChange // since the last record, for the stream to be opened again there
	turn  uint64          // of reading: counts how often that was done
	// unknown are keys whose previous value is foreign, although no foreign put was seen: the stream begins
	// behind it. They must be looked up before the events can be taken.
	unknown []foreignRef
}

// foreignRef is a foreign value, by the local revision of its put.
type foreignRef struct {
	key   string
	local int64
}

// missing reports whether an event replaces a foreign value that is not known, and notes it.
func (f *foreignKeys) missing(kv, prev *codec.KV) bool {
	if prev.Key == nil {
		return false
	}
	if _, _, ok := ParseStamp(prev.Value); ok {
		return false
	}
	if is, ok := f.keys[string(kv.Key)]; ok && is.local < kv.ModRevision {
		return false
	}
	f.unknown = append(f.unknown, foreignRef{string(kv.Key), prev.ModRevision})
	return true
}

// lookup reads from the shard's history what unknown foreign values have replaced, and calls f; the stream must
// then be opened again at its last record. If the stream was opened again meanwhile, what is found counts for nothing: that reading may have come
// beyond the place already, and asks for itself.
func (f *foreignKeys) lookup(s *shardState, then func()) {
	refs := f.unknown
	f.unknown = nil
	f.rewind()
	left, turn := len(refs), f.turn
	for _, ref := range refs {
		s.before([]byte(ref.key), ref.local, s.c.deadline(), func(old []byte, st codec.Status) {
			switch {
			case turn != f.turn:
				return
			case st.Code == codec.OK:
				f.change(ref.key, foreignKey{local: ref.local, known: true, old: append([]byte(nil), old...)}, true)
			case st == codec.ErrCompacted:
				f.change(ref.key, foreignKey{local: ref.local}, true)
			}
			if left--; left == 0 {
				then()
			}
		})
	}
}

// foreignChange is what a key was before it changed.
type foreignChange struct {
	key string
	was foreignKey
	had bool
}

// set changes what is known of a key; has is false if its value is not foreign (any more).
func (f *foreignKeys) set(key string, is foreignKey, has bool) {
	was, had := f.keys[key]
	f.undo = append(f.undo, foreignChange{key, was, had})
	f.change(key, is, has)
}

func (f *foreignKeys) change(key string, is foreignKey, has bool) {
	f.bytes += len(is.old) - len(f.keys[key].old)
	switch {
	case !has:
		delete(f.keys, key)
	case f.keys == nil:
		f.keys = map[string]foreignKey{key: is}
	default:
		f.keys[key] = is
	}
}

// recorded says that the stream will not be opened again at an earlier record.
func (f *foreignKeys) recorded() {
	clear(f.undo)
	f.undo = f.undo[:0]
}

// rewind goes back to the last record: what happened since will come again.
func (f *foreignKeys) rewind() {
	for i := len(f.undo) - 1; i >= 0; i-- {
		f.change(f.undo[i].key, f.undo[i].was, f.undo[i].had)
	}
	f.recorded()
	f.turn++
}

// put takes a foreign put. It returns false if the key is not to be remembered.
func (f *foreignKeys) put(kv, prev *codec.KV, prevMsg []byte) bool {
	was, have := f.keys[string(kv.Key)]
	switch {
	case have && was.local >= kv.ModRevision:
		return true // it comes a second time
	case have:
		was.local, was.tried = kv.ModRevision, false
		f.set(string(kv.Key), was, true)
		return true
	case len(f.keys) >= maxForeignKeys:
		return false
	}
	is := foreignKey{local: kv.ModRevision}
	if prev.Key == nil {
		is.known = kv.CreateRevision == kv.ModRevision // else it was compacted
	} else if _, _, ok := ParseStamp(prev.Value); ok && f.bytes+len(prevMsg) <= maxForeignBytes {
		is.known, is.old = true, append([]byte(nil), prevMsg...)
	}
	f.set(string(kv.Key), is, true)
	return true
}

// take returns, and forgets, what clients saw of a key until its change at a local revision. ok is false if
// the key's value was not foreign.
func (f *foreignKeys) take(key []byte, local int64) (was foreignKey, ok bool) {
	if len(f.keys) == 0 {
		return was, false
	}
	was, ok = f.keys[string(key)]
	if !ok || was.local >= local {
		return foreignKey{}, false
	}
	f.set(string(key), foreignKey{}, false)
	return was, true
}

// waits returns what is to be kept of an event without a record until the next one, nil for nothing: a
// foreign put is none yet, and the delete of a foreign value deletes what clients saw.
func (f *foreignKeys) waits(ev []byte) []byte {
	kv, prev, del, prevMsg := eventParts(ev)
	if len(kv.Key) == 0 || kv.Key[0] == 0 {
		return nil
	}
	if f.missing(&kv, &prev) {
		return nil
	}
	if !del {
		f.put(&kv, &prev, prevMsg)
		return nil
	}
	was, ok := f.take(kv.Key, kv.ModRevision)
	switch {
	case !ok:
		return ev
	case was.known && was.old == nil:
		return nil
	}
	out := codec.AppendInt(nil, 1, 1)
	out = codec.AppendBytes(out, 2, codec.AppendKV(nil, &codec.KV{Key: kv.Key, ModRevision: kv.ModRevision}))
	return codec.AppendBytes(out, 3, was.old)
}

// eventParts is eventKVs, with the previous pair's bytes.
func eventParts(ev []byte) (kv, prev codec.KV, del bool, prevMsg []byte) {
	kv, prev, del = eventKVs(ev)
	it := codec.Fields{Msg: ev}
	for it.Next() {
		if it.Field.Num == 3 {
			prevMsg = it.Field.Bytes
		}
	}
	return kv, prev, del, prevMsg
}

// sawForeign counts what somebody else did on the shard, and says so.
func (s *shardState) sawForeign(key []byte, del bool) {
	c := s.c
	c.stats.Foreign++
	now := c.cfg.Now()
	if s.foreignWarned > 0 && now-s.foreignWarned < int64(foreignWarning) {
		return
	}
	s.foreignWarned = now
	what := "put"
	if del {
		what = "deleted"
	}
	c.log.Warn("somebody changed a key on a member cluster directly; clients see it with a revision of its own. Close the members to everyone but spindle",
		"shard", s.name, "key", string(key), "change", what, "total", c.stats.Foreign)
}

// armRewrites looks at the foreign values of the shard after a jitter, so that of several proxies mostly one
// rewrites them.
func (s *shardState) armRewrites(d time.Duration) {
	if s.rewriteTimer || len(s.foreign.keys)+len(s.found) == 0 {
		return
	}
	s.rewriteTimer = true
	s.c.after(s.c.jitter(d), func() {
		s.rewriteTimer = false
		s.rewriteSome()
	})
}

// rewriteSome begins to rewrite what is foreign, as much as may be under way.
func (s *shardState) rewriteSome() {
	switch s.c.state {
	case stateStarting:
		s.armRewrites(rewriteRetry)
		return
	case stateFailed, stateClosed:
		return
	}
	if s.rewrites == nil {
		s.rewrites = map[string]*rewrite{}
	}
	var keys []string
	for k, is := range s.foreign.keys {
		if s.rewrites[k] == nil && !is.tried {
			keys = append(keys, k)
		}
	}
	for k := range s.found {
		if _, known := s.foreign.keys[k]; !known && s.rewrites[k] == nil {
			keys = append(keys, k)
		}
	}
	keys = slices.DeleteFunc(keys, s.misplaced)
	slices.Sort(keys)
	for _, k := range keys[:min(len(keys), maxRewrites-len(s.rewrites))] {
		r := &rewrite{s: s, key: k, local: s.found[k]}
		if is, ok := s.foreign.keys[k]; ok {
			r.local = is.local
		}
		s.rewrites[k] = r
		r.read()
	}
}

// misplaced reports whether a foreign value lies on a shard that its key does not belong to. It is never shown, and
// left where it is.
func (s *shardState) misplaced(key string) bool {
	if s.c.part.ShardOf([]byte(key)) == s.idx {
		return false
	}
	if is, ok := s.foreign.keys[key]; ok {
		is.tried = true
		s.foreign.keys[key] = is
	}
	if _, ok := s.found[key]; !ok { // said already when it was put
		s.c.log.Error("somebody put a key on a member cluster where it does not belong; it is not shown, delete it there", "shard", s.name, "key", key)
	}
	delete(s.found, key)
	return true
}

// rewrite puts one foreign value again, with a stamp.
type rewrite struct {
	s     *shardState
	key   string
	local int64 // of the foreign put
	op    Op
	old   snapKV
	seen  bool // clients see old
}

// wanted says that the key still has the foreign value, as far as is known.
func (r *rewrite) wanted() bool {
	if is, ok := r.s.foreign.keys[r.key]; ok {
		return is.local == r.local
	}
	return r.s.found[r.key] == r.local
}

// end ends r. settled says that the value is foreign no more.
func (r *rewrite) end(settled bool) {
	s := r.s
	delete(s.rewrites, r.key)
	d := time.Duration(rewriteRetry)
	if !r.wanted() {
		d = fenceJitter // nothing failed: somebody has put another value
	}
	if settled {
		d = fenceJitter
		if is, ok := s.foreign.keys[r.key]; ok && is.local == r.local {
			is.tried = true
			s.foreign.keys[r.key] = is
		}
		if s.found[r.key] == r.local {
			delete(s.found, r.key)
		}
	}
	if len(s.rewrites) < len(s.found) {
		s.armRewrites(d)
		return
	}
	for k, is := range s.foreign.keys {
		if !is.tried && s.rewrites[k] == nil {
			s.armRewrites(d)
			return
		}
	}
}

// read looks what clients see of the key, and then at the value itself.
func (r *rewrite) read() {
	s := r.s
	s.before([]byte(r.key), r.local, s.c.deadline(), func(old []byte, st codec.Status) {
		if st.Code != codec.OK && st != codec.ErrCompacted || !r.wanted() {
			r.end(false)
			return
		}
		if old != nil {
			r.seen, _ = parseStored(append([]byte(nil), old...), &r.old)
		}
		body := codec.AppendString(s.c.scratch[:0], rangeKey, r.key)
		s.c.scratch = body
		s.call(codec.MethodRange, body, completion(func(resp []byte, st codec.Status, _ bool) {
			kv, found := firstKV(resp)
			switch {
			case st.Code != codec.OK || !r.wanted() || s.c.state != stateReady:
				r.end(false)
			case !found || kv.ModRevision != r.local:
				r.end(true)
			default:
				r.write(&kv)
			}
		}))
	})
}

// write sends the value as a put of its own, which succeeds only if nothing has changed since.
func (r *rewrite) write(kv *codec.KV) {
	s := r.s
	value := kv.Value
	if _, user, ok := ParseStamp(value); ok {
		value = user // somebody copied what lies on a member
	}
	op := &r.op
	op.Kind, op.Done = OpPut, r.done
	op.Msg = codec.AppendBytes(nil, 1, kv.Key)
	op.Msg = codec.AppendBytes(op.Msg, 2, value)
	op.Msg = codec.AppendInt(op.Msg, 3, kv.Lease)
	p := &op.core.plan
	if st := p.Parse(OpPut, op.Msg, &Limits{MaxRequestBytes: s.c.cfg.MemberMaxRequestBytes}); st.Code != codec.OK {
		s.c.log.Error("a value that somebody put on a member cluster cannot be taken over; delete it there", "shard", s.name, "key", r.key, "err", st.Msg)
		r.end(true)
		return
	}
	create := Create{}
	if r.seen {
		create = Create{Local: r.old.local, Meta: r.old.CreateRevision}
	}
	p.decideRewrite(r.local, create)
	w := &op.core.w
	*w = write{op: op, plan: p, since: s.c.cfg.Now(), once: true}
	s.enqueue(w)
}

// done takes the outcome. If it was applied, or the key has changed, the stream will show it.
func (r *rewrite) done(op *Op) {
	s := r.s
	s.c.creates.Forget([]byte(r.key)) // it was created where the foreign put was
	settled := op.Status.Code == codec.OK || op.Status == statusOvertaken
	r.end(settled)
	if !settled {
		s.c.log.Debug("rewriting a foreign value failed", "shard", s.name, "key", r.key, "err", op.Status.Msg)
	}
}

// statusOvertaken ends a write that is not to be tried again.
var statusOvertaken = codec.Status{Code: codec.Aborted, Msg: "spindle: the key has changed"}

// decideRewrite makes a Put a decided one: it is applied if the key's local mod revision is local.
func (p *Plan) decideRewrite(local int64, create Create) {
	p.slow, p.decided = true, true
	p.guards = append(p.guards[:0], planGuard{iv: Interval{Key: p.ops[0].key}, rev: local})
	slot := &p.PutSlots[0]
	slot.runs, slot.fresh, slot.Known, slot.Guard = true, create.Meta == 0, true, false
	slot.Create = create
	// It keeps the member's lease, which is there as long as the guard holds.
	slot.lease, slot.member, p.leases = 0, p.ops[0].lease, p.leases[:0]
}
