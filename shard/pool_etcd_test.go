package shard

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"testing"
	"time"

	"spindle/codec"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/embed"
	"google.golang.org/protobuf/proto"
)

// testPingMin is the minimum interval of pings that the test's etcd allows.
const testPingMin = 200 * time.Millisecond

// startEtcd starts one etcd of its own, without fsync, and returns its client address.
func startEtcd(t testing.TB) (addr string) {
	t.Helper()
	client, peer := url.URL{Scheme: "http", Host: freePort(t)}, url.URL{Scheme: "http", Host: freePort(t)}
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	cfg.LogLevel, cfg.LogOutputs = "error", []string{os.DevNull} // it reports its own Close as an error
	cfg.UnsafeNoFsync = true
	cfg.GRPCKeepAliveMinTime = testPingMin
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(testGuard):
		t.Fatal("etcd does not start")
	}
	return client.Host
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func unmarshal[M proto.Message](t testing.TB, b []byte, m M) M {
	t.Helper()
	if err := proto.Unmarshal(b, m); err != nil {
		t.Fatalf("%d bytes: %v", len(b), err)
	}
	return m
}

// putTxn is a Txn of one put, as the pool's user sends writes.
func putTxn(t testing.TB, key string, value []byte) []byte {
	return marshal(t, &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{
		RequestPut: &pb.PutRequest{Key: []byte(key), Value: value}}}}})
}

func watchRequest(t testing.TB, key string, rev int64) []byte {
	return marshal(t, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{
		CreateRequest: &pb.WatchCreateRequest{Key: []byte(key), RangeEnd: []byte(key + "\xff"), StartRevision: rev}}})
}

// TestPoolEtcd runs against a real etcd; the parts share it.
func TestPoolEtcd(t *testing.T) {
	addr := startEtcd(t)
	t.Run("Calls", func(t *testing.T) { testEtcdCalls(t, addr) })
	t.Run("Watch", func(t *testing.T) { testEtcdWatch(t, addr) })
	t.Run("Methods", func(t *testing.T) { testEtcdMethods(t, addr) })
	t.Run("KilledConnections", func(t *testing.T) { testEtcdKilled(t, addr) })
	t.Run("LongSilence", func(t *testing.T) { testEtcdSilence(t, addr) })
}

// Thousands of calls, hundreds at once: every one gets its own answer.
func testEtcdCalls(t *testing.T, addr string) {
	const n, atOnce = 4000, 300
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 2))
	e := newPoolEnv(t, []string{"http://" + addr}, func(c *PoolConfig) { c.ConnsPerEndpoint = 2 })
	e.connected(0)
	value := func(i int) []byte {
		v := make([]byte, 8+i*37%3000)
		binary.BigEndian.PutUint64(v, uint64(i))
		return v
	}
	order := rng.Perm(n)
	for _, m := range []codec.Method{codec.MethodTxn, codec.MethodRange} {
		slots := make(chan struct{}, atOnce)
		dones := make([]chanDone, n)
		for _, i := range order {
			slots <- struct{}{}
			req := putTxn(t, fmt.Sprintf("calls/%d", i), value(i))
			if m == codec.MethodRange {
				req = marshal(t, &pb.RangeRequest{Key: fmt.Appendf(nil, "calls/%d", i)})
			}
			dones[i] = make(chanDone, 1)
			e.loop.Post(func() { e.pool.Call(0, m, req, testGuard, releasing{dones[i], slots}) })
		}
		for i, d := range dones {
			r := d.wait(t)
			if r.st.Code != codec.OK {
				t.Fatalf("seed %d: %+v", seed, r.st)
			}
			if m == codec.MethodTxn {
				if !unmarshal(t, r.resp, &pb.TxnResponse{}).Succeeded {
					t.Fatalf("seed %d: %d did not succeed", seed, i)
				}
				continue
			}
			kvs := unmarshal(t, r.resp, &pb.RangeResponse{}).Kvs
			if len(kvs) != 1 || string(kvs[0].Value) != string(value(i)) {
				t.Fatalf("seed %d: call %d got another's answer", seed, i)
			}
		}
	}
	if n2 := e.counter(metricPoolCalls, "shard-1", "OK"); n2 != 2*n {
		t.Errorf("%d calls counted", n2)
	}
	if e.counter(metricPoolSentBytes, "shard-1") < n*100 || e.counter(metricPoolRecvBytes, "shard-1") < n*1000 {
		t.Error("bytes are not counted")
	}
	// The whole range in one answer: several windows long.
	r := e.call(codec.MethodRange, marshal(t, &pb.RangeRequest{Key: []byte("calls/"), RangeEnd: []byte("calls0")}))
	if kvs := unmarshal(t, r.resp, &pb.RangeResponse{}).Kvs; r.st.Code != codec.OK || len(kvs) != n {
		t.Errorf("%+v, %d keys", r.st, len(kvs))
	}
}

// releasing gives a slot back when the call ends.
type releasing struct {
	chanDone
	slots chan struct{}
}

func (r releasing) Complete(resp []byte, st codec.Status, sent bool) {
	r.chanDone.Complete(resp, st, sent)
	<-r.slots
}

func testEtcdWatch(t *testing.T, addr string) {
	const n = 1000
	e := newPoolEnv(t, []string{"http://" + addr})
	e.connected(0)
	sink, h := e.watch(watchRequest(t, "watch/", 0))
	if m := unmarshal(t, sink.message(t), &pb.WatchResponse{}); !m.Created {
		t.Fatalf("first message: %v", m)
	}
	done := make(chanDone, n)
	e.loop.do(func() {
		for i := range n {
			e.pool.Call(0, codec.MethodTxn, putTxn(t, fmt.Sprintf("watch/%d", i%10), fmt.Append(nil, i)), testGuard, done)
		}
	})
	seen := make(map[string]bool)
	var rev int64
	for len(seen) < n {
		for _, ev := range unmarshal(t, sink.message(t), &pb.WatchResponse{}).Events {
			if ev.Kv.ModRevision != rev+1 && rev != 0 {
				t.Fatalf("revision %d after %d", ev.Kv.ModRevision, rev)
			}
			rev = ev.Kv.ModRevision
			seen[string(ev.Kv.Value)] = true
		}
	}
	for range n {
		if r := done.wait(t); r.st.Code != codec.OK {
			t.Fatalf("%+v", r)
		}
	}
	// A second watch on the same stream, a progress request, and the end.
	e.loop.do(func() { h.Send(watchRequest(t, "other/", 0)) })
	if m := unmarshal(t, sink.message(t), &pb.WatchResponse{}); !m.Created {
		t.Errorf("second watch: %v", m)
	}
	e.loop.do(h.Close)
	e.loop.do(h.Close)
	// Compacted: etcd cancels the watch, and the stream goes on.
	sink, h = e.watch(watchRequest(t, "watch/", rev+1000000))
	if m := unmarshal(t, sink.message(t), &pb.WatchResponse{}); !m.Created {
		t.Errorf("a watch in the future: %v", m)
	}
	e.loop.do(h.Close)
}

func testEtcdMethods(t *testing.T, addr string) {
	e := newPoolEnv(t, []string{"http://" + addr})
	e.connected(0)
	if r := e.call(codec.MethodStatus, nil); r.st.Code != codec.OK || unmarshal(t, r.resp, &pb.StatusResponse{}).Version == "" {
		t.Errorf("Status: %+v", r.st)
	}
	if r := e.call(codec.MethodMemberList, nil); r.st.Code != codec.OK || len(unmarshal(t, r.resp, &pb.MemberListResponse{}).Members) != 1 {
		t.Errorf("MemberList: %+v", r.st)
	}
	if r := e.call(codec.MethodAlarm, marshal(t, &pb.AlarmRequest{})); r.st.Code != codec.OK {
		t.Errorf("Alarm: %+v", r.st)
	}
	if r := e.call(codec.MethodRange, nil); r.st != codec.ErrEmptyKey || !r.sent {
		t.Errorf("Range without a key: %+v", r)
	}
	if r := e.call(codec.MethodCompact, marshal(t, &pb.CompactionRequest{Revision: 1 << 40})); r.st != codec.ErrFutureRev {
		t.Errorf("Compact: %+v", r.st)
	}
	if r := e.call(codec.MethodTxn, []byte{0xff, 0xff}); r.st.Code != codec.Internal {
		t.Errorf("garbage: %+v", r.st)
	}
}

// Connections are killed under load: every call is reported once, what is reported as unsent was not applied, and what
// is reported as done is there.
func testEtcdKilled(t *testing.T, addr string) {
	const rounds, atOnce = 60, 20
	r := newRelay(t, "127.0.0.1:0", addr)
	e := newPoolEnv(t, []string{r.url()})
	results := make(map[string]callResult)
	for round := range rounds {
		e.connected(0)
		dones := make([]chanDone, atOnce)
		call := func(i int) {
			req := putTxn(t, fmt.Sprintf("killed/%d/%d", round, i), []byte("x"))
			dones[i] = make(chanDone, 2)
			e.loop.do(func() { e.pool.Call(0, codec.MethodTxn, req, testGuard, dones[i]) })
		}
		call(0)
		if r := dones[0].wait(t); r.st.Code == codec.OK {
			dones[0] <- r
		} else {
			t.Fatalf("%+v", r)
		}
		for i := 1; i < atOnce; i++ {
			call(i)
			if i == atOnce/2 {
				r.kill()
			}
		}
		for i, d := range dones {
			results[fmt.Sprintf("killed/%d/%d", round, i)] = d.wait(t)
		}
		e.loop.do(func() {})
		for _, d := range dones {
			if len(d) != 0 {
				t.Error("completed twice")
			}
		}
	}
	e.connected(0)
	resp := e.call(codec.MethodRange, marshal(t, &pb.RangeRequest{Key: []byte("killed/"), RangeEnd: []byte("killed0"), KeysOnly: true}))
	there := make(map[string]bool)
	for _, kv := range unmarshal(t, resp.resp, &pb.RangeResponse{}).Kvs {
		there[string(kv.Key)] = true
	}
	var done, unsent, lost, applied int
	for key, got := range results {
		switch {
		case got.st.Code == codec.OK:
			if done++; !there[key] {
				t.Errorf("%s was acknowledged, and is not there", key)
			}
		case got.st.Code != codec.Unavailable:
			t.Errorf("%s: %+v", key, got.st)
		case !got.sent:
			if unsent++; there[key] {
				t.Errorf("%s was reported as unsent, and is there", key)
			}
		default:
			if lost++; there[key] {
				applied++
			}
		}
	}
	t.Logf("%d done, %d unsent, %d lost of which %d were applied", done, unsent, lost, applied)
	if done == 0 || lost == 0 {
		t.Error("the test tests nothing")
	}
}

// etcd closes connections that ping more often than its minimum, or without a stream. Here the minimum is testPingMin
// and the pool stays above it by as little as it does by default.
func testEtcdSilence(t *testing.T, addr string) {
	if defaultPingInterval <= embed.DefaultGRPCKeepAliveMinTime {
		t.Errorf("the default interval %v is not above etcd's minimum %v", defaultPingInterval, embed.DefaultGRPCKeepAliveMinTime)
	}
	e := newPoolEnv(t, []string{"http://" + addr}, func(c *PoolConfig) {
		c.PingInterval = testPingMin * defaultPingInterval / embed.DefaultGRPCKeepAliveMinTime
	})
	e.connected(0)
	sink, h := e.watch(watchRequest(t, "silence/", 0))
	sink.message(t)
	l := e.pool.clusters[0].ready[0]
	pongs := func(want int) {
		n, last := 0, int64(0)
		e.until("pings are answered", func() bool {
			if l.lastRecv != last {
				n, last = n+1, l.lastRecv
			}
			return n > want || len(sink.ends) > 0
		})
	}
	pongs(5) // etcd strikes a connection out at the third bad ping
	e.loop.do(h.Close)
	e.until("a silence without streams", func() bool { return e.pool.timers.now()-l.lastRecv > int64(3*testPingMin) })
	sink, _ = e.watch(watchRequest(t, "silence/", 0))
	sink.message(t)
	pongs(4)
	if r := e.call(codec.MethodRange, marshal(t, &pb.RangeRequest{Key: []byte("x")})); r.st.Code != codec.OK {
		t.Errorf("%+v", r)
	}
	if n := e.counter(metricPoolConnects, "shard-1"); n != 1 || len(sink.ends) > 0 {
		t.Errorf("%d connects", n)
	}
}
