package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// progressEvery is how often a watch asks how far it is.
const progressEvery = 200 * time.Millisecond

var errCompacted = errors.New("compacted")

// watchAll watches everything from the beginning to the end, through one proxy, and goes on where it was whenever the
// stream ends. The first proxy's is the history.
func (l *load) watchAll(p int) {
	var last int64
	for {
		seg := &segment{key: root, end: string(prefixEnd(root)), start: last + 1, prevKV: true}
		err := l.follow(p, seg, 0, func(e *mvccpb.Event) {
			if p == 0 {
				l.rec.history = append(l.rec.history, historyEvent(e, l.rec.now()))
			}
		}, func() { l.position[p].Store(seg.upto) })
		last = max(last, seg.upto)
		switch {
		case err == nil:
			return
		case errors.Is(err, errCompacted):
			l.rec.complain("%s: compacted, though nothing above %d was", seg.who, l.compacted.Load())
			return
		}
		l.breathe()
	}
}

// breathe keeps a client from trying again all the time. It goes on after the end of the load.
func (l *load) breathe() { <-time.After(20 * time.Millisecond) }

func historyEvent(e *mvccpb.Event, heard time.Duration) *event {
	out := &event{rev: e.Kv.ModRevision, key: string(e.Kv.Key), del: e.Type == mvccpb.Event_DELETE, sum: sumOfEvent(e), heard: heard,
		prev: e.PrevKv.GetModRevision()}
	if !out.del {
		out.value, out.create, out.version, out.lease = string(e.Kv.Value), e.Kv.CreateRevision, e.Kv.Version, e.Kv.Lease
	}
	return out
}

// watchSome watches this and that for a while, from now or some way back, and often goes on where it was through the
// other proxy.
func (l *load) watchSome(r *rand.Rand, p int) {
	spans := []string{root, root + "hot/", root + "group/", root + "lease/"}
	for !l.over() {
		from := spans[r.IntN(len(spans))]
		seg := &segment{key: from, end: string(prefixEnd(from)), prevKV: r.IntN(2) == 0}
		if r.IntN(3) == 0 {
			seg.key, seg.end = l.hot[r.IntN(shards)][r.IntN(hotKeys)], ""
		}
		if r.IntN(2) == 0 {
			seg.start = max(l.compacted.Load()+1, l.newest.Load()-r.Int64N(2000))
		}
		for turns := 1 + r.IntN(4); turns > 0 && !l.over(); turns-- {
			err := l.follow(p, seg, time.Duration(1+r.Int64N(int64(4*time.Second))), nil, nil)
			if errors.Is(err, errCompacted) {
				break
			}
			if err != nil {
				l.breathe()
			}
			if r.IntN(2) == 0 {
				p = (p + 1) % proxies
			}
			next := &segment{key: seg.key, end: seg.end, prevKV: seg.prevKV, start: seg.start}
			if seg.who != "" { // it was created
				next.start = seg.upto + 1
			}
			seg = next
		}
	}
}

// follow runs one watch for a while (0: until the load is over and everything has come), and records what it brings. It
// returns nil when the watch ended because it should.
func (l *load) follow(p int, seg *segment, life time.Duration, event func(*mvccpb.Event), moved func()) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stream, err := pb.NewWatchClient(l.conn[p]).Watch(ctx)
	if err != nil {
		return err
	}
	err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte(seg.key), RangeEnd: []byte(seg.end), StartRevision: seg.start, PrevKv: seg.prevKV,
	}}})
	if err != nil {
		return err
	}
	// Asks for progress, and ends the watch when its time is over. The only sender from here on.
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	if life > 0 {
		timer := time.AfterFunc(life, cancel)
		defer timer.Stop()
	}
	created := make(chan struct{})
	wg.Go(func() {
		select {
		case <-created:
		case <-ctx.Done():
			return
		}
		ask := time.NewTicker(progressEvery)
		defer ask.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ask.C:
				if stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}) != nil {
					return
				}
			}
		}
	})
	recorded := false
	for {
		resp, err := stream.Recv()
		if err != nil {
			if life > 0 && ctx.Err() != nil {
				return nil
			}
			return err
		}
		at := l.rec.now()
		if resp.Canceled {
			return l.canceled(seg, resp)
		}
		if resp.Created {
			if seg.start == 0 {
				seg.start = resp.Header.Revision + 1
			}
			seg.upto = seg.start - 1
			seg.who = fmt.Sprintf("%.3f: watch of [%s, %s) from %d by proxy %d", at.Seconds(), seg.key, seg.end, seg.start, p)
			close(created)
		}
		l.rec.mu.Lock()
		if !recorded {
			recorded = true
			l.rec.segments = append(l.rec.segments, seg)
		}
		if rev := resp.Header.Revision; len(l.rec.shown) == 0 || l.rec.shown[len(l.rec.shown)-1].rev < rev {
			l.rec.shown = append(l.rec.shown, shown{at, rev})
		}
		err = seg.take(resp)
		if event != nil && err == nil {
			for _, e := range resp.Events {
				event(e)
			}
		}
		l.rec.mu.Unlock()
		if err != nil {
			l.rec.complain("%s: %v", seg.who, err)
			return err
		}
		if moved != nil {
			moved()
		}
		if final := l.final.Load(); life == 0 && final > 0 && seg.upto >= final {
			return nil
		}
	}
}

// take adds a response to the segment, and checks what must hold for any watch.
func (seg *segment) take(resp *pb.WatchResponse) error {
	rev := resp.Header.Revision
	if resp.Created {
		return nil
	}
	if len(resp.Events) == 0 {
		if rev < seg.upto {
			return fmt.Errorf("progress %d after %d", rev, seg.upto)
		}
		seg.upto = rev
		return nil
	}
	if first := resp.Events[0].Kv.ModRevision; first <= seg.upto {
		return fmt.Errorf("an event of revision %d after %d was reached", first, seg.upto)
	}
	if !slices.IsSortedFunc(resp.Events, func(a, b *mvccpb.Event) int { return int(a.Kv.ModRevision - b.Kv.ModRevision) }) {
		return fmt.Errorf("events are not in order: %v", resp.Events)
	}
	for _, e := range resp.Events {
		if e.PrevKv != nil && !seg.prevKV {
			return fmt.Errorf("prev_kv, though it was not asked for: %v", e)
		}
		seg.upto = e.Kv.ModRevision
		seg.seen = append(seg.seen, seen{rev: seg.upto, sum: sumOfEvent(e), prev: e.PrevKv.GetModRevision()})
	}
	if rev < seg.upto {
		return fmt.Errorf("header %d with an event of %d", rev, seg.upto)
	}
	return nil
}

// canceled judges a watch that the proxy has ended.
func (l *load) canceled(seg *segment, resp *pb.WatchResponse) error {
	if at := resp.CompactRevision; at > 0 {
		if at > l.compacted.Load() || max(seg.start, seg.upto+1) >= at {
			l.rec.complain("%s, at %d: canceled as compacted at %d; %d was", seg.who, seg.upto, at, l.compacted.Load())
		}
		return errCompacted
	}
	return fmt.Errorf("canceled: %s", strings.TrimSpace(resp.CancelReason))
}
