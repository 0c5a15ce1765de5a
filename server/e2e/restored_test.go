package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/server/node"
)

// restoredWorld is a proxy over two members and a victim, an etcd with fixed URLs whose data is replaced.
type restoredWorld struct {
	t      *testing.T
	cfg    node.Config
	victim *lossyCoordinator
	n      *node.Node
	kv     *rpc
	newest int64 // the largest revision that a put was told
}

const restoredKeys = 20 // of which some lie on every shard

func newRestoredWorld(t *testing.T) *restoredWorld {
	t.Helper()
	w := &restoredWorld{t: t, victim: startLossyCoordinator(t)}
	w.cfg = nodeConfig(t, startMembers(t, 2))
	w.cfg.Shards = append(w.cfg.Shards, node.Shard{Name: "victim", URLs: []string{w.victim.client}})
	w.cfg.ShardTimeout = 10 * time.Second
	w.cfg.ShardMaxTxnOps, w.cfg.ShardMaxRequestBytes = 128, 1536<<10
	w.start()
	return w
}

func (w *restoredWorld) start() {
	w.t.Helper()
	w.n = startNode(w.t, w.cfg)
	w.kv = dial(w.t, w.n.ClientURLs()[0])
}

func (w *restoredWorld) put(i int, value string) error {
	resp, err := w.kv.kv.Put(callContext(w.t), &pb.PutRequest{Key: fmt.Appendf(nil, "restored/%02d", i), Value: []byte(value)})
	if err == nil {
		if resp.Header.Revision <= w.newest {
			w.t.Errorf("revision %d after %d", resp.Header.Revision, w.newest)
		}
		w.newest = resp.Header.Revision
	}
	return err
}

// putAll puts every key. A shard that was away for long is not waited for by its requests, so they are made again.
func (w *restoredWorld) putAll(value string) {
	w.t.Helper()
	for i := range restoredKeys {
		var err error
		waitUntil(w.t, "a put is served", callTimeout, func() bool {
			err = w.put(i, value)
			return err == nil || !strings.Contains(err.Error(), "no endpoint answers")
		})
		if err != nil {
			w.t.Fatal(err)
		}
	}
}

// putSome puts all keys until a shard is refused, and returns how many puts were served and how many were turned away in the
// last round.
func (w *restoredWorld) putSome(value string) (served, turnedAway int) {
	w.t.Helper()
	waitUntil(w.t, "the member is refused", callTimeout, func() bool {
		served, turnedAway = 0, 0
		for i := range restoredKeys {
			switch err := w.put(i, value); {
			case err == nil:
				served++
			case strings.Contains(err.Error(), "is refused"):
				turnedAway++
			}
		}
		return turnedAway > 0
	})
	if served == 0 {
		w.t.Error("the other shards are not served any more")
	}
	if ready, why := w.n.Status(); !ready || !strings.Contains(why, "victim is refused") {
		w.t.Errorf("the status is %v %q", ready, why)
	}
	return served, turnedAway
}

// replace stops the victim, puts a copy of another data directory in the place of its own, none if from is "", and
// starts it again. It returns a copy of what was there.
func (w *restoredWorld) replace(from string) (was string) {
	w.t.Helper()
	w.victim.e.Close()
	was = w.copy(w.victim.dir)
	if from != w.victim.dir {
		if err := os.RemoveAll(w.victim.dir); err != nil {
			w.t.Fatal(err)
		}
		if from != "" {
			if err := os.CopyFS(w.victim.dir, os.DirFS(from)); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	w.victim.start()
	return was
}

func (w *restoredWorld) copy(dir string) string {
	w.t.Helper()
	to := filepath.Join(w.t.TempDir(), "copy")
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		w.t.Fatal(err)
	}
	return to
}

// A member cluster that is restored from an older backup behind a running proxy is refused as soon as the proxy meets
// it, whatever was on its way, and at the next start; others go on. With its newest state it is accepted again. The operator
// may accept the loss.
func TestRestoredMemberIsRefused(t *testing.T) {
	t.Parallel()
	w := newRestoredWorld(t)
	w.putAll("old")
	backup := w.replace(w.victim.dir)
	for range 3 {
		w.putAll("new")
	}
	newest := w.replace(backup)
	served, turnedAway := w.putSome("after")
	t.Logf("%d keys are served, %d are refused", served, turnedAway)
	w.n.Close()

	w.start()
	w.putSome("at the start")
	w.replace(newest)
	waitUntil(t, "the newest state is accepted", callTimeout, func() bool {
		_, why := w.n.Status()
		return why == ""
	})
	w.putAll("whole")
	w.n.Close()

	w.replace(backup)
	w.cfg.AcceptDataLoss = []string{"victim"}
	w.start()
	w.putAll("accepted")
	w.n.Close()
	w.cfg.AcceptDataLoss = nil
	w.start()
	w.putAll("as ever")
}

// A member that lost everything is refused alone, too, and the operator may accept that: it takes the place of the one
// that it was, and what was before is compacted.
func TestWipedMember(t *testing.T) {
	t.Parallel()
	w := newRestoredWorld(t)
	w.putAll("old")
	old := w.newest
	w.replace("")
	w.putSome("after")
	w.n.Close()
	w.start()
	w.putSome("at the start")
	w.n.Close()

	w.cfg.AcceptDataLoss = []string{"victim"}
	w.start()
	waitUntil(t, "the past is compacted", callTimeout, func() bool {
		_, err := w.kv.kv.Range(callContext(t), &pb.RangeRequest{Key: []byte("restored/"), RangeEnd: []byte("restored0"), Revision: old})
		return err != nil && strings.Contains(err.Error(), "compacted")
	})
	w.putAll("accepted")
	w.n.Close()
	w.cfg.AcceptDataLoss = nil
	w.start()
	w.putAll("as ever")
}

// One endpoint of a member leads to an older copy of it that runs beside it: it is not used, the other one is.
func TestEndpointOfAnOlderCopy(t *testing.T) {
	t.Parallel()
	w := newRestoredWorld(t)
	w.putAll("old")
	backup := w.replace(w.victim.dir)
	w.putAll("new")
	w.n.Close()
	twin := &lossyCoordinator{t: t, dir: backup, client: freeURL(t), peer: freeURL(t), name: "coordinator"}
	twin.start()
	defer twin.e.Close()
	w.cfg.Shards[2].URLs = []string{twin.client, w.victim.client}
	before := twin.e.Server.KV().Rev()
	w.start()
	for range 3 {
		w.putAll("newer")
	}
	resp, err := w.kv.kv.Range(callContext(t), &pb.RangeRequest{Key: []byte("restored/"), RangeEnd: []byte("restored0")})
	if err != nil || len(resp.Kvs) != restoredKeys {
		t.Fatal(resp, err)
	}
	for _, kv := range resp.Kvs {
		if string(kv.Value) != "newer" {
			t.Errorf("%s is %q", kv.Key, kv.Value)
		}
	}
	if rev := twin.e.Server.KV().Rev(); rev != before {
		t.Errorf("the copy was written to: %d, was %d", rev, before)
	}
}

// A proxy that runs while another one accepts what a member has lost refuses the member until it sees that. Then it starts again within
// its process, on its port, and serves all.
func TestAcceptedLossSeenByRunningProxy(t *testing.T) {
	w := newRestoredWorld(t)
	url := freeURL(t)
	args := []string{"--listen-client-urls", url, "--listen-metrics-urls", freeURL(t), "--coordinator", strings.Join(w.cfg.Coordinator, ","), "--shard-timeout", "10s"}
	for _, s := range w.cfg.Shards {
		args = append(args, "--shard", s.Name+"="+strings.Join(s.URLs, ","))
	}
	p := startProcess(t, t.TempDir(), args...)
	p.awaitReady(t)
	other := dial(t, url)
	put := func(i int) error {
		_, err := other.kv.Put(callContext(t), &pb.PutRequest{Key: fmt.Appendf(nil, "restored/%02d", i), Value: []byte("by the other")})
		return err
	}
	w.putAll("old")
	backup := w.replace(w.victim.dir)
	w.putAll("new")
	w.n.Close()
	w.replace(backup)
	waitUntil(t, "the member is refused", callTimeout, func() bool {
		for i := range restoredKeys {
			if err := put(i); err != nil && strings.Contains(err.Error(), "is refused") {
				return true
			}
		}
		return false
	})
	w.cfg.AcceptDataLoss = []string{"victim"}
	w.start()
	w.putAll("accepted")
	waitUntil(t, "the other one serves all", callTimeout, func() bool {
		for i := range restoredKeys {
			if put(i) != nil {
				return false
			}
		}
		return true
	})
	starts := func() int { return strings.Count(p.log(), "Spindle is ready") }
	waitUntil(t, "it says so", callTimeout, func() bool { return starts() > 1 })
	w.putAll("as ever")
	if starts() != 2 {
		t.Errorf("it has started %d times", starts())
	}
}
