package sim

import (
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/revclock"
	"spindle/shard"
)

// TestEachFault lets one thing alone go wrong for long, and asks that it did. It is what TestItBites plants its bugs in.
func TestEachFault(t *testing.T) {
	for name, f := range map[string]struct {
		events ChaosEvents
		was    func(*Stats) bool
	}{
		"cut":           {ChaosEvents{Cut: true}, func(s *Stats) bool { return s.Cuts > 0 }},
		"die":           {ChaosEvents{Die: true}, func(s *Stats) bool { return s.Deaths > 0 }},
		"full":          {ChaosEvents{Full: true}, func(s *Stats) bool { return s.Fulls > 0 && s.Core.LostReplies > 0 }},
		"die and wipe":  {ChaosEvents{Die: true, Wipe: true}, func(s *Stats) bool { return s.Deaths > 0 && s.Wipes > 0 }},
		"stop and wipe": {ChaosEvents{StallMid: true, Wipe: true}, func(s *Stats) bool { return s.Mid[midReplace] > 0 && s.Mid[midRebuild] > 0 }},
		"stop in all":   {ChaosEvents{StallMid: true, Wipe: true, Crash: true}, func(s *Stats) bool { return s.Mid[midFence] > 0 && s.Mid[midCompaction] > 0 && s.Mid[midLease] > 0 }},
	} {
		t.Run(name, func(t *testing.T) {
			var sum Stats
			seeds := seedsOf(8)
			if name == "stop in all" {
				seeds *= 4 // fences are rare
			}
			for seed := uint64(1); seed <= seeds; seed++ {
				cfg := ConfigOf(seed)
				long(&cfg, f.events)
				if name == "stop in all" {
					cfg.Leases, cfg.Ops, cfg.Chaos = true, 400, 100*time.Millisecond
				}
				stats, err := Go(cfg)
				if err != nil {
					report(t, cfg, err)
				}
				sum = sum.plus(stats)
			}
			t.Logf("%+v", sum)
			if !f.was(&sum) {
				t.Error("it did not happen")
			}
		})
	}
}

// TestLead: a proxy that takes ranges and writes nothing brings N far above the clocks. At 2^19 nothing more is handed
// out for clients, or a rebuild's margin could fall short; fences are, and the clocks follow.
func TestLead(t *testing.T) {
	w := newScript(t, Config{Seed: 1, Shards: 2, Proxies: 1, Keys: 8, Base: time.Millisecond, RingSize: 1 << 10, MaxTxnOps: 128,
		MaxRequestBytes: defaultMaxRequestBytes, Window: 250 * time.Millisecond, Timeout: 5 * time.Second, SnapshotEvery: 100})
	p := w.proxies[0]
	w.put(p, "k00")
	for _, m := range w.net.Members {
		m.Pause()
	}
	n := int64(0)
	for nonce := uint64(1); n < revclock.MaxLead; nonce++ {
		tick := revclock.Tick{Proxy: revclock.ID{0xee}, Nonce: nonce, Items: []revclock.TickItem{{Shard: int(nonce % 2), Count: revclock.MaxCount, Filter: revclock.FilterAll}}}
		if _, st := w.net.Coord.Put(&pb.PutRequest{Key: []byte("t"), Value: revclock.AppendTick(nil, &tick)}); st.Code != codec.OK {
			t.Fatal(st)
		}
		n += revclock.MaxCount
	}
	known := false // the proxy has folded the ticks
	p.core.Now(func(now int64, st codec.Status) { known = st.Code == codec.OK && now > n })
	p.turn()
	w.wait("the ticks", func() bool { return known })

	// What the proxy is handed out from here on.
	var batches, fences int
	w.net.Sent = func(_ *Host, to codec.ClusterID, m codec.Method, req []byte) {
		switch q := (&pb.TxnRequest{}); {
		case to == codec.Coordinator || m != codec.MethodTxn || midOf(to, m, req) != midFence && !putsClock(q, req):
		case midOf(to, m, req) == midFence:
			fences++
		default:
			batches++
			if largest := clockOf(w.net.Members[0]); max(largest, clockOf(w.net.Members[1])) < n {
				t.Errorf("a batch of a client is sent while the clocks are at %d", largest)
			}
		}
	}
	answers := 0
	for _, key := range []string{"k00", "k01", "x02", "k03", "k04"} {
		p.core.Submit(&shard.Op{Kind: shard.OpPut, Msg: encode(&pb.PutRequest{Key: []byte(key), Value: []byte("v")}), Done: func(s *shard.Op) {
			if answers++; s.Status.Code != codec.OK {
				t.Errorf("%s: %v", key, s.Status)
			}
		}})
	}
	p.turn()
	w.net.After(2*time.Second, func() {
		if batches > 0 || fences == 0 {
			t.Errorf("%d batches and %d fences were sent while no clock could follow", batches, fences)
		}
		for _, m := range w.net.Members {
			m.Resume()
		}
	})
	w.wait("the answers", func() bool { return answers == 5 })
	if batches == 0 {
		t.Error("no batch was seen")
	}
}

func putsClock(q *pb.TxnRequest, req []byte) bool {
	return proto.Unmarshal(req, q) == nil && isBatch(q)
}

func clockOf(m *Cluster) int64 {
	rec, err := parseRecord(m.at([]byte(keyClock), m.Rev()).KV.Value)
	if err != nil {
		return 0 // the first start's
	}
	return rec.last
}
