package e2e

import (
	"context"
	be "encoding/binary"
	"errors"
	"slices"
	"sort"
	"sync"
	"testing"
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

// memberLog collects all changes of all members.
type memberLog struct {
	mu   sync.Mutex
	keys map[string][]rawChange
	errs []error
	late bool // a watch of a member was overtaken by a compaction: this process had no time for it
}

// watchMembers watches the members directly, beside Spindle.
func watchMembers(t *testing.T, urls []string) *memberLog {
	m := &memberLog{keys: map[string][]rawChange{}}
	for _, u := range urls {
		ctx, cancel := context.WithCancel(context.Background())
		t.Cleanup(cancel)
		w := client(t, u).Watch(ctx, soakPrefix, clientv3.WithPrefix(), clientv3.WithRev(1))
		go func() {
			for resp := range w {
				m.mu.Lock()
				switch err := resp.Err(); {
				case errors.Is(err, rpctypes.ErrCompacted):
					m.late = true
				case err != nil && ctx.Err() == nil:
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
				m.mu.Unlock()
			}
		}()
	}
	return m
}

func (m *memberLog) overtaken() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.late
}

// checkMembers: the members, whose stamps are described in docs/formats.md, tell the same history of every
// key.
func (s *soak) checkMembers(h *soakHistory, m *memberLog) {
	count := func() (n int) {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, c := range m.keys {
			n += len(c)
		}
		return n
	}
	deadline := time.Now().Add(readyTimeout)
	for count() < len(h.events) && !m.overtaken() && time.Now().Before(deadline) {
		s.pauseAfterLoad()
	}
	if m.overtaken() {
		s.t.Log("the members' own histories were compacted before they were read: not compared")
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, err := range m.errs {
		s.t.Errorf("a watch of a member: %v", err)
	}
	at := map[string]int{}
	for _, e := range h.events {
		raw := m.keys[e.key]
		i := at[e.key]
		at[e.key]++
		if i >= len(raw) {
			s.t.Errorf("%s: the member has %d changes only, none for revision %d", e.key, len(raw), e.rev)
			return
		}
		if c := raw[i]; c.del != e.del || !c.del && (c.rev != uint64(e.rev) || s.sum(c.value) != e.value) {
			s.t.Errorf("%s: change %d is of revision %d (delete: %v), on the member of %d (delete: %v)", e.key, i, e.rev, e.del, c.rev, c.del)
			return
		}
	}
	for k, raw := range m.keys {
		if at[k] != len(raw) {
			s.t.Errorf("%s: %d changes in the history, %d on the member", k, at[k], len(raw))
		}
	}
}

// pauseAfterLoad gives a member's watch time to bring more.
func (s *soak) pauseAfterLoad() {
	select {
	case <-s.ctx.Done():
	case <-time.After(10 * time.Millisecond):
	}
}
