package e2e

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

const (
	// loadDeadline is what the clients of a faultLoad give each request.
	loadDeadline = 60 * time.Second
	// loadPause is how long each of them thinks between two requests: a load that takes the whole machine would
	// measure that.
	loadPause = 5 * time.Millisecond
)

// faultLoad is a load that is checked, on keys of several shards, each under a prefix of its own (an area), while
// members fail. Nothing of it may see an error, but for those of areas in mayFail.
type faultLoad struct {
	t      *testing.T
	conn   *rpc
	areas  []*loadArea
	all    *loadArea // lists over everything
	leases *loadArea // KeepAlives: the home of a lease is any shard
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	errs   chan error // what must never be
	newest atomic.Int64
	watch  *eventLog

	mu   sync.Mutex
	acks []loadAck
}

// loadAck is an acknowledged write.
type loadAck struct {
	rev        int64
	key, value string
}

// loadArea is what clients saw of one area since the last mark.
type loadArea struct {
	prefix  string
	mayFail atomic.Bool
	writes  atomic.Int64 // acknowledged, ever
	reads   atomic.Int64
	created atomic.Int64

	mu                  sync.Mutex
	write, read, events time.Duration // the longest that one took; the longest pause of the watch
	failed              map[string]int
	allFailed           int
}

func newArea(prefix string) *loadArea {
	return &loadArea{prefix: prefix, failed: map[string]int{}}
}

// do runs one request, and judges how it ended.
func (l *faultLoad) do(a *loadArea, write bool, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(l.ctx, loadDeadline)
	defer cancel()
	defer l.pause(loadPause)
	begun := time.Now()
	err := f(ctx)
	if l.ctx.Err() != nil {
		return l.ctx.Err()
	}
	took := time.Since(begun)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.failed[err.Error()]++
		a.allFailed++
		if !a.mayFail.Load() {
			fatalOnce(l.errs, "a request under %q failed after %v: %w", a.prefix, took, err)
		}
		return err
	}
	if write {
		a.write = max(a.write, took)
		a.writes.Add(1)
	} else {
		a.read = max(a.read, took)
		a.reads.Add(1)
	}
	return nil
}

func (l *faultLoad) pause(d time.Duration) {
	select {
	case <-l.ctx.Done():
	case <-time.After(d):
	}
}

// groups returns the areas, and what belongs to none.
func (l *faultLoad) groups() []*loadArea { return append(slices.Clone(l.areas), l.all, l.leases) }

// revision checks that what begins after an answer has no smaller revision.
func (l *faultLoad) revision(what string, before int64, h *pb.ResponseHeader, larger bool) {
	if h.Revision < before || larger && h.Revision == before {
		fatalOnce(l.errs, "%s: revision %d after %d", what, h.Revision, before)
	}
	raise(&l.newest, h.Revision)
}

func (l *faultLoad) acked(rev int64, key, value string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.acks = append(l.acks, loadAck{rev, key, value})
}

// startLoad begins.
func startLoad(t *testing.T, conn *rpc, prefixes ...string) *faultLoad {
	l := &faultLoad{t: t, conn: conn, errs: make(chan error, 1), all: newArea("everything"), leases: newArea("KeepAlive")}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	t.Cleanup(func() { l.cancel(); l.wg.Wait() })
	l.watch = openWatchOn(t, conn, []byte{1}, []byte{0}, 1)
	for _, p := range prefixes {
		a := newArea(p)
		l.areas = append(l.areas, a)
		for i := range 3 {
			l.wg.Go(func() { l.count(a, fmt.Sprintf("%scounter-%d", p, i), true) })
		}
		for range 2 {
			l.wg.Go(func() { l.count(a, p+"shared", false) })
		}
		l.wg.Go(func() { l.create(a) })
		l.wg.Go(func() { l.get(a) })
		l.wg.Go(func() { l.list(a, []byte(p), prefixEnd(p)) })
		l.follow(a)
		l.lease(a)
	}
	l.wg.Go(func() { l.list(l.all, []byte{1}, []byte{0}) })
	return l
}

// count raises a counter by compare-and-swap; sole is its only writer.
func (l *faultLoad) count(a *loadArea, key string, sole bool) {
	mod, value := int64(0), 0
	sure := false
	for l.ctx.Err() == nil {
		if !sure {
			err := l.do(a, false, func(ctx context.Context) error {
				r, err := l.conn.kv.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
				if err == nil && len(r.Kvs) > 0 {
					mod = r.Kvs[0].ModRevision
					value, err = strconv.Atoi(string(r.Kvs[0].Value))
				}
				return err
			})
			if err != nil {
				continue
			}
			sure = true
		}
		before := l.newest.Load()
		err := l.do(a, true, func(ctx context.Context) error {
			v := strconv.Itoa(value + 1)
			r, err := l.conn.kv.Txn(ctx, &pb.TxnRequest{
				Compare: []*pb.Compare{{Key: []byte(key), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: mod}}},
				Success: []*pb.RequestOp{putOp(key, v)},
				Failure: []*pb.RequestOp{rangeOp(key, "")},
			})
			switch {
			case err != nil:
				return err
			case r.Succeeded:
				l.revision(key, before, r.Header, true)
				l.acked(r.Header.Revision, key, v)
				mod, value = r.Header.Revision, value+1
			case sole:
				fatalOnce(l.errs, "%s was changed by its only writer, who does not know: %v", key, r)
			default:
				kv := r.Responses[0].GetResponseRange().Kvs[0]
				mod = kv.ModRevision
				value, err = strconv.Atoi(string(kv.Value))
			}
			return err
		})
		sure = err == nil
	}
}

// create makes keys that nobody else makes.
func (l *faultLoad) create(a *loadArea) {
	for n := 0; l.ctx.Err() == nil; n++ {
		key := fmt.Sprintf("%snew-%06d", a.prefix, n)
		l.pause(5 * loadPause) // every list has all of them
		before := l.newest.Load()
		_ = l.do(a, true, func(ctx context.Context) error {
			r, err := l.conn.kv.Txn(ctx, &pb.TxnRequest{
				Compare: []*pb.Compare{{Key: []byte(key), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{}}},
				Success: []*pb.RequestOp{putOp(key, "new")},
			})
			if err != nil {
				return err
			}
			if !r.Succeeded {
				fatalOnce(l.errs, "%s was there before it was created", key)
			}
			l.revision(key, before, r.Header, true)
			l.acked(r.Header.Revision, key, "new")
			a.created.Add(1)
			return nil
		})
	}
}

// get reads one counter.
func (l *faultLoad) get(a *loadArea) {
	last := 0
	for l.ctx.Err() == nil {
		before := l.newest.Load()
		_ = l.do(a, false, func(ctx context.Context) error {
			r, err := l.conn.kv.Range(ctx, &pb.RangeRequest{Key: []byte(a.prefix + "counter-0")})
			if err != nil {
				return err
			}
			l.revision("get", before, r.Header, false)
			if len(r.Kvs) > 0 {
				v, err := strconv.Atoi(string(r.Kvs[0].Value))
				if err != nil || v < last {
					fatalOnce(l.errs, "%s went from %d to %q", r.Kvs[0].Key, last, r.Kvs[0].Value)
				}
				last = v
			}
			return nil
		})
	}
}

// list counts what there is.
func (l *faultLoad) list(a *loadArea, key, end []byte) {
	for l.ctx.Err() == nil {
		before := l.newest.Load()
		var least int64
		for _, b := range l.areas {
			if a == b || a == l.all {
				least += b.created.Load()
			}
		}
		_ = l.do(a, false, func(ctx context.Context) error {
			r, err := l.conn.kv.Range(ctx, &pb.RangeRequest{Key: key, RangeEnd: end, KeysOnly: true})
			if err != nil {
				return err
			}
			l.revision("list", before, r.Header, false)
			var n int64
			for _, kv := range r.Kvs {
				if strings.Contains(string(kv.Key), "new-") {
					n++
				}
			}
			if n < least || r.Count != int64(len(r.Kvs)) {
				fatalOnce(l.errs, "a list of %q at %d shows %d new keys of %d (count %d), at least %d were there", key, r.Header.Revision, n, len(r.Kvs), r.Count, least)
			}
			return nil
		})
	}
}

// follow watches a, to see how long it pauses.
func (l *faultLoad) follow(a *loadArea) {
	stream, err := l.conn.w.Watch(l.ctx)
	if err == nil {
		err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
			Key: []byte(a.prefix), RangeEnd: prefixEnd(a.prefix),
		}}})
	}
	if err != nil {
		l.t.Fatal(err)
	}
	l.wg.Go(func() {
		for last := time.Now(); ; {
			r, err := stream.Recv()
			if l.ctx.Err() != nil {
				return
			}
			if err != nil || r.Canceled {
				fatalOnce(l.errs, "watch of %q: %v, %v", a.prefix, r, err)
				return
			}
			now := time.Now()
			a.mu.Lock()
			a.events = max(a.events, now.Sub(last))
			a.mu.Unlock()
			last = now
		}
	})
}

// lease holds a key by a lease that needs its KeepAlives.
func (l *faultLoad) lease(a *loadArea) {
	r, err := l.conn.l.LeaseGrant(l.ctx, &pb.LeaseGrantRequest{TTL: int64(2 * loadDeadline / time.Second)})
	if err != nil {
		l.t.Fatal(err)
	}
	key := a.prefix + "leased"
	p, err := l.conn.kv.Put(l.ctx, &pb.PutRequest{Key: []byte(key), Value: []byte("held"), Lease: r.ID})
	if err != nil {
		l.t.Fatal(err)
	}
	l.acked(p.Header.Revision, key, "held")
	stream, err := l.conn.l.LeaseKeepAlive(l.ctx)
	if err != nil {
		l.t.Fatal(err)
	}
	l.wg.Go(func() {
		for l.ctx.Err() == nil {
			err := l.do(l.leases, false, func(context.Context) error {
				if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: r.ID}); err != nil {
					return err
				}
				k, err := stream.Recv()
				if err == nil && k.TTL <= 0 {
					err = fmt.Errorf("lease of %q has ended", key)
				}
				return err
			})
			if err != nil && l.ctx.Err() == nil {
				if stream, err = l.conn.l.LeaseKeepAlive(l.ctx); err != nil {
					fatalOnce(l.errs, "KeepAlive: %w", err)
					return
				}
			}
			l.pause(10 * loadPause)
		}
	})
}

// longest returns how long the slowest request took.
func (a *loadArea) longest() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	return max(a.write, a.read)
}

// mark begins a new measurement.
func (l *faultLoad) mark() {
	for _, a := range l.groups() {
		a.mu.Lock()
		a.write, a.read, a.events = 0, 0, 0
		clear(a.failed)
		a.mu.Unlock()
	}
}

// report says what clients saw since mark.
func (l *faultLoad) report(what string) {
	l.t.Helper()
	var b strings.Builder
	for _, a := range l.groups() {
		a.mu.Lock()
		fmt.Fprintf(&b, "\n  %-10s longest write %4d ms, read %4d ms, watch pause %4d ms; errors: %v", a.prefix,
			a.write.Milliseconds(), a.read.Milliseconds(), a.events.Milliseconds(), a.failed)
		a.mu.Unlock()
	}
	l.t.Logf("%s: %s", what, b.String())
}

// progress waits until every area, or the given ones, has n more writes and n more reads.
func (l *faultLoad) progress(what string, n int64, areas ...*loadArea) {
	l.t.Helper()
	if len(areas) == 0 {
		areas = l.groups()
	}
	for _, a := range areas {
		w, r := a.writes.Load(), a.reads.Load()
		waitUntil(l.t, what+": requests under "+a.prefix+" go on", 2*loadDeadline, func() bool {
			l.check()
			return (a == l.all || a == l.leases || a.writes.Load() >= w+n) && a.reads.Load() >= r+n
		})
	}
}

func (l *faultLoad) check() {
	l.t.Helper()
	select {
	case err := <-l.errs:
		l.t.Fatal(err)
	default:
	}
}

// end stops the load and compares the history with what was acknowledged.
func (l *faultLoad) end() {
	l.t.Helper()
	l.check()
	l.cancel()
	l.wg.Wait()
	l.check()
	// One more write in each area ends what the watch must show.
	var last int64
	for _, a := range l.areas {
		r, err := l.conn.kv.Put(callContext(l.t), &pb.PutRequest{Key: []byte(a.prefix + "end")})
		if err != nil {
			l.t.Fatal(err)
		}
		last = r.Header.Revision
	}
	events := l.watch.until(l.t, last)
	values := map[string]string{} // key@revision
	counters, created := map[string]int{}, map[string]int{}
	for _, e := range events {
		key, value := string(e.Kv.Key), string(e.Kv.Value)
		if e.Type != mvccpb.Event_PUT {
			l.t.Errorf("nobody deleted anything, but %v", e)
			continue
		}
		values[fmt.Sprintf("%s@%d", key, e.Kv.ModRevision)] = value
		switch {
		case strings.Contains(key, "counter-"), strings.HasSuffix(key, "shared"):
			if v, err := strconv.Atoi(value); err != nil || v != counters[key]+1 {
				l.t.Errorf("%s went from %d to %q at %d", key, counters[key], value, e.Kv.ModRevision)
			}
			counters[key]++
		case strings.Contains(key, "new-"):
			if created[key]++; created[key] > 1 {
				l.t.Errorf("%s was created twice", key)
			}
		}
	}
	for _, a := range l.acks {
		if v, ok := values[fmt.Sprintf("%s@%d", a.key, a.rev)]; !ok || v != a.value {
			l.t.Errorf("acknowledged, but not in the history: %s=%s at %d", a.key, a.value, a.rev)
		}
	}
	failed := 0
	for _, a := range l.areas {
		failed += a.allFailed
	}
	if extra := len(events) - len(l.areas) - len(l.acks); extra < 0 || extra > failed+len(l.areas)*6 {
		l.t.Errorf("%d events, %d writes were acknowledged, %d failed and at most %d were under way at the end", len(events), len(l.acks), failed, len(l.areas)*6)
	}
	l.t.Logf("%d acknowledged writes and %d events checked, %d requests failed", len(l.acks), len(events), failed)
}
