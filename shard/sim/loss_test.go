package sim

import (
	"os"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/shard"
)

// losesData makes a loss that an operator accepts the main event of a run.
func losesData(c *Config) {
	c.Lose = true
	c.Shards, c.Proxies, c.Clients, c.Keys, c.Ops, c.Think = 1+int(c.Seed)%3, 1+int(c.Seed/3)%3, 3, 8, 300, 20*time.Millisecond
	c.MaxTxnOps, c.MaxRequestBytes = 128, defaultMaxRequestBytes
	c.AutoCompact, c.Leases = shard.AutoCompact{}, false
	c.Chaos = max(c.Chaos, 60*time.Millisecond)
	e := &c.Events
	e.Foreign, e.Compact, e.Expire = false, false, false
}

// TestAcceptedLosses runs seeds in which a member is restored to an older state, or wiped, and that is accepted, by a proxy that may end in
// the middle of it, while others start, serve, are watched and stop. What clients were told before the loss fits one history, what
// they were told behind it the other, and nobody was led past what is missing.
func TestAcceptedLosses(t *testing.T) {
	sum := runSeeds(t, 25, losesData)
	if n := int(seedsOf(25)); os.Getenv(envSeed) == "" && (sum.Losses < n/2 || sum.Cut < n/4) {
		t.Errorf("%d losses, %d starts cut short", sum.Losses, sum.Cut)
	}
}

// TestAcceptedLossEndedMeanwhile: of two proxies that accept a loss one comes to its fence when the other's has ended the loss, and its clients
// have written. That is not compacted once more: nothing of it is lost. (Seed 7 of TestAcceptedLosses, as it was.)
func TestAcceptedLossEndedMeanwhile(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	w.c.replace(w.c.Etcd.rewound(w.lastButOne()))
	p, q := w.proxies[0], w.proxies[1]
	w.Accept = []string{"m1"}
	q.boot(0)
	held := false // q has asked for the revisions of its fence, and sees nothing of what happens from here on
	w.net.Sent = func(h *Host, to codec.ClusterID, m codec.Method, req []byte) {
		txn := &pb.TxnRequest{}
		if held || h != q.host || to != codec.Coordinator || m != codec.MethodTxn || proto.Unmarshal(req, txn) != nil || !hasPut(txn) || !w.marked() {
			return
		}
		held = true
		h.Link(codec.Coordinator).Hole = true
		h.Link(w.c.ID).StreamHole = true
	}
	w.wait("the tick", func() bool { return held })
	p.boot(0)
	w.wait("the other start", func() bool { return p.ready })
	var last int64
	for _, c := range w.net.Members {
		last = w.put(p, w.keys[c])
	}
	q.host.Link(codec.Coordinator).Resume()
	w.wait("the start", func() bool { return q.ready || w.c.Rev() > 1<<40 })
	w.pass(time.Second)
	q.host.Link(w.c.ID).Resume()
	w.pass(2 * time.Second)
	for _, c := range w.net.Members {
		if rec := c.at([]byte(shard.KeyCompact), c.Rev()); rec == nil {
			t.Errorf("%s has no record of the compaction", c)
		} else if at, _ := shard.ParseCompaction(rec.KV.Value); at >= last {
			t.Errorf("%s is compacted at %d, and %d was written behind the loss", c, at, last)
		}
	}
	w.wantWhole(q)
}

// TestPastOfOthersBehindAcceptedLoss: who accepts a loss ends behind its fence, before another member has the compaction's record. A proxy that
// cannot reach the lost member shows what others have of the past, as it was, and refuses that once it has taken the member in. Somebody
// brings the record to all. (Seed 51551 of TestAcceptedLosses, as it was, took what was shown for an error; there the other member was full.)
func TestPastOfOthersBehindAcceptedLoss(t *testing.T) {
	w := newAbsentWorld(t, 2*time.Second)
	w.c.replace(w.c.Etcd.rewound(w.lastButOne()))
	p, q, past, other := w.proxies[0], w.proxies[1], w.last, w.net.Members[0]
	q.boot(0)
	w.wait("the start", func() bool { return q.ready })
	l := q.host.Link(w.c.ID)
	l.Deaf, l.Mute = true, true
	w.Accept = []string{"m1"}
	p.boot(0)
	has := func(c *Cluster) bool { return c.recorded(past+1) > 0 }
	w.wait("the fence", func() bool { return has(w.c) })
	p.crash()
	ask := func() (proto.Message, codec.Status) {
		return w.ask(q, shard.OpRange, &pb.RangeRequest{Key: []byte(w.keys[other]), Revision: past})
	}
	resp, st := ask()
	if has(other) {
		t.Fatal("the other member has the record already")
	}
	if st.Code != codec.OK || len(resp.(*pb.RangeResponse).Kvs) != 1 || resp.(*pb.RangeResponse).Kvs[0].ModRevision > past {
		t.Errorf("the past of the other member: %v %v", resp, st)
	}
	l.heal()
	w.wantWhole(q)
	if _, st := ask(); st != codec.ErrCompacted {
		t.Errorf("the past, once the loss is known: %v", st)
	}
	for _, c := range w.net.Members {
		w.wait("the record", func() bool { return has(c) })
	}
}
