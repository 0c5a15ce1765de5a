package sim

import (
	"encoding/binary"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/shard"
)

// biteSeeds is for how many seeds a planted bug may stay hidden. Most are found by the first few.
const biteSeeds = 2000

// TestItBites plants bugs, one at a time, in the core or on the wire, and wants each of them to be found.
func TestItBites(t *testing.T) {
	if raceEnabled {
		t.Skip("the same seeds, in one goroutine, many times slower: the plain run has them")
	}
	for _, bug := range []struct {
		name  string
		plant func(*Config)
	}{
		{"guard dropped", func(c *Config) { c.Sabotage = shard.Sabotage{DropGuard: true} }},
		{"new range on a rejection without looking", func(c *Config) { c.Sabotage = shard.Sabotage{RetickWithoutLooking: true} }},
		{"flat batches without their requests' compares", func(c *Config) { c.Sabotage = shard.Sabotage{BareFlat: true} }},
		{"a flat batch that failed goes again without its guard", func(c *Config) { c.Sabotage = shard.Sabotage{FlatTwice: true} }},
		{"frontier ignores open ranges", func(c *Config) { c.Sabotage = shard.Sabotage{FrontierIgnoresRanges: true} }},
		{"a Get from the ring ignores open ranges", func(c *Config) { c.Sabotage = shard.Sabotage{RecentIgnoresRanges: true} }},
		{"the past is not waited for", func(c *Config) { c.Sabotage, c.RingSize = shard.Sabotage{HistoryAhead: true}, 32 }},
		{"an answered compaction does not hold on every proxy", func(c *Config) {
			c.Sabotage = shard.Sabotage{CompactionUnread: true}
			// It takes a proxy whose streams stand still while another one compacts, and little else.
			c.Shards, c.Proxies, c.Clients, c.Ops, c.Think, c.Far, c.Faults = 1, 2, 3, 400, 5*time.Millisecond, 0, Faults{}
			c.Chaos, c.Events = 15*time.Millisecond, ChaosEvents{StreamHole: true, Lag: true}
		}},
		{"events without a record have the revision of the record before", func(c *Config) {
			c.Sabotage = shard.Sabotage{UnrecordedBehind: true}
		}},
		{"copies of leases not revoked", func(c *Config) {
			c.Sabotage, c.Leases, c.Shards = shard.Sabotage{KeepCopies: true}, true, 3
		}},
		{"guards on leases lost", func(c *Config) {
			oneLease(c)
			c.Tamper = tamperTxn(func(to codec.ClusterID, q *pb.TxnRequest) {
				if to >= 0 && writesClock(q) {
					dropLeaseGuards(q)
				}
			})
		}},
		{"a rebuild skips a shard", func(c *Config) { loses(c); c.Sabotage.RebuildSkipsShard = true }},
		{"a rebuild fences first", func(c *Config) {
			// It takes a rebuild that comes to a coordinator which was rebuilt and lost again meanwhile.
			loses(c)
			c.Faults, c.Shards, c.Proxies, c.Base, c.Jitter, c.Far = Faults{SlowRequest: 0.3}, 1, 2, 100*time.Microsecond, 0, 0
			c.Sabotage.RebuildFencesFirst = true
		}},
		{"a rebuild does not fence", func(c *Config) { loses(c); c.Sabotage.RebuildNoFence = true }},
		{"full means not applied", func(c *Config) { long(c, ChaosEvents{Full: true}); c.Sabotage.NoSpaceUnapplied = true }},
		{"cut off from the coordinator, and goes on", func(c *Config) { long(c, ChaosEvents{Cut: true}); c.Sabotage.CutOffNow = true }},
		{"no guard, and copies on the way", func(c *Config) {
			long(c, ChaosEvents{})
			c.Sabotage.DropGuard, c.Faults = true, Faults{Duplicate: 0.1}
		}},
		{"a dead shard is passed", func(c *Config) { long(c, ChaosEvents{Die: true}); c.Sabotage.DeadShardPassed = true }},
		{"a rebuild skips a shard, and proxies stop in its middle", func(c *Config) {
			long(c, ChaosEvents{StallMid: true, Wipe: true})
			c.Sabotage.RebuildSkipsShard = true
		}},
		{"the fence of an accepted loss compacts nothing", func(c *Config) {
			losesData(c)
			c.Tamper = tamperTxn(func(to codec.ClusterID, q *pb.TxnRequest) {
				if to >= 0 && slices.ContainsFunc(q.Success, func(o *pb.RequestOp) bool { return string(o.GetRequestDeleteRange().GetKey()) == shard.KeyLoss }) {
					q.Success = slices.DeleteFunc(q.Success, func(o *pb.RequestOp) bool { return string(o.GetRequestPut().GetKey()) == shard.KeyCompact })
				}
			})
		}},
		{"a doomed Txn is not looked at", func(c *Config) { swaps(c); c.Sabotage.DoomedUnchecked = true }},
		{"ranges behind a Txn read now", func(c *Config) { c.Sabotage.WideAtNow, c.Wide, c.Shards = true, true, max(c.Shards, 2) }},
		{"guard lost on the wire", func(c *Config) {
			c.Tamper = tamperTxn(func(to codec.ClusterID, q *pb.TxnRequest) {
				if to >= 0 && writesClock(q) {
					q.Compare = nil
				}
			})
		}},
		{"guards on create revisions lost", func(c *Config) {
			c.Tamper = tamperTxn(func(to codec.ClusterID, q *pb.TxnRequest) {
				if to >= 0 && writesClock(q) {
					dropCreates(q)
				}
			})
		}},
		{"filters of ticks empty", func(c *Config) {
			c.Tamper = tamperTxn(func(to codec.ClusterID, q *pb.TxnRequest) {
				if to == codec.Coordinator {
					emptyFilters(q)
				}
			})
		}},
		{"deletes left out of records", func(c *Config) {
			c.Tamper = tamperTxn(func(to codec.ClusterID, q *pb.TxnRequest) {
				for _, o := range q.Success {
					if p := o.GetRequestPut(); p != nil && string(p.Key) == keyClock && to >= 0 {
						p.Value = withoutDeletes(p.Value)
					}
				}
			})
		}},
		{"now is a stale read", func(c *Config) {
			// It takes a watch of the coordinator that lags, or the proxy knows better.
			long(c, ChaosEvents{Lag: true, StreamHole: true})
			c.Shards, c.Chaos = 4, 15*time.Millisecond
			old := map[string][]byte{}
			c.TamperReply = func(from codec.ClusterID, m codec.Method, req, resp []byte) []byte {
				q := &pb.TxnRequest{}
				if from != codec.Coordinator || m != codec.MethodTxn || proto.Unmarshal(req, q) != nil || !readOnly(q) || len(q.Success) != 2 {
					return resp
				}
				was := old[string(req)]
				old[string(req)] = slices.Clone(resp)
				if was == nil {
					return resp
				}
				return slices.Clone(was)
			}
		}},
		{"a lost reply is forgotten when another batch is closed behind", func(c *Config) { c.Sabotage.AheadUnsettled, c.Ahead = true, true }},
		{"a read ignores the batch that is closed behind another", func(c *Config) { c.Sabotage.AheadUnread, c.Ahead = true, true }},
		{"what the stream skipped was not there", func(c *Config) { aheads(c); c.Sabotage.BlindIsVoid = true }},
		{"restored members are not looked at", func(c *Config) { restores(c); c.Sabotage.TrustConnections = true }},
	} {
		t.Run(bug.name, func(t *testing.T) {
			start := time.Now()
			for seed := uint64(1); seed <= biteSeeds; seed++ {
				cfg := ConfigOf(seed)
				bug.plant(&cfg)
				if _, err := Go(cfg); err != nil {
					t.Logf("found after %d seeds, %v: %s", seed, time.Since(start).Round(time.Millisecond), clip(err.Error()))
					return
				}
			}
			t.Error("not found")
		})
	}
}

// loses makes losses of the coordinator, and batches that arrive late, nearly all that happens.
func loses(c *Config) {
	c.Shards, c.Proxies, c.Clients, c.Keys, c.Ops, c.Think = 2, 2+int(c.Seed)%2, 4, 6, 160, 5*time.Millisecond
	c.MaxTxnOps, c.MaxRequestBytes, c.RingSize = 128, defaultMaxRequestBytes, 1<<12
	c.Faults = Faults{Late: 0.1, SlowRequest: 0.1}
	c.Leases, c.AutoCompact = false, shard.AutoCompact{}
	c.Chaos, c.Events = 40*time.Millisecond, ChaosEvents{Wipe: true, Stall: true}
}

// long makes one of the faults that last long all that goes wrong.
func long(c *Config, events ChaosEvents) {
	c.Shards, c.Proxies, c.Clients, c.Keys, c.Ops, c.Think = 2, 2, 4, 6, 200, 5*time.Millisecond
	c.MaxTxnOps, c.MaxRequestBytes, c.RingSize = 128, defaultMaxRequestBytes, 1<<12
	c.Leases, c.AutoCompact = false, shard.AutoCompact{}
	c.Faults, c.Chaos, c.Events = Faults{}, 40*time.Millisecond, events
}

func tamperTxn(f func(to codec.ClusterID, q *pb.TxnRequest)) func(codec.ClusterID, codec.Method, []byte) []byte {
	return func(to codec.ClusterID, m codec.Method, req []byte) []byte {
		q := &pb.TxnRequest{}
		if m != codec.MethodTxn || proto.Unmarshal(req, q) != nil {
			return req
		}
		f(to, q)
		return encode(q)
	}
}

// writesClock reports whether q is a batch.
func writesClock(q *pb.TxnRequest) bool {
	for _, o := range q.Success {
		if p := o.GetRequestPut(); p != nil && string(p.Key) == keyClock && len(q.Compare) > 1 {
			return true
		}
	}
	return false
}

func dropCreates(q *pb.TxnRequest) {
	if q == nil {
		return
	}
	q.Compare = slices.DeleteFunc(q.Compare, func(c *pb.Compare) bool { return c.Target == pb.Compare_CREATE })
	for _, o := range q.Success {
		dropCreates(o.GetRequestTxn())
	}
}

func dropLeaseGuards(q *pb.TxnRequest) {
	if q == nil {
		return
	}
	q.Compare = slices.DeleteFunc(q.Compare, func(c *pb.Compare) bool { return strings.HasPrefix(string(c.Key), shard.KeyLeases) })
	for _, o := range q.Success {
		dropLeaseGuards(o.GetRequestTxn())
	}
}

// emptyFilters rewrites every tick that q puts, without its filters.
func emptyFilters(q *pb.TxnRequest) {
	for _, ops := range [][]*pb.RequestOp{q.Success, q.Failure} {
		for _, o := range ops {
			if n := o.GetRequestTxn(); n != nil {
				emptyFilters(n)
			}
			p := o.GetRequestPut()
			if p == nil || string(p.Key) != "t" {
				continue
			}
			v := p.Value
			out := slices.Clone(v[:17])
			v = v[17:]
			num := func() uint64 {
				x, n := binary.Uvarint(v)
				v = v[n:]
				out = binary.AppendUvarint(out, x)
				return x
			}
			num()
			for n := num(); n > 0; n-- {
				num()
				num()
				num()
				size, k := binary.Uvarint(v)
				v = v[k+int(size):]
				out = binary.AppendUvarint(out, 0)
			}
			p.Value = out
		}
	}
}

// withoutDeletes rewrites a clock record.
func withoutDeletes(v []byte) []byte {
	const fixed = 42
	if len(v) <= fixed {
		return v
	}
	_, n := binary.Uvarint(v[fixed:])
	_, m := binary.Uvarint(v[fixed+n:])
	return append(slices.Clone(v[:fixed+n+m]), 0, 0)
}
