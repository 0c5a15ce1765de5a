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

// A member cluster that is restored from an older backup behind a running proxy is refused as soon as the proxy meets
// it, and at the next start; others go on. The operator may accept the loss.
func TestRestoredMemberIsRefused(t *testing.T) {
	members := startMembers(t, 2)
	victim := startLossyCoordinator(t) // an etcd with fixed URLs
	cfg := nodeConfig(t, members)
	cfg.Shards = append(cfg.Shards, node.Shard{Name: "victim", URLs: []string{victim.client}})
	cfg.ShardTimeout = 5 * time.Second
	cfg.ShardMaxTxnOps, cfg.ShardMaxRequestBytes = 128, 1536<<10
	n := startNode(t, cfg)
	kv := dial(t, n.ClientURLs()[0])
	put := func(key, value string) (int64, error) {
		resp, err := kv.kv.Put(callContext(t), &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
		if err != nil {
			return 0, err
		}
		return resp.Header.Revision, nil
	}
	mustPut := func(key, value string) int64 {
		t.Helper()
		rev, err := put(key, value)
		if err != nil {
			t.Fatal(err)
		}
		return rev
	}
	// Keys of which some lie on every shard.
	key := func(i int) string { return fmt.Sprintf("restored/%02d", i) }
	for i := range 20 {
		mustPut(key(i), "old")
	}
	victim.e.Close()
	backup := filepath.Join(t.TempDir(), "backup")
	if err := os.CopyFS(backup, os.DirFS(victim.dir)); err != nil {
		t.Fatal(err)
	}
	victim.start()
	newest := int64(0)
	for range 3 {
		for i := range 20 {
			newest = mustPut(key(i), "new")
		}
	}
	victim.e.Close()
	if err := os.RemoveAll(victim.dir); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(victim.dir, os.DirFS(backup)); err != nil {
		t.Fatal(err)
	}
	victim.start()

	served, turnedAway := 0, 0
	waitUntil(t, "the restored member is refused", callTimeout, func() bool {
		served, turnedAway = 0, 0
		for i := range 20 {
			switch _, err := put(key(i), "after"); {
			case err == nil:
				served++
			case strings.Contains(err.Error(), "is refused"):
				turnedAway++
			}
		}
		return turnedAway > 0
	})
	if served == 0 {
		t.Error("the other shards are not served any more")
	}
	t.Logf("%d keys are served, %d are refused", served, turnedAway)
	n.Close()

	refused(t, cfg, "victim", "restored", "--accept-data-loss=victim")
	cfg.AcceptDataLoss = []string{"victim"}
	n = startNode(t, cfg)
	kv = dial(t, n.ClientURLs()[0])
	for i := range 20 {
		if rev := mustPut(key(i), "accepted"); rev <= newest {
			t.Errorf("revision %d after %d", rev, newest)
		}
	}
	n.Close()
	cfg.AcceptDataLoss = nil
	startNode(t, cfg)
}
