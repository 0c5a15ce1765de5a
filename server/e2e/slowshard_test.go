package e2e

import (
	"os"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"spindle/shard/embedded/embeddedtest"
)

// slowShardTimeout is small, so that what waits for a shard that is mute ends soon.
const slowShardTimeout = 5 * time.Second

// One shard of two is slow, then mute, then dead: the other one goes on as if nothing were, and after its return
// everything flows again.
func TestShardSlowMuteDead(t *testing.T) {
	members := startMembers(t, 2)
	relay := embeddedtest.NewRelay(t)
	target := strings.TrimPrefix(members.Shards[1], "http://")
	relay.SetTarget(target)
	cfg := nodeConfig(t, members)
	cfg.Shards[1].URLs = []string{relay.URL()}
	cfg.Partition = rangesOf([]string{"", "p"})
	cfg.ShardTimeout = slowShardTimeout
	conn := dial(t, startNode(t, cfg).ClientURLs()[0])
	control := startControl(t, members.Shards[0])
	l := startLoad(t, conn, "one/", "two/")
	one, two := l.areas[0], l.areas[1]
	l.progress("at first", 8)

	// Slow: 100 ms for each of its writes and reads. How much the other shard does is compared with what it did just
	// before, more than once, since the machine has other things to do too.
	slowed, quick := int64(0), int64(0)
	rounds := 2
	if os.Getenv("SPINDLE_MULTINODE") != "" {
		rounds = 10
	}
	for round := 0; round < rounds || slowed < quick/5 && round < 5*rounds; round++ {
		for _, delay := range []time.Duration{0, 50 * time.Millisecond} {
			relay.Delay(delay)
			l.progress("with another delay", 5, two)
			l.mark()
			w, r := one.writes.Load(), one.reads.Load()
			l.pause(500 * time.Millisecond)
			n := one.writes.Load() - w + one.reads.Load() - r
			if delay == 0 {
				quick += n
			} else {
				slowed += n
				l.report("one shard is slow")
			}
		}
	}
	t.Logf("requests for the other shard: %d while one was quick, %d while it was slow", quick, slowed)
	if slowed < quick/5 {
		t.Errorf("a slow shard slows the other one: %d requests, %d before", slowed, quick)
	}
	relay.Delay(0)
	l.progress("quick again", 8)

	// From here on requests for the shard, and what needs all shards, may fail; nothing else may.
	for _, a := range []*loadArea{two, l.all, l.leases} {
		a.mayFail.Store(true)
	}
	put := func(key string) (time.Duration, error) {
		begun := time.Now()
		_, err := conn.kv.Put(callContext(t), &pb.PutRequest{Key: []byte(key)})
		return time.Since(begun), err
	}
	for _, f := range []struct {
		name       string
		harm, mend func()
	}{
		{"mute", relay.Mute, relay.Pass},
		{"dead", func() { relay.SetTarget("") }, func() { relay.SetTarget(target) }},
	} {
		l.mark()
		l.progress("before it is "+f.name, 20, one)
		quiet := one.longest()
		l.mark()
		f.harm()
		// It may take a moment to be noticed; then the answer is there at once, and says why.
		waitUntil(t, "a put is refused at once", callTimeout, func() bool {
			l.check()
			took, err := put("two/x")
			st := status.Convert(err)
			if err != nil && st.Code() != codes.Unavailable {
				t.Fatal(err)
			}
			return err != nil && took < slowShardTimeout/6 && strings.Contains(st.Message(), members.Names[1])
		})
		l.progress("one shard is "+f.name, 20, one)
		l.report("one shard is " + f.name)
		if took := one.longest(); took > slowShardTimeout/2+2*quiet { // a busy machine makes everybody wait
			t.Errorf("%s: a request for the other shard took %v, %v before", f.name, took, quiet)
		}
		f.mend()
		control.mark()
		begun := time.Now()
		waitUntil(t, "it is back", callTimeout, func() bool {
			_, err := put("two/x")
			return err == nil
		})
		back, waited := time.Since(begun), control.longest()
		l.progress(f.name+", back", 5)
		t.Logf("%s: the first put %v after its return, everything after %v", f.name, back.Round(time.Millisecond), time.Since(begun).Round(time.Millisecond))
		if back > slowShardTimeout*4/5+2*waited { // a second, on a machine that is not busy
			t.Errorf("%s: the first put succeeded %v after its return, a read of the other member took %v", f.name, back, waited)
		}
	}
	l.end()
}
