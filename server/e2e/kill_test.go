package e2e

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

const (
	killWriters = 32
	killRounds  = 4
	killLoad    = time.Second // of load before each kill, at least
)

// killWriter puts 1, 2, 3, ... to a key of its own, whatever happens to the proxy.
type killWriter struct {
	key   string
	next  int   // the value that goes next
	acked int   // the last value that was acknowledged
	rev   int64 // and its revision
}

// A proxy that is killed (-9) in the middle of load has lost nothing that it acknowledged, and after its
// restart no revision runs backwards.
func TestKillLosesNothing(t *testing.T) {
	t.Parallel()
	members := startMembers(t, 3)
	url := freeURL(t)
	args := proxyArgs(members, url, "")
	// A second proxy over the same members lives through it all and watches.
	witness := startNode(t, nodeConfig(t, members))
	witnessConn := dial(t, witness.ClientURLs()[0])
	watch := openWatch(t, witnessConn, "kill/", 1)

	dir := t.TempDir()
	p := startProcess(t, dir, args...)
	p.awaitReady(t)

	writers := make([]*killWriter, killWriters)
	for i := range writers {
		writers[i] = &killWriter{key: fmt.Sprintf("kill/%02d", i), next: 1}
	}
	var newest atomic.Int64
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	acked, unknown := 0, 0
	for round := range killRounds {
		conn := dial(t, url)
		var killed atomic.Bool
		errs := make(chan error, 1)
		var wg sync.WaitGroup
		var count, lost, begun atomic.Int64
		for _, w := range writers {
			wg.Go(func() {
				for first := true; ; first = false {
					before := newest.Load()
					resp, err := conn.kv.Put(ctx, &pb.PutRequest{Key: []byte(w.key), Value: []byte(strconv.Itoa(w.next))})
					if err != nil {
						if !killed.Load() {
							fatalOnce(errs, "%s: %w", w.key, err)
						}
						lost.Add(1)
						w.next++ // it happened once or not at all
						return
					}
					if resp.Header.Revision <= before {
						fatalOnce(errs, "%s: revision %d after %d", w.key, resp.Header.Revision, before)
						return
					}
					raise(&newest, resp.Header.Revision)
					w.acked, w.rev = w.next, resp.Header.Revision
					w.next++
					count.Add(1)
					if first {
						begun.Add(1)
					}
				}
			})
		}
		<-time.After(killLoad) // how long the load lasts, not a synchronisation
		waitUntil(t, "every writer has written", readyTimeout, func() bool { return begun.Load() == killWriters || len(errs) > 0 })
		killed.Store(true)
		p.signal(t, syscall.SIGKILL)
		// Calls wait for a connection that will not come back here: close it.
		<-p.done
		conn.conn.Close()
		wg.Wait()
		select {
		case err := <-errs:
			t.Fatal(err)
		default:
		}
		acked, unknown = acked+int(count.Load()), unknown+int(lost.Load())
		if count.Load() == 0 {
			t.Fatal("nothing was written in this round")
		}

		p = startProcess(t, dir, args...)
		p.awaitReady(t)
		resp, err := dial(t, url).kv.Range(callContext(t), &pb.RangeRequest{Key: []byte("kill/"), RangeEnd: prefixEnd("kill/")})
		if err != nil {
			t.Fatal(err)
		}
		if resp.Header.Revision < newest.Load() {
			t.Errorf("round %d: revision %d after the restart, a write had got %d", round, resp.Header.Revision, newest.Load())
		}
		raise(&newest, resp.Header.Revision)
		if len(resp.Kvs) != killWriters {
			t.Errorf("round %d: %d keys", round, len(resp.Kvs))
		}
		for _, kv := range resp.Kvs {
			i, _ := strconv.Atoi(strings.TrimPrefix(string(kv.Key), "kill/"))
			w := writers[i]
			v, _ := strconv.Atoi(string(kv.Value))
			if v != w.acked && v != w.next-1 || kv.ModRevision < w.rev {
				t.Errorf("round %d: %s holds %d at %d; %d was acknowledged at %d, then %d was tried", round, kv.Key, v, kv.ModRevision, w.acked, w.rev, w.next-1)
			}
		}
	}
	t.Logf("%d writes acknowledged, %d with unknown outcome, %d kills", acked, unknown, killRounds)

	// The witness saw each value once, in order, and all that were acknowledged.
	seen := map[string]int{}
	n := 0
	for _, e := range watch.until(t, newest.Load()) {
		v, _ := strconv.Atoi(string(e.Kv.Value))
		if k := string(e.Kv.Key); v <= seen[k] {
			t.Errorf("%s: %d after %d", k, v, seen[k])
		} else {
			seen[k] = v
		}
		n++
	}
	if n < acked || n > acked+unknown {
		t.Errorf("the watch brought %d events; %d writes were acknowledged, %d uncertain", n, acked, unknown)
	}
	for _, w := range writers {
		if seen[w.key] < w.acked {
			t.Errorf("%s: the watch has seen %d, %d was acknowledged", w.key, seen[w.key], w.acked)
		}
	}
}
