package sim

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/codec"
)

// TestStartBeginsAnewWithReadsUnderWay: a start looks for where its streams begin when an endpoint of the coordinator leads elsewhere, and
// begins anew. What it has read for the first beginning comes only then, and counts for nothing. (It opened streams of no shards, and
// the frontier of no shards made the process panic.)
func TestStartBeginsAnewWithReadsUnderWay(t *testing.T) {
	for wrong := 1700 * time.Millisecond; wrong < 2200*time.Millisecond; wrong += 20 * time.Millisecond {
		w := newAbsentWorld(t, 2*time.Second)
		p := w.proxies[0]
		p.boot(0)
		w.wait("the process", func() bool { return p.up })
		p.host.Ways = 2
		right, slow := w.net.Coord.Etcd, p.host.Link(w.c.ID)
		base, late := slow.Base, false
		w.net.Tamper = func(to codec.ClusterID, m codec.Method, req []byte) []byte {
			if q := (&pb.RangeRequest{}); !late && to == w.c.ID && m == codec.MethodRange && proto.Unmarshal(req, q) == nil && q.Revision > 0 {
				slow.Base, late = time.Second, true
				w.net.Coord.Wipe(w.net.Coord.ClusterID + 1)
			}
			return req
		}
		w.net.Sent = func(*Host, codec.ClusterID, codec.Method, []byte) { slow.Base = base }
		w.wait("a look for the start of a stream", func() bool { return late })
		w.pass(wrong)
		if p.ready {
			t.Fatal("it did not begin anew")
		}
		w.net.Coord.replace(right)
		w.wait("the start", func() bool { return p.ready })
		w.wantWhole(p)
	}
}
