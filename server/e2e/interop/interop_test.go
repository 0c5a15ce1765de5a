// Package interop runs real clients against a Spindle that listens at $SPINDLE_ENDPOINT; run.sh starts one. It
// is a module of its own, with one go.mod for each minor version of clientv3 (go.mod: 3.7, v35.mod, v36.mod),
// because a program can hold one version of etcd's API only. The same file must compile with all of them.
package interop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

func endpoint(t *testing.T) string {
	t.Helper()
	e := os.Getenv("SPINDLE_ENDPOINT")
	if e == "" {
		t.Fatal("SPINDLE_ENDPOINT is not set: start run.sh, which starts a Spindle")
	}
	return e
}

func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func newClient(t *testing.T, opts ...grpc.DialOption) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint(t)}, DialTimeout: 20 * time.Second,
		DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 10 * time.Second, DialOptions: opts})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// prefix is a part of the key space that is this test's, in this run.
func prefix(t *testing.T) string {
	return fmt.Sprintf("interop/%s/%d/", t.Name(), time.Now().UnixNano())
}

func TestPutGetDelete(t *testing.T) {
	c, ctx, p := newClient(t), deadline(t), prefix(t)
	first, err := c.Put(ctx, p+"a", "1")
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.Put(ctx, p+"a", "2", clientv3.WithPrevKV())
	if err != nil || again.PrevKv == nil || string(again.PrevKv.Value) != "1" || again.Header.Revision <= first.Header.Revision {
		t.Fatalf("%v %v", again, err)
	}
	for i := range 20 {
		if _, err := c.Put(ctx, fmt.Sprintf("%sk%02d", p, i), strings.Repeat("v", i*100)); err != nil {
			t.Fatal(err)
		}
	}
	got, err := c.Get(ctx, p+"a")
	if err != nil || got.Count != 1 || string(got.Kvs[0].Value) != "2" || got.Kvs[0].Version != 2 ||
		got.Kvs[0].CreateRevision != first.Header.Revision || got.Kvs[0].ModRevision != again.Header.Revision {
		t.Fatalf("%v %v", got, err)
	}
	if got, err = c.Get(ctx, p+"a", clientv3.WithRev(first.Header.Revision)); err != nil || string(got.Kvs[0].Value) != "1" {
		t.Fatalf("%v %v", got, err)
	}
	if got, err = c.Get(ctx, p+"k", clientv3.WithPrefix(), clientv3.WithLimit(7)); err != nil || len(got.Kvs) != 7 || !got.More || got.Count != 20 {
		t.Fatalf("%v %v", got, err)
	}
	if got, err = c.Get(ctx, p+"k", clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend), clientv3.WithKeysOnly()); err != nil ||
		len(got.Kvs) != 20 || string(got.Kvs[0].Key) != p+"k19" || len(got.Kvs[0].Value) != 0 {
		t.Fatalf("%v %v", got, err)
	}
	if got, err = c.Get(ctx, p, clientv3.WithPrefix(), clientv3.WithCountOnly(), clientv3.WithSerializable()); err != nil || got.Count != 21 {
		t.Fatalf("%v %v", got, err)
	}
	del, err := c.Delete(ctx, p, clientv3.WithPrefix(), clientv3.WithPrevKV())
	if err != nil || del.Deleted != 21 || len(del.PrevKvs) != 21 {
		t.Fatalf("%v %v", del, err)
	}
	if _, err := c.Get(ctx, ""); !errors.Is(err, rpctypes.ErrEmptyKey) && status.Code(err) != codes.InvalidArgument {
		t.Fatalf("the empty key: %v", err)
	}
	if _, err := c.Get(ctx, p, clientv3.WithRev(1<<60)); !errors.Is(err, rpctypes.ErrFutureRev) {
		t.Fatalf("the future: %v", err)
	}
}

func TestTxn(t *testing.T) {
	c, ctx, p := newClient(t), deadline(t), prefix(t)
	key := p + "a"
	create := func() *clientv3.TxnResponse {
		r, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).
			Then(clientv3.OpPut(key, "new")).Else(clientv3.OpGet(key)).Commit()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	first, second := create(), create()
	if !first.Succeeded || second.Succeeded || string(second.Responses[0].GetResponseRange().Kvs[0].Value) != "new" {
		t.Fatalf("%v %v", first, second)
	}
	r, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", first.Header.Revision), clientv3.Compare(clientv3.Value(key), "=", "new"),
		clientv3.Compare(clientv3.Version(key), "<", 2)).Then(clientv3.OpGet(key), clientv3.OpDelete(key, clientv3.WithPrevKV())).Commit()
	if err != nil || !r.Succeeded || r.Responses[1].GetResponseDeleteRange().Deleted != 1 {
		t.Fatalf("%v %v", r, err)
	}
}

func TestWatch(t *testing.T) {
	c, ctx, p := newClient(t), deadline(t), prefix(t)
	put := func(i int) int64 {
		r, err := c.Put(ctx, fmt.Sprintf("%s%03d", p, i), fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		return r.Header.Revision
	}
	const n = 100
	start := put(0)
	wctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	past := c.Watch(wctx, p, clientv3.WithPrefix(), clientv3.WithRev(start), clientv3.WithPrevKV(), clientv3.WithProgressNotify())
	now := c.Watch(wctx, p, clientv3.WithPrefix(), clientv3.WithCreatedNotify(), clientv3.WithFragment())
	if r := <-now; !r.Created {
		t.Fatalf("%+v", r)
	}
	for i := 1; i < n; i++ {
		put(i)
	}
	if _, err := c.Delete(ctx, p, clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	for name, w := range map[string]clientv3.WatchChan{"from the past": past, "from now": now} {
		first := 0
		if name == "from now" {
			first = 1
		}
		rev, puts, dels := int64(0), first, 0
		for puts+dels < 2*n {
			r, ok := <-w
			if !ok || r.Err() != nil {
				t.Fatalf("%s: %d puts, %d deletes, then %v", name, puts, dels, r.Err())
			}
			for _, e := range r.Events {
				switch {
				case e.Kv.ModRevision < rev:
					t.Fatalf("%s: %d behind %d", name, e.Kv.ModRevision, rev)
				case e.Type == clientv3.EventTypePut && string(e.Kv.Value) != fmt.Sprint(puts):
					t.Fatalf("%s: %v instead of %d", name, e, puts)
				case e.Type == clientv3.EventTypePut:
					puts++
				default:
					dels++
				}
				rev = e.Kv.ModRevision
			}
		}
		if puts != n || dels != n {
			t.Fatalf("%s: %d puts, %d deletes", name, puts, dels)
		}
	}
	if err := c.RequestProgress(clientv3.WithRequireLeader(ctx)); err != nil {
		t.Fatal(err)
	}
	cancel()
	for range past {
	}
}

func TestCompaction(t *testing.T) {
	c, ctx, p := newClient(t), deadline(t), prefix(t)
	var revs []int64
	for i := range 3 {
		r, err := c.Put(ctx, p+"a", fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		revs = append(revs, r.Header.Revision)
	}
	if _, err := c.Compact(ctx, revs[1]); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Compact(ctx, revs[0]); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Fatalf("compacted twice: %v", err)
	}
	if _, err := c.Get(ctx, p+"a", clientv3.WithRev(revs[0])); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Fatalf("a compacted revision: %v", err)
	}
	if r, err := c.Get(ctx, p+"a", clientv3.WithRev(revs[1])); err != nil || string(r.Kvs[0].Value) != "1" {
		t.Fatalf("%v %v", r, err)
	}
	w := <-c.Watch(ctx, p+"a", clientv3.WithRev(revs[0]))
	if !errors.Is(w.Err(), rpctypes.ErrCompacted) || w.CompactRevision < revs[1] {
		t.Fatalf("a watch of a compacted revision: %+v", w)
	}
}

func TestLease(t *testing.T) {
	c, ctx, p := newClient(t), deadline(t), prefix(t)
	l, err := c.Grant(ctx, 60)
	if status.Code(err) == codes.Unimplemented || err != nil && strings.Contains(err.Error(), "not built") {
		t.Skip("this Spindle has no leases: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Put(ctx, p+"a", "1", clientv3.WithLease(l.ID)); err != nil {
		t.Fatal(err)
	}
	if ka, err := c.KeepAliveOnce(ctx, l.ID); err != nil || ka.TTL != 60 {
		t.Fatalf("%v %v", ka, err)
	}
	if ttl, err := c.TimeToLive(ctx, l.ID, clientv3.WithAttachedKeys()); err != nil || len(ttl.Keys) != 1 || ttl.GrantedTTL != 60 {
		t.Fatalf("%v %v", ttl, err)
	}
	if _, err := c.Revoke(ctx, l.ID); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Get(ctx, p+"a"); err != nil || len(r.Kvs) != 0 {
		t.Fatalf("%v %v", r, err)
	}
	if _, err := c.Put(ctx, p+"a", "1", clientv3.WithLease(l.ID)); !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		t.Fatalf("a lease that is gone: %v", err)
	}
}

func TestMaintenance(t *testing.T) {
	c, ctx := newClient(t), deadline(t)
	if st, err := c.Status(ctx, endpoint(t)); err != nil || !strings.HasPrefix(st.Version, "3.") || st.Leader != st.Header.MemberId {
		t.Fatalf("%v %v", st, err)
	}
	if a, err := c.AlarmList(ctx); err != nil || len(a.Alarms) != 0 {
		t.Fatalf("%v %v", a, err)
	}
	if m, err := c.MemberList(ctx); err != nil || len(m.Members) != 1 {
		t.Fatalf("%v %v", m, err)
	}
	if err := c.Sync(ctx); err != nil {
		t.Fatal(err)
	}
}

// TestManyAtOnce uses one connection for many calls of all sizes at a time.
func TestManyAtOnce(t *testing.T) { manyAtOnce(t, newClient(t), 64) }

func manyAtOnce(t *testing.T, c *clientv3.Client, workers int) {
	t.Helper()
	ctx, p := deadline(t), prefix(t)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 5 {
				key, value := fmt.Sprintf("%s%d/%d", p, w, i), strings.Repeat(fmt.Sprint(w%10), 1<<(w%17))
				if _, err := c.Put(ctx, key, value); err != nil {
					t.Errorf("put of %d bytes: %v", len(value), err)
					return
				}
				if r, err := c.Get(ctx, key); err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != value {
					t.Errorf("get of %d bytes: %v", len(value), err)
					return
				}
			}
		}()
	}
	wg.Wait()
}

// tinyConn reads a few bytes at a time, and writes them one piece after the other.
type tinyConn struct{ net.Conn }

func (c tinyConn) Read(p []byte) (int, error) { return c.Conn.Read(p[:min(len(p), 7)]) }
func (c tinyConn) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var k int
		k, err = c.Conn.Write(p[n:min(len(p), n+1000)])
		n += k
	}
	return n, err
}

// TestSmallWindows is a grpc-go client with the smallest windows of the protocol, no window estimation, no
// buffers, and a socket that is read seven bytes at a time: lists far larger than a window, beside other calls.
func TestSmallWindows(t *testing.T) {
	var d net.Dialer
	c := newClient(t, grpc.WithInitialWindowSize(65535), grpc.WithInitialConnWindowSize(65535), grpc.WithReadBufferSize(0), grpc.WithWriteBufferSize(0),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			nc, err := d.DialContext(ctx, "tcp", strings.TrimPrefix(addr, "http://"))
			if err != nil {
				return nil, err
			}
			return tinyConn{nc}, nil
		}))
	ctx, p := deadline(t), prefix(t)
	value := bytes.Repeat([]byte("v"), 10<<10)
	for i := range 60 {
		if _, err := c.Put(ctx, fmt.Sprintf("%s%02d", p, i), string(value)); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			r, err := c.Get(ctx, p, clientv3.WithPrefix())
			if err != nil || len(r.Kvs) != 60 {
				t.Errorf("%v", err)
				return
			}
			for _, kv := range r.Kvs {
				if !bytes.Equal(kv.Value, value) {
					t.Errorf("%s has other bytes", kv.Key)
				}
			}
		}()
	}
	manyAtOnce(t, c, 17)
	wg.Wait()
	// A watch of the past brings more than a window, too.
	r, err := c.Get(ctx, p+"00")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for w := range c.Watch(ctx, p, clientv3.WithPrefix(), clientv3.WithRev(r.Kvs[0].ModRevision)) {
		if w.Err() != nil {
			t.Fatal(w.Err())
		}
		if n += len(w.Events); n >= 60 {
			break
		}
	}
}

// TestGzip compresses what it sends, as etcd's server allows.
func TestGzip(t *testing.T) {
	c := newClient(t, grpc.WithDefaultCallOptions(grpc.UseCompressor(gzip.Name)))
	ctx, p := deadline(t), prefix(t)
	big := strings.Repeat("compress me ", 100_000)
	for _, v := range []string{"", "small", big} {
		if _, err := c.Put(ctx, p+"a", v); err != nil {
			t.Fatalf("put of %d bytes: %v", len(v), err)
		}
		if r, err := c.Get(ctx, p+"a"); err != nil || string(r.Kvs[0].Value) != v {
			t.Fatalf("get of %d bytes: %v", len(v), err)
		}
	}
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := c.Watch(wctx, p+"a", clientv3.WithCreatedNotify())
	if r := <-w; !r.Created {
		t.Fatalf("%+v", r)
	}
	if _, err := c.Put(ctx, p+"a", "watched"); err != nil {
		t.Fatal(err)
	}
	if r := <-w; len(r.Events) != 1 || string(r.Events[0].Kv.Value) != "watched" {
		t.Fatalf("%+v", r)
	}
	// What is larger inflated than a message may be is refused, and the connection lives on.
	huge := strings.Repeat("x", 8<<20)
	if _, err := pb.NewKVClient(c.ActiveConnection()).Put(ctx, &pb.PutRequest{Key: []byte(p + "a"), Value: []byte(huge)}, grpc.MaxCallSendMsgSize(1<<30), grpc.UseCompressor(gzip.Name)); status.Code(err) != codes.ResourceExhausted {
		t.Fatalf("8 MiB, compressed: %v", err)
	}
	if _, err := c.Get(ctx, p+"a"); err != nil {
		t.Fatal(err)
	}
}

// TestUnknown asks for what is not there, and gives up on what is.
func TestUnknown(t *testing.T) {
	cc, err := grpc.Dial("passthrough:///"+endpoint(t), // NewClient is not in the oldest
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second}), grpc.WithUserAgent(strings.Repeat("agent ", 100)))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	ctx := deadline(t)
	if err := cc.Invoke(ctx, "/etcdserverpb.KV/Nothing", &pb.RangeRequest{}, &pb.RangeResponse{}); status.Code(err) != codes.Unimplemented {
		t.Fatal(err)
	}
	if err := cc.Invoke(ctx, "/no.Service/Nothing", &pb.RangeRequest{}, &pb.RangeResponse{}); status.Code(err) != codes.Unimplemented {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, time.Nanosecond)
	defer cancel()
	if _, err := pb.NewKVClient(cc).Range(short, &pb.RangeRequest{Key: []byte("a")}); status.Code(err) != codes.DeadlineExceeded {
		t.Fatal(err)
	}
	for i := range 200 { // canceled in all states
		cctx, cancel := context.WithTimeout(ctx, time.Duration(i)*20*time.Microsecond)
		_, err := pb.NewKVClient(cc).Range(cctx, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Limit: 3})
		cancel()
		if c := status.Code(err); c != codes.OK && c != codes.DeadlineExceeded {
			t.Fatalf("call %d: %v", i, err)
		}
	}
	if _, err := pb.NewKVClient(cc).Range(ctx, &pb.RangeRequest{Key: []byte("a")}); err != nil {
		t.Fatal(err)
	}
}
