package shard

import (
	"strings"
	"time"

	"spindle/codec"
)

// This file keeps members from running full. An etcd whose database has reached its quota refuses every Txn that puts
// anything, and every batch puts its record: deletes would be refused with the puts, and fences too, so that watches
// over all shards would wait. So Spindle refuses puts and leases itself, with etcd's own error, while there is room
// left for what frees space again. etcd compares the size of the file, which never shrinks without a defragmentation;
// but it does not grow either while it has free pages, which is what a compaction gives.

const (
	// quotaLook is the time between two looks at the size of a member, quotaLookNear while it is near its quota, or
	// beyond. Each is one small unary call. What is written faster than that is looked at by its bytes (see wrote).
	quotaLook     = 2 * time.Second
	quotaLookNear = 250 * time.Millisecond
	// quotaSettle is after which time the size shows what was written: etcd counts the file as its last commit left it,
	// which is 100 ms ago, or as long as the disk takes.
	quotaSettle = time.Second
	// The reserve is a part of the quota, within bounds: proxies that know nothing of each other's writes fill it
	// between two looks at the worst.
	quotaReservePart    = 64
	quotaReserveBatches = 5
	maxQuotaReserve     = 128 << 20
	// quotaNearReserves is from how many reserves below the quota on a member is looked at often.
	quotaNearReserves = 8
	// quotaGrowth is what a byte in a batch may make the file grow by, at most: pages that are not full, the index.
	quotaGrowth = 2
	// quotaSizes is how many looks count: the nodes of a member cluster have files of different sizes, any of them may
	// answer, and each enforces the quota for itself.
	quotaSizes = 3
	// quotaStir is how long a full member is left without a write of ours at first, quotaStirMost at most: see stir.
	quotaStir     = time.Second
	quotaStirMost = 64 * time.Second
)

// quota is what is known of the room on one member cluster. It decides without I/O or time.
type quota struct {
	limit   int64             // bytes, 0: the member has none, or does not tell
	sizes   [quotaSizes]int64 // of the file, as seen in the last looks
	free    int64             // bytes in pages without content, in the last look
	written int64             // bytes of batches that no size may show yet
	marked  int64             // of them, those that were sent before markAt
	markAt  int64             // ns
	batch   int64             // the largest batch, bytes
	full    bool              // puts are refused
	alarm   bool              // the member itself refuses, whatever its size
	stirAt  int64             // ns, when the member is to be written to if it is still full; 0: it was not full
	stirred time.Duration     // how long that was waited for
}

// size is the largest that was seen lately.
func (q *quota) size() int64 {
	return max(q.sizes[0], q.sizes[1], q.sizes[2])
}

// reserve is the room that is kept for what frees space, in bytes.
func (q *quota) reserve() int64 {
	return min(max(q.limit/quotaReservePart, quotaReserveBatches*q.batch), maxQuotaReserve, q.limit/4)
}

// near says that the member must be looked at often.
func (q *quota) near() bool {
	return q.alarm || q.full || q.limit > 0 && (q.size() > q.limit-quotaNearReserves*q.reserve() || q.hurried())
}

// hurried says that what was written lately may have taken a good part of what was left.
func (q *quota) hurried() bool {
	return q.written*quotaGrowth > max((q.limit-q.size())/4, q.reserve()/2)
}

// looked takes what a member has told at now (ns).
func (q *quota) looked(m *memberStatus, now int64) {
	q.limit = max(m.quota, 0)
	copy(q.sizes[1:], q.sizes[:])
	q.sizes[0], q.free = m.dbSize, m.dbSize-m.dbInUse
	if now-q.markAt >= int64(quotaSettle) {
		q.written -= q.marked
		q.marked, q.markAt = q.written, now
	}
	q.alarm = false
	for _, e := range m.errors {
		q.alarm = q.alarm || strings.Contains(e, "NOSPACE")
	}
	q.decide()
}

// stir reports whether a full member is to be written to now (ns), with an empty batch. bbolt counts a page as free only
// with the commit after the one that freed it, and etcd commits nothing where nothing is written: what a compaction
// freed on a member that refuses every put would not be seen before somebody deletes a key. The pauses double, so that
// a member that stays full is not filled by this; a compaction begins them anew (see compacted).
func (q *quota) stir(now int64) bool {
	switch {
	case !q.full || q.alarm:
		q.stirAt = 0
		return false
	case q.stirAt == 0:
		q.stirred = quotaStir
	case now < q.stirAt:
		return false
	default:
		q.stirred = min(2*q.stirred, quotaStirMost)
	}
	due := q.stirAt != 0
	q.stirAt = now + int64(q.stirred)
	return due
}

// compacted tells that the member may have free pages soon.
func (q *quota) compacted() { q.stirAt = 0 }

// wrote counts n bytes that are sent, and reports whether the member should be looked at before its time.
func (q *quota) wrote(n int) bool {
	q.written += int64(n)
	if q.limit == 0 || q.full {
		return false
	}
	q.decide()
	return q.full || q.hurried()
}

func (q *quota) decide() {
	if q.limit == 0 {
		q.full = false
		return
	}
	r, grown := q.reserve(), q.written*quotaGrowth
	need := r
	if q.full {
		need += r / 4 // not in and out with every look
	}
	// Free pages count only where there are many: a value of many pages needs them side by side, and a commit needs
	// others than those it frees. Half of the reserve stays in any case: etcd refuses by the size of the file. A
	// file beyond that stays refused until it is defragmented, so a member that was refused is not asked for more.
	free := q.free
	if free < 2*need {
		free = 0
	}
	size, free := q.size()+max(grown-free, 0), max(free-grown, 0)
	q.full = size > q.limit-need && free < 2*need || size > q.limit-r/2
}

// startQuotas looks at every member from now on.
func (c *Core) startQuotas() {
	for _, s := range c.shards {
		s.quota.batch = int64(c.cfg.MemberMaxRequestBytes)
		s.lookQuota()
	}
}

// lookQuota asks for the member's size now, and again after a while; one look at a time.
func (s *shardState) lookQuota() {
	c := s.c
	if s.quotaLooks || c.state != stateReady {
		return
	}
	s.quotaLooks = true
	s.quotaTurn++
	c.tr.Call(s.cluster, codec.MethodStatus, nil, statusTimeout, completion(func(resp []byte, st codec.Status, _ bool) {
		s.quotaLooks = false
		if c.state != stateReady {
			return
		}
		if st.Code == codec.OK {
			var m memberStatus
			m.parse(resp)
			if m.quota == 0 {
				m.quota = c.cfg.MemberQuotaBytes
			}
			was := s.quota
			s.quota.looked(&m, c.cfg.Now())
			s.tellQuota(&was)
			if s.quota.stir(c.cfg.Now()) {
				s.wantFence = true
				s.touch()
			}
			if was.alarm && !s.quota.alarm {
				s.touch()
			}
		}
		d := quotaLook
		if s.quotaSoon = s.quota.near(); s.quotaSoon {
			d = quotaLookNear
		}
		turn := s.quotaTurn
		c.after(d, func() {
			if turn == s.quotaTurn {
				s.lookQuota()
			}
		})
	}))
}

func (s *shardState) tellQuota(was *quota) {
	q, log := &s.quota, s.c.log.With("shard", s.name, "bytes", s.quota.size(), "free", s.quota.free, "quota", s.quota.limit)
	switch {
	case q.alarm && !was.alarm:
		log.Error("a member cluster has raised its NOSPACE alarm: nothing can be written to it, and watches over all shards wait. Compact, defragment its nodes, then disarm the alarm there (etcdctl alarm disarm)")
	case was.alarm && !q.alarm:
		log.Info("a member cluster's NOSPACE alarm is gone: writes go on")
	case q.full && !was.full:
		log.Error("a member cluster is nearly full: puts and new leases on it are refused, deletes and compaction are not. Compact, then defragment its nodes; or raise its --quota-backend-bytes")
	case was.full && !q.full:
		log.Info("a member cluster has room again")
	}
}

// sentBytes counts a batch towards the member's quota.
func (s *shardState) sentBytes(n int) {
	if s.quota.wrote(n) && !s.quotaSoon {
		s.lookQuota()
	}
}

// noSpace is told that the member has answered with its NOSPACE error.
func (s *shardState) noSpace() {
	if !s.quota.alarm {
		s.lookQuota()
	}
}

// refusesPut says that a request which puts something, or grants a lease, would find no room.
func (s *shardState) refusesPut() bool { return s.quota.full || s.quota.alarm }

// noRoomFor says that p is to be refused with etcd's ErrNoSpace. Deletes pass until the member itself refuses.
func (s *shardState) noRoomFor(p *Plan) bool {
	return s.quota.alarm || s.quota.full && len(p.PutSlots) > 0
}

// failNoSpace answers what waits for a member that refuses everything: none of it was sent.
func (s *shardState) failNoSpace() {
	if !s.quota.alarm || len(s.queue) == 0 {
		return
	}
	queue := s.queue
	s.queue = nil
	for _, w := range queue {
		s.answer(w, codec.ErrNoSpace)
	}
}
