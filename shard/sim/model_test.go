package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/url"
	"sort"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/embed"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/shard/embedded/embeddedtest"
)

// realEtcd is an etcd of its own in this process, and raw clients for it.
type realEtcd struct {
	kv    pb.KVClient
	lease pb.LeaseClient
	watch pb.WatchClient
}

func startEtcd(t *testing.T) realEtcd {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	cfg.LogLevel = "fatal"
	cfg.UnsafeNoFsync = true
	cfg.ListenClientUrls = []url.URL{{Scheme: "http", Host: embeddedtest.FreeAddr(t)}}
	cfg.AdvertiseClientUrls = cfg.ListenClientUrls
	cfg.ListenPeerUrls = []url.URL{{Scheme: "http", Host: embeddedtest.FreeAddr(t)}}
	cfg.AdvertisePeerUrls = cfg.ListenPeerUrls
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	srv, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(srv.Close)
	<-srv.Server.ReadyNotify()
	conn, err := grpc.NewClient(cfg.ListenClientUrls[0].Host, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return realEtcd{pb.NewKVClient(conn), pb.NewLeaseClient(conn), pb.NewWatchClient(conn)}
}

// reqGen makes random requests over few keys, valid ones and others.
type reqGen struct {
	*rand.Rand
	e      *Etcd
	leases []int64
}

func (g *reqGen) chance(n int) bool { return g.IntN(n) == 0 }

func (g *reqGen) key() []byte {
	if g.chance(60) {
		return nil
	}
	return []byte(string(rune('a' + g.IntN(7))))
}

func (g *reqGen) end() []byte {
	switch g.IntN(8) {
	case 0:
		return []byte{0}
	case 1, 2:
		return g.key()
	}
	return nil
}

func (g *reqGen) rev() int64 {
	if !g.chance(4) {
		return 0
	}
	return g.e.Rev() + 2 - int64(g.IntN(12))
}

func (g *reqGen) value() []byte { return []byte{byte('0' + g.IntN(6))} }

func (g *reqGen) lease() int64 {
	switch g.IntN(8) {
	case 0:
		return 4711 // unknown
	case 1, 2:
		if len(g.leases) > 0 {
			return g.leases[g.IntN(len(g.leases))]
		}
	}
	return 0
}

func (g *reqGen) put(ignore bool) *pb.PutRequest {
	p := &pb.PutRequest{Key: g.key(), Value: g.value(), Lease: g.lease(), PrevKv: g.chance(3)}
	if ignore && g.chance(6) {
		p.IgnoreLease = true
		if !g.chance(5) {
			p.Lease = 0
		}
	}
	if ignore && g.chance(6) {
		p.IgnoreValue = true
		if !g.chance(5) {
			p.Value = nil
		}
	}
	return p
}

func (g *reqGen) rng(sorted bool) *pb.RangeRequest {
	r := &pb.RangeRequest{Key: g.key(), RangeEnd: g.end(), Revision: g.rev(), KeysOnly: g.chance(6), CountOnly: g.chance(8)}
	if g.chance(3) {
		r.Limit = int64(g.IntN(4))
	}
	if g.chance(6) {
		r.SortOrder = pb.RangeRequest_DESCEND
	}
	if sorted && g.chance(4) {
		r.SortTarget = pb.RangeRequest_SortTarget(g.IntN(6))
		r.SortOrder = pb.RangeRequest_SortOrder(g.IntN(4))
	}
	for _, f := range []*int64{&r.MinModRevision, &r.MaxModRevision, &r.MinCreateRevision, &r.MaxCreateRevision} {
		if g.chance(12) {
			*f = g.e.Rev() - int64(g.IntN(10))
		}
	}
	return r
}

func (g *reqGen) compare() *pb.Compare {
	c := &pb.Compare{Key: g.key(), RangeEnd: g.end(), Target: pb.Compare_CompareTarget(g.IntN(5)), Result: pb.Compare_CompareResult(g.IntN(4))}
	n := int64(g.IntN(4))
	switch c.Target {
	case pb.Compare_VERSION:
		c.TargetUnion = &pb.Compare_Version{Version: n}
	case pb.Compare_LEASE:
		c.TargetUnion = &pb.Compare_Lease{Lease: g.lease()}
	case pb.Compare_VALUE:
		c.TargetUnion = &pb.Compare_Value{Value: g.value()}
	case pb.Compare_MOD, pb.Compare_CREATE:
		if g.chance(2) {
			n = g.e.Rev() - int64(g.IntN(10))
		}
		if c.Target == pb.Compare_MOD {
			c.TargetUnion = &pb.Compare_ModRevision{ModRevision: n}
		} else {
			c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: n}
		}
	}
	return c
}

// txn makes a transaction; ignore: with ignore_* puts and without deletes (both together can make
// etcd panic).
func (g *reqGen) txn(depth int, ignore bool) *pb.TxnRequest {
	t := &pb.TxnRequest{}
	for range g.IntN(3) {
		t.Compare = append(t.Compare, g.compare())
	}
	ops := func() (ops []*pb.RequestOp) {
		for range g.IntN(4) {
			op := &pb.RequestOp{}
			switch k := g.IntN(8); {
			case k < 2:
				op.Request = &pb.RequestOp_RequestRange{RequestRange: g.rng(false)}
			case k < 4 || depth == 0 && k < 6 || ignore && k < 6:
				op.Request = &pb.RequestOp_RequestPut{RequestPut: g.put(ignore)}
			case k < 6 && depth > 0:
				op.Request = &pb.RequestOp_RequestTxn{RequestTxn: g.txn(depth-1, ignore)}
			case !ignore && !g.chance(30):
				end := g.end()
				if string(end) == "\x00" {
					// etcd lets a put of the same key pass beside a delete to infinity, and when such a
					// revision is compacted, the next read of the key ends its process (3.7.3).
					end = nil
				}
				op.Request = &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: g.key(), RangeEnd: end, PrevKv: g.chance(2)}}
			default:
				op.Request = &pb.RequestOp_RequestRange{RequestRange: g.rng(false)}
			}
			ops = append(ops, op)
		}
		return ops
	}
	t.Success, t.Failure = ops(), ops()
	return t
}

// TestModelAgainstEtcd sends the same random requests to a modelled cluster and to etcd, and compares
// every answer, and what watches deliver.
func TestModelAgainstEtcd(t *testing.T) {
	n := 4000
	if testing.Short() {
		n = 1500
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	real := startEtcd(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	e := NewEtcd(1)
	e.MaxTxnOps, e.MaxRequestBytes = 128, 1536*1024
	g := &reqGen{Rand: rand.New(rand.NewPCG(seed, 1)), e: e}
	first, err := real.kv.Range(ctx, &pb.RangeRequest{Key: []byte("a")})
	if err != nil {
		t.Fatal(err)
	}
	e.ClusterID, e.MemberID, e.Term = first.Header.ClusterId, first.Header.MemberId, first.Header.RaftTerm

	outcomes := map[codec.Code]int{}
	check := func(i int, req, want proto.Message, err error, got proto.Message, st codec.Status, loose bool) {
		t.Helper()
		outcomes[st.Code]++
		if s := status.Convert(err); codec.Code(s.Code()) != st.Code || s.Message() != st.Msg {
			t.Fatalf("request %d %T{%v}: etcd says %v %q, the model %v %q", i, req, req, s.Code(), s.Message(), st.Code, st.Msg)
		}
		if err != nil {
			return
		}
		if loose { // etcd does not say how ties are sorted
			w, g := want.(*pb.RangeResponse), got.(*pb.RangeResponse)
			if len(w.Kvs) != len(g.Kvs) || w.More != g.More || w.Count != g.Count {
				t.Fatalf("request %d %v:\netcd  %v\nmodel %v", i, req, want, got)
			}
			return
		}
		b, _ := proto.Marshal(got)
		back := proto.Clone(want)
		proto.Reset(back)
		if proto.Unmarshal(b, back) != nil || !proto.Equal(back, want) {
			t.Fatalf("request %d %T{%v}:\netcd  %v\nmodel %v", i, req, req, want, got)
		}
	}
	for i := range n {
		switch k := g.IntN(100); {
		case k < 1:
			id := int64(1000 + i)
			if _, err := real.lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: id, TTL: 100000}); err != nil {
				t.Fatal(err)
			}
			e.Grant(id)
			g.leases = append(g.leases, id)
		case k < 2 && len(g.leases) > 0:
			j := g.IntN(len(g.leases))
			if _, err := real.lease.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: g.leases[j]}); err != nil {
				t.Fatal(err)
			}
			e.Revoke(g.leases[j])
			g.leases = append(g.leases[:j], g.leases[j+1:]...)
		case k < 3:
			r := &pb.CompactionRequest{Revision: e.Rev() + 1 - int64(g.IntN(10)), Physical: true}
			want, err := real.kv.Compact(ctx, r)
			got, st := e.Compact(r)
			check(i, r, want, err, got, st, false)
		case k < 4 && g.chance(3):
			compareWatch(t, ctx, real, e, g)
		case k < 30:
			r := g.rng(true)
			want, err := real.kv.Range(ctx, r)
			got, st := e.Range(r)
			check(i, r, want, err, got, st, r.SortTarget != pb.RangeRequest_KEY)
		case k < 40:
			r := g.put(true)
			want, err := real.kv.Put(ctx, r)
			got, st := e.Put(r)
			check(i, r, want, err, got, st, false)
		default:
			r := g.txn(2, g.chance(2))
			want, err := real.kv.Txn(ctx, r)
			got, st := e.Txn(r)
			check(i, r, want, err, got, st, false)
		}
	}
	t.Logf("revision %d, outcomes by code %v", e.Rev(), outcomes)
	if e.Rev() < int64(n/10) || outcomes[codec.OK] < n/3 {
		t.Error("the requests are not interesting enough")
	}
}

// compareWatch watches from a random revision on both, to the present, and compares the events.
func compareWatch(t *testing.T, ctx context.Context, real realEtcd, e *Etcd, g *reqGen) {
	t.Helper()
	c := &pb.WatchCreateRequest{Key: []byte{0}, RangeEnd: []byte{0}, StartRevision: max(1, e.Rev()-int64(g.IntN(30))), PrevKv: g.chance(2)}
	if g.chance(3) {
		c.Key, c.RangeEnd = []byte("c"), []byte("e")
	}
	req := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: c}}
	s := e.OpenStream()
	model := s.Request(encode(req))
	model = append(model, s.Pull(g.chance(2))...)
	wantEvents, wantCompact := flatten(t, model)

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ws, err := real.watch.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := ws.Send(req); err != nil {
		t.Fatal(err)
	}
	var events []*mvccpb.Event
	compact := int64(0)
	for created := false; !created || len(events) < len(wantEvents) || compact < wantCompact; {
		m, err := ws.Recv()
		if err != nil {
			t.Fatal(err)
		}
		created = created || m.Created
		events = append(events, m.Events...)
		compact = m.CompactRevision
		if compact != 0 && wantCompact == 0 {
			break
		}
	}
	if compact != wantCompact {
		t.Fatalf("watch %v: compact revision %d, model %d", c, compact, wantCompact)
	}
	if compact == 0 && fmt.Sprint(events) != fmt.Sprint(wantEvents) {
		t.Fatalf("watch %v (compacted %d):\netcd  %v\nmodel %v", c, e.Compacted(), events, wantEvents)
	}
}

func flatten(t *testing.T, msgs [][]byte) (events []*mvccpb.Event, compact int64) {
	for _, b := range msgs {
		m := &pb.WatchResponse{}
		if err := proto.Unmarshal(b, m); err != nil {
			t.Fatal(err)
		}
		if !sort.SliceIsSorted(m.Events, func(i, j int) bool { return m.Events[i].Kv.ModRevision < m.Events[j].Kv.ModRevision }) {
			t.Fatalf("events out of order: %v", m)
		}
		events = append(events, m.Events...)
		compact = max(compact, m.CompactRevision)
	}
	return events, compact
}
