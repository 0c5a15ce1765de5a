package shard

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net/url"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// startPlanEtcd starts an etcd whose KV service is called in-process.
func startPlanEtcd(t *testing.T, maxOps uint) pb.KVServer {
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	cfg.LogLevel = "panic"
	cfg.UnsafeNoFsync = true
	cfg.MaxTxnOps = maxOps
	cfg.TickMs, cfg.ElectionMs = 20, 200
	free, err := url.Parse("http://127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg.ListenClientUrls, cfg.ListenPeerUrls = []url.URL{*free}, []url.URL{*free}
	cfg.AdvertiseClientUrls, cfg.AdvertisePeerUrls = cfg.ListenClientUrls, cfg.ListenPeerUrls
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(time.Minute):
		t.Fatal("etcd does not start")
	}
	return v3rpc.NewKVServer(e.Server)
}

// TestPlanChecksAgainstEtcd sends requests with all kinds of faults to a real etcd server: Parse refuses
// exactly those that etcd refuses, with the same error. (Reserved keys aside, and what makes etcd panic.)
// The member form of what passes must pass there too.
func TestPlanChecksAgainstEtcd(t *testing.T) {
	const ops = 5 // few, so that limits are met
	n := 6000
	if testing.Short() {
		n = 600
	}
	plain, member := startPlanEtcd(t, ops), startPlanEtcd(t, 100)
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(planSeed, 3))
	g := &planGen{rng: rng, odd: true, rev: 100, know: func([]byte) *mvccpb.KeyValue { return nil }}
	for i := range 7 {
		if _, err := plain.Put(ctx, &pb.PutRequest{Key: []byte{byte('a' + i)}}); err != nil {
			t.Fatal(err)
		}
	}
	send := func(kv pb.KVServer, req proto.Message) (err error) {
		switch r := req.(type) {
		case *pb.RangeRequest:
			_, err = kv.Range(ctx, r)
		case *pb.PutRequest:
			_, err = kv.Put(ctx, r)
		case *pb.DeleteRangeRequest:
			_, err = kv.DeleteRange(ctx, r)
		case *pb.TxnRequest:
			_, err = kv.Txn(ctx, r)
		}
		return err
	}
	// An error of etcd that only the state brings about is not a check.
	ofState := func(st codec.Status) bool {
		return st == codec.ErrKeyNotFound || st == codec.ErrLeaseNotFound || st == codec.ErrFutureRev
	}
	seen := map[string]int{}
	var p Plan
	for range n {
		req := g.request()
		msg := mustMarshal(t, req)
		got := p.Parse(kindOf(req), msg, &Limits{MaxTxnOps: ops})
		seen[got.Msg]++
		if got == errReserved {
			continue
		}
		want := codec.Status{}
		if err := send(plain, proto.Clone(req)); err != nil {
			s := status.Convert(err)
			want = codec.Status{Code: codec.Code(s.Code()), Msg: s.Message()}
		}
		if got != want && !(got.Code == codec.OK && ofState(want)) {
			t.Fatalf("seed %d: %v\nspindle %v\netcd    %v", planSeed, req, got, want)
		}
		if got.Code != codec.OK || p.Slow() || p.ReadOnly() {
			continue
		}
		for i := range p.PutSlots {
			p.PutSlots[i].Known, p.PutSlots[i].Guard = true, i%2 == 0
		}
		body, m := codec.BeginMessage(nil, 2)
		body = codec.EndMessage(p.AppendRequestOp(body, 7), m)
		batch := &pb.TxnRequest{}
		if err := proto.Unmarshal(body, batch); err != nil {
			t.Fatal(err)
		}
		if err := send(member, batch); err != nil && !ofState(codec.Status{Code: codec.Code(status.Code(err)), Msg: status.Convert(err).Message()}) {
			t.Fatalf("seed %d: %v\nmember form %v\nrefused: %v", planSeed, req, batch, err)
		}
		seen["member form"]++
	}
	t.Logf("seed %d: %v", planSeed, seen)
	for _, must := range []string{codec.ErrTooManyOps.Msg, codec.ErrDuplicateKey.Msg, codec.ErrEmptyKey.Msg, "member form"} {
		if seen[must] == 0 {
			t.Errorf("%q did not happen", must)
		}
	}
}

// TestPlanPanicsOfEtcd names the requests that would bring an etcd member down: a put that needs a key
// which an earlier delete of the same Txn takes away.
func TestPlanPanicsOfEtcd(t *testing.T) {
	del := func(key, end string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
	}
	ignoring := false
	put := func(key string) *pb.RequestOp {
		ignoring = !ignoring
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), IgnoreLease: ignoring}}}
	}
	nest := func(then, els []*pb.RequestOp) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Success: then, Failure: els}}}
	}
	ops := func(o ...*pb.RequestOp) []*pb.RequestOp { return o }
	for name, c := range map[string]struct {
		ops []*pb.RequestOp
		ok  bool
	}{
		"from-key delete before":         {ops(del("a", "\x00"), put("k")), false},
		"from-key delete after":          {ops(put("k"), del("a", "\x00")), true},
		"from-key delete beyond":         {ops(del("x", "\x00"), put("k")), true},
		"sibling delete before":          {ops(nest(ops(del("k", "")), nil), nest(ops(put("k")), nil)), false},
		"sibling delete in else":         {ops(nest(nil, ops(del("k", ""))), nest(nil, ops(put("k")))), false},
		"sibling delete after":           {ops(nest(ops(put("k")), nil), nest(ops(del("k", "")), nil)), true},
		"delete in the other branch":     {ops(nest(ops(del("k", "")), ops(put("k")))), true},
		"outer from-key delete, put in":  {ops(del("a", "\x00"), nest(nil, ops(put("k")))), false},
		"inner from-key delete, put out": {ops(nest(nil, ops(del("a", "\x00"))), put("k")), false},
	} {
		var p Plan
		st := p.Parse(OpTxn, mustMarshal(t, &pb.TxnRequest{Success: c.ops}), nil)
		if (st.Code == codec.OK) != c.ok || !c.ok && st != codec.ErrDuplicateKey {
			t.Errorf("%s: %v", name, st)
		}
	}
}

func TestPlanLimits(t *testing.T) {
	var p Plan
	big := bytes.Repeat([]byte("v"), 100)
	put := mustMarshal(t, &pb.PutRequest{Key: []byte("k"), Value: big})
	if st := p.Parse(OpPut, put, &Limits{MaxRequestBytes: 100}); st != codec.ErrRequestTooLarge {
		t.Error(st)
	}
	if st := p.Parse(OpPut, put, &Limits{MaxRequestBytes: len(put)}); st.Code != codec.OK {
		t.Error(st)
	}
	// A bomb: each level allowed, all together far too many.
	ops := make([]*pb.RequestOp, 60)
	for i := range ops {
		ops[i] = &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("k")}}}
	}
	in := &pb.TxnRequest{Success: ops}
	outer := &pb.TxnRequest{}
	for range 68 {
		outer.Success = append(outer.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: in}})
	}
	if st := p.Parse(OpTxn, mustMarshal(t, outer), nil); st != codec.ErrTooManyOps || len(p.ops) > maxPlanOps {
		t.Error(st, len(p.ops))
	}
	// Deep nesting: etcd says too many operations as long as protobuf can read it.
	for _, c := range []struct {
		depth int
		want  codec.Status
	}{{100, codec.Status{}}, {200, codec.ErrTooManyOps}, {4000, codec.ErrTooManyOps}, {6000, errUnmarshal}} {
		var msg []byte
		for range c.depth {
			op := codec.AppendBytes(nil, 4, msg)
			if msg == nil {
				op = []byte{4<<3 | 2, 0}
			}
			msg = codec.AppendBytes(nil, 2, op)
		}
		if st := p.Parse(OpTxn, msg, nil); st != c.want {
			t.Errorf("depth %d: %v", c.depth, st)
		}
	}
}
