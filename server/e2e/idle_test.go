package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"
)

const (
	// idleConns connections with a watch each are what a few kube-apiservers hold.
	idleConns = 5000
	// maxIdleBytes is what one of them may cost the proxy, without TLS, as resident memory.
	maxIdleBytes = 16 << 10
)

// idleWatch opens a connection as grpc-go does, creates one watch of a key of its own, and waits until it is
// created. The client side costs a socket and nothing else.
func idleWatch(addr string, i int) (net.Conn, error) {
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (net.Conn, error) {
		nc.Close()
		return nil, fmt.Errorf("connection %d: %w", i, err)
	}
	var buf, block bytes.Buffer
	fr := http2.NewFramer(&buf, nc)
	buf.WriteString(http2.ClientPreface)
	fr.WriteSettings()
	enc := hpack.NewEncoder(&block)
	for _, kv := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/etcdserverpb.Watch/Watch"}, {":authority", addr},
		{"content-type", "application/grpc"}, {"user-agent", "grpc-go/1.72.1"}, {"te", "trailers"},
		{"hasleader", "true"}, {"client-api-version", "3.6.16"}} {
		enc.WriteField(hpack.HeaderField{Name: kv[0], Value: kv[1]})
	}
	fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
	key := fmt.Sprintf("/registry/resource-%d/", i)
	req, err := proto.Marshal(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte(key), RangeEnd: []byte(clientv3.GetPrefixRangeEnd(key)), PrevKv: true, ProgressNotify: true}}})
	if err != nil {
		return fail(err)
	}
	fr.WriteData(1, false, append([]byte{0, 0, 0, 0, byte(len(req))}, req...))
	fr.WriteSettingsAck()
	nc.SetDeadline(time.Now().Add(readyTimeout))
	if _, err := nc.Write(buf.Bytes()); err != nil {
		return fail(err)
	}
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return fail(err)
		}
		switch f := f.(type) {
		case *http2.DataFrame:
			var resp pb.WatchResponse
			if err := proto.Unmarshal(f.Data()[5:], &resp); err != nil || !resp.Created {
				return fail(fmt.Errorf("%v %v", &resp, err))
			}
			return nc, nil
		case *http2.GoAwayFrame, *http2.RSTStreamFrame:
			return fail(fmt.Errorf("%v", f))
		}
	}
}

// openIdle opens n of them, several at a time.
func openIdle(t testing.TB, addr string, n int) {
	t.Helper()
	type result struct {
		nc  net.Conn
		err error
	}
	const atATime = 16
	results := make(chan result)
	for w := range atATime {
		go func() {
			for i := w; i < n; i += atATime {
				nc, err := idleWatch(addr, i)
				results <- result{nc, err}
			}
		}()
	}
	var failed error
	for range n {
		r := <-results
		if r.err != nil {
			failed = r.err
			continue
		}
		t.Cleanup(func() { r.nc.Close() })
	}
	if failed != nil {
		t.Fatal(failed)
	}
}

// TestIdleConnections opens thousands of connections with one quiet watch each to a proxy that is a process of
// its own, and looks at how far its resident memory rises.
func TestIdleConnections(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("long")
	}
	members := startMembers(t, 1)
	url, metrics := freeURL(t), freeURL(t)
	p := startProcess(t, t.TempDir(), proxyArgs(members, url, metrics)...)
	p.awaitReady(t)
	addr := strings.TrimPrefix(url, "http://")

	openIdle(t, addr, 200) // what the first ones allocate once
	before := memoryOf(t, p, metrics)
	start := time.Now()
	openIdle(t, addr, idleConns)
	took := time.Since(start)
	after := memoryOf(t, p, metrics)
	rss := (after.rss - before.rss) / idleConns
	t.Logf("%d connections with one watch in %v: %d bytes resident each (%d MiB before, %d MiB after), of them heap %d, stacks %d",
		idleConns, took.Round(time.Millisecond), rss, before.rss>>20, after.rss>>20,
		(after.heap-before.heap)/idleConns, (after.stacks-before.stacks)/idleConns)
	if rss > maxIdleBytes {
		t.Errorf("%d bytes a connection, want at most %d", rss, maxIdleBytes)
	}

	// Each watch gets events, and falls quiet again: what it took for them is given back.
	ctx, cancel := context.WithTimeout(context.Background(), 5*readyTimeout)
	defer cancel()
	kv := dial(t, url).kv
	value := bytes.Repeat([]byte("v"), 1<<10)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 64 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := next.Add(1) - 1; i < idleConns; i = next.Add(1) - 1 {
				if _, err := kv.Put(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "/registry/resource-%d/x", i), Value: value}); err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	wg.Wait()
	used := memoryOf(t, p, metrics)
	t.Logf("after an event of 1 KiB for each: %d bytes resident each (%d MiB), the ring of events included", (used.rss-before.rss)/idleConns, used.rss>>20)
	if got := (used.rss - before.rss) / idleConns; got > maxIdleBytes {
		t.Errorf("%d bytes a connection after an event, want at most %d", got, maxIdleBytes)
	}
}

// processMemory is what a process holds, in bytes.
type processMemory struct{ rss, heap, stacks int }

func memoryOf(t testing.TB, p *process, metrics string) (m processMemory) {
	t.Helper()
	resp, err := http.Get(metrics + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), " ")
		n, _ := strconv.ParseFloat(value, 64)
		switch name {
		case "go_memstats_heap_inuse_bytes":
			m.heap = int(n)
		case "go_memstats_stack_inuse_bytes":
			m.stacks = int(n)
		}
	}
	io.Copy(io.Discard, resp.Body)
	m.rss = statusOf(t, p, "VmRSS") << 20
	return m
}

// TestIdleProfile writes where the memory of idle connections lies to the file that SPINDLE_IDLE_PROFILE names,
// for people: go tool pprof -sample_index=inuse_space.
func TestIdleProfile(t *testing.T) {
	path := os.Getenv("SPINDLE_IDLE_PROFILE")
	if path == "" {
		t.Skip("SPINDLE_IDLE_PROFILE is not set")
	}
	defer func(rate int) { runtime.MemProfileRate = rate }(runtime.MemProfileRate)
	runtime.MemProfileRate = 512
	n := startNode(t, nodeConfig(t, startMembers(t, 1)))
	openIdle(t, strings.TrimPrefix(n.ClientURLs()[0], "http://"), idleConns)
	runtime.GC()
	runtime.GC()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := pprof.Lookup("heap").WriteTo(f, 0); err != nil {
		t.Fatal(err)
	}
}
