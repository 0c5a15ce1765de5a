package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

const (
	// root is the prefix of all keys.
	root = "/chaos/"
	// callTimeout is how long a client waits for an answer: longer than a proxy ever should.
	callTimeout = 10 * shardTimeout
	// writers is how many clients write to each shard through each proxy, one request at a time, and think how long each
	// thinks between two requests: the load is meant to leave room for many faults, not to be heavy.
	writers = 3
	think   = 40 * time.Millisecond
	// hotKeys is how many keys of each shard all writers fight for, groupKeys how many are written together.
	hotKeys   = 2
	groupKeys = 3
	// pageLimit is the page of a paged list.
	pageLimit = 17
)

// load is the clients of a system and what they have seen.
type load struct {
	sys  *system
	rec  *record
	seed uint64
	conn [proxies]*grpc.ClientConn

	hot   [shards][]string
	group [shards][]string

	stop chan struct{} // closed at the end of the load
	// clients end with the load, watches when they have seen all.
	clients, watches sync.WaitGroup
	ids              atomic.Int64
	final            atomic.Int64 // the last revision of all, once it is known
	newest           atomic.Int64 // the highest revision that a request was answered with
	// compacted is the revision that was last asked to be compacted.
	compacted atomic.Int64
	// position is up to where each proxy's watch of everything has come.
	position [proxies]atomic.Int64

	mu   sync.Mutex
	acks [proxies][shards][]time.Duration // when writes were acknowledged
	past []shown                          // newest, now and then
}

// newRand returns a source of random numbers of its own for one client.
func newRand(seed uint64, stream int) *rand.Rand { return rand.New(rand.NewPCG(seed, uint64(stream))) }

func newLoad(sys *system, rec *record, seed uint64) (*load, error) {
	l := &load{sys: sys, rec: rec, seed: seed, stop: make(chan struct{})}
	rec.shardOf = sys.shardOf
	for p := range proxies {
		var err error
		if l.conn[p], err = dial(sys.proxies[p].in.addr()); err != nil {
			return nil, err
		}
	}
	for s := range shards {
		for i := range hotKeys {
			l.hot[s] = append(l.hot[s], sys.keyOn(s, fmt.Sprintf("%shot/%d-%d", root, s, i)))
		}
		for i := range groupKeys {
			l.group[s] = append(l.group[s], sys.keyOn(s, fmt.Sprintf("%sgroup/%d-%d", root, s, i)))
		}
	}
	return l, nil
}

// begin starts all clients.
func (l *load) begin() {
	stream := 0
	begin := func(wg *sync.WaitGroup, run func(r *rand.Rand)) {
		stream++
		r := newRand(l.seed, stream)
		wg.Go(func() { run(r) })
	}
	client := func(run func(r *rand.Rand)) { begin(&l.clients, run) }
	for p := range proxies {
		for s := range shards {
			for range writers {
				client(func(r *rand.Rand) { l.write(r, p, s) })
			}
		}
		client(func(r *rand.Rand) { l.list(r, p) })
		client(func(r *rand.Rand) { l.keepLeases(r, p) })
		client(func(r *rand.Rand) { l.wide(r, p) })
		begin(&l.watches, func(*rand.Rand) { l.watchAll(p) })
		begin(&l.watches, func(r *rand.Rand) { l.watchSome(r, p) })
	}
	client(l.compact)
}

func (l *load) over() bool {
	select {
	case <-l.stop:
		return true
	default:
		return false
	}
}

// pause waits, and reports false at the end of the load.
func (l *load) pause(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-l.stop:
		return false
	}
}

func raise(v *atomic.Int64, to int64) {
	for {
		now := v.Load()
		if now >= to || v.CompareAndSwap(now, to) {
			return
		}
	}
}

// do sends one request: send fills in what the answer says.
func (l *load) do(q *request, send func(ctx context.Context, q *request) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	q.call = l.rec.now()
	err := send(ctx, q)
	q.ret = l.rec.now()
	if err != nil {
		st := status.Convert(err)
		q.code, q.text, q.rev, q.acked, q.reads = st.Code(), st.Message(), 0, false, nil
	}
	l.rec.add(q)
	raise(&l.newest, q.rev)
	if q.acked && q.shard >= 0 {
		l.mu.Lock()
		l.acks[q.proxy][q.shard] = append(l.acks[q.proxy][q.shard], q.ret)
		l.mu.Unlock()
	}
	return err
}

// value returns a value that is never written again.
func (l *load) value() string { return fmt.Sprintf("v%d", l.ids.Add(1)) }

// write is one writer.
func (l *load) write(r *rand.Rand, p, s int) {
	var mine []*mvccpb.KeyValue // keys that only this client writes
	for l.pause(time.Duration(r.Int64N(int64(2 * think)))) {
		switch n := r.IntN(100); {
		case n < 55:
			l.swap(r, p, s)
		case n < 60:
			_ = l.put(p, s, l.hot[s][r.IntN(hotKeys)])
		case n < 80:
			l.putGroup(r, p, s)
		case n < 90 || len(mine) == 0:
			if kv := l.create(p, s); kv != nil {
				mine = append(mine, kv)
			}
		default:
			kv := mine[0]
			mine = mine[1:]
			l.deleteVersion(p, s, kv)
		}
	}
}

func (l *load) kv(p int) pb.KVClient { return pb.NewKVClient(l.conn[p]) }

func compareMod(key string, mod int64) *pb.Compare {
	return &pb.Compare{Key: []byte(key), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: mod}}
}

func opPut(key, value string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}
}

func opDelete(key string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key)}}}
}

func opGet(key string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}}}
}

// txn sends a Txn and notes whether its writes took place, and what its other branch's ranges have shown.
func (l *load) txn(q *request, req *pb.TxnRequest) (*pb.TxnResponse, error) {
	var resp *pb.TxnResponse
	err := l.do(q, func(ctx context.Context, q *request) error {
		var err error
		if resp, err = l.kv(q.proxy).Txn(ctx, req); err != nil {
			return err
		}
		q.rev, q.acked = resp.Header.Revision, resp.Succeeded
		if !resp.Succeeded {
			for i, op := range req.Failure {
				q.reads = append(q.reads, readOf(op.GetRequestRange(), resp.Responses[i].GetResponseRange()))
			}
			if q.swap != nil {
				q.swap.shown = valueOf(resp.Responses[0].GetResponseRange())
			}
		}
		return nil
	})
	return resp, err
}

func readOf(req *pb.RangeRequest, resp *pb.RangeResponse) read {
	rd := read{key: string(req.Key), end: string(req.RangeEnd), at: req.Revision, limit: req.Limit, countOnly: req.CountOnly,
		count: resp.Count, more: resp.More}
	for _, kv := range resp.Kvs {
		rd.sum = rd.sum*31 + sumOfKV(kv)
		rd.mods = append(rd.mods, kv.ModRevision)
	}
	return rd
}

func valueOf(resp *pb.RangeResponse) string {
	if len(resp.GetKvs()) == 0 {
		return ""
	}
	return string(resp.Kvs[0].Value)
}

// get reads one key.
func (l *load) get(p int, key string) (*mvccpb.KeyValue, error) {
	q := &request{proxy: p, shard: -1, what: "get " + key}
	var kv *mvccpb.KeyValue
	err := l.do(q, func(ctx context.Context, q *request) error {
		req := &pb.RangeRequest{Key: []byte(key)}
		resp, err := l.kv(p).Range(ctx, req)
		if err != nil {
			return err
		}
		q.rev, q.reads = resp.Header.Revision, []read{readOf(req, resp)}
		q.swap = &swap{key: key, kind: swapGet, shown: valueOf(resp)}
		if len(resp.Kvs) > 0 {
			kv = resp.Kvs[0]
		}
		return nil
	})
	return kv, err
}

// swap is a compare-and-swap of a hot key, or a compare-and-delete.
func (l *load) swap(r *rand.Rand, p, s int) {
	key := l.hot[s][r.IntN(hotKeys)]
	kv, err := l.get(p, key)
	if err != nil {
		return
	}
	w := write{key: key, value: l.value()}
	op := opPut(key, w.value)
	if kv != nil && r.IntN(8) == 0 {
		w = write{key: key, del: true, prevMod: kv.ModRevision}
		op = opDelete(key)
	}
	q := &request{proxy: p, shard: s, what: "compare-and-swap", writes: []write{w},
		swap: &swap{key: key, kind: swapSwap, expected: string(kv.GetValue()), value: w.value}}
	_, _ = l.txn(q, &pb.TxnRequest{
		Compare: []*pb.Compare{compareMod(key, kv.GetModRevision())},
		Success: []*pb.RequestOp{op},
		Failure: []*pb.RequestOp{opGet(key)},
	})
}

// put writes a key, whatever is there.
func (l *load) put(p, s int, key string) error {
	w := write{key: key, value: l.value()}
	q := &request{proxy: p, shard: s, what: "put", writes: []write{w}, swap: &swap{key: key, kind: swapPut, value: w.value}}
	return l.do(q, func(ctx context.Context, q *request) error {
		resp, err := l.kv(p).Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(w.value)})
		if err != nil {
			return err
		}
		q.rev, q.acked = resp.Header.Revision, true
		return nil
	})
}

// putGroup writes several keys of a shard at once.
func (l *load) putGroup(r *rand.Rand, p, s int) {
	q := &request{proxy: p, shard: s, what: "Txn of several keys"}
	req := &pb.TxnRequest{}
	for _, key := range l.group[s] {
		if len(q.writes) == 0 || r.IntN(4) > 0 {
			w := write{key: key, value: l.value()}
			q.writes = append(q.writes, w)
			req.Success = append(req.Success, opPut(key, w.value))
		}
	}
	_, _ = l.txn(q, req)
}

// create makes a key that never was, and returns it if it was acknowledged.
func (l *load) create(p, s int) *mvccpb.KeyValue {
	w := write{key: l.sys.keyOn(s, fmt.Sprintf("%sown/%d", root, l.ids.Add(1))), value: l.value()}
	q := &request{proxy: p, shard: s, what: "create", writes: []write{w}}
	resp, err := l.txn(q, &pb.TxnRequest{
		Compare: []*pb.Compare{compareMod(w.key, 0)},
		Success: []*pb.RequestOp{opPut(w.key, w.value)},
	})
	if err != nil {
		return nil
	}
	if !resp.Succeeded {
		l.rec.complain("create found somebody else's key: %v", q)
		return nil
	}
	return &mvccpb.KeyValue{Key: []byte(w.key), ModRevision: q.rev}
}

// deleteVersion deletes a key that nobody else writes.
func (l *load) deleteVersion(p, s int, kv *mvccpb.KeyValue) {
	w := write{key: string(kv.Key), del: true, prevMod: kv.ModRevision}
	q := &request{proxy: p, shard: s, what: "delete", writes: []write{w}}
	_ = l.do(q, func(ctx context.Context, q *request) error {
		resp, err := l.kv(p).DeleteRange(ctx, &pb.DeleteRangeRequest{Key: kv.Key})
		if err != nil {
			return err
		}
		q.rev, q.acked = resp.Header.Revision, resp.Deleted == 1
		if resp.Deleted != 1 {
			l.rec.complain("a delete of one key deleted %d: %v", resp.Deleted, q)
		}
		return nil
	})
}

// list reads ranges: all keys or a part, at once or in pages, now or in the past, linearizable or not.
func (l *load) list(r *rand.Rand, p int) {
	for l.pause(time.Duration(r.Int64N(int64(8 * think)))) {
		from := []string{root, root + "hot/", root + "group/", root + "own/", root + "lease/"}[r.IntN(5)]
		req := &pb.RangeRequest{Key: []byte(from), RangeEnd: prefixEnd(from)}
		switch r.IntN(6) {
		case 0:
			req.Serializable = true
		case 1:
			req.Revision = max(1, l.newest.Load()-r.Int64N(1000))
		case 2:
			req.CountOnly = true
		case 3:
			req.Limit = pageLimit
		case 4: // one shard's key
			req.Key, req.RangeEnd = []byte(l.group[r.IntN(shards)][r.IntN(groupKeys)]), nil
			req.Serializable = r.IntN(2) == 0
		}
		for page := req; page != nil; {
			_, page = l.listPage(p, page)
		}
	}
}

// listPage sends one range. It returns the next page's, too; nil if there is none.
func (l *load) listPage(p int, req *pb.RangeRequest) (q *request, next *pb.RangeRequest) {
	q = &request{proxy: p, shard: -1, what: "list", stale: req.Serializable}
	_ = l.do(q, func(ctx context.Context, q *request) error {
		resp, err := l.kv(p).Range(ctx, req)
		if err != nil {
			return err
		}
		q.rev, q.reads = resp.Header.Revision, []read{readOf(req, resp)}
		if req.Limit > 0 && resp.More {
			next = &pb.RangeRequest{Key: append(slices.Clone(resp.Kvs[len(resp.Kvs)-1].Key), 0), RangeEnd: req.RangeEnd, Limit: req.Limit, Revision: req.Revision}
			if next.Revision == 0 {
				next.Revision = resp.Header.Revision
			}
		}
		return nil
	})
	return q, next
}

// prefixEnd returns the end of the range of all keys that begin with prefix.
func prefixEnd(prefix string) []byte {
	end := []byte(prefix)
	end[len(end)-1]++
	return end
}

// compact compacts now and then what nobody needs any more: neither the watches of everything, nor most of the reads
// of the past.
func (l *load) compact(r *rand.Rand) {
	for l.pause(2 * time.Second) {
		l.mu.Lock()
		l.past = append(l.past, shown{l.rec.now(), l.newest.Load()})
		var rev int64
		for _, s := range l.past {
			if s.at < l.rec.now()-6*time.Second {
				rev = s.rev
			}
		}
		l.mu.Unlock()
		for p := range proxies {
			rev = min(rev, l.position[p].Load())
		}
		if rev <= l.compacted.Load() {
			continue
		}
		l.rec.mu.Lock()
		l.rec.compacted = max(l.rec.compacted, rev)
		l.rec.mu.Unlock()
		l.compacted.Store(rev)
		q := &request{proxy: r.IntN(proxies), shard: -1, what: "compact", stale: true}
		_ = l.do(q, func(ctx context.Context, q *request) error {
			resp, err := l.kv(q.proxy).Compact(ctx, &pb.CompactionRequest{Revision: rev})
			if err != nil {
				return err
			}
			q.rev = resp.Header.Revision
			return nil
		})
	}
}
