package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"spindle/codec"
	"spindle/shard/embedded"
)

// quotaRig is a proxy over two members with little room: keys below "m" lie on the first.
func quotaRig(t *testing.T, quota int64) (*embedded.Members, *rpc) {
	t.Helper()
	m, err := embedded.Start(embedded.Config{
		Dir: filepath.Join(t.TempDir(), "members"), Shards: 2, NoFsync: true, Log: testLog(t), Quota: quota,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	cfg := nodeConfig(t, m)
	cfg.Partition = rangesOf([]string{"", "m"})
	cfg.ShardTimeout = 10 * time.Second
	return m, dial(t, startNode(t, cfg).ClientURLs()[0])
}

func isNoSpace(err error) bool {
	return status.Code(err) == codes.ResourceExhausted && status.Convert(err).Message() == codec.ErrNoSpace.Msg
}

// alarms asks a member itself.
func alarms(t *testing.T, url string) []*pb.AlarmMember {
	t.Helper()
	resp, err := dial(t, url).m.Alarm(callContext(t), &pb.AlarmRequest{Action: pb.AlarmRequest_GET, Alarm: pb.AlarmType_NONE})
	if err != nil {
		t.Fatal(err)
	}
	return resp.Alarms
}

// A member near its quota: puts and leases are refused with etcd's error before the member raises its alarm, other
// shards and watches go on, deletes pass, and compaction makes room again without anybody's restart.
func TestQuotaRefusesBeforeTheMember(t *testing.T) {
	if raceEnabled {
		t.Skip("long; TestNoSpaceAlarm goes the same ways")
	}
	const quota = 64 << 20
	// A file beyond this stays refused: half of the reserve, which is five of the largest requests (shard/quota.go).
	const tooLarge = quota - 5*embedded.MaxRequestBytes/2
	m, spindle := quotaRig(t, quota)
	w := openWatchRange(t, spindle, "a", "z", 1)
	value := make([]byte, 512<<10)
	for i := range value {
		value[i] = byte(rand.Uint32())
	}
	put := func(key string) (int64, error) {
		resp, err := spindle.kv.Put(callContext(t), &pb.PutRequest{Key: []byte(key), Value: value})
		if err != nil {
			return 0, err
		}
		return resp.Header.Revision, nil
	}
	// How many have room depends on when the member commits: a large value is copied when the next one comes into its page, and
	// what it leaves behind is free, but in pieces. 81 to 110 were seen.
	const leastStored = 50
	last, stored := int64(0), 0
	var refused error
	// A burst is refused before its time: what was written in the last second counts twice. A little later there is room.
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	// A machine that stands still for a while looks like one: then there is more patience.
	full := func(since time.Duration) bool {
		return refused != nil && (since > 4*time.Second && stored >= leastStored || since > readyTimeout)
	}
	for since := time.Now(); stored < 200 && !full(time.Since(since)); <-tick.C {
		rev, err := put(fmt.Sprintf("a/%d", stored%4))
		if refused = err; err != nil {
			continue
		}
		last, stored, since = rev, stored+1, time.Now()
	}
	if !isNoSpace(refused) {
		t.Fatalf("after %d puts of 512 KiB: %v", stored, refused)
	}
	if stored < leastStored {
		t.Errorf("only %d puts of 512 KiB had room in 64 MiB", stored)
	}
	for i, u := range m.Shards {
		if a := alarms(t, u); len(a) > 0 {
			t.Errorf("member %d has raised %v", i, a)
		}
	}
	txn := &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("a/t")}}}}}
	waitUntil(t, "a Txn that puts is refused", readyTimeout, func() bool { // the last refusal may have been a burst's
		_, err := spindle.kv.Txn(callContext(t), txn)
		if err != nil && !isNoSpace(err) {
			t.Fatal(err)
		}
		return err != nil
	})
	if rev, err := put("z"); err != nil {
		t.Errorf("the other shard: %v", err)
	} else {
		last = rev
	}
	del, err := spindle.kv.DeleteRange(callContext(t), &pb.DeleteRangeRequest{Key: []byte("a/0")})
	if err != nil || del.Deleted != 1 {
		t.Fatalf("a delete: %v, %v", del, err)
	}
	w.until(t, del.Header.Revision)
	if _, err := spindle.kv.Compact(callContext(t), &pb.CompactionRequest{Revision: last, Physical: true}); err != nil {
		t.Fatal(err)
	}
	// Nothing else is written to the full member from here on (shard/quota.go, stir).
	begun, looked, member := time.Now(), false, dial(t, m.Shards[0])
	waitUntil(t, "there is room again", readyTimeout, func() bool {
		_, err := put("a/again")
		if took := time.Since(begun); err != nil && took > readyTimeout/4 && !looked {
			looked = true
			s, err := member.m.Status(callContext(t), &pb.StatusRequest{})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("no room %v after the compaction: %d bytes, %d in use", took.Round(time.Second), s.DbSize, s.DbSizeInUse)
			if s.DbSize > tooLarge {
				// Where looks and commits came late the file has grown into the reserve, and stays refused until this.
				if _, err := member.m.Defragment(callContext(t), &pb.DefragmentRequest{}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err != nil && !isNoSpace(err) {
			t.Fatal(err)
		}
		return err == nil
	})
	t.Logf("%d puts had room; there was room again %v after the compaction", stored, time.Since(begun).Round(time.Millisecond))
	if _, err := spindle.l.LeaseGrant(callContext(t), &pb.LeaseGrantRequest{TTL: 60}); err != nil {
		t.Errorf("a lease: %v", err)
	}
}

// A member that has raised its alarm all the same: clear errors at once, not a timeout, reads go on, and so does
// everything as soon as the alarm is disarmed. What was on its way happened once or not at all.
func TestNoSpaceAlarm(t *testing.T) {
	t.Parallel()
	m, spindle := quotaRig(t, 64<<20)
	put := func(key string) error {
		_, err := spindle.kv.Put(callContext(t), &pb.PutRequest{Key: []byte(key), Value: []byte("v")})
		return err
	}
	if err := errors.Join(put("a"), put("z")); err != nil {
		t.Fatal(err)
	}
	member := dial(t, m.Shards[0])
	id := uint64(m.Etcd(0).Server.MemberID())
	alarm := func(do pb.AlarmRequest_AlarmAction) {
		t.Helper()
		if _, err := member.m.Alarm(callContext(t), &pb.AlarmRequest{Action: do, MemberID: id, Alarm: pb.AlarmType_NOSPACE}); err != nil {
			t.Fatal(err)
		}
	}
	alarm(pb.AlarmRequest_ACTIVATE)
	// The first one may be on its way while the proxy does not know: its fate is open until the alarm is gone.
	first := make(chan error, 1)
	go func() { first <- put("a/first") }()
	waitUntil(t, "writes are refused at once", readyTimeout, func() bool {
		start := time.Now()
		err := put("a/more")
		return isNoSpace(err) && time.Since(start) < time.Second
	})
	if _, err := spindle.kv.DeleteRange(callContext(t), &pb.DeleteRangeRequest{Key: []byte("a")}); !isNoSpace(err) {
		t.Errorf("a delete: %v", err)
	}
	if r, err := spindle.kv.Range(callContext(t), &pb.RangeRequest{Key: []byte("z")}); err != nil || r.Count != 1 {
		t.Errorf("a read of the other shard: %v %v", r, err)
	}
	if err := put("z"); err != nil {
		t.Errorf("the other shard: %v", err)
	}
	alarm(pb.AlarmRequest_DEACTIVATE)
	start := time.Now()
	var after int64
	waitUntil(t, "writes go on", readyTimeout, func() bool {
		r, err := spindle.kv.Put(callContext(t), &pb.PutRequest{Key: []byte("a/after")})
		if err != nil {
			return false
		}
		after = r.Header.Revision
		return true
	})
	t.Logf("writes went on %v after the alarm was gone", time.Since(start).Round(time.Millisecond))
	if err := <-first; err != nil && !isNoSpace(err) && status.Convert(err).Message() != codec.ErrTimeout.Msg {
		t.Errorf("the put that met the alarm: %v", err)
	}
	puts := map[string]int{}
	for _, e := range openWatchRange(t, spindle, "a", "b", 1).until(t, after) {
		puts[string(e.Kv.Key)]++
	}
	if puts["a/first"] > 1 || puts["a/more"] > 1 || puts["a/after"] != 1 {
		t.Errorf("puts: %v", puts)
	}
}
