package e2e

import (
	"context"
	"fmt"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/prototext"
)

// watchRequest makes a watch with random fields. What starts behind the compaction must be canceled.
func (g *generator) watchRequest() *pb.WatchCreateRequest {
	r := &pb.WatchCreateRequest{Key: g.key(), PrevKv: g.chance(50), Fragment: g.chance(30), ProgressNotify: g.chance(30)}
	if g.chance(70) {
		r.Key, r.RangeEnd = g.span()
	}
	if g.chance(30) {
		r.WatchId = int64(g.r.IntN(100))
	}
	for _, f := range []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT, pb.WatchCreateRequest_NODELETE} {
		if g.chance(20) {
			r.Filters = append(r.Filters, f)
		}
	}
	if n := g.revs.len(); n > g.compacted+1 && !g.chance(10) {
		i := n - 1 - g.r.IntN(min(n-1-g.compacted, 200))
		if g.chance(10) {
			i = g.r.IntN(n)
		}
		if i == g.compacted {
			i++ // the previous value of an event there may be gone or not
		}
		r.StartRevision = g.revs.revs[0][i]
	}
	return r
}

// watchTale is what a watch has told up to a revision.
type watchTale struct {
	created string
	events  []*mvccpb.Event
	end     string
}

// watchStep opens the same watch on both sides and compares what they bring up to the last write.
func (p *pair) watchStep() error {
	if p.revs.len() == 0 {
		return nil
	}
	reqs := [2]*pb.WatchCreateRequest{p.gen.watchRequest()}
	reqs[1] = &pb.WatchCreateRequest{
		Key: reqs[0].Key, RangeEnd: reqs[0].RangeEnd, StartRevision: reqs[0].StartRevision, ProgressNotify: reqs[0].ProgressNotify,
		Filters: reqs[0].Filters, PrevKv: reqs[0].PrevKv, WatchId: reqs[0].WatchId, Fragment: reqs[0].Fragment,
	}
	if i, ok := p.revs.index[0][reqs[0].StartRevision]; ok && i > 0 {
		// What one request wrote on several shards has several revisions here, the pair has the largest.
		reqs[1].StartRevision = p.revs.revs[1][i-1] + 1
	} else {
		reqs[1].StartRevision = p.revs.other(reqs[0].StartRevision)
	}
	p.history = append(p.history, fmt.Sprintf("watch{%s}", prototext.MarshalOptions{}.Format(reqs[0])))
	var tales [2]watchTale
	for side := range 2 {
		var err error
		if tales[side], err = p.watchTale(side, reqs[side]); err != nil {
			return fmt.Errorf("watch on side %d: %w", side, err)
		}
	}
	if tales[0].created != tales[1].created || tales[0].end != tales[1].end {
		return fmt.Errorf("watches differ:\n  etcd:    %s, %s\n  spindle: %s, %s", tales[0].created, tales[0].end, tales[1].created, tales[1].end)
	}
	if err := p.compareEvents(tales[0].events, tales[1].events); err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	return nil
}

// watchTale runs one watch until everything up to the last write has come, or it is canceled.
func (p *pair) watchTale(side int, req *pb.WatchCreateRequest) (tale watchTale, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	stream, err := p.side[side].w.Watch(ctx)
	if err != nil {
		return tale, err
	}
	if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: req}}); err != nil {
		return tale, err
	}
	// etcd says nothing while it is not there yet, so it is asked again and again.
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	asking.Go(func() {
		again := time.NewTicker(5 * time.Millisecond)
		defer again.Stop()
		ask := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}
		for stream.Send(ask) == nil {
			select {
			case <-ctx.Done():
				return
			case <-again.C:
			}
		}
	})
	last := p.revs.last(side)
	for {
		resp, err := stream.Recv()
		if err != nil {
			return tale, err
		}
		if resp.Created {
			tale.created = fmt.Sprintf("id %d", resp.WatchId)
		}
		if resp.Canceled {
			tale.end = fmt.Sprintf("canceled %q compact %s", resp.CancelReason, p.revs.name(side, resp.CompactRevision))
			return tale, nil
		}
		tale.events = append(tale.events, resp.Events...)
		if len(resp.Events) == 0 && tale.created != "" && !resp.Created && resp.Header.Revision >= last {
			tale.end = "all"
			return tale, nil
		}
	}
}
