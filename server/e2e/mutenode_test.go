package e2e

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/server/node"
	"spindle/shard/embedded/embeddedtest"
)

// Each node of a three-node member in turn takes what it is sent and says nothing, the one with the proxy's stream among them. Whoever reads
// waits for one attempt of a second at most, and then for another node: also what only another proxy
// writes, of which nothing but the stream tells.
func TestReadsPastMuteNode(t *testing.T) {
	three := embeddedtest.Start(t, 3, nil)
	m := startMembers(t, 1)
	cfg := nodeConfig(t, m)
	cfg.Shards = append(cfg.Shards, node.Shard{Name: "three", URLs: three.URLs()})
	cfg.Partition = rangesOf([]string{"", "p"})
	reader := dial(t, startNode(t, cfg).ClientURLs()[0])
	writer := dial(t, startNode(t, cfg).ClientURLs()[0])

	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { // it has the same to bear
		for i := 0; ctx.Err() == nil; i++ {
			_, _ = writer.kv.Put(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "three/%d", i%10), Value: []byte("v")})
		}
	})
	control := startControl(t, m.Shards[0])
	reads := []struct {
		name string
		req  *pb.RangeRequest
	}{
		{"get", &pb.RangeRequest{Key: []byte("three/1")}},
		{"another get", &pb.RangeRequest{Key: []byte("three/none")}},
		{"list of the member", &pb.RangeRequest{Key: []byte("three/"), RangeEnd: []byte("three0"), Limit: 100}},
		{"serializable list of the member", &pb.RangeRequest{Key: []byte("three/"), RangeEnd: []byte("three0"), Limit: 100, Serializable: true}},
		{"list of all", &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Limit: 100}},
	}
	for i := range 3 {
		three.Relay(i).Mute()
		control.mark()
		longest := make([]time.Duration, len(reads))
		for begun := time.Now(); time.Since(begun) < 2500*time.Millisecond; {
			for k, r := range reads {
				at := time.Now()
				if _, err := reader.kv.Range(callContext(t), r.req); err != nil {
					t.Fatalf("%s: %v", r.name, err)
				}
				longest[k] = max(longest[k], time.Since(at))
			}
		}
		waited := control.longest()
		three.Relay(i).Pass()
		three.AwaitHealthy()
		for k, r := range reads {
			t.Logf("node %d mute: %s took %v at most", i+1, r.name, longest[k].Round(time.Millisecond))
			if longest[k] > 5*time.Second+2*waited { // 2, on a machine that is not busy
				t.Errorf("node %d mute: %s took %v, a read of another member %v", i+1, r.name, longest[k], waited)
			}
		}
	}
}
