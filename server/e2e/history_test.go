package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"spindle/server/node"
)

// This file watches from before the ring's tail: a ring of a thousand revisions, and twelve times as many.

const (
	historyWrites  = 12000
	historyWriters = 50
)

func ringSmall(c *node.Config) { c.RingSize = smallRing }

// done is a request that succeeded, and at which revision.
type done struct {
	rev int64
	txn *pb.TxnRequest
}

// writeHistory lets many writers, each with keys of its own, write n revisions at once (so that batches
// form), and returns what happened, in order.
func writeHistory(t *testing.T, rng uint64, n int, conns []*rpc) []done {
	t.Helper()
	var mu sync.Mutex
	var all []done
	errs := make(chan error, 1)
	var wg sync.WaitGroup
	for w := range historyWriters {
		var keys []string
		for k := range 5 {
			keys = append(keys, fmt.Sprintf("h/w%02d/%d", w, k))
		}
		s := conns[w%len(conns)]
		groups := sameShard(t, s, keys)
		wg.Go(func() {
			r := newRand(rng, w)
			have := map[string]bool{}
			for i := range n / historyWriters {
				g := groups[r.IntN(len(groups))]
				txn := &pb.TxnRequest{}
				put := func(k string) {
					txn.Success = append(txn.Success, putOp(k, fmt.Sprintf("%s-%d-%s", k, i, strings.Repeat("v", r.IntN(100)))))
					have[k] = true
				}
				switch k := g[r.IntN(len(g))]; {
				case r.IntN(5) == 0 && have[k]:
					txn.Success = append(txn.Success, deleteOp(k, ""))
					delete(have, k)
				case r.IntN(5) == 0:
					for _, k := range g {
						put(k)
					}
				default:
					put(k)
				}
				resp, err := s.kv.Txn(context.Background(), txn)
				if err != nil {
					fatalOnce(errs, "writer %d: %w", w, err)
					return
				}
				mu.Lock()
				all = append(all, done{resp.Header.Revision, txn})
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
	slices.SortFunc(all, func(a, b done) int { return int(a.rev - b.rev) })
	return all
}

// line is an event in words in which revisions are counted from the beginning of the writes.
func line(e *mvccpb.Event, rank func(int64) int) string {
	kv := func(kv *mvccpb.KeyValue) string {
		if kv == nil {
			return "-"
		}
		return fmt.Sprintf("%s create %d mod %d version %d %q", kv.Key, rank(kv.CreateRevision), rank(kv.ModRevision), kv.Version, kv.Value)
	}
	return fmt.Sprintf("%v %s, before: %s", e.Type, kv(e.Kv), kv(e.PrevKv))
}

func lines(events []*mvccpb.Event, revs []int64) []string {
	rank := func(rev int64) int {
		i, ok := slices.BinarySearch(revs, rev)
		if !ok && rev != 0 {
			return -int(rev)
		}
		return i
	}
	var out []string
	for _, e := range events {
		out = append(out, line(e, rank))
	}
	return out
}

func sameLines(t *testing.T, what string, got, want []string) {
	t.Helper()
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			t.Fatalf("%s: event %d of %d:\n  got  %s\n  want %s", what, i, len(want), got[i], want[i])
		}
	}
	if len(got) != len(want) {
		t.Fatalf("%s: %d events, %d expected", what, len(got), len(want))
	}
}

// watchClientv3 reads with clientv3 from start on until it has an event of rev last.
func watchClientv3(t *testing.T, c *clientv3.Client, start, last int64) []*mvccpb.Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	var events []*mvccpb.Event
	for resp := range c.Watch(ctx, "h/", clientv3.WithPrefix(), clientv3.WithRev(start), clientv3.WithPrevKV()) {
		if err := resp.Err(); err != nil {
			t.Fatalf("watch from %d: %v", start, err)
		}
		for _, e := range resp.Events {
			events = append(events, (*mvccpb.Event)(e))
		}
		if n := len(events); n > 0 && events[n-1].Kv.ModRevision >= last {
			return events
		}
	}
	t.Fatalf("watch from %d ended with %d events", start, len(events))
	return nil
}

func TestWatchFromAnyRevision(t *testing.T) {
	t.Parallel()
	s := seed(t)
	members := startMembers(t, 3)
	cfg := nodeConfig(t, members)
	ringSmall(&cfg)
	cfg.Loops = 2 // watches on the core's loop, and on another
	n := startNode(t, cfg)
	var conns []*rpc
	for range 4 {
		conns = append(conns, dial(t, n.ClientURLs()[0]))
	}
	writes := max(scale(historyWrites), 4*smallRing)
	begun := time.Now()
	all := writeHistory(t, s, writes, conns)
	revs := make([]int64, len(all))
	for i, d := range all {
		revs[i] = d.rev
	}
	last := revs[len(revs)-1]
	t.Logf("%d writes, revisions %d to %d, in %v", len(all), revs[0], last, time.Since(begun).Round(time.Millisecond))

	// The same on a plain etcd, one after the other.
	etcd := dial(t, startEtcd(t))
	etcdRevs := make([]int64, len(all))
	for i, d := range all {
		resp, err := etcd.kv.Txn(context.Background(), d.txn)
		if err != nil {
			t.Fatal(err)
		}
		etcdRevs[i] = resp.Header.Revision
	}
	want := lines(openWatch(t, etcd, "h/", 1).until(t, etcdRevs[len(etcdRevs)-1]), etcdRevs)
	from := func(start int64) []string { // what a watch from start on must show
		i, _ := slices.BinarySearch(revs, start)
		if i == len(revs) {
			return nil
		}
		skip := 0
		for _, d := range all[:i] {
			skip += len(d.txn.Success)
		}
		return want[skip:]
	}

	check := func(n *node.Node, what string) {
		t.Helper()
		c, raw := client(t, n.ClientURLs()[0]), dial(t, n.ClientURLs()[0])
		begun := time.Now()
		events := watchClientv3(t, c, 1, last)
		t.Logf("%s: clientv3 had %d events of %d revisions in %v", what, len(events), len(revs), time.Since(begun).Round(time.Millisecond))
		sameLines(t, what+": from 1", lines(events, revs), want)
		sameLines(t, what+": from 1, raw", lines(openWatch(t, raw, "h/", 1).until(t, last), revs), want)
		r := newRand(s, 1000)
		for range 5 {
			start := 1 + r.Int64N(last)
			sameLines(t, fmt.Sprintf("%s: from %d", what, start), lines(openWatch(t, raw, "h/", start).until(t, last), revs), from(start))
		}
		// Many come back at once, as after a restart of theirs.
		begun = time.Now()
		reads := historyReads(t, n)
		starts := make([]int64, 60)
		logs := make([]*eventLog, len(starts))
		for i := range starts {
			starts[i] = 1 + r.Int64N(last)
			logs[i] = openWatch(t, raw, "h/", starts[i])
		}
		for i, l := range logs {
			sameLines(t, fmt.Sprintf("%s: one of many, from %d", what, starts[i]), lines(l.until(t, last), revs), from(starts[i]))
			l.close()
		}
		t.Logf("%s: %d watches at once in %v, with %d reads of the history", what, len(starts), time.Since(begun).Round(time.Millisecond), historyReads(t, n)-reads)
	}
	check(n, "a proxy that has seen it")
	n.Close()
	n = startNode(t, cfg)
	check(n, "a proxy with an empty memory")

	// They go on with what is new, without a seam.
	raw := dial(t, n.ClientURLs()[0])
	l := openWatch(t, raw, "h/", 1)
	more := writeHistory(t, s+1, 2*smallRing, []*rpc{raw})
	end := more[len(more)-1].rev
	events := l.until(t, end)
	counted := 0
	for _, d := range append(slices.Clone(all), more...) {
		for range d.txn.Success {
			if counted >= len(events) || events[counted].Kv.ModRevision != d.rev {
				t.Fatalf("event %d is not of revision %d", counted, d.rev)
			}
			counted++
		}
	}
	if counted != len(events) {
		t.Errorf("%d events, %d expected", len(events), counted)
	}

	// What is compacted is gone, from the compact revision on everything is there.
	at := revs[len(revs)/2]
	slow := openSlow(t, n.ClientURLs()[0], 1)
	if _, err := raw.kv.Compact(callContext(t), &pb.CompactionRequest{Revision: at}); err != nil {
		t.Fatal(err)
	}
	seen, canceled := slow.read(t, end)
	if canceled == nil {
		if len(seen) < len(events) {
			t.Errorf("a watch over a compaction was not canceled, and has %d events of %d", len(seen), len(events))
		}
	} else if canceled.CompactRevision != at {
		t.Errorf("canceled with %v, compacted at %d", canceled, at)
	} else {
		for i, e := range seen {
			if e.Kv.ModRevision != events[i].Kv.ModRevision {
				t.Fatalf("event %d before the cancel is of revision %d, not %d", i, e.Kv.ModRevision, events[i].Kv.ModRevision)
			}
		}
	}
	for _, start := range []int64{1, at - 1} {
		if _, canceled := openSlow(t, n.ClientURLs()[0], start).read(t, end); canceled == nil || canceled.CompactRevision != at || len(canceled.CancelReason) != 0 {
			t.Errorf("a watch from %d, compacted at %d: %v", start, at, canceled)
		}
	}
	for _, start := range []int64{at, at + 1} {
		i, _ := slices.BinarySearch(revs, start)
		j := slices.IndexFunc(events, func(e *mvccpb.Event) bool { return e.Kv.ModRevision == revs[i] })
		got, canceled := openSlow(t, n.ClientURLs()[0], start).read(t, end)
		// As with etcd, a delete at the compact revision itself is gone.
		if canceled != nil || len(got) != len(events)-j && !(start == at && events[j].Type == mvccpb.Event_DELETE) {
			t.Errorf("a watch from %d, compacted at %d: %d events, %d expected, canceled: %v", start, at, len(got), len(events)-j, canceled)
		}
	}
}

// slowWatch is a watch whose client does not read until it is told to.
type slowWatch struct{ stream pb.Watch_WatchClient }

func openSlow(t testing.TB, url string, start int64) *slowWatch {
	t.Helper()
	const window = 64 << 10 // grpc-go would enlarge it by itself, up to 16 MiB, whether anybody reads or not
	s := dial(t, url, grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window))
	ctx, cancel := context.WithTimeout(context.Background(), 4*readyTimeout)
	t.Cleanup(cancel)
	stream, err := s.w.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte("h/"), RangeEnd: prefixEnd("h/"), StartRevision: start,
	}}}); err != nil {
		t.Fatal(err)
	}
	if first, err := stream.Recv(); err != nil || !first.Created {
		t.Fatalf("%v, %v", first, err)
	}
	return &slowWatch{stream}
}

// read reads until an event of rev or above comes, or the watch is canceled.
func (w *slowWatch) read(t testing.TB, rev int64) (events []*mvccpb.Event, canceled *pb.WatchResponse) {
	t.Helper()
	for {
		resp, err := w.stream.Recv()
		if err != nil {
			t.Fatalf("after %d events: %v", len(events), err)
		}
		if resp.Canceled {
			return events, resp
		}
		events = append(events, resp.Events...)
		if n := len(events); n > 0 && events[n-1].Kv.ModRevision >= rev {
			return events, nil
		}
	}
}

// historyReads returns how many reads of the members' history there were in this process.
func historyReads(t *testing.T, n *node.Node) int {
	t.Helper()
	const name = "\nspindle_watch_history_reads_total "
	_, body := httpGet(t, n.MetricsURLs()[0]+"/metrics")
	_, rest, _ := strings.Cut(body, name)
	value, _, _ := strings.Cut(rest, "\n")
	reads, err := strconv.Atoi(value)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return reads
}

// A client that does not read while five times the ring passes, then reads on.
func TestSlowWatcherLosesNothing(t *testing.T) {
	const events, size = 5 * smallRing, 10 << 20 / (5 * smallRing) // more than sockets hold
	n := startSpindle(t, 3, 1, ringSmall)[0]
	before := historyReads(t, n)
	w := openSlow(t, n.ClientURLs()[0], 1)
	var mu sync.Mutex
	at := map[int64]string{}
	var last int64
	errs := make(chan error, 1)
	var wg sync.WaitGroup
	s := dial(t, n.ClientURLs()[0])
	for i := range historyWriters {
		wg.Go(func() {
			for j := range events / historyWriters {
				key := fmt.Sprintf("h/%02d/%03d", i, j)
				resp, err := s.kv.Put(context.Background(), &pb.PutRequest{Key: []byte(key), Value: make([]byte, size)})
				if err != nil {
					fatalOnce(errs, "%s: %w", key, err)
					return
				}
				mu.Lock()
				at[resp.Header.Revision], last = key, max(last, resp.Header.Revision)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
	got, canceled := w.read(t, last)
	if canceled != nil {
		t.Fatalf("canceled after %d events: %v", len(got), canceled)
	}
	prev := int64(0)
	for _, e := range got {
		rev := e.Kv.ModRevision
		if rev <= prev || at[rev] != string(e.Kv.Key) {
			t.Fatalf("at %d, after %d: %q, written was %q", rev, prev, e.Kv.Key, at[rev])
		}
		prev = rev
		delete(at, rev)
	}
	if len(at) > 0 {
		t.Errorf("%d events of %d were lost", len(at), events)
	}
	if historyReads(t, n) == before {
		t.Error("it has read nothing but the ring: the test has become blind")
	}
}

// A slow watcher reads a history that is far larger than what may be held in memory for it.
func TestHistoryMemory(t *testing.T) {
	t.Parallel() // whatever goes on beside it, its memory is that of a process of its own
	const value, bound, writers = 20 << 10, 192 << 20, 16
	total := 240 << 20
	if mb, err := strconv.Atoi(os.Getenv("SPINDLE_HISTORY_MB")); err == nil {
		total = mb << 20
	}
	if testing.Short() || raceEnabled {
		t.Skip("writes 240 MB")
	}
	members := startMembers(t, 3)
	url := freeURL(t)
	args := append(proxyArgs(members, url, ""), "--ring-size", strconv.Itoa(smallRing))
	p := startProcess(t, t.TempDir(), args...)
	p.awaitReady(t)
	s := dial(t, url)
	r := rand.New(rand.NewPCG(1, 1))
	random := make([]byte, value)
	for i := range random {
		random[i] = byte(r.Uint32())
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var last int64
	for w := range writers {
		wg.Go(func() {
			for i := range total / value / writers {
				resp, err := s.kv.Put(context.Background(), &pb.PutRequest{Key: fmt.Appendf(nil, "h/%d/%d", w, i%50), Value: random})
				if err != nil {
					t.Errorf("put: %v", err)
					return
				}
				mu.Lock()
				last = max(last, resp.Header.Revision)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	// A new process, so that what the writes took is not counted.
	p.cmd.Process.Kill()
	<-p.done
	p = startProcess(t, t.TempDir(), args...)
	p.awaitReady(t)
	before := statusBytes(t, p.cmd.Process.Pid, "VmRSS:")
	slow := openSlow(t, url, 1)
	begun := time.Now()
	count := 0
	for at := int64(0); at < last; {
		resp, err := slow.stream.Recv()
		if err != nil || resp.Canceled {
			t.Fatalf("after %d events: %v, %v", count, resp, err)
		}
		count += len(resp.Events)
		at = resp.Events[len(resp.Events)-1].Kv.ModRevision
		if count%50 < len(resp.Events) { // it is slow
			wait := time.NewTimer(20 * time.Millisecond)
			<-wait.C
		}
	}
	peak := statusBytes(t, p.cmd.Process.Pid, "VmHWM:")
	t.Logf("%d events, %d MiB, read in %v: resident %d MiB before, %d MiB at most", count, count*value>>20, time.Since(begun).Round(time.Millisecond), before>>20, peak>>20)
	if count != total/value/writers*writers {
		t.Errorf("%d events, %d written", count, total/value/writers*writers)
	}
	if peak-before > bound {
		t.Errorf("the proxy grew by %d MiB, by more than %d", (peak-before)>>20, bound>>20)
	}
}

// statusBytes is residentBytes, and skips the test where the kernel does not tell.
func statusBytes(t testing.TB, pid int, field string) int64 {
	t.Helper()
	n, err := residentBytes(pid, field)
	if err != nil {
		t.Skip(err)
	}
	return n
}
