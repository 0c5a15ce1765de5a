package e2e

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/embed"

	"spindle/server/node"
)

// lossyCoordinator is a coordinator that can lose its data: an etcd with fixed URLs and a fixed token, so that it
// comes back with the same cluster ID, as one on tmpfs does.
type lossyCoordinator struct {
	t      testing.TB
	dir    string
	client string
	peer   string
	name   string
	e      *embed.Etcd
}

func startLossyCoordinator(t testing.TB) *lossyCoordinator {
	t.Helper()
	c := &lossyCoordinator{t: t, dir: filepath.Join(t.TempDir(), "coordinator"), client: freeURL(t), peer: freeURL(t), name: "coordinator"}
	c.start()
	t.Cleanup(func() { c.e.Close() })
	return c
}

func (c *lossyCoordinator) start() {
	c.t.Helper()
	at := func(s string) url.URL {
		u, err := url.Parse(s)
		if err != nil {
			c.t.Fatal(err)
		}
		return *u
	}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = c.name, c.dir
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{at(c.client)}, []url.URL{at(c.client)}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{at(c.peer)}, []url.URL{at(c.peer)}
	cfg.InitialCluster = c.name + "=" + c.peer
	cfg.LogLevel, cfg.UnsafeNoFsync, cfg.EnableGRPCGateway = "panic", true, false
	cfg.TickMs, cfg.ElectionMs = 20, 100
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(readyTimeout):
		c.t.Fatal("the coordinator does not serve")
	}
	c.e = e
}

// wipe stops the coordinator and starts it again without its data. It returns when it serves.
func (c *lossyCoordinator) wipe() {
	c.t.Helper()
	c.e.Close()
	if err := os.RemoveAll(c.dir); err != nil {
		c.t.Fatal(err)
	}
	c.start()
}

// A coordinator that loses its data under load is rebuilt: nothing that was acknowledged is lost, no revision runs
// backwards, watches have no gap, and writes go on soon after it is back.
func TestCoordinatorLosesItsData(t *testing.T) {
	t.Parallel()
	for _, proxies := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d proxies", proxies), func(t *testing.T) { coordinatorLoses(t, proxies, max(2, scale(5))) })
	}
}

func coordinatorLoses(t *testing.T, proxies, rounds int) {
	const writers = 8
	members := startMembers(t, 3)
	coord := startLossyCoordinator(t)
	var conns []*rpc
	for range proxies {
		cfg := nodeConfig(t, members)
		cfg.Coordinator = []string{coord.client}
		n := startNode(t, cfg)
		conns = append(conns, dial(t, n.ClientURLs()[0]))
	}
	var watches []*eventLog
	for _, c := range conns {
		watches = append(watches, openWatch(t, c, "lost/", 1))
	}

	var newest, lastAck atomic.Int64 // revision; time of the latest acknowledgement, unix ns
	var acked, failed atomic.Int64
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var mu sync.Mutex
	acks := map[int64]string{} // revision: key=value
	errs := make(chan error, 1)
	var wg sync.WaitGroup
	for i := range writers {
		key, conn := fmt.Sprintf("lost/%02d", i), conns[i%len(conns)]
		wg.Go(func() {
			for v := 1; ctx.Err() == nil; v++ {
				before := newest.Load()
				value := strconv.Itoa(v)
				resp, err := conn.kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
				if err != nil {
					failed.Add(1)
					continue
				}
				if resp.Header.Revision <= before {
					fatalOnce(errs, "%s: revision %d after %d", key, resp.Header.Revision, before)
				}
				raise(&newest, resp.Header.Revision)
				lastAck.Store(time.Now().UnixNano())
				acked.Add(1)
				mu.Lock()
				if was, twice := acks[resp.Header.Revision]; twice {
					fatalOnce(errs, "revision %d was given twice: %s and %s=%s", resp.Header.Revision, was, key, value)
				}
				acks[resp.Header.Revision] = key + "=" + value
				mu.Unlock()
			}
		})
		// Readers: linearizable lists over all shards never run backwards.
		wg.Go(func() {
			for ctx.Err() == nil {
				before := newest.Load()
				resp, err := conn.kv.Range(ctx, &pb.RangeRequest{Key: []byte("lost/"), RangeEnd: prefixEnd("lost/"), KeysOnly: true})
				if err == nil && resp.Header.Revision < before {
					fatalOnce(errs, "a list has revision %d after %d", resp.Header.Revision, before)
				}
			}
		})
	}
	control := startControl(t, members.Shards[0])
	for round := range rounds {
		base := acked.Load()
		waitUntil(t, "writes before the loss", callTimeout, func() bool { return acked.Load() > base+200 })
		begun := time.Now()
		coord.wipe()
		control.mark()
		back := time.Now()
		waitUntil(t, "a write after the loss", callTimeout, func() bool { return lastAck.Load() > back.UnixNano() })
		waited := control.longest()
		t.Logf("round %d: the coordinator was away for %v, first write %v after it was back, revision %d", round,
			back.Sub(begun).Round(time.Millisecond), time.Unix(0, lastAck.Load()).Sub(back).Round(time.Millisecond), newest.Load())
		if pause := time.Unix(0, lastAck.Load()).Sub(back); pause > 5*time.Second+2*waited { // a tenth of a second, on a machine that is not busy
			t.Errorf("round %d: writes went on %v after the coordinator was back, a read of a member took %v", round, pause, waited)
		}
	}
	base := acked.Load()
	waitUntil(t, "writes at the end", callTimeout, func() bool { return acked.Load() > base+200 })
	cancel()
	wg.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
	// One more write ends what the watches must show.
	resp, err := conns[0].kv.Put(callContext(t), &pb.PutRequest{Key: []byte("lost/end"), Value: []byte("end")})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d writes acknowledged, %d without an answer (at the end of the test), newest revision %d", acked.Load(), failed.Load(), resp.Header.Revision)
	for i, w := range watches {
		events := w.until(t, resp.Header.Revision)
		seen := map[int64]string{}
		for _, e := range events {
			seen[e.Kv.ModRevision] = string(e.Kv.Key) + "=" + string(e.Kv.Value)
		}
		for rev, what := range acks {
			if seen[rev] != what {
				t.Fatalf("watch of proxy %d: revision %d is %q, acknowledged was %s", i, rev, seen[rev], what)
			}
		}
	}
}

// A coordinator that was made anew has another cluster ID, and one may simply be the wrong one: it is refused unless the
// operator says that it takes the other's place.
func TestAnotherCoordinatorIsRefused(t *testing.T) {
	t.Parallel()
	members := startMembers(t, 2)
	coord := startLossyCoordinator(t)
	cfg := nodeConfig(t, members)
	cfg.Coordinator = []string{coord.client}
	n := startNode(t, cfg)
	first, err := dial(t, n.ClientURLs()[0]).kv.Put(callContext(t), &pb.PutRequest{Key: []byte("a"), Value: []byte("1")})
	if err != nil {
		t.Fatal(err)
	}
	n.Close()

	other := startLossyCoordinator(t)
	cfg.Coordinator = []string{other.client}
	refused(t, cfg, "cluster ID", "--replace-coordinator")
	cfg.ReplaceCoordinator = true
	n = startNode(t, cfg)
	second, err := dial(t, n.ClientURLs()[0]).kv.Put(callContext(t), &pb.PutRequest{Key: []byte("a"), Value: []byte("2")})
	if err != nil {
		t.Fatal(err)
	}
	if second.Header.Revision <= first.Header.Revision {
		t.Errorf("revision %d after %d", second.Header.Revision, first.Header.Revision)
	}
	n.Close()
	// From now on it is the one, and the old one is refused.
	cfg.ReplaceCoordinator = false
	startNode(t, cfg).Close()
	cfg.Coordinator = []string{coord.client}
	refused(t, cfg, "cluster ID")

	// Another system's is refused whatever the operator says.
	theirs := startLossyCoordinator(t)
	their := nodeConfig(t, startMembers(t, 1))
	their.Coordinator = []string{theirs.client}
	startNode(t, their).Close()
	cfg.Coordinator, cfg.ReplaceCoordinator = []string{theirs.client}, true
	refused(t, cfg, "another system")
}

// refused starts a proxy that must give up with a sentence that has all of want.
func refused(t *testing.T, cfg node.Config, want ...string) {
	t.Helper()
	n, err := node.Start(cfg)
	if err == nil {
		defer n.Close()
		select {
		case err = <-n.Failed():
		case <-n.Ready():
			t.Fatalf("accepted; expected %q", want)
		case <-time.After(readyTimeout):
			_, why := n.Status()
			t.Fatalf("neither accepted nor refused: %s", why)
		}
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Fatalf("%v; it should say %q", err, w)
		}
	}
}
