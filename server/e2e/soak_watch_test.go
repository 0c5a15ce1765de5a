package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// soakSeen is what is kept of an event.
type soakSeen struct {
	rev  int64
	sum  uint64
	prev uint64 // 0: none shown
}

// soakSegment is what one watch brought: everything in [key, end) from start to upto.
type soakSegment struct {
	key, end    string
	start, upto int64
	prevKV      bool
	noPut       bool // the filters
	noDelete    bool
	who         string // for errors
	seen        []soakSeen
}

var errWatchCompacted = errors.New("compacted")

// watch is one watcher's life: watches on random ranges from random revisions, for a random time, with
// pauses, by one proxy or the other. Some go on where the last one ended, some list and go on from there,
// as kube-apiserver does. When the load has ended it stays until it has seen the last revision.
func (s *soak) watch(r *rand.Rand) {
	var key, end string
	next := int64(-1) // where to go on; -1: anywhere
	for s.ctx.Err() == nil {
		last := s.stopped()
		var start int64
		if next >= 0 {
			start = next
			s.resumed.Add(1)
		} else {
			key, end = s.span(r)
			newest := s.newest.Load()
			switch r.IntN(6) {
			case 0: // from now on
			case 1:
				start = newest + 1 + r.Int64N(100)
			case 2:
				start = 1 + r.Int64N(newest+1)
			case 3:
				start = s.compacted.Load() + r.Int64N(3) // at the edge
			default:
				start = max(1, newest-r.Int64N(3*soakSmallRing))
			}
		}
		seg := &soakSegment{key: key, end: end, start: start, prevKV: r.IntN(3) > 0}
		if r.IntN(5) == 0 {
			seg.noPut, seg.noDelete = r.IntN(2) == 0, r.IntN(2) == 0
		}
		err := s.follow(r, seg)
		if len(seg.seen) > 0 || seg.upto >= seg.start {
			s.mu.Lock()
			s.segments = append(s.segments, seg)
			s.mu.Unlock()
		}
		switch {
		case errors.Is(err, errWatchCompacted):
			next = s.listAgain(r, key, end)
		case err != nil:
			s.check(err)
			return
		case last && s.final.Load() > 0:
			return
		case r.IntN(2) == 0:
			next = max(seg.start, seg.upto+1) // resume, maybe after a pause in which it is compacted
		default:
			next = -1
		}
		if s.final.Load() == 0 && r.IntN(2) == 0 {
			s.pause(time.Duration(r.Int64N(int64(4 * time.Second))))
		}
	}
}

// listAgain is what a client does after a compaction: list, watch from the next revision on. It returns
// that, and records the list.
func (s *soak) listAgain(r *rand.Rand, key, end string) int64 {
	req := &pb.RangeRequest{Key: []byte(key), RangeEnd: []byte(end)}
	resp, err := s.conn(r).kv.Range(s.ctx, req)
	if !s.check(err) {
		return -1
	}
	s.addRead(req, resp)
	raise(&s.newest, resp.Header.Revision)
	return resp.Header.Revision + 1
}

// follow runs one watch until its time is over (or, after the load, until it has seen all).
func (s *soak) follow(r *rand.Rand, seg *soakSegment) error {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	stream, err := s.conn(r).w.Watch(ctx)
	if err != nil {
		return err
	}
	create := &pb.WatchCreateRequest{
		Key: []byte(seg.key), RangeEnd: []byte(seg.end), StartRevision: seg.start,
		PrevKv: seg.prevKV, ProgressNotify: r.IntN(2) == 0,
	}
	if seg.noPut {
		create.Filters = append(create.Filters, pb.WatchCreateRequest_NOPUT)
	}
	if seg.noDelete {
		create.Filters = append(create.Filters, pb.WatchCreateRequest_NODELETE)
	}
	if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}}); err != nil {
		return err
	}
	resp, err := stream.Recv()
	if err != nil {
		return err
	}
	if !resp.Created || resp.Canceled || len(resp.Events) > 0 {
		return fmt.Errorf("watch from %d: the first message is %v", seg.start, resp)
	}
	id := resp.WatchId
	if seg.start == 0 {
		seg.start = resp.Header.Revision + 1
	}
	seg.upto = seg.start - 1
	seg.who = fmt.Sprintf("watch %d of [%s, %s) from %d", id, seg.key, seg.end, seg.start)

	// Asks for progress now and then, and ends the watch when its time is over. The only sender.
	life := time.Duration(r.Int64N(int64(6 * time.Second)))
	byCancel := r.IntN(2) == 0
	senderDone := make(chan struct{})
	defer func() { cancel(); <-senderDone }()
	go func() {
		defer close(senderDone)
		over := time.After(life)
		ask := time.NewTicker(200 * time.Millisecond)
		defer ask.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-over:
				if s.stopped() {
					continue // it stays to the end
				}
				if !byCancel {
					cancel()
					return
				}
				_ = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: id}}})
				return
			case <-ask.C:
				if final := s.final.Load(); final > 0 && seg.start > final {
					cancel() // it began in a future that does not come
					return
				}
				_ = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
			}
		}
	}()

	for {
		if r.IntN(150) == 0 { // a slow reader
			s.lags.Add(1)
			s.pause(time.Duration(r.Int64N(int64(3 * time.Second))))
		}
		resp, err := stream.Recv()
		if err != nil {
			if ctx.Err() != nil && s.ctx.Err() == nil {
				return nil
			}
			return fmt.Errorf("%s: %w", seg.who, err)
		}
		if resp.Canceled {
			return s.canceled(seg, resp)
		}
		if err := s.take(seg, resp); err != nil {
			return fmt.Errorf("%s: %w", seg.who, err)
		}
		if final := s.final.Load(); final > 0 && seg.upto >= final {
			return nil
		}
	}
}

// canceled judges the end of a watch.
func (s *soak) canceled(seg *soakSegment, resp *pb.WatchResponse) error {
	at := resp.CompactRevision
	if at == 0 {
		if resp.CancelReason != "" {
			return fmt.Errorf("%s: canceled: %v", seg.who, resp)
		}
		return nil // as it was asked
	}
	if seg.upto+1 >= at {
		return fmt.Errorf("%s: canceled as compacted at %d, but the next revision is %d", seg.who, at, seg.upto+1)
	}
	if seg.upto+1 < s.compacted.Load() && at <= s.compacted.Load() {
		s.compactCancels.Add(1)
	} else if soakRingIsHistory {
		s.ringCancels.Add(1)
	} else {
		return fmt.Errorf("%s: canceled as compacted at %d, next revision %d, but only %d was compacted", seg.who, at, seg.upto+1, s.compacted.Load())
	}
	return errWatchCompacted
}

// take adds a response to the segment.
func (s *soak) take(seg *soakSegment, resp *pb.WatchResponse) error {
	if len(resp.Events) == 0 {
		if resp.Header.Revision < seg.upto {
			return fmt.Errorf("progress %d after %d", resp.Header.Revision, seg.upto)
		}
		seg.upto = resp.Header.Revision
		return nil
	}
	if first := resp.Events[0].Kv.ModRevision; first <= seg.upto {
		return fmt.Errorf("an event of revision %d after %d was reached", first, seg.upto)
	}
	for _, e := range resp.Events {
		rev := e.Kv.ModRevision
		if rev < seg.upto {
			return fmt.Errorf("revision %d after %d", rev, seg.upto)
		}
		seg.upto = rev
		seen := soakSeen{rev: rev, sum: s.eventSum(e)}
		if e.PrevKv != nil {
			if !seg.prevKV {
				return fmt.Errorf("prev_kv, though it was not asked for: %v", e)
			}
			seen.prev = s.kvSum(e.PrevKv)
		} else if seg.prevKV && rev > s.compacted.Load() && (e.Type == mvccpb.Event_DELETE || e.Kv.CreateRevision != rev) {
			// etcd leaves it out only when the version before is compacted.
			return fmt.Errorf("no prev_kv: %v", e)
		}
		seg.seen = append(seg.seen, seen)
	}
	if resp.Header.Revision < seg.upto {
		return fmt.Errorf("header %d with an event of %d", resp.Header.Revision, seg.upto)
	}
	return nil
}

func (s *soak) eventSum(e *mvccpb.Event) uint64 {
	if e.Type == mvccpb.Event_DELETE {
		return s.factsSum(string(e.Kv.Key), 0, e.Kv.ModRevision)
	}
	return s.kvSum(e.Kv)
}
