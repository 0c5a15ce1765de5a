package revclock

import (
	"errors"
	"fmt"
	"math"
)

// Log is the fold of the log of ticks: how far revisions were handed out, for which shard and to whom.
// Every proxy folds the same ticks in the same order and has the same N, A and C. What differs from proxy
// to proxy is the clocks: how far this one's streams have seen each shard, which decides what ranges
// are open.
//
// Invariants, per shard: open ranges are ascending and lie above the clock; the last one ends at A if
// A is above the clock, and there is none if not.
//
// A Log is a plain state machine and belongs to one goroutine.
type Log struct {
	self   ID
	rev    int64 // coordinator's revision of the last tick folded in
	n      int64
	shards []logShard
	ticks  int // folded since the last Load or snapshotSeen
	order  order

	tick   Tick    // the last one folded in; filters are not valid any more
	ranges []Range // what each of its items got, without filters
}

type logShard struct {
	a      int64
	holder ID
	c      int64   // the largest C_i of a tick
	clock  int64   // clock_i, as this proxy's stream has seen it
	open   []Range // ascending
	other  int64   // when a range was last given to another proxy, 0 for never
}

// maxOpen bounds the open ranges kept of one shard (one whose stream is down while others write to it).
// Beyond, the older half becomes one Merged range.
const maxOpen = 4096

var errOverflow = errors.New("the coordinator has handed out all revisions there are")

// NewLog makes the Log of a fresh system: N is 1, like the revision of an empty etcd, and nothing was
// handed out. self is the proxy that uses it.
func NewLog(self ID, shards int) *Log {
	l := &Log{self: self, n: 1, shards: make([]logShard, shards)}
	l.order.init(shards)
	return l
}

// restart forgets everything but the clocks, and what was learned of the other proxies.
func (l *Log) restart() {
	l.rev, l.n, l.ticks = 0, 1, 0
	for i := range l.shards {
		l.shards[i] = logShard{clock: l.shards[i].clock}
	}
}

// Load goes on from a snapshot, of a later revision than what is folded in, if anything is. Between F_i
// (clock_i at first) and the snapshot's A_i lies one open range that may write anything: ticks that were
// summed up cannot be told apart any more.
func (l *Log) Load(snapshot []byte, now int64) error {
	var s Snapshot
	if err := s.Parse(snapshot); err != nil {
		return err
	}
	if len(s.Shards) != len(l.shards) {
		return &lossError{fmt.Errorf("the coordinator's snapshot has %d member clusters and the partition map %d: it belongs to another system; see whether --coordinator is right", len(s.Shards), len(l.shards)), lossForeign}
	}
	for i := range l.shards {
		sh, from := &l.shards[i], &s.Shards[i]
		seen := l.Frontier(i)
		sh.a, sh.holder, sh.c = from.A, from.Holder, from.C
		clear(sh.open)
		sh.open = sh.open[:0]
		if sh.a > seen {
			if sh.holder != l.self {
				sh.other = now
			}
			sh.open = append(sh.open, Range{
				First: seen + 1, Last: sh.a, Holder: sh.holder, Rev: s.Rev, Seen: now, Filter: FilterAll, Merged: true,
			})
		}
	}
	l.rev, l.n, l.ticks = s.Rev, s.N, 0
	return nil
}

// AppendSnapshot appends the snapshot of what is folded in.
func (l *Log) AppendSnapshot(dst []byte) []byte {
	s := Snapshot{Rev: l.rev, N: l.n, Shards: make([]SnapshotShard, len(l.shards))}
	for i := range l.shards {
		s.Shards[i] = SnapshotShard{A: l.shards[i].a, Holder: l.shards[i].holder, C: l.shards[i].c}
	}
	return AppendSnapshot(dst, &s)
}

// Fold takes the tick that the coordinator has at revision rev. Ticks must come in order of rev; one that
// was folded before changes nothing and is answered with false. waiting is the nonce of the own tick that
// somebody waits for, 0 for none: the ranges of another own one are orphans. After an error the Log is of
// no use any more.
func (l *Log) Fold(tick []byte, rev, now int64, waiting uint64) (folded bool, err error) {
	if rev <= l.rev {
		return false, nil
	}
	t := &l.tick
	if err := t.Parse(tick); err != nil {
		return false, err
	}
	l.rev = rev
	l.ticks++
	l.ranges = l.ranges[:0]
	for i := range t.Items {
		it := &t.Items[i]
		if it.Shard >= len(l.shards) {
			return false, errTick
		}
		if l.n > math.MaxInt64-MaxCount {
			return false, errOverflow
		}
		sh := &l.shards[it.Shard]
		if it.Committed > sh.a {
			return false, errBehind
		}
		if it.Count == 0 {
			sh.c = max(sh.c, it.Committed)
			l.ranges = append(l.ranges, Range{})
			continue
		}
		r := Range{
			First: l.n + 1, Last: l.n + int64(it.Count), Holder: t.Proxy, Nonce: t.Nonce, Rev: rev, Turn: it.Turn,
			Seen: now, Orphan: t.Proxy == l.self && t.Nonce != waiting,
		}
		l.n = r.Last
		l.ranges = append(l.ranges, r)
		sh.a, sh.holder, sh.c = r.Last, t.Proxy, max(sh.c, it.Committed)
		if t.Proxy != l.self {
			sh.other = now
		}
		if r.Last <= sh.clock {
			continue // its record was faster than its tick
		}
		r.First = max(r.First, sh.clock+1)
		r.Filter = append([]byte(nil), it.Filter...)
		if len(sh.open) >= maxOpen {
			sh.merge(maxOpen / 2)
		}
		sh.open = append(sh.open, r)
	}
	return true, nil
}

// merge makes one range of the k oldest.
func (sh *logShard) merge(k int) {
	m := sh.open[k-1]
	m.First, m.Filter, m.Merged, m.Nonce, m.Turn, m.Orphan = sh.open[0].First, FilterAll, true, 0, false, false
	m.Seen = sh.open[0].Seen
	sh.open[k-1] = m
	sh.drop(k - 1)
}

// drop forgets the k oldest open ranges.
func (sh *logShard) drop(k int) {
	if k == 0 {
		return
	}
	n := copy(sh.open, sh.open[k:])
	clear(sh.open[n:])
	sh.open = sh.open[:n]
}

// Committed says that this proxy's stream of a shard has delivered the record of holder's batch first to
// last, next after the record before it. It returns how many open ranges were overtaken by it: their
// batches can only be rejected now.
func (l *Log) Committed(shard int, first, last int64, holder ID) (overtaken int) {
	sh := &l.shards[shard]
	for i := range sh.open {
		r := &sh.open[i]
		if r.First > last {
			break
		}
		switch {
		case r.Merged:
		case r.Last < first:
			overtaken++
			l.order.overtaken(shard, r.Holder)
		case r.Holder == holder:
			l.order.inOrder(shard, holder)
		}
	}
	l.SetClock(shard, last)
	return overtaken
}

// SetClock says that this proxy has seen everything of a shard up to its clock, without a look at what
// the records in between were: where a stream begins, or leaps over a compaction. A clock never goes back.
func (l *Log) SetClock(shard int, clock int64) {
	sh := &l.shards[shard]
	if clock <= sh.clock {
		return
	}
	sh.clock = clock
	k := 0
	for k < len(sh.open) && sh.open[k].Last <= clock {
		k++
	}
	sh.drop(k)
	if len(sh.open) > 0 && sh.open[0].First <= clock {
		sh.open[0].First = clock + 1
	}
}

// Rev returns the coordinator's revision of the last tick that is folded in.
func (l *Log) Rev() int64 { return l.rev }

// N returns the last revision that was handed out at all.
func (l *Log) N() int64 { return l.n }

// Shards returns the number of shards.
func (l *Log) Shards() int { return len(l.shards) }

// A returns the last revision that was handed out for a shard, and to whom.
func (l *Log) A(shard int) (a int64, holder ID) { return l.shards[shard].a, l.shards[shard].holder }

// C returns the largest clock of a shard that any proxy has named as committed: a shard whose clock is
// below has lost data.
func (l *Log) C(shard int) int64 { return l.shards[shard].c }

// LastOther returns when this proxy last learned of a range of a shard that another proxy was given, in the nanoseconds of
// Config.Now; 0 for never.
func (l *Log) LastOther(shard int) int64 { return l.shards[shard].other }

// Clock returns the last clock of a shard that this proxy was told.
func (l *Log) Clock(shard int) int64 { return l.shards[shard].clock }

// Open returns the ranges of a shard above its clock, ascending, valid until the next call that changes
// the Log.
func (l *Log) Open(shard int) []Range { return l.shards[shard].open }

// Frontier returns F_i: every revision up to it is seen or will never be on this shard.
func (l *Log) Frontier(shard int) int64 {
	sh := &l.shards[shard]
	if len(sh.open) > 0 {
		return sh.open[0].First - 1
	}
	// The clock may be above N when a record was faster than its tick.
	return max(l.n, sh.clock)
}

// AppendA appends A_i of every shard.
func (l *Log) AppendA(dst []int64) []int64 {
	for i := range l.shards {
		dst = append(dst, l.shards[i].a)
	}
	return dst
}
