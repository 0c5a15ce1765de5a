package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

const (
	// memoryKeys is how many keys the lists of TestListMemory have; SPINDLE_MEMORY_KEYS overrides it.
	memoryKeys   = 120_000
	memoryValue  = 1 << 10
	memoryWriter = 256
	// maxStreamMemory is by how much a RangeStream of any length may raise a proxy's resident memory, in MiB. What it
	// leaves as garbage counts: it lies there until there is as much of it as of what the proxy holds.
	maxStreamMemory = 64
)

// TestListMemory lists many keys through a proxy that is a process of its own, over members that are not
// in it, and looks at how far its resident memory rises: for a RangeStream, also one whose client reads
// slowly, and (reported only: it holds the answer) for one Range.
func TestListMemory(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("long")
	}
	keys := memoryKeys
	if v := os.Getenv("SPINDLE_MEMORY_KEYS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		keys = n
	}
	members := startMembers(t, 3)
	writer := startNode(t, nodeConfig(t, members))
	start := time.Now()
	fill(t, writer.ClientURLs()[0], keys)
	writer.Close()
	t.Logf("%d keys written in %v", keys, time.Since(start).Round(time.Second))

	url := freeURL(t)
	p := startProcess(t, t.TempDir(), proxyArgs(members, url, "")...)
	p.awaitReady(t)
	s := dial(t, url)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	all := &pb.RangeRequest{Key: []byte("m/"), RangeEnd: []byte("m0")}

	for _, pause := range []time.Duration{0, 2 * time.Millisecond} {
		before := resetPeak(t, p)
		start := time.Now()
		st, err := s.kv.RangeStream(ctx, all)
		if err != nil {
			t.Fatal(err)
		}
		n, chunks, last := 0, 0, []byte(nil)
		for tick := time.NewTicker(max(pause, 1)); ; {
			m, err := st.Recv()
			if err == io.EOF {
				tick.Stop()
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			chunks++
			for _, kv := range m.RangeResponse.Kvs {
				if bytes.Compare(kv.Key, last) <= 0 {
					t.Fatalf("%q behind %q", kv.Key, last)
				}
				last = kv.Key
				n++
			}
			if pause > 0 {
				<-tick.C
			}
		}
		peak := statusOf(t, p, "VmHWM")
		t.Logf("RangeStream with pauses of %v: %d keys in %d chunks in %v; resident %d MiB before, at most %d MiB while it ran",
			pause, n, chunks, time.Since(start).Round(time.Millisecond), before, peak)
		if n != keys {
			t.Errorf("%d keys, want %d", n, keys)
		}
		if peak-before > maxStreamMemory {
			t.Errorf("it took %d MiB", peak-before)
		}
	}

	if keys*memoryValue < maxRecvBytes*9/10 {
		before := resetPeak(t, p)
		start := time.Now()
		resp, err := s.kv.Range(ctx, all)
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.Kvs) != keys {
			t.Errorf("%d keys, want %d", len(resp.Kvs), keys)
		}
		t.Logf("one Range of %d MiB in %v; resident %d MiB before, at most %d MiB while it ran",
			keys*memoryValue>>20, time.Since(start).Round(time.Millisecond), before, statusOf(t, p, "VmHWM"))
	}

	// Pages as kube-apiserver takes them.
	const page = 500
	start = time.Now()
	key, rev, n := all.Key, int64(0), 0
	for n < min(keys, 20*page) {
		resp, err := s.kv.Range(ctx, &pb.RangeRequest{Key: key, RangeEnd: all.RangeEnd, Revision: rev, Limit: page})
		if err != nil {
			t.Fatal(err)
		}
		if rev == 0 {
			rev = resp.Header.Revision
		}
		if want := int64(keys - n); len(resp.Kvs) != page || resp.Count != want || resp.More != (want > page) {
			t.Fatalf("page at %q: %d keys, count %d, more %v; want count %d", key, len(resp.Kvs), resp.Count, resp.More, want)
		}
		n += len(resp.Kvs)
		key = append(bytes.Clone(resp.Kvs[len(resp.Kvs)-1].Key), 0)
	}
	t.Logf("%d pages of %d keys in %v", n/page, page, time.Since(start).Round(time.Millisecond))
}

// fill writes keys m/00000000, m/00000001, ... with values of a KiB.
func fill(t testing.TB, url string, keys int) {
	t.Helper()
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make(chan error, 1)
	var conns [4]*rpc
	for i := range conns {
		conns[i] = dial(t, url)
	}
	for i := range memoryWriter {
		wg.Go(func() {
			value := bytes.Repeat([]byte("v"), memoryValue)
			for {
				k := next.Add(1) - 1
				if k >= int64(keys) || len(errs) > 0 {
					return
				}
				req := &pb.PutRequest{Key: fmt.Appendf(nil, "m/%08d", k), Value: value}
				if _, err := conns[i%len(conns)].kv.Put(context.Background(), req); err != nil {
					fatalOnce(errs, "%w", err)
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
}

// resetPeak makes the process's peak of resident memory the present one, and returns it, in MiB.
func resetPeak(t testing.TB, p *process) int {
	t.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.cmd.Process.Pid), []byte("5"), 0); err != nil {
		t.Skip(err)
	}
	return statusOf(t, p, "VmRSS")
}

// statusOf reads a size from the process's status, in MiB.
func statusOf(t testing.TB, p *process, field string) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Skip(err)
	}
	_, rest, _ := strings.Cut(string(b), field+":")
	words := strings.Fields(rest)
	if len(words) == 0 {
		t.Skipf("no %s in the process's status", field)
	}
	kib, err := strconv.Atoi(words[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib >> 10
}
