package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/server/node"
	"spindle/shard"
	"spindle/shard/embedded"
)

// rangesOf makes the range map in which member i holds the keys from starts[i] on; nil is no statement.
func rangesOf(starts []string) (spec shard.PartitionSpec) {
	if starts == nil {
		return spec
	}
	spec.Kind = shard.PartitionRange
	for i, s := range starts {
		spec.Ranges = append(spec.Ranges, shard.RangeSpec{Start: []byte(s), Member: i})
	}
	return spec
}

// With ranges, who needs one shard asks that shard alone: another member is stopped, and lists, watches,
// writes and Txns inside the healthy shards go on.
func TestRangesAskOneShard(t *testing.T) {
	t.Parallel()
	m := startMembers(t, 3)
	cfg := nodeConfig(t, m)
	last := relayTo(t, m.Shards[2])
	cfg.Shards[2].URLs = []string{last.URL()}
	cfg.Partition = rangesOf([]string{"", "g", "p"})
	cfg.ShardTimeout = 5 * time.Second // one list waits for it
	spindle := dial(t, startNode(t, cfg).ClientURLs()[0])
	ctx := testContext(t)
	put := func(k string) int64 {
		t.Helper()
		r, err := spindle.kv.Put(ctx, &pb.PutRequest{Key: []byte(k), Value: []byte("v")})
		if err != nil {
			t.Fatalf("put %s: %v", k, err)
		}
		return r.Header.Revision
	}
	for _, k := range []string{"a", "b", "g", "h", "p", "z"} {
		put(k)
	}
	for i, want := range []string{"a b", "g h", "p z"} {
		if got := memberKeys(t, m, i); got != want {
			t.Errorf("member %d holds %s, not %s", i, got, want)
		}
	}
	inside := openWatchRange(t, spindle, "g", "i", 1)

	last.SetTarget("") // a server that is stopped inside its process panics when it is asked for its status
	list := func(key, end string, limit int64, rev int64, serializable bool) string {
		t.Helper()
		r, err := spindle.kv.Range(ctx, &pb.RangeRequest{Key: []byte(key), RangeEnd: []byte(end), Limit: limit, Revision: rev, Serializable: serializable})
		if err != nil {
			t.Fatalf("list of [%s, %s): %v", key, end, err)
		}
		s := ""
		for _, kv := range r.Kvs {
			s += string(kv.Key)
		}
		return s
	}
	at := put("h")
	for round := range 3 {
		before := at
		at = put("gg")
		for _, c := range []struct {
			key, end, want string
			rev            int64
		}{
			{"g", "p", "ggg" + "h", 0}, {"a", "g", "ab", 0}, {"a", "p", "abggg" + "h", 0}, {"a", "h", "abggg", 0}, {"g", "p", "ggg" + "h", at}, {"a", "p", "abggg" + "h", at},
		} {
			for _, serializable := range []bool{false, true} {
				if got := list(c.key, c.end, 0, c.rev, serializable); got != c.want && !serializable {
					t.Errorf("round %d: [%s, %s) holds %s, not %s", round, c.key, c.end, got, c.want)
				}
			}
		}
		if got := list("a", "p", 3, 0, false); got != "abg" {
			t.Errorf("limited: %s", got)
		}
		if _, err := inside.wait(at, callTimeout); err != nil {
			t.Fatal(err)
		}
		late := openWatchRange(t, spindle, "a", "g", before)
		if _, err := late.wait(at, callTimeout); err != nil {
			t.Fatal(err)
		}
		late.close()
		if _, err := spindle.kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte("gg"), RangeEnd: []byte("h")}); err != nil {
			t.Fatal(err)
		}
		r, err := spindle.kv.Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{
			{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("g"), RangeEnd: []byte("p")}}},
			{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("k")}}},
			{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("l"), RangeEnd: []byte("p")}}},
		}})
		if err != nil || len(r.Responses[0].GetResponseRange().Kvs) != 2 {
			t.Fatalf("txn over a range of one shard: %v, %v", r, err)
		}
		if _, err := spindle.kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte("k")}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := spindle.kv.Range(ctx, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")}); err == nil {
		t.Error("a list that needs the stopped member is answered")
	}
}

func openWatchRange(t testing.TB, s *rpc, key, end string, start int64) *eventLog {
	t.Helper()
	return openWatchOn(t, s, []byte(key), []byte(end), start)
}

// memberKeys returns the keys of clients that a member holds.
func memberKeys(t testing.TB, m *embedded.Members, i int) string {
	t.Helper()
	r, err := dial(t, m.Shards[i]).kv.Range(callContext(t), &pb.RangeRequest{Key: []byte{1}, RangeEnd: []byte{0}, KeysOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, kv := range r.Kvs {
		keys = append(keys, string(kv.Key))
	}
	return strings.Join(keys, " ")
}

// The map is fixed by the first start: later ones may leave it out, and are refused with a sentence that
// says what to do if they say something else.
func TestRangesAreVerified(t *testing.T) {
	t.Parallel()
	m := startMembers(t, 3)
	first := nodeConfig(t, m)
	first.Partition = rangesOf([]string{"", "g", "p"})

	refused := func(cfg node.Config, want ...string) {
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
				t.Errorf("%q does not say %q", err, w)
			}
		}
		t.Log(err)
	}
	without := nodeConfig(t, m)
	without.Partition = shard.PartitionSpec{Kind: shard.PartitionRange}
	refused(without, "start and end")

	n := startNode(t, first)
	spindle := dial(t, n.ClientURLs()[0])
	for _, k := range []string{"a", "g", "p"} {
		if _, err := spindle.kv.Put(callContext(t), &pb.PutRequest{Key: []byte(k)}); err != nil {
			t.Fatal(err)
		}
	}
	n.Close()

	for _, spec := range []shard.PartitionSpec{{}, {Kind: shard.PartitionRange}, first.Partition} {
		cfg := nodeConfig(t, m)
		cfg.Partition = spec
		n := startNode(t, cfg)
		r, err := dial(t, n.ClientURLs()[0]).kv.Range(callContext(t), &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte{0}})
		if err != nil || len(r.Kvs) != 3 {
			t.Errorf("%v: %v, %v", spec, r, err)
		}
		n.Close()
	}
	// The order of the members means nothing as long as each has its range.
	turned := nodeConfig(t, m)
	turned.Shards[0], turned.Shards[2] = turned.Shards[2], turned.Shards[0]
	turned.Partition = shard.PartitionSpec{Kind: shard.PartitionRange, Ranges: []shard.RangeSpec{{Member: 2}, {Start: []byte("g"), Member: 1}, {Start: []byte("p"), Member: 0}}}
	startNode(t, turned).Close()

	swapped := turned
	swapped.Partition = first.Partition
	refused(swapped, "was set up for", `from "p" to the last one`, "addresses")
	moved := nodeConfig(t, m)
	moved.Partition = rangesOf([]string{"", "h", "p"})
	refused(moved, `from the first key to "g"`, `from the first key to "h"`, "leave all of them out")
	hash := nodeConfig(t, m)
	hash.Partition.Kind = shard.PartitionHash
	refused(hash, "partitioner range", "--partitioner range")
	missing := nodeConfig(t, m)
	missing.Shards = missing.Shards[:2]
	refused(missing, "the configuration does not have", "--shard")

	other := startMembers(t, 2)
	foreign := nodeConfig(t, m)
	foreign.Shards = append(foreign.Shards, node.Shard{Name: "new", URLs: []string{other.Shards[0]}})
	refused(foreign, "new", "not in the partition map")
	c := dial(t, other.Shards[1])
	if _, err := c.kv.Put(context.Background(), &pb.PutRequest{Key: []byte("somebody's")}); err != nil {
		t.Fatal(err)
	}
	foreign.Shards[3].URLs = []string{other.Shards[1]}
	refused(foreign, fmt.Sprintf("member cluster %s", "new"), "not Spindle's", "empty etcd")
}
