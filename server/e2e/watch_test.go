package e2e

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// eventLog collects what one watch (with prev_kv, on a stream of its own) brings, and checks on the way
// what must hold for any watch: revisions rise, a revision comes in one response, headers keep step.
type eventLog struct {
	mu        sync.Mutex
	cond      *sync.Cond
	start     int64
	created   int64 // header revision of the created message
	events    []*mvccpb.Event
	progress  int64 // everything up to here has come
	err       error
	compacted int64 // see openWatchOver
	stream    pb.Watch_WatchClient
	cancel    context.CancelFunc
}

// close ends the watch; the log keeps what it has.
func (l *eventLog) close() { l.cancel() }

func openWatch(t testing.TB, s *rpc, prefix string, start int64) *eventLog {
	t.Helper()
	return openWatchOn(t, s, []byte(prefix), prefixEnd(prefix), start)
}

func openWatchOn(t testing.TB, s *rpc, prefix, end []byte, start int64) *eventLog {
	t.Helper()
	return openWatchOver(t, s, prefix, end, start, 0)
}

// openWatchOver opens a watch where everything below compacted is known to be compacted: events up to there
// must have lost their prev_kv, all others must have it.
func openWatchOver(t testing.TB, s *rpc, prefix, end []byte, start, compacted int64) *eventLog {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	stream, err := s.w.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: prefix, RangeEnd: end, StartRevision: start, PrevKv: true,
	}}})
	if err != nil {
		t.Fatal(err)
	}
	l := &eventLog{start: start, compacted: compacted, stream: stream, cancel: cancel}
	l.cond = sync.NewCond(&l.mu)
	first, err := stream.Recv()
	if err != nil {
		t.Fatalf("watch %q from %d: %v", prefix, start, err)
	}
	if !first.Created || first.Canceled || len(first.Events) > 0 {
		t.Fatalf("watch %q from %d: the first message is %v", prefix, start, first)
	}
	if err := checkHeader(first.Header); err != nil {
		t.Fatalf("watch %q from %d: created: %v", prefix, start, err)
	}
	l.created = first.Header.Revision
	go l.receive()
	return l
}

func (l *eventLog) receive() {
	for {
		resp, err := l.stream.Recv()
		l.mu.Lock()
		if err == nil {
			err = l.take(resp)
		}
		if err != nil && l.err == nil {
			l.err = err
		}
		l.cond.Broadcast()
		l.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (l *eventLog) take(resp *pb.WatchResponse) error {
	if resp.Canceled {
		return fmt.Errorf("the watch was canceled: %v", resp)
	}
	if err := checkHeader(resp.Header); err != nil {
		return err
	}
	if len(resp.Events) == 0 {
		if resp.Header.Revision < l.progress {
			return fmt.Errorf("progress went from %d back to %d", l.progress, resp.Header.Revision)
		}
		l.progress = resp.Header.Revision
		return nil
	}
	first := resp.Events[0].Kv.ModRevision
	if first <= l.progress {
		return fmt.Errorf("an event of revision %d came after everything up to %d was said to be sent: %v", first, l.progress, resp.Events[0])
	}
	rev := first
	for _, e := range resp.Events {
		if e.Kv.ModRevision < rev {
			return fmt.Errorf("revision %d after %d", e.Kv.ModRevision, rev)
		}
		rev = e.Kv.ModRevision
		if rev < l.start {
			return fmt.Errorf("revision %d in a watch from %d", rev, l.start)
		}
		// A Txn may write a key twice (a put and a delete in sibling Txns); prev_kv is from before it.
		hasPrev := e.PrevKv != nil
		wantPrev := rev > l.compacted && (e.Type == mvccpb.Event_DELETE || e.Kv.CreateRevision != e.Kv.ModRevision)
		if hasPrev != wantPrev && !slices.ContainsFunc(resp.Events, func(o *mvccpb.Event) bool {
			return o != e && o.Kv.ModRevision == rev && bytes.Equal(o.Kv.Key, e.Kv.Key)
		}) {
			return fmt.Errorf("prev_kv of %v", e)
		}
	}
	if resp.Header.Revision < rev {
		return fmt.Errorf("header revision %d with an event of %d", resp.Header.Revision, rev)
	}
	l.progress = rev
	l.events = append(l.events, resp.Events...)
	return nil
}

// until waits until the watch has brought everything up to rev, asking for progress, and returns all
// events up to rev.
func (l *eventLog) until(t testing.TB, rev int64) []*mvccpb.Event {
	t.Helper()
	events, err := l.wait(rev, readyTimeout)
	if err != nil {
		t.Fatal(err)
	}
	return events
}

func (l *eventLog) wait(rev int64, timeout time.Duration) ([]*mvccpb.Event, error) {
	deadline := time.Now().Add(timeout)
	for {
		l.mu.Lock()
		if l.err != nil || l.progress >= rev {
			n := len(l.events)
			for n > 0 && l.events[n-1].Kv.ModRevision > rev {
				n--
			}
			events, err := l.events[:n:n], l.err
			l.mu.Unlock()
			return events, err
		}
		at := l.progress
		l.mu.Unlock()
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("the watch from %d is at %d after %v, %d expected", l.start, at, timeout, rev)
		}
		// etcd stays silent when it is not there yet, so ask again now and then, as kube-apiserver does.
		if err := l.stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}); err != nil {
			return nil, err
		}
		l.awaitNews(50 * time.Millisecond)
	}
}

// awaitNews returns when something has come, or d has passed.
func (l *eventLog) awaitNews(d time.Duration) {
	timer := time.AfterFunc(d, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.cond.Broadcast()
	})
	defer timer.Stop()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.cond.Wait()
	}
}
