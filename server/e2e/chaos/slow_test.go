package chaos

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// slowTurns is how often TestSlowDisk may compare: the machine may have had other things to do while one shard was slow.
const slowTurns = 3

// failuresForgiven is how many requests for other shards may fail in TestSlowDisk: a busy machine may keep one for the whole shard
// timeout. Those that fail while this process stands still for standstill do not count.
const (
	failuresForgiven = 2
	standstill       = shardTimeout / 4
)

// What TestSlowDisk tells apart: by whose shard it is, and what it was.
var slowGroups = []string{"writes, others", "gets, others", "writes, slow shard", "gets, slow shard", "lists of everything"}

// latencies sorts what was asked and answered between two points in time into slowGroups.
func (l *load) latencies(slow int, from, to time.Duration) map[string][]time.Duration {
	l.rec.mu.Lock()
	defer l.rec.mu.Unlock()
	out := map[string][]time.Duration{}
	for _, q := range l.rec.requests {
		if q.call < from || q.call > to || q.code != 0 {
			continue
		}
		group, shard := "", q.shard
		switch key, get := strings.CutPrefix(q.what, "get "); {
		case get:
			group, shard = "gets", l.sys.shardOf(key)
		case q.acked && q.shard >= 0:
			group = "writes"
		case q.what == "list" && !q.stale && len(q.reads) == 1 && q.reads[0].key == root && q.reads[0].at == 0:
			group, shard = "lists of everything", -1
		default:
			continue
		}
		switch {
		case shard < 0:
		case shard == slow:
			group += ", slow shard"
		default:
			group += ", others"
		}
		out[group] = append(out[group], q.ret-q.call)
	}
	for _, d := range out {
		slices.Sort(d)
	}
	return out
}

// quantile returns one of sorted durations, 0 of none.
func quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	return d[int(q*float64(len(d)-1))]
}

// A shard whose every fsync takes 100 ms slows neither the writes nor the reads of other shards; lists and watches of
// everything wait for its writes, and for nothing more. Longer with SPINDLE_CHAOS_MEASURE.
func TestSlowDisk(t *testing.T) {
	if testing.Short() {
		t.Skip("starts eight processes")
	}
	lasts := 2 * time.Second
	if v := os.Getenv("SPINDLE_CHAOS_MEASURE"); v != "" {
		var err error
		if lasts, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
	}
	seed := seedOf(t)
	sys, l := startLoad(t, seed)
	if !sys.slowDisks() {
		t.Skip(errNoSlowDisk)
	}
	for p := range proxies { // more lists of everything than the load has
		l.clients.Go(func() {
			for l.pause(think) {
				l.listPage(p, &pb.RangeRequest{Key: []byte(root), RangeEnd: prefixEnd(root)})
			}
		})
	}
	var stood [][2]time.Duration // from when to when this process stood still; ours once the load has finished
	l.clients.Go(func() {
		for last := l.rec.now(); l.pause(think); last = l.rec.now() {
			if now := l.rec.now(); now-last > think+standstill {
				stood = append(stood, [2]time.Duration{last, now})
			}
		}
	})
	r := newRand(seed, 0)
	slow := r.IntN(shards)
	t.Logf("the slow one is %s", shardNames[slow])
	now := l.rec.now
	var spans [2][2]time.Duration
	// slower is what is wrong with the other shards' requests, which know nothing of it.
	slower := func() (wrong []string) {
		before, during := l.latencies(slow, spans[0][0], spans[0][1]), l.latencies(slow, spans[1][0], spans[1][1])
		for _, g := range slowGroups[:2] {
			if len(before[g]) == 0 || len(during[g]) == 0 {
				wrong = append(wrong, fmt.Sprintf("%s: %d before, %d during", g, len(before[g]), len(during[g])))
			} else if b, d := quantile(before[g], 0.5), quantile(during[g], 0.5); d > 3*b+slowFsync/4 {
				wrong = append(wrong, fmt.Sprintf("%s: the median was %v and is %v", g, b, d))
			}
		}
		return wrong
	}
	for turn := range slowTurns {
		for i, f := range []*fault{nil, sys.slowDisk(slow)} {
			if f != nil {
				if err := f.begin(); err != nil {
					t.Fatal(err)
				}
			}
			spans[i][0] = now()
			l.pause(lasts)
			spans[i][1] = now()
			if f == nil {
				continue
			}
			// Still slow, everything goes on.
			if !l.awaitAll(spans[i][1], recoverTimeout, nil) {
				t.Fatalf("not everything goes on while %s is slow: %s", shardNames[slow], l.stuck(spans[i][1]))
			}
			if err := f.undo(); err != nil {
				t.Fatal(err)
			}
		}
		wrong := slower()
		if len(wrong) == 0 {
			break
		}
		t.Logf("turn %d: %q", turn+1, wrong)
	}
	if err := l.finish(); err != nil {
		t.Fatal(err)
	}
	for _, w := range slower() {
		t.Error(w)
	}
	before, during := l.latencies(slow, spans[0][0], spans[0][1]), l.latencies(slow, spans[1][0], spans[1][1])
	for _, g := range slowGroups {
		b, d := before[g], during[g]
		t.Logf("%-20s before: %4d, p50 %6.1f ms, p99 %6.1f ms; during: %4d, p50 %6.1f ms, p99 %6.1f ms", g,
			len(b), toMs(quantile(b, 0.5)), toMs(quantile(b, 0.99)), len(d), toMs(quantile(d, 0.5)), toMs(quantile(d, 0.99)))
	}
	if d := during["writes, slow shard"]; len(d) > 0 && quantile(d, 0.5) < slowFsync {
		t.Errorf("the slow shard is not slow: half of its writes took less than %v", d)
	}
	var gap, last time.Duration
	for _, e := range l.rec.history {
		if e.heard > spans[1][0] && last > 0 && e.heard < spans[1][1] {
			gap = max(gap, e.heard-last)
		}
		last = e.heard
	}
	// What is asked of the slow shard, or of all, may take longer than the shard timeout.
	late, failed := 0, 0
	for _, q := range l.rec.requests {
		key, get := strings.CutPrefix(q.what, "get ")
		switch {
		case q.code == 0 || strings.Contains(q.text, "compacted") || strings.Contains(q.text, "lease not found"):
		case q.shard < 0 && !get, q.shard == slow, get && l.sys.shardOf(key) == slow:
			late++
		default:
			still := slices.ContainsFunc(stood, func(s [2]time.Duration) bool { return s[0] < q.ret && s[1] > q.call })
			if !still {
				failed++
			}
			t.Logf("a request for another shard failed (this process stood still: %v): %v", still, q)
		}
	}
	if failed > failuresForgiven {
		t.Errorf("%d requests for other shards failed", failed)
	}
	t.Logf("%d requests for the slow shard timed out; the watch of everything paused %v at most", late, ms(gap))
	for _, w := range l.rec.check().wrong {
		t.Error(w)
	}
}

func toMs(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
