package e2e

import (
	"os"
	"strings"
	"testing"
	"time"

	"spindle/server/node"
	"spindle/shard/embedded/embeddedtest"
)

// startMultinode starts a proxy over a member cluster of one node (keys below "p") and one of three (the others). The
// control asks the former.
func startMultinode(t *testing.T) (*embeddedtest.Cluster, *rpc, *control) {
	t.Helper()
	m := startMembers(t, 1)
	three := embeddedtest.Start(t, 3, nil)
	cfg := nodeConfig(t, m)
	cfg.Shards = append(cfg.Shards, node.Shard{Name: "three", URLs: three.URLs()})
	cfg.Partition = rangesOf([]string{"", "p"})
	n := startNode(t, cfg)
	return three, dial(t, n.ClientURLs()[0]), startControl(t, m.Shards[0])
}

// Nodes of a member cluster fail, one at a time, under load: nobody sees an error, nothing is lost or done twice,
// and other shards notice nothing.
func TestNodesFail(t *testing.T) {
	three, conn, control := startMultinode(t)
	l := startLoad(t, conn, "one/", "three/")
	one, affected := l.areas[0], l.areas[1]
	other := func(i int) int { return (i + 1) % 3 }
	long := os.Getenv("SPINDLE_MULTINODE") != ""
	for _, f := range []struct {
		name  string
		short bool
		run   func() (mend func())
	}{
		{"leader moved", true, func() func() {
			three.MoveLeader(other(three.AwaitLeader(-1)))
			return nil
		}},
		{"leader killed", true, func() func() {
			i := three.AwaitLeader(-1)
			three.Kill(i)
			three.AwaitLeader(i)
			return func() { three.Restart(i) }
		}},
		{"leader cut off", true, func() func() {
			i := three.AwaitLeader(-1)
			three.Cut(i)
			three.AwaitLeader(i)
			return func() { three.Heal(i) }
		}},
		{"follower mute", true, func() func() {
			i := three.Follower()
			three.Relay(i).Mute()
			return func() { three.Relay(i).Pass() }
		}},
		{"leader stopped", false, func() func() {
			i := three.AwaitLeader(-1)
			three.Stop(i)
			return func() { three.Restart(i) }
		}},
		{"follower stopped", false, func() func() {
			i := three.Follower()
			three.Stop(i)
			return func() { three.Restart(i) }
		}},
		{"follower killed", false, func() func() {
			i := three.Follower()
			three.Kill(i)
			return func() { three.Restart(i) }
		}},
		{"follower cut off", false, func() func() {
			i := three.Follower()
			three.Cut(i)
			return func() { three.Heal(i) }
		}},
		{"leader mute", false, func() func() {
			i := three.AwaitLeader(-1)
			three.Relay(i).Mute()
			return func() { three.Relay(i).Pass() }
		}},
	} {
		if !long && (!f.short || raceEnabled && f.name != "leader killed") {
			continue // shard's own tests of the pool have every failure of a node under the race detector
		}
		l.mark()
		l.progress("before "+f.name, 8)
		l.mark()
		control.mark()
		mend := f.run()
		l.progress(f.name, 8)
		// How long it stays so: the proxy meets the node again and again.
		l.pause(map[bool]time.Duration{false: 500 * time.Millisecond, true: 8 * time.Second}[long])
		l.progress(f.name, 8)
		l.report(f.name)
		// A busy machine makes everybody wait; what counts is how much longer it was than past the proxy.
		waited := control.longest()
		if took := one.longest(); took > 5*time.Second+2*waited {
			t.Errorf("%s: a request for the other shard took %v, a read of its member %v", f.name, took, waited)
		}
		// A node keeps what it cannot finish for 6 s; a mute connection would be noticed after 9 s of silence. A read may wait
		// for the shard's own stream, which moves when the connection has not answered the ping that follows the first
		// attempt without an answer.
		limit := 5 * time.Second
		if strings.HasSuffix(f.name, "mute") {
			limit = 8 * time.Second
		}
		if took := affected.longest(); took > limit+2*waited {
			t.Errorf("%s: a request took %v, a read of the other member %v", f.name, took, waited)
		}
		l.mark()
		if mend != nil {
			mend()
			three.AwaitHealthy()
			l.progress(f.name+", mended", 8)
			l.report(f.name + ", mended")
		}
	}
	l.end()
}
