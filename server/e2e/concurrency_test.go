package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

const (
	casWriters    = 64
	casKeys       = 24
	casIncrements = 80 // successful ones of each writer
	casPrefix     = "cas/"
)

// written is an acknowledged compare-and-swap.
type written struct {
	key   string
	value int
	rev   int64
}

// casKey and casValue: counters that everybody increments.
func casKey(i int) string { return fmt.Sprintf("%s%02d", casPrefix, i) }

// increment raises a counter by one, trying until it wins. It checks what a compare-and-swap promises.
func increment(ctx context.Context, s *rpc, key string, known *mvccpb.KeyValue) (written, *mvccpb.KeyValue, error) {
	for {
		var mod int64
		value := 0
		if known != nil {
			mod = known.ModRevision
			var err error
			if value, err = strconv.Atoi(string(known.Value)); err != nil {
				return written{}, nil, fmt.Errorf("%s holds %q", key, known.Value)
			}
		}
		next := []byte(strconv.Itoa(value + 1))
		resp, err := s.kv.Txn(ctx, &pb.TxnRequest{
			Compare: []*pb.Compare{{Key: []byte(key), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: mod}}},
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: next}}}},
			Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}}}},
		})
		if err != nil {
			return written{}, nil, err
		}
		if resp.Succeeded {
			rev := resp.Header.Revision
			if rev <= mod {
				return written{}, nil, fmt.Errorf("%s: written at revision %d over one of %d", key, rev, mod)
			}
			return written{key, value + 1, rev}, &mvccpb.KeyValue{Value: next, ModRevision: rev}, nil
		}
		kvs := resp.Responses[0].GetResponseRange().Kvs
		if len(kvs) != 1 {
			return written{}, nil, fmt.Errorf("%s: a lost compare-and-swap on mod %d shows %v", key, mod, kvs)
		}
		if kvs[0].ModRevision == mod {
			return written{}, nil, fmt.Errorf("%s: lost a compare-and-swap on the mod revision %d that it has", key, mod)
		}
		if kvs[0].ModRevision > resp.Header.Revision {
			return written{}, nil, fmt.Errorf("%s: header %d with mod revision %d", key, resp.Header.Revision, kvs[0].ModRevision)
		}
		if known != nil && kvs[0].ModRevision < mod {
			return written{}, nil, fmt.Errorf("%s: mod revision went from %d back to %d", key, mod, kvs[0].ModRevision)
		}
		known = kvs[0]
	}
}

func TestConcurrencyOneProxy(t *testing.T) {
	t.Parallel()
	testConcurrency(t, 1)
}

func TestConcurrencyTwoProxies(t *testing.T) {
	t.Parallel()
	testConcurrency(t, 2)
}

// testConcurrency lets 64 writers fight over shared keys while watchers follow from several revisions and
// readers list at H and watch from H+1. In the end everything must add up: nothing lost, doubled or
// out of order, through whichever proxy it was seen.
func testConcurrency(t *testing.T, proxies int) {
	s := seed(t)
	nodes := startSpindle(t, 3, proxies, ringAll)
	conns := make([]*rpc, 4*proxies) // several connections to each
	for i := range conns {
		conns[i] = dial(t, nodes[i%proxies].ClientURLs()[0])
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()

	var mu sync.Mutex
	var all []written
	var newest atomic.Int64 // largest revision acknowledged so far
	errs := make(chan error, 1)
	watchers := make(chan *eventLog, 64)
	for i := range proxies {
		watchers <- openWatch(t, conns[i], casPrefix, 1)
	}

	var writers sync.WaitGroup
	per := max(scale(casIncrements), 8)
	start := time.Now()
	for w := range casWriters {
		r := newRand(s, w)
		conn := conns[w%len(conns)]
		writers.Go(func() {
			known := map[string]*mvccpb.KeyValue{}
			for range per {
				key := casKey(r.IntN(casKeys))
				before := newest.Load()
				done, kv, err := increment(ctx, conn, key, known[key])
				if err != nil {
					fatalOnce(errs, "writer %d: %w", w, err)
					return
				}
				if done.rev <= before {
					fatalOnce(errs, "a write got revision %d, but %d was given to somebody before it began", done.rev, before)
					return
				}
				raise(&newest, done.rev)
				known[key] = kv
				mu.Lock()
				all = append(all, done)
				mu.Unlock()
			}
		})
	}

	// Readers: list at H, watch from H+1, and hold the sum against later lists.
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for i := range 2 * proxies {
		lister, watcher := conns[i%len(conns)], conns[(i+1)%len(conns)] // not always the same proxy
		readers.Go(func() {
			for round := 0; ; round++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := listThenWatch(ctx, t, lister, watcher, &newest, 4); err != nil {
					fatalOnce(errs, "reader %d, round %d: %w", i, round, err)
					return
				}
			}
		})
	}
	// More watchers from wherever the revisions are by now.
	readers.Go(func() {
		for i := 0; i < 12; i++ {
			rev := newest.Load()
			select {
			case <-stop:
				return
			case watchers <- openWatch(t, conns[i%len(conns)], casPrefix, max(1, rev-int64(i*20))):
			}
			waitRevision(&newest, rev+100, stop)
		}
	})

	finished := make(chan struct{})
	go func() { writers.Wait(); close(finished) }()
	select {
	case <-finished:
	case err := <-errs:
		cancel()
		t.Fatal(err)
	}
	took := time.Since(start)
	close(stop)
	readers.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
	close(watchers)

	sort.Slice(all, func(i, j int) bool { return all[i].rev < all[j].rev })
	t.Logf("%d writes through %d proxies in %v, revisions %d to %d", len(all), proxies, took.Round(time.Millisecond), all[0].rev, all[len(all)-1].rev)
	checkHistory(t, all, casWriters*per)
	n := 0
	for l := range watchers {
		events := l.until(t, all[len(all)-1].rev)
		checkEvents(t, l.start, events, all)
		n++
	}
	t.Logf("%d watches agree", n)
	for _, c := range conns[:proxies] {
		checkFinalState(t, c, all)
	}
}

func raise(v *atomic.Int64, to int64) {
	for {
		old := v.Load()
		if to <= old || v.CompareAndSwap(old, to) {
			return
		}
	}
}

func waitRevision(v *atomic.Int64, rev int64, stop <-chan struct{}) {
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for v.Load() < rev {
		select {
		case <-stop:
			return
		case <-poll.C:
		}
	}
}

// checkHistory: revisions are unique, and each key counts up by one in order of revision.
func checkHistory(t *testing.T, all []written, want int) {
	t.Helper()
	if len(all) != want {
		t.Fatalf("%d writes acknowledged, %d expected", len(all), want)
	}
	values := map[string]int{}
	for i, w := range all {
		if i > 0 && w.rev == all[i-1].rev {
			t.Fatalf("two writes got revision %d: %v, %v", w.rev, all[i-1], w)
		}
		if w.value != values[w.key]+1 {
			t.Fatalf("%s: value %d at revision %d after %d", w.key, w.value, w.rev, values[w.key])
		}
		values[w.key] = w.value
	}
}

// checkEvents: a watch has brought exactly the writes from start on.
func checkEvents(t *testing.T, start int64, events []*mvccpb.Event, all []written) {
	t.Helper()
	i := sort.Search(len(all), func(i int) bool { return all[i].rev >= start })
	for _, w := range all[i:] {
		if len(events) == 0 {
			t.Fatalf("watch from %d: the write %v is missing", start, w)
		}
		e := events[0]
		events = events[1:]
		if e.Type != mvccpb.Event_PUT || string(e.Kv.Key) != w.key || string(e.Kv.Value) != strconv.Itoa(w.value) || e.Kv.ModRevision != w.rev {
			t.Fatalf("watch from %d: %v instead of the write %v", start, e, w)
		}
		if e.Kv.Version != int64(w.value) {
			t.Fatalf("watch from %d: %v: version %d", start, w, e.Kv.Version)
		}
		if w.value > 1 && string(e.PrevKv.GetValue()) != strconv.Itoa(w.value-1) {
			t.Fatalf("watch from %d: %v: prev_kv %v", start, w, e.PrevKv)
		}
	}
	if len(events) > 0 {
		t.Fatalf("watch from %d: %d events too many, the first is %v", start, len(events), events[0])
	}
}

func checkFinalState(t *testing.T, s *rpc, all []written) {
	t.Helper()
	resp, err := s.kv.Range(callContext(t), &pb.RangeRequest{Key: []byte(casPrefix), RangeEnd: prefixEnd(casPrefix)})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]written{}
	for _, w := range all {
		want[w.key] = w
	}
	for _, kv := range resp.Kvs {
		w := want[string(kv.Key)]
		if kv.ModRevision != w.rev || string(kv.Value) != strconv.Itoa(w.value) || kv.Version != int64(w.value) {
			t.Errorf("in the end %v, the last write was %v", kv, w)
		}
	}
	if len(resp.Kvs) != len(want) {
		t.Errorf("%d keys in the end, %d were written", len(resp.Kvs), len(want))
	}
	if last := all[len(all)-1].rev; resp.Header.Revision < last {
		t.Errorf("the last list is at %d, a write got %d", resp.Header.Revision, last)
	}
}

// listThenWatch lists at H, watches from H+1, and lists again several times: list plus events up to each
// later H must be that list.
func listThenWatch(ctx context.Context, t *testing.T, lister, watcher *rpc, newest *atomic.Int64, lists int) error {
	list := func() (int64, map[string]string, error) {
		before := newest.Load()
		resp, err := lister.kv.Range(ctx, &pb.RangeRequest{Key: []byte(casPrefix), RangeEnd: prefixEnd(casPrefix)})
		if err != nil {
			return 0, nil, err
		}
		h := resp.Header.Revision
		if h < before {
			return 0, nil, fmt.Errorf("a list at %d, but a write of %d was acknowledged before it", h, before)
		}
		state := map[string]string{}
		for _, kv := range resp.Kvs {
			if kv.ModRevision > h {
				return 0, nil, fmt.Errorf("a list at %d shows %v", h, kv)
			}
			state[string(kv.Key)] = fmt.Sprintf("%s@%d", kv.Value, kv.ModRevision)
		}
		if !slices.IsSortedFunc(resp.Kvs, func(a, b *mvccpb.KeyValue) int { return slices.Compare(a.Key, b.Key) }) {
			return 0, nil, errors.New("a list is not sorted")
		}
		return h, state, nil
	}
	h, state, err := list()
	if err != nil {
		return err
	}
	l := openWatch(t, watcher, casPrefix, h+1)
	defer l.close()
	applied := 0
	for range lists {
		h2, want, err := list()
		if err != nil {
			return err
		}
		events, err := l.wait(h2, readyTimeout)
		if err != nil {
			return err
		}
		for _, e := range events[applied:] {
			state[string(e.Kv.Key)] = fmt.Sprintf("%s@%d", e.Kv.Value, e.Kv.ModRevision)
		}
		applied = len(events)
		if !maps.Equal(state, want) {
			return fmt.Errorf("the list at %d and the events up to %d make %v, the list there says %v", h, h2, state, want)
		}
	}
	return nil
}
