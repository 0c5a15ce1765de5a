package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sort"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// A DeleteRange over several shards is one atomic request for each of them, each with its own revision; the answer has
// the sum and the largest revision.

// wideRoot is the prefix of the keys that are deleted so, of all shards.
const wideRoot = root + "wide/"

// wideDelete is a DeleteRange of [key, end), and what its answer says of what it deleted.
type wideDelete struct {
	key, end string
	deleted  []write
}

// wide puts keys on all shards and deletes all of them at once, while the other proxy's client does the same.
func (l *load) wide(r *rand.Rand, p int) {
	for l.pause(time.Duration(r.Int64N(int64(16 * think)))) {
		for s := range shards {
			for i := range 3 {
				if r.IntN(3) == 0 {
					continue
				}
				w := write{key: l.sys.keyOn(s, fmt.Sprintf("%s%d-%d", wideRoot, s, i)), value: l.value()}
				_ = l.do(&request{proxy: p, shard: s, what: "put of a wide range", writes: []write{w}}, func(ctx context.Context, q *request) error {
					resp, err := l.kv(p).Put(ctx, &pb.PutRequest{Key: []byte(w.key), Value: []byte(w.value)})
					if err != nil {
						return err
					}
					q.rev, q.acked = resp.Header.Revision, true
					return nil
				})
			}
		}
		l.deleteWide(p)
	}
}

func (l *load) deleteWide(p int) {
	w := &wideDelete{key: wideRoot, end: string(prefixEnd(wideRoot))}
	_ = l.do(&request{proxy: p, shard: -1, what: "delete over all shards", wide: w}, func(ctx context.Context, q *request) error {
		resp, err := l.kv(p).DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte(w.key), RangeEnd: []byte(w.end), PrevKv: true})
		if err != nil {
			return err
		}
		q.rev, q.acked = resp.Header.Revision, resp.Deleted > 0
		if resp.Deleted != int64(len(resp.PrevKvs)) {
			l.rec.complain("a delete of %d keys shows %d: %v", resp.Deleted, len(resp.PrevKvs), q)
		}
		for _, kv := range resp.PrevKvs {
			w.deleted = append(w.deleted, write{key: string(kv.Key), del: true, prevMod: kv.ModRevision})
		}
		return nil
	})
}

// liveCount is how many keys there are from a revision on.
type liveCount struct {
	rev int64
	n   int
}

// liveOn counts the keys of [key, end) on each shard, revision by revision.
func (r *record) liveOn(h *history, key, end string) (out [shards][]liveCount) {
	for s := range out {
		out[s] = []liveCount{{}}
	}
	live := map[string]bool{}
	for _, e := range h.events {
		if !within(e.key, key, end) || live[e.key] == !e.del {
			continue
		}
		live[e.key] = !e.del
		s := r.shardOf(e.key)
		n := out[s][len(out[s])-1].n + 1
		if e.del {
			n -= 2
		}
		if last := &out[s][len(out[s])-1]; last.rev == e.rev {
			last.n = n
		} else {
			out[s] = append(out[s], liveCount{e.rev, n})
		}
	}
	return out
}

// emptyWithin says whether there was no key at some revision of from..to.
func emptyWithin(counts []liveCount, from, to int64) bool {
	i := sort.Search(len(counts), func(i int) bool { return counts[i].rev > from }) - 1
	for ; i < len(counts) && (counts[i].rev <= to); i++ {
		if counts[i].n == 0 {
			return true
		}
	}
	return false
}

// checkWide: what a DeleteRange says that it deleted went, on each shard at one revision that is its own and above all that
// was known, and nothing was left there at that revision; where it deleted nothing there was nothing at some point. One
// without an answer did this at most once on each shard.
func (r *record) checkWide(v *verdict, h *history, owner map[int64]*request, explained map[*event]bool) {
	floor := r.known()
	var unknown []*request
	var live [shards][]liveCount
	for _, q := range r.requests {
		if q.wide == nil {
			continue
		}
		if live[0] == nil {
			live = r.liveOn(h, q.wide.key, q.wide.end)
		}
		if q.code != 0 {
			unknown = append(unknown, q)
			v.unknown++
			continue
		}
		if q.acked {
			v.acked++
			v.wide++
		}
		before := floor(q.call)
		var part [shards]int64 // revisions
		var largest int64
		parts := 0
		for _, w := range q.wide.deleted {
			e := h.find(w)
			if e == nil {
				v.complain("acknowledged, but not in the history: %s of %d by %v", w.key, w.prevMod, q)
				continue
			}
			explained[e] = true
			s := r.shardOf(w.key)
			if part[s] != 0 && part[s] != e.rev {
				v.complain("one shard's part of a delete is not at one revision, but at %d and %d: %v", part[s], e.rev, q)
			}
			if part[s] == 0 {
				parts++
			}
			part[s] = e.rev
		}
		for s, rev := range part {
			switch {
			case rev == 0:
				if !emptyWithin(live[s], before, q.rev) {
					v.complain("a delete left all of shard %d, which was never empty from %d to %d: %v", s, before, q.rev, q)
				}
				continue
			case owner[rev] != nil:
				v.complain("revision %d belongs to two requests: %v and %v", rev, owner[rev], q)
			case rev <= before:
				v.complain("revision %d was known before this began, which has %d for a part: %v", before, rev, q)
			case !emptyWithin(live[s], rev, rev):
				v.complain("a delete left something of shard %d at %d: %v", s, rev, q)
			}
			owner[rev] = q
			largest = max(largest, rev)
		}
		if largest > q.rev || parts == shards && largest != q.rev {
			v.complain("the largest revision of a delete is %d: %v", largest, q)
		}
	}
	// What is left belongs to those without an answer.
	used := map[*request]*[shards]bool{}
	for i := 0; i < len(h.events); {
		e := h.events[i]
		next := i + 1
		for next < len(h.events) && h.events[next].rev == e.rev {
			next++
		}
		all := h.events[i:next]
		i = next
		// Keys that went with their lease may share the revision of the request behind them.
		n := slices.IndexFunc(all, func(e *event) bool { return e.del && e.lease == 0 && !explained[e] })
		if n < 0 || owner[e.rev] != nil {
			continue
		}
		e = all[n]
		s := r.shardOf(e.key)
		for _, q := range unknown {
			u := used[q]
			if u == nil {
				u = &[shards]bool{}
				used[q] = u
			}
			if u[s] || q.call > e.heard || !within(e.key, q.wide.key, q.wide.end) {
				continue
			}
			u[s] = true
			for _, e := range all {
				if within(e.key, q.wide.key, q.wide.end) && r.shardOf(e.key) == s {
					explained[e] = true
				}
			}
			if !emptyWithin(live[s], e.rev, e.rev) {
				v.complain("a delete left something of shard %d at %d: %v", s, e.rev, q)
			}
			owner[e.rev] = q
			break
		}
	}
	for _, u := range used {
		if *u != [shards]bool{} {
			v.unknownDone++
		}
	}
}
