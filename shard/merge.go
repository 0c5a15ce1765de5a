package shard

import (
	"bytes"
	"math"
	"sort"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// This file makes a client's range out of what shards return: stamps come off, parts of several shards
// are merged by key, and order, filters, limit, count and more come out as one etcd has them
// (server/etcdserver/txn/range.go of etcd 3.7).

// etcdserverpb.RangeRequest.SortOrder and SortTarget.
const (
	orderNone, orderAscend, orderDescend                 = 0, 1, 2
	sortKey, sortVersion, sortCreate, sortMod, sortValue = 0, 1, 2, 3, 4
)

// rangeSpec is what a RangeRequest asks for besides its keys.
type rangeSpec struct {
	limit, rev                           int64
	order, target                        int32
	serializable, keysOnly, countOnly    bool
	minMod, maxMod, minCreate, maxCreate int64
}

// plain says that keys come in ascending order and none is left out but by the limit: what a shard's
// answer is anyway.
func (r *rangeSpec) plain() bool {
	return r.target == sortKey && r.order != orderDescend && !r.filters()
}

// cut returns how many keys, in order of keys, the answer is made from, 0 for all. etcd takes one more
// than the limit, and does so before it sorts when only a target and no order is given.
func (r *rangeSpec) cut() int64 {
	if r.limit <= 0 || r.filters() || r.order != orderNone && !(r.order == orderAscend && r.target == sortKey) {
		return 0
	}
	if r.limit == math.MaxInt64 {
		return r.limit
	}
	return r.limit + 1
}

func (r *rangeSpec) filters() bool {
	return r.minMod != 0 || r.maxMod != 0 || r.minCreate != 0 || r.maxCreate != 0
}

// fromTop says that the order is the descending one of keys and nothing is left out: a shard can do it.
func (r *rangeSpec) fromTop() bool {
	return r.order == orderDescend && r.target == sortKey && !r.filters()
}

// appendMember appends the fields of a RangeRequest that reads iv on a shard.
func (r *rangeSpec) appendMember(dst []byte, iv Interval, localRev int64) []byte {
	dst = codec.AppendBytes(dst, 1, iv.Key)
	dst = codec.AppendBytes(dst, 2, iv.End)
	if r.countOnly {
		dst = codec.AppendInt(dst, 4, localRev)
		return codec.AppendBool(dst, 9, true)
	}
	descend := r.limit > 0 && r.fromTop()
	switch {
	case r.limit > 0 && (r.plain() || descend):
		dst = codec.AppendInt(dst, 3, r.limit)
	default:
		dst = codec.AppendInt(dst, 3, r.cut())
	}
	dst = codec.AppendInt(dst, 4, localRev)
	if descend {
		dst = codec.AppendInt(dst, 5, orderDescend)
	}
	return dst
}

// snapKV is a key in client form, with what its shard says.
type snapKV struct {
	codec.KV
	local    int64 // create revision on the shard
	localMod int64
	member   int64 // ID of its lease on the shard
}

// parseStored reads a KeyValue of a shard and brings it to client form. stamped is false for a value
// that has no stamp: somebody else wrote it, or it is one of Spindle's own keys; clients do not see it.
func parseStored(msg []byte, kv *snapKV) (stamped, ok bool) {
	raw, ok := codec.ParseKV(msg)
	if !ok {
		return false, false
	}
	kv.KV, kv.local, kv.localMod, kv.member = raw, raw.CreateRevision, raw.ModRevision, raw.Lease
	return !isReserved(raw.Key) && unstamp(&kv.KV), true
}

// isReserved says that key is one of Spindle's own.
func isReserved(key []byte) bool { return len(key) == 0 || key[0] == 0 }

// unstamp brings what a shard stores to client form; false, with kv unchanged, if it has no stamp.
func unstamp(kv *codec.KV) bool {
	st, user, ok := ParseStamp(kv.Value)
	if !ok {
		return false
	}
	kv.Value, kv.ModRevision, kv.CreateRevision = user, st.Rev, st.Create
	kv.Version += st.VersionOffset
	if st.Lease != 0 {
		kv.Lease = st.Lease
	}
	return true
}

// partIter walks one shard's RangeResponse.
type partIter struct {
	it      codec.Fields
	kv      snapKV
	have    bool // kv is the next key
	more    bool
	count   int64
	skipped int64 // keys without a stamp

	client bool   // the keys are in client form; of kv there is the key only
	field  []byte // then: the KeyValue
}

// next moves to the next key; false at the end and on bad bytes (it.Bad).
func (p *partIter) next() bool {
	p.have = false
	for p.it.Next() {
		switch p.it.Field.Num {
		case 2:
			if p.client {
				p.field = p.it.Field.Bytes
				p.kv.Key, p.have = clientKey(p.field), true
				return true
			}
			stamped, ok := parseStored(p.it.Field.Bytes, &p.kv)
			if !ok {
				p.it.Bad = true
				return false
			}
			if stamped {
				p.have = true
				return true
			}
			p.skipped++
		case 3:
			p.more = p.it.Field.Val != 0
		case 4:
			p.count = int64(p.it.Field.Val)
		}
	}
	return false
}

// clientKey returns the key of a KeyValue in the form that appendKVField gives it: the first field.
func clientKey(kv []byte) []byte {
	size, n := protowire.ConsumeVarint(kv[1:])
	return kv[1+n:][:size]
}

// drain reads what stands behind the keys.
func (p *partIter) drain() {
	for p.it.Next() {
		switch p.it.Field.Num {
		case 3:
			p.more = p.it.Field.Val != 0
		case 4:
			p.count = int64(p.it.Field.Val)
		}
	}
}

// rangeMerge is the scratch of appendRange.
type rangeMerge struct {
	parts []partIter
	kvs   []snapKV
}

// foreign says that the last appendRange met values without a stamp: they are not in the answer.
func (m *rangeMerge) foreign() bool {
	for i := range m.parts {
		if m.parts[i].skipped > 0 {
			return true
		}
	}
	return false
}

func (m rangeMerge) reset() rangeMerge { return rangeMerge{reuse(m.parts), reuse(m.kvs)} }

// first returns the part with the smallest next key, -1 when all are at their end.
func (m *rangeMerge) first() int {
	best := -1
	for i := range m.parts {
		if m.parts[i].have && (best < 0 || bytes.Compare(m.parts[i].kv.Key, m.parts[best].kv.Key) < 0) {
			best = i
		}
	}
	return best
}

// AnswerRange appends the client's RangeResponse, made of the RangeResponses of the shards asked (in
// member form, in any order; none at all is an empty range). hdr.Revision is the revision that the answer
// speaks for. What was seen of create revisions goes to learn, which may be nil. Parts that are not
// well-formed are taken as far as they can be read.
func (p *Plan) AnswerRange(dst []byte, parts [][]byte, hdr codec.Header, learn Learner) []byte {
	if p.Kind != OpRange {
		return dst
	}
	dst = codec.AppendHeaderField(dst, &hdr)
	dst, _ = p.merge.appendRange(dst, &p.ranges[0], parts, learn)
	return dst
}

// appendRange appends the fields of a RangeResponse behind the header.
func (m *rangeMerge) appendRange(dst []byte, r *rangeSpec, parts [][]byte, learn Learner) (out []byte, ok bool) {
	m.parts, m.kvs = m.parts[:0], m.kvs[:0]
	for _, part := range parts {
		m.parts = append(m.parts, partIter{it: codec.Fields{Msg: part}})
		if !r.countOnly {
			m.parts[len(m.parts)-1].next()
		}
	}
	plain, more, cut := r.plain(), false, r.cut()
	for n := int64(0); !r.countOnly; n++ {
		i := m.first()
		if i < 0 {
			break
		}
		if plain && r.limit > 0 && n == r.limit {
			more = true
			break
		}
		if cut > 0 && n == cut {
			break
		}
		it := &m.parts[i]
		if learn != nil {
			learn.Learn(it.kv.Key, it.kv.local, it.kv.CreateRevision, it.kv.ModRevision)
		}
		if plain {
			dst = r.appendKV(dst, &it.kv.KV)
		} else {
			m.kvs = append(m.kvs, it.kv)
		}
		it.next()
	}
	if !plain && !r.countOnly {
		m.kvs = r.arrange(m.kvs)
		if r.limit > 0 && int64(len(m.kvs)) > r.limit {
			m.kvs, more = m.kvs[:r.limit], true
		}
		for i := range m.kvs {
			dst = r.appendKV(dst, &m.kvs[i].KV)
		}
	}
	count := int64(0)
	ok = true
	for i := range m.parts {
		it := &m.parts[i]
		it.drain()
		count += it.count - it.skipped
		more = more || it.more
		ok = ok && !it.it.Bad
	}
	dst = codec.AppendBool(dst, 3, more)
	return codec.AppendInt(dst, 4, count), ok
}

// appendSnapshot is appendRange for keys in client form and in order.
func (r *rangeSpec) appendSnapshot(dst []byte, kvs []snapKV) []byte {
	count, more := len(kvs), false
	if r.countOnly {
		kvs = nil
	} else {
		if cut := r.cut(); cut > 0 && int64(len(kvs)) > cut {
			kvs = kvs[:cut]
		}
		if !r.plain() {
			kvs = r.arrange(append([]snapKV(nil), kvs...))
		}
		if r.limit > 0 && int64(len(kvs)) > r.limit {
			kvs, more = kvs[:r.limit], true
		}
	}
	for i := range kvs {
		dst = r.appendKV(dst, &kvs[i].KV)
	}
	dst = codec.AppendBool(dst, 3, more)
	return codec.AppendInt(dst, 4, int64(count))
}

// appendKV appends one key of the response. Since 3.7 etcd answers keys_only from its index, which does
// not know leases, unless it sorts by value.
func (r *rangeSpec) appendKV(dst []byte, kv *codec.KV) []byte {
	if r.keysOnly {
		bare := *kv
		bare.Value = nil
		if r.target != sortValue {
			bare.Lease = 0
		}
		return appendKVField(dst, 2, &bare)
	}
	return appendKVField(dst, 2, kv)
}

// appendKVField appends kv as the message num. Its size is computed first: lists are long, and moving
// what was written costs more than counting.
func appendKVField(dst []byte, num protowire.Number, kv *codec.KV) []byte {
	dst = protowire.AppendTag(dst, num, protowire.BytesType)
	dst = protowire.AppendVarint(dst, uint64(sizeKV(kv)))
	return codec.AppendKV(dst, kv)
}

// sizeKV is the length of what codec.AppendKV appends.
func sizeKV(kv *codec.KV) int {
	return sizeBytes(kv.Key) + sizeInt(kv.CreateRevision) + sizeInt(kv.ModRevision) + sizeInt(kv.Version) +
		sizeBytes(kv.Value) + sizeInt(kv.Lease)
}

// sizeKVField is the length of what appendKVField appends, with a num below 16.
func sizeKVField(kv *codec.KV) int { return 1 + protowire.SizeBytes(sizeKV(kv)) }

func sizeBytes(b []byte) int {
	if len(b) == 0 {
		return 0
	}
	return 1 + protowire.SizeBytes(len(b))
}

func sizeInt(v int64) int {
	if v == 0 {
		return 0
	}
	return 1 + protowire.SizeVarint(uint64(v))
}

// arrange filters and sorts kvs, which are in order of keys. Like etcd it uses sort.Sort, so that keys
// that compare equal come in the same order as there.
func (r *rangeSpec) arrange(kvs []snapKV) []snapKV {
	n := 0
	for i := range kvs {
		if r.keeps(&kvs[i]) {
			kvs[n] = kvs[i]
			n++
		}
	}
	kvs = kvs[:n]
	order := r.order
	if r.target != sortKey && order == orderNone {
		order = orderAscend
	}
	s := kvSorter{kvs, r.target}
	switch {
	case order == orderDescend:
		sort.Sort(sort.Reverse(s))
	case r.target != sortKey:
		sort.Sort(s)
	}
	return kvs
}

func (r *rangeSpec) keeps(kv *snapKV) bool {
	return (r.maxMod == 0 || kv.ModRevision <= r.maxMod) && (r.minMod == 0 || kv.ModRevision >= r.minMod) &&
		(r.maxCreate == 0 || kv.CreateRevision <= r.maxCreate) && (r.minCreate == 0 || kv.CreateRevision >= r.minCreate)
}

type kvSorter struct {
	kvs    []snapKV
	target int32
}

func (s kvSorter) Len() int      { return len(s.kvs) }
func (s kvSorter) Swap(i, j int) { s.kvs[i], s.kvs[j] = s.kvs[j], s.kvs[i] }
func (s kvSorter) Less(i, j int) bool {
	a, b := &s.kvs[i], &s.kvs[j]
	switch s.target {
	case sortVersion:
		return a.Version < b.Version
	case sortCreate:
		return a.CreateRevision < b.CreateRevision
	case sortMod:
		return a.ModRevision < b.ModRevision
	case sortValue:
		return bytes.Compare(a.Value, b.Value) < 0
	}
	return bytes.Compare(a.Key, b.Key) < 0
}
