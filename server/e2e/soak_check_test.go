package e2e

import (
	"context"
	be "encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// soakEvent is an event of the history.
type soakEvent struct {
	rev     int64
	key     string
	del     bool
	value   uint64 // of a put
	sum     uint64
	prev    uint64 // of the version before; 0: there was none
	hasPrev bool
}

// soakHistory is what really happened, in order of revisions.
type soakHistory struct {
	events []soakEvent
}

// from returns the index of the first event at or above rev.
func (h *soakHistory) from(rev int64) int {
	return sort.Search(len(h.events), func(i int) bool { return h.events[i].rev >= rev })
}

// history builds the history from a watch of everything, and checks that it is consistent in itself: create
// revisions, versions and previous values follow from one another.
func (s *soak) history(events []*mvccpb.Event) *soakHistory {
	h := &soakHistory{}
	state := map[string]*mvccpb.KeyValue{}
	for _, e := range events {
		key := string(e.Kv.Key)
		before := state[key]
		ev := soakEvent{rev: e.Kv.ModRevision, key: key, del: e.Type == mvccpb.Event_DELETE, sum: s.eventSum(e)}
		if before != nil {
			ev.prev, ev.hasPrev = s.kvSum(before), true
		}
		late := e.PrevKv == nil && ev.rev <= s.compacted.Load() // compacted away before it was sent
		if !late && ((e.PrevKv != nil) != ev.hasPrev || ev.hasPrev && s.kvSum(e.PrevKv) != ev.prev) {
			s.t.Errorf("history: prev_kv of %v is not %v", e, before)
		}
		if ev.del {
			if before == nil {
				s.t.Errorf("history: %v deletes what is not there", e)
			}
			delete(state, key)
		} else {
			create, version := e.Kv.ModRevision, int64(1)
			if before != nil {
				create, version = before.CreateRevision, before.Version+1
			}
			if e.Kv.CreateRevision != create || e.Kv.Version != version {
				s.t.Errorf("history: %v over %v", e, before)
			}
			ev.value = s.sum(e.Kv.Value)
			state[key] = e.Kv
		}
		h.events = append(h.events, ev)
	}
	return h
}

// checkAcks: what was acknowledged is in the history, and nothing else is.
func (s *soak) checkAcks(h *soakHistory) {
	puts, deletes := int64(0), int64(0)
	for _, e := range h.events {
		if e.del {
			deletes++
		} else {
			puts++
		}
	}
	for _, a := range s.acks {
		if a.deleted > 0 {
			deletes -= a.deleted
		} else {
			puts--
		}
		if a.key == "" {
			continue
		}
		found := false
		for i := h.from(a.rev); i < len(h.events) && h.events[i].rev == a.rev; i++ {
			e := h.events[i]
			found = found || e.key == a.key && e.del == (a.deleted > 0) && e.value == a.value
		}
		if !found {
			s.t.Errorf("acknowledged, but not in the history: %s at revision %d (delete: %v)", a.key, a.rev, a.deleted > 0)
		}
	}
	if puts != 0 || deletes != 0 {
		s.t.Errorf("the history has %d puts and %d deletes more than were acknowledged", puts, deletes)
	}
}

// checkReads replays the history and holds every answer against the state at its revision.
func (s *soak) checkReads(h *soakHistory) {
	sort.SliceStable(s.reads, func(i, j int) bool { return s.reads[i].rev < s.reads[j].rev })
	state := make([]uint64, len(s.keys)) // by key; 0: absent
	next := 0
	wrong := 0
	for _, rd := range s.reads {
		for ; next < len(h.events) && h.events[next].rev <= rd.rev; next++ {
			e := h.events[next]
			i, _ := slices.BinarySearch(s.keys, e.key)
			state[i] = e.sum
			if e.del {
				state[i] = 0
			}
		}
		var sum uint64
		var count int64
		n := 0
		from, _ := slices.BinarySearch(s.keys, rd.key)
		for i := from; i < len(s.keys) && within(s.keys[i], rd.key, rd.end); i++ {
			if state[i] == 0 {
				continue
			}
			count++
			if rd.limit == 0 || count <= rd.limit {
				sum = sum*31 + state[i]
				n++
			}
		}
		if sum != rd.sum || n != rd.n || count != rd.count || rd.more != (int64(n) < count) {
			if wrong++; wrong <= 10 {
				s.t.Errorf("read of [%s, %s) limit %d at revision %d: %d keys, count %d, more %v; in the history there are %d of %d (same contents: %v)",
					rd.key, rd.end, rd.limit, rd.rev, rd.n, rd.count, rd.more, n, count, sum == rd.sum)
			}
		}
	}
	s.t.Logf("%d reads agree with the history, %d were refused as compacted", len(s.reads)-wrong, s.expiredReads.Load())
}

func within(key, from, end string) bool {
	if end == "" {
		return key == from
	}
	return key >= from && key < end
}

// checkSegments holds every watch against the history: each event once, in order, none missing, none more.
func (s *soak) checkSegments(h *soakHistory) {
	total, wrong := 0, 0
	for _, seg := range s.segments {
		var want []soakSeen
		for i := h.from(seg.start); i < len(h.events) && h.events[i].rev <= seg.upto; i++ {
			e := &h.events[i]
			if !within(e.key, seg.key, seg.end) || e.del && seg.noDelete || !e.del && seg.noPut {
				continue
			}
			want = append(want, soakSeen{e.rev, e.sum, e.prev})
		}
		total += len(seg.seen)
		if len(want) != len(seg.seen) {
			wrong++
			s.t.Errorf("%s up to %d brought %d events, the history has %d", seg.who, seg.upto, len(seg.seen), len(want))
		}
		for i := range min(len(want), len(seg.seen)) {
			got := seg.seen[i]
			if got.prev == 0 { // not asked for, or compacted: take checked which
				want[i].prev = 0
			}
			if got != want[i] {
				wrong++
				s.t.Errorf("%s: event %d is of revision %d, in the history it is of %d (same event: %v, same prev_kv: %v)",
					seg.who, i, got.rev, want[i].rev, got.sum == want[i].sum, got.prev == want[i].prev)
				break
			}
		}
		if wrong > 10 {
			break
		}
	}
	s.t.Logf("%d watches with %d events agree with the history; %d went on after a watch before them, %d pauses of slow readers, %d canceled as compacted, %d because memory had no more",
		len(s.segments)-wrong, total, s.resumed.Load(), s.lags.Load(), s.compactCancels.Load(), s.ringCancels.Load())
}

// rawChange is a change as a member itself tells it.
type rawChange struct {
	del   bool
	rev   uint64 // of a put: the stamp's
	value []byte
}

// memberLog collects the changes of one member.
type memberLog struct {
	mu   sync.Mutex
	keys map[string][]rawChange // a key that was met stays here, also without changes
	errs []error
	// lost is the revision of Spindle up to which changes may be missing: this process had no time for the watch, and a compaction
	// that was asked for has overtaken it. What came before the gap is dropped.
	lost int64
}

// watchMembers watches the members directly, beside Spindle.
func (s *soak) watchMembers(urls []string) (logs []*memberLog) {
	for _, u := range urls {
		c := client(s.t, u)
		ctx, cancel := context.WithCancel(context.Background())
		s.t.Cleanup(cancel)
		m := &memberLog{keys: map[string][]rawChange{}}
		logs = append(logs, m)
		go func() {
			for from := int64(1); from > 0; {
				w := c.Watch(ctx, soakPrefix, clientv3.WithPrefix(), clientv3.WithRev(from))
				from = 0
				for resp := range w {
					if resp.CompactRevision > 0 { // the last one, then
						from = resp.CompactRevision + 1
					}
					m.took(resp, s.compacted.Load())
				}
			}
		}()
	}
	return logs
}

// took takes what a watch brought; asked is up to where a compaction was asked for.
func (m *memberLog) took(resp clientv3.WatchResponse, asked int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := resp.Err(); errors.Is(err, rpctypes.ErrCompacted) {
		m.lost = asked
		for k := range m.keys {
			m.keys[k] = nil
		}
	} else if err != nil {
		m.errs = append(m.errs, err)
	}
	for _, e := range resp.Events {
		k := string(e.Kv.Key)
		c := rawChange{del: e.Type == clientv3.EventTypeDelete}
		if !c.del && len(e.Kv.Value) > 8 {
			c.rev = be.BigEndian.Uint64(e.Kv.Value)
			_, n := be.Uvarint(e.Kv.Value[8:])
			c.value = e.Kv.Value[8+max(n, 0):]
		}
		m.keys[k] = append(m.keys[k], c)
	}
}

// checkMembers: the members, whose stamps are described in docs/formats.md, tell the same history of every
// key, but for what a compaction took before it was read here.
func (s *soak) checkMembers(h *soakHistory, logs []*memberLog) {
	events := map[string][]soakEvent{}
	for _, e := range h.events {
		events[e.key] = append(events[e.key], e)
	}
	deadline := time.Now().Add(readyTimeout)
	wrong := s.compareMembers(events, logs)
	for len(wrong) > 0 && time.Now().Before(deadline) {
		s.pauseAfterLoad()
		wrong = s.compareMembers(events, logs)
	}
	for _, w := range wrong {
		s.t.Error(w)
	}
	for i, m := range logs {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, err := range m.errs {
			s.t.Errorf("the watch of member %d: %v", i, err)
		}
		if m.lost > 0 {
			s.t.Logf("member %d was compacted up to revision %d before it was read: what is older is not compared", i, m.lost)
		}
	}
}

// compareMembers returns what is wrong with the first key of each member that is not as the history (by key) has it.
func (s *soak) compareMembers(events map[string][]soakEvent, logs []*memberLog) (wrong []string) {
	left := maps.Clone(events)
	lost := int64(0)
	for i, m := range logs {
		m.mu.Lock()
		lost = max(lost, m.lost)
		said := len(wrong)
		for key, raw := range m.keys {
			if _, ok := left[key]; !ok {
				wrong = append(wrong, fmt.Sprintf("member %d: %s is elsewhere, too, or not in the history", i, key))
			} else if w := s.compareKey(events[key], raw, m.lost); w != "" && len(wrong) == said {
				wrong = append(wrong, fmt.Sprintf("member %d: %s: %s", i, key, w))
			}
			delete(left, key)
		}
		m.mu.Unlock()
	}
	for key, want := range left {
		if w := s.compareKey(want, nil, lost); w != "" {
			return append(wrong, fmt.Sprintf("no member: %s: %s", key, w))
		}
	}
	return wrong
}

// compareKey holds what a member has told of a key against the history. What is missing up to lost is missing at its begin.
func (s *soak) compareKey(events []soakEvent, raw []rawChange, lost int64) string {
	missing := len(events) - len(raw)
	if missing < 0 {
		return fmt.Sprintf("%d changes in the history, %d on the member", len(events), len(raw))
	}
	if missing > 0 && events[missing-1].rev > lost {
		return fmt.Sprintf("the member has %d changes only, of %d; revisions up to %d may be missing", len(raw), len(events), lost)
	}
	for i, e := range events[missing:] {
		if c := raw[i]; c.del != e.del || !c.del && (c.rev != uint64(e.rev) || s.sum(c.value) != e.value) {
			return fmt.Sprintf("change %d is of revision %d (delete: %v), on the member of %d (delete: %v)", missing+i, e.rev, e.del, c.rev, c.del)
		}
	}
	return ""
}

// pauseAfterLoad gives a member's watch time to bring more.
func (s *soak) pauseAfterLoad() {
	select {
	case <-s.ctx.Done():
	case <-time.After(10 * time.Millisecond):
	}
}
