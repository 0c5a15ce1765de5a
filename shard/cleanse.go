package shard

import (
	"spindle/codec"
)

// This file shows clients what they are to see of keys whose value on a shard is foreign (see foreign.go): what
// was there before the foreign put. It is asked for only when such a value was met.

// maxCleanse is how many foreign values one answer of a member may hold; one with more ends in Unavailable.
// They are rewritten a few at a time, so it is worth to ask again.
const maxCleanse = 1024

// maxForeignSteps is how many foreign values of one key are stepped over, a round trip each, on the way to what was there
// before them. With more of them that counts as compacted: the key is taken for new, instead of never being found.
const maxForeignSteps = 1024

var errManyForeign = codec.Status{Code: codec.Unavailable,
	Msg: "etcdserver: too many values were written to a member cluster directly; they are being taken over"}

// foreignKV says that msg, a KeyValue of a shard, is a client's key whose value has no stamp.
func foreignKV(msg []byte) bool {
	kv, ok := codec.ParseKV(msg)
	if !ok || len(kv.Key) == 0 || kv.Key[0] == 0 {
		return false
	}
	_, _, stamped := ParseStamp(kv.Value)
	return !stamped
}

// anyForeign says that one of parts, RangeResponses of a shard, holds a foreign value.
func anyForeign(parts ...[]byte) bool {
	for _, part := range parts {
		it := codec.Fields{Msg: part}
		for it.Next() {
			if it.Field.Num == 2 && foreignKV(it.Field.Bytes) {
				return true
			}
		}
	}
	return false
}

// before reads what a key held before it was written at a local revision: the newest stamped value, as a
// KeyValue in member form that is valid during the call of f, or nil. ErrCompacted says that it is not known
// any more.
func (s *shardState) before(key []byte, local, deadline int64, f func(old []byte, st codec.Status)) {
	s.beforeIn(maxForeignSteps, key, local, deadline, f)
}

func (s *shardState) beforeIn(steps int, key []byte, local, deadline int64, f func(old []byte, st codec.Status)) {
	c := s.c
	if steps <= 0 {
		f(nil, codec.ErrCompacted)
		return
	}
	body := codec.AppendInt(codec.AppendBytes(nil, rangeKey, key), rangeRevision, local-1)
	if local <= 1 {
		f(nil, codec.Status{})
		return
	}
	var ask func()
	ask = func() {
		s.call(codec.MethodRange, body, completion(func(resp []byte, st codec.Status, _ bool) {
			switch {
			case c.state == stateFailed || c.state == stateClosed:
				f(nil, codec.ErrStopped)
			case st == codec.ErrCompacted:
				f(nil, st)
			case st.Code != codec.OK && c.cfg.Now() >= deadline:
				f(nil, codec.ErrTimeout)
			case st.Code != codec.OK:
				c.after(c.jitter(retryDelay), ask)
			default:
				it := codec.Fields{Msg: resp}
				for it.Next() {
					if it.Field.Num != 2 {
						continue
					}
					if foreignKV(it.Field.Bytes) {
						kv, _ := codec.ParseKV(it.Field.Bytes)
						s.beforeIn(steps-1, key, kv.ModRevision, deadline, f)
						return
					}
					f(it.Field.Bytes, codec.Status{})
					return
				}
				f(nil, codec.Status{})
			}
		}))
	}
	ask()
}

// cleanse brings RangeResponses of the shard to what clients see, and calls f with copies.
func (s *shardState) cleanse(parts [][]byte, deadline int64, f func(parts [][]byte, st codec.Status)) {
	k := &cleansing{s: s, out: ownParts(parts), deadline: deadline, f: f}
	k.next()
}

// cleansing is one cleanse under way.
type cleansing struct {
	s        *shardState
	out      [][]byte
	part     int
	done     int // foreign values met
	deadline int64
	f        func([][]byte, codec.Status)
}

// next looks for the next foreign value.
func (k *cleansing) next() {
	for ; k.part < len(k.out); k.part++ {
		it := codec.Fields{Msg: k.out[k.part]}
		for it.Next() {
			if it.Field.Num != 2 || !foreignKV(it.Field.Bytes) {
				continue
			}
			if k.done++; k.done > maxCleanse {
				k.f(nil, errManyForeign)
				return
			}
			kv, _ := codec.ParseKV(it.Field.Bytes)
			k.s.foundForeign(kv.Key, kv.ModRevision)
			k.s.before(kv.Key, kv.ModRevision, k.deadline, func(old []byte, st codec.Status) {
				if st.Code != codec.OK && st != codec.ErrCompacted {
					k.f(nil, st)
					return
				}
				k.replace(kv.Key, old)
				k.next()
			})
			return
		}
	}
	k.f(k.out, codec.Status{})
}

// replace puts old in the place of the key's value; nil takes the key out.
func (k *cleansing) replace(key, old []byte) {
	in := k.out[k.part]
	out := make([]byte, 0, len(in)+len(old))
	count := int64(0)
	it := codec.Fields{Msg: in}
	for it.Next() {
		f := &it.Field
		switch f.Num {
		case 2:
			if kv, _ := codec.ParseKV(f.Bytes); string(kv.Key) == string(key) {
				if old != nil {
					out = codec.AppendBytes(out, 2, old)
				} else {
					count--
				}
				continue
			}
			out = codec.AppendBytes(out, 2, f.Bytes)
		case 1:
			out = codec.AppendBytes(out, 1, f.Bytes)
		case 3:
			out = codec.AppendBool(out, 3, f.Val != 0)
		case 4:
			count += int64(f.Val)
		}
	}
	k.out[k.part] = codec.AppendInt(out, 4, count)
}

// cleanTxn is cleanse for the answer to a Txn of ranges: f gets a TxnResponse.
func (s *shardState) cleanTxn(t *txnReply, deadline int64, f func(resp []byte, st codec.Status)) {
	hdr := codec.Header{ClusterID: t.cluster, Revision: t.rev}
	s.cleanse(t.resps, deadline, func(parts [][]byte, st codec.Status) {
		if st.Code != codec.OK {
			f(nil, st)
			return
		}
		out := codec.AppendHeaderField(nil, &hdr)
		out = codec.AppendBool(out, 2, true)
		for _, part := range parts {
			var m, m2 int
			out, m = codec.BeginMessage(out, 3)
			out, m2 = codec.BeginMessage(out, 1)
			out = append(out, part...)
			out = codec.EndMessage(codec.EndMessage(out, m2), m)
		}
		f(out, codec.Status{})
	})
}

// foundForeign is told of a foreign value that a read met. The stream knows of those above its record;
// older ones may have been forgotten.
func (s *shardState) foundForeign(key []byte, local int64) {
	if _, ok := s.foreign.keys[string(key)]; ok || local > s.rec.local || len(s.found) >= maxForeignKeys {
		return
	}
	if s.found == nil {
		s.found = map[string]int64{}
	}
	s.found[string(key)] = local
	s.armRewrites(fenceJitter)
}

// awaitRewrite looks again at a write's keys when what somebody else wrote there may have been taken over.
func (s *shardState) awaitRewrite(w *write, parts [][]byte) {
	c := s.c
	if c.cfg.Now()-w.since > int64(c.cfg.ShardTimeout) {
		s.answer(w, codec.ErrTimeout)
		return
	}
	for _, part := range parts {
		it := codec.Fields{Msg: part}
		for it.Next() {
			if it.Field.Num == 2 && foreignKV(it.Field.Bytes) {
				kv, _ := codec.ParseKV(it.Field.Bytes)
				s.foundForeign(kv.Key, kv.ModRevision)
			}
		}
	}
	c.after(c.jitter(retryDelay), func() { s.lookup(w) })
}
