package sim

import (
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/codec"
	"spindle/shard"
)

// TestFenceForgetsNothingBehindIt: a proxy has heard of a write behind the fence of an accepted loss, by a read, before its stream or a look shows it
// the fence. Then the member loses that write, and the coordinator everything: the proxy is the last that knows, and does not start again. (It
// forgot the write for the fence.)
func TestFenceForgetsNothingBehindIt(t *testing.T) {
	for name, byLook := range map[string]bool{"stream": false, "look": true} {
		t.Run(name, func(t *testing.T) {
			w, p, q, cut, coord := newLossBehind(t)
			cut.heal()
			w.pass(2 * time.Second) // q misses nothing that it knows of
			cut.StreamHole = true
			w.Accept = []string{"m1"}
			p.boot(0)
			w.wait("the start", func() bool { return p.ready })
			w.Accept = nil
			coord.heal()
			w.pass(500 * time.Millisecond)
			for range 3 {
				w.last = w.put(p, w.keys[w.c])
			}
			if resp, st := w.ask(q, shard.OpRange, &pb.RangeRequest{Key: []byte(w.keys[w.c])}); st.Code != codec.OK ||
				resp.(*pb.RangeResponse).Kvs[0].ModRevision != w.last {
				t.Fatalf("q reads %v %v, the last write is %d", resp, st, w.last)
			}
			away := q.host.Link(w.net.Members[2].ID)
			away.Deaf, away.Mute = true, true
			p.crash()
			life := q.life
			if byLook {
				cut.Reset()
			}
			cut.Resume()
			w.wait("a refusal", func() bool { return q.core.Observe().Shards[w.shardOf(q)].Refused != "" })
			w.net.Coord.Wipe(w.net.Coord.ClusterID)
			w.c.replace(w.c.Etcd.rewound(w.lastButOne()))
			w.pass(5 * time.Second)
			away.heal()
			if w.pass(time.Minute); q.life != life {
				resp, st := w.ask(q, shard.OpRange, &pb.RangeRequest{Key: []byte(w.keys[w.c])})
				t.Errorf("it has started again, and answers %v %v", resp, st)
			}
		})
	}
}
