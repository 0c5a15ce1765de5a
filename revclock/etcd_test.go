package revclock

import (
	"context"
	"math/rand/v2"
	"net/url"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/embed"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"spindle/codec"
)

// startEtcd runs one etcd in this process, and returns its client address.
func startEtcd(t *testing.T) string {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	cfg.LogLevel = "panic"
	local := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{local}, []url.URL{local}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{local}, []url.URL{local}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.UnsafeNoFsync = true
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(time.Minute):
		t.Fatal("etcd is not ready")
	}
	return e.Clients[0].Addr().String()
}

// grpcTransport reaches a real etcd. Everything it reports goes through loop.
type grpcTransport struct {
	t    *testing.T
	conn *grpc.ClientConn
	loop chan func()
	ctx  context.Context
}

func (g *grpcTransport) Call(_ codec.ClusterID, m codec.Method, req []byte, timeout time.Duration, c codec.Completion) {
	var in, out any
	raw := append([]byte(nil), req...)
	in, out = &raw, new([]byte)
	go func() {
		ctx, cancel := context.WithTimeout(g.ctx, timeout)
		defer cancel()
		err := g.conn.Invoke(ctx, codec.MethodPath(m), in, out, grpc.ForceCodec(rawCodec{}))
		st := status.Convert(err)
		g.loop <- func() {
			c.Complete(*out.(*[]byte), codec.Status{Code: codec.Code(st.Code()), Msg: st.Message()}, true)
		}
	}()
}

// pass runs the loop for d.
func (g *grpcTransport) pass(d time.Duration) {
	for over := time.After(d); ; {
		select {
		case f := <-g.loop:
			f()
		case <-over:
			return
		}
	}
}

func (g *grpcTransport) Watch(_ codec.ClusterID, req []byte, sink codec.WatchSink) codec.WatchHandle {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(g.ctx, "hasleader", "true"))
	h := &grpcWatch{cancel: cancel}
	raw := append([]byte(nil), req...)
	go func() {
		s, err := g.conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true},
			codec.MethodPath(codec.MethodWatch), grpc.ForceCodec(rawCodec{}))
		if err == nil {
			err = s.SendMsg(&raw)
		}
		for err == nil {
			msg := new([]byte)
			if err = s.RecvMsg(msg); err == nil {
				g.loop <- func() {
					if !h.closed {
						sink.OnMessage(*msg)
					}
				}
			}
		}
		g.loop <- func() {
			if !h.closed {
				h.closed = true
				st := status.Convert(err)
				sink.OnEnd(codec.Status{Code: codec.Code(st.Code()), Msg: st.Message()})
			}
		}
	}()
	return h
}

func (g *grpcTransport) KeepAlive(codec.ClusterID, codec.WatchSink) codec.WatchHandle {
	panic("the clock has no leases")
}

type grpcWatch struct {
	cancel context.CancelFunc
	closed bool // on the loop
}

func (h *grpcWatch) Send([]byte) {}
func (h *grpcWatch) Hold(bool)   {}
func (h *grpcWatch) Close()      { h.closed = true; h.cancel() }

// rawCodec sends and receives encoded messages as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), data...)
	return nil
}
func (rawCodec) Name() string { return "proto" }

// etcdProxy is a Clock on a real etcd, for TestClockOnEtcd.
type etcdProxy struct {
	t       *testing.T
	c       *Clock
	granted []Range
	done    uint64
	n       int64
	started bool
}

func (p *etcdProxy) Granted(_ int, _ uint64, r Range) { p.granted = append(p.granted, r) }
func (p *etcdProxy) Folded()                          {}
func (p *etcdProxy) Started()                         { p.started = true }
func (p *etcdProxy) Lost(err error)                   { p.t.Fatal(err) }
func (p *etcdProxy) NowDone(ticket uint64, n int64, _ []int64) {
	p.done, p.n = ticket, n
}

// fill gives an empty coordinator its first epoch, {5}.
func fill(t *testing.T, conn *grpc.ClientConn, shards int) {
	t.Helper()
	in, out := createTxn(ID{5}, shards), new([]byte)
	if err := conn.Invoke(context.Background(), codec.MethodPath(codec.MethodTxn), &in, out, grpc.ForceCodec(rawCodec{}), grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	if replaced, ok := ParseReplaced(*out); !replaced || !ok {
		t.Fatal("the coordinator was not empty")
	}
}

func TestClockOnEtcd(t *testing.T) {
	if testing.Short() {
		t.Skip("runs an etcd")
	}
	addr := startEtcd(t)
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	tr := &grpcTransport{t: t, conn: conn, loop: make(chan func(), 1000), ctx: ctx}
	t.Cleanup(func() { cancel(); conn.Close() })
	deadline := time.NewTimer(3 * time.Minute)
	defer deadline.Stop()

	var all []*etcdProxy
	// until runs the loop of all proxies until cond holds.
	until := func(what string, cond func() bool) {
		t.Helper()
		for !cond() {
			wake := int64(0)
			for _, p := range all {
				p.c.Flush()
				if d := p.c.Deadline(); d > 0 && (wake == 0 || d < wake) {
					wake = d
				}
			}
			var timer <-chan time.Time
			if wake > 0 {
				timer = time.After(time.Duration(wake - time.Now().UnixNano()))
			}
			select {
			case f := <-tr.loop:
				f()
			case <-timer:
				for _, p := range all {
					p.c.Tick()
				}
			case <-deadline.C:
				t.Fatalf("timeout: %s: %s", what, all[0].c.LastError())
			}
		}
	}
	fill(t, conn, 2)
	start := func(id byte, clocks ...int64) *etcdProxy {
		p := &etcdProxy{t: t}
		p.c = New(Config{Proxy: ID{id}, Shards: 2, Now: func() int64 { return time.Now().UnixNano() },
			Rand: rand.New(rand.NewPCG(1, uint64(id))), SnapshotEvery: 40}, tr, p)
		p.c.Start(StartArgs{Epoch: ID{5}, Clocks: clocks})
		all = append(all, p)
		return p
	}
	a, b := start(1, 0, 0), start(2, 0, 0)
	until("start", func() bool { return a.started && b.started })

	const each = 150
	for _, p := range all {
		p.c.Request(Request{Shard: 0, Count: 1})
	}
	until("ticks", func() bool {
		for _, p := range all {
			if len(p.granted) < each {
				p.c.Request(Request{Shard: len(p.granted) % 2, Count: 1 + len(p.granted)%3, Filter: FilterAll})
			}
		}
		return len(a.granted) >= each && len(b.granted) >= each
	})
	seen := map[int64]bool{}
	last := int64(1)
	for _, p := range all {
		for _, r := range p.granted {
			for rev := r.First; rev <= r.Last; rev++ {
				if seen[rev] {
					t.Fatalf("revision %d twice", rev)
				}
				seen[rev] = true
			}
			last = max(last, r.Last)
		}
	}
	ticket := b.c.Now()
	until("now", func() bool { return b.done >= ticket })
	if b.n < last {
		t.Fatalf("now is %d, %d was granted", b.n, last)
	}
	if a.c.Stats().FastTicks == 0 || a.c.Stats().Snapshots+b.c.Stats().Snapshots == 0 {
		t.Fatalf("%+v %+v", a.c.Stats(), b.c.Stats())
	}

	// One that starts now begins at a snapshot, behind which history is compacted.
	c := start(3, last, 0)
	until("third start", func() bool { return c.started })
	ticket = a.c.Now()
	until("now", func() bool { return a.done >= ticket })
	if c.c.Log().N() != a.c.Log().N() || string(c.c.Log().AppendSnapshot(nil)) != string(a.c.Log().AppendSnapshot(nil)) {
		t.Fatalf("%d and %d", c.c.Log().N(), a.c.Log().N())
	}
	if n := c.c.Stats().Folded; n >= 2*each {
		t.Fatalf("folded %d ticks from the beginning on", n)
	}
	kv := pb.NewKVClient(conn)
	for tries := 0; ; tries++ { // the compaction may be under way
		_, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("t"), Revision: 3})
		if err != nil {
			break
		}
		if tries == 100 {
			t.Fatal("history was not compacted")
		}
		tr.pass(100 * time.Millisecond)
	}
	t.Logf("%+v", a.c.Stats())
}
