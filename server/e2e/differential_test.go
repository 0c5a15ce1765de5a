package e2e

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	"spindle/server/node"
)

// The numbers of requests (each goes to both systems) in a normal run.
const (
	sequentialRequests = 8_000
	parallelWorkers    = 48
	parallelRequests   = 72_000
	keysPerWorker      = 14
)

// ringAll makes the ring large enough to hold a whole test.
func ringAll(c *node.Config) { c.RingSize, c.RingBytes = 1<<18, 1<<30 }

// pair is one etcd and one Spindle that get the same requests.
type pair struct {
	t    *testing.T
	side [2]*rpc
	revs *revMap
	gen  *generator

	last    [2]int64 // largest header revision seen
	history []string // the last requests, for a failure's report
	// multi holds the etcd revisions of ranges that were deleted: on Spindle such a request may have
	// a revision for each shard.
	multi map[int64]bool
}

func call(ctx context.Context, s *rpc, req proto.Message) (any, error) {
	switch r := req.(type) {
	case *pb.RangeRequest:
		return s.kv.Range(ctx, r)
	case *pb.PutRequest:
		return s.kv.Put(ctx, r)
	case *pb.DeleteRangeRequest:
		return s.kv.DeleteRange(ctx, r)
	case *pb.TxnRequest:
		return s.kv.Txn(ctx, r)
	case *pb.CompactionRequest:
		return s.kv.Compact(ctx, r)
	}
	panic(fmt.Sprintf("no call for %T", req))
}

// step sends one random request to both and compares the answers.
func (p *pair) step(ctx context.Context) error {
	reqs := [2]proto.Message{p.gen.request()}
	reqs[1] = p.revs.translate(reqs[0])
	p.history = append(p.history, fmt.Sprintf("%T{%s}", reqs[0], prototext.MarshalOptions{}.Format(reqs[0])))
	if len(p.history) > 12 {
		p.history = p.history[1:]
	}

	var resps [2]any
	var errs [2]error
	send := call
	if r, ok := reqs[0].(*pb.RangeRequest); ok && p.gen.chance(30) && (r.SortOrder != pb.RangeRequest_NONE || r.SortTarget == pb.RangeRequest_KEY) {
		send = rangeStream
		p.history[len(p.history)-1] += " as a stream"
	}
	for side := range 2 {
		resps[side], errs[side] = send(ctx, p.side[side], reqs[side])
	}
	if r, ok := reqs[1].(*pb.RangeRequest); ok && r.Serializable && errs[1] == nil {
		// A serializable answer may be old; wait until it is not.
		for deadline := time.Now().Add(callTimeout); header(resps[1]).Revision < p.last[1]; {
			if resps[1], errs[1] = send(ctx, p.side[1], reqs[1]); errs[1] != nil {
				return fmt.Errorf("serializable: %w", errs[1])
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("serializable answers stay at revision %d, %d was seen", header(resps[1]).Revision, p.last[1])
			}
		}
	}
	if errs[0] != nil || errs[1] != nil {
		if a, b := errText(errs[0]), errText(errs[1]); a != b {
			return fmt.Errorf("errors differ:\n  etcd:    %s\n  spindle: %s", a, b)
		}
		return nil
	}
	for side, resp := range resps {
		h := header(resp)
		if err := checkHeader(h); err != nil {
			return err
		}
		if h.Revision < p.last[side] {
			return fmt.Errorf("side %d: header revision went from %d back to %d", side, p.last[side], h.Revision)
		}
		p.last[side] = h.Revision
	}
	if changed(resps[0]) != changed(resps[1]) {
		return fmt.Errorf("one changed something, one did not:\n  etcd:    %v\n  spindle: %v", resps[0], resps[1])
	}
	if changed(resps[0]) {
		if err := p.revs.add(header(resps[0]).Revision, header(resps[1]).Revision); err != nil {
			return err
		}
		p.gen.learn(reqs[0], resps[0], p.revs.last(0))
		if d, ok := reqs[0].(*pb.DeleteRangeRequest); ok && len(d.RangeEnd) > 0 {
			p.multi[p.revs.last(0)] = true
		}
	}
	if c, ok := reqs[0].(*pb.CompactionRequest); ok {
		p.gen.compacted = p.revs.index[0][c.Revision]
	}
	if a, b := p.revs.response(0, resps[0]), p.revs.response(1, resps[1]); a != b {
		return fmt.Errorf("answers differ:\n  etcd:    %s\n  spindle: %s", a, b)
	}
	return nil
}

func (p *pair) fail(step int, err error) {
	for _, h := range p.history {
		p.t.Log(h)
	}
	p.t.Errorf("request %d: %v", step, err)
}

// sameShard sorts keys by the shard they lie on, asking Spindle: a Txn over two shards is refused.
func sameShard(t testing.TB, s *rpc, keys []string) [][]string {
	t.Helper()
	get := func(k string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(k)}}}
	}
	var groups [][]string
next:
	for _, k := range keys {
		for i, g := range groups {
			_, err := s.kv.Txn(callContext(t), &pb.TxnRequest{Success: []*pb.RequestOp{get(g[0]), get(k)}})
			switch {
			case err == nil:
				groups[i] = append(g, k)
				continue next
			case status.Code(err) != codes.InvalidArgument:
				t.Fatalf("a Txn over %q and %q: %v", g[0], k, err)
			}
		}
		groups = append(groups, []string{k})
	}
	return groups
}

func newPair(t *testing.T, seed uint64, stream int, etcd, spindle *rpc, prefix string, alone bool) *pair {
	t.Helper()
	p := &pair{t: t, side: [2]*rpc{etcd, spindle}, revs: newRevMap(), multi: map[int64]bool{}}
	p.gen = &generator{r: newRand(seed, stream), prefix: prefix, revs: p.revs, mods: map[string]int64{}, alone: alone}
	for i := range keysPerWorker {
		p.gen.keys = append(p.gen.keys, fmt.Sprintf("%sk%02d", prefix, i))
	}
	p.gen.groups = sameShard(t, spindle, p.gen.keys)
	return p
}

// restartEvery is after how many requests the proxy is closed and another one started over the same members.
const restartEvery = 1000

// watchEvery is after how many requests a watch with random fields is compared.
const watchEvery = 80

// One client, all kinds of requests, compactions too: every answer equal, and every header's revision
// where it belongs between the writes. The proxy is closed now and then, and another one goes on.
func TestDifferentialSequential(t *testing.T) {
	t.Parallel()
	differentialSequential(t, nil)
}

// The same over shards that have ranges of keys: Txns then hold ranges, lists lie on one shard, some or all.
func TestDifferentialRanges(t *testing.T) {
	t.Parallel()
	differentialSequential(t, []string{"", "seq/k04", "seq/k09"})
}

func differentialSequential(t *testing.T, starts []string) {
	s := seed(t)
	etcd := dial(t, startEtcd(t))
	cfg := nodeConfig(t, startMembers(t, 3))
	ringAll(&cfg)
	cfg.Partition = rangesOf(starts)
	n := startNode(t, cfg)
	p := newPair(t, s, 0, etcd, dial(t, n.ClientURLs()[0]), "seq/", true)
	p.gen.spans = starts != nil
	ctx := context.Background()
	start := time.Now()
	restarts, watches := 0, 0
	for i := range scale(sequentialRequests) {
		if i%restartEvery == restartEvery-1 {
			p.side[1].conn.Close()
			n.Close()
			n = startNode(t, cfg)
			p.side[1] = dial(t, n.ClientURLs()[0])
			restarts++
		}
		if i%watchEvery == watchEvery-1 {
			watches++
			if err := p.watchStep(); err != nil {
				p.fail(i, err)
				return
			}
		}
		if err := p.step(ctx); err != nil {
			p.fail(i, err)
			return
		}
	}
	t.Logf("%d requests, %d writes, %d watches, %d restarts, %v", scale(sequentialRequests), p.revs.len(), watches, restarts, time.Since(start).Round(time.Millisecond))
}

// Many clients with keys of their own, so that batches form. Watches from revision 1, one opened before
// the first write and one after the last, must tell the same story as etcd's.
func TestDifferentialParallel(t *testing.T) {
	t.Parallel()
	s := seed(t)
	// The ring holds a part of it only: the late watches read the members' history.
	etcdURL, spindleURL := startEtcd(t), startSpindle(t, 3, 1, ringSmall)[0].ClientURLs()[0]
	// A few connections each, as several clients would have.
	const conns = 4
	var conn [2][conns]*rpc
	for i := range conns {
		conn[0][i], conn[1][i] = dial(t, etcdURL), dial(t, spindleURL)
	}
	pairs := make([]*pair, parallelWorkers)
	live := make([]*eventLog, parallelWorkers)
	for i := range pairs {
		prefix := fmt.Sprintf("w%02d/", i)
		pairs[i] = newPair(t, s, i+1, conn[0][i%conns], conn[1][i%conns], prefix, false)
		live[i] = openWatch(t, conn[1][i%conns], prefix, 1)
	}
	ctx := t.Context()
	perWorker := scale(parallelRequests) / parallelWorkers
	start := time.Now()
	var failed atomic.Bool
	var wg sync.WaitGroup
	for _, p := range pairs {
		wg.Go(func() {
			for i := range perWorker {
				if failed.Load() {
					return
				}
				if err := p.step(ctx); err != nil {
					if failed.CompareAndSwap(false, true) {
						p.fail(i, err)
					}
					return
				}
			}
		})
	}
	wg.Wait()
	if failed.Load() {
		return
	}
	writes := 0
	for _, p := range pairs {
		writes += p.revs.len()
	}
	t.Logf("%d requests, %d writes, %v", perWorker*parallelWorkers, writes, time.Since(start).Round(time.Millisecond))

	start = time.Now()
	lates := make([]*eventLog, len(pairs)) // all at once: they share what is read for them
	for i, p := range pairs {
		lates[i] = openWatch(t, conn[1][i%conns], p.gen.prefix, 1)
	}
	for i, p := range pairs {
		etcd := openWatch(t, conn[0][i%conns], p.gen.prefix, 1).until(t, p.revs.last(0))
		early := live[i].until(t, p.revs.last(1))
		late := lates[i].until(t, p.revs.last(1))
		if err := p.compareEvents(etcd, early); err != nil {
			t.Errorf("%s, watch opened before the writes: %v", p.gen.prefix, err)
		}
		if err := p.compareEvents(etcd, late); err != nil {
			t.Errorf("%s, watch opened after the writes: %v", p.gen.prefix, err)
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("watches compared in %v", time.Since(start).Round(time.Millisecond))
}

// compareEvents compares what watches on etcd and on Spindle brought. The events of a deleted range may
// come in another order (each shard's part has a revision of its own).
func (p *pair) compareEvents(etcd, spindle []*mvccpb.Event) error {
	for len(etcd) > 0 {
		rev := etcd[0].Kv.ModRevision
		n := 1
		for n < len(etcd) && etcd[n].Kv.ModRevision == rev {
			n++
		}
		if len(spindle) < n {
			return fmt.Errorf("%d events are missing, the first is %v", len(etcd)-len(spindle), etcd[len(spindle)])
		}
		a, b := etcd[:n], spindle[:n]
		etcd, spindle = etcd[n:], spindle[n:]
		if p.multi[rev] {
			byKey := func(x, y *mvccpb.Event) int { return bytes.Compare(x.Kv.Key, y.Kv.Key) }
			b = slices.Clone(b)
			slices.SortFunc(b, byKey)
		}
		for i := range a {
			if x, y := p.event(0, a[i]), p.event(1, b[i]); x != y {
				return fmt.Errorf("events differ:\n  etcd:    %s\n  spindle: %s", x, y)
			}
		}
	}
	if len(spindle) > 0 {
		return fmt.Errorf("%d events too many, the first is %v", len(spindle), spindle[0])
	}
	return nil
}

func (p *pair) event(side int, e *mvccpb.Event) string {
	kv := p.revs.kv(side, e.Kv)
	if e.Type == mvccpb.Event_DELETE {
		// Compared by place: a deleted range has more than one revision on Spindle.
		kv = fmt.Sprintf("%q version %d value %q", e.Kv.Key, e.Kv.Version, e.Kv.Value)
	}
	return fmt.Sprintf("%v %s prev %s", e.Type, kv, p.revs.kv(side, e.PrevKv))
}
