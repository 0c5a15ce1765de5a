package compare

import (
	"time"

	"spindle/bench/load"
	"spindle/bench/report"
)

// Suite returns the scenarios that hold Spindle to what it promises of its speed. each is how long a round measures.
func Suite(each time.Duration) []*Scenario {
	const one, four = SpindlePrefix + "1", SpindlePrefix + "4"
	base := load.Default()
	base.Warmup, base.Duration = min(time.Second, each), each
	spec := func(mix load.Work, change func(*load.Spec)) load.Spec {
		s := base
		s.Mix = load.Mix{{Work: mix, Weight: 1}}
		if change != nil {
			change(&s)
		}
		return s
	}
	single := func(s *load.Spec) { s.Clients, s.Connections = 1, 1 }
	fanout := func(s *load.Spec) {
		s.Watchers, s.ValueSize, s.Clients, s.Connections = 1000, 1024, 64, 4
	}
	const us = float64(time.Microsecond)
	proxyCost := func(name string, most float64) func(o *Outcome) []report.Check {
		return func(o *Outcome) []report.Check {
			return []report.Check{
				o.value("proxy's CPU per "+name, one, proxyCPU, duration, atMost(most)),
				o.ratio("the same, against etcd grpc-proxy", one, Proxied, proxyCPU, atMost(0.1)),
				o.ratio("the same over mutual TLS, against plain", one+TLSSuffix, one, proxyCPU, atMost(1.3)),
			}
		}
	}
	disks := func(spread int) func(*load.Spec) {
		return func(s *load.Spec) {
			s.Clients, s.NameSpread = 2048, spread
			// A request takes 0.8 s on one disk: a short round would count a few of each client's.
			s.Warmup, s.Duration = 2*s.Warmup, max(s.Duration, min(8*time.Second, 3*s.Duration))
		}
	}
	fourDisks := func(o *Outcome) []report.Check {
		return []report.Check{o.ratio("writes/s of 4 shards on 4 disks, against one etcd on one", four, Direct, perSecond, atLeast(3.8))}
	}
	return []*Scenario{
		{
			Name: "creates", Title: "creates, 256 clients, one shard, one watch of everything with prev_kv",
			Targets: []string{Direct, one}, Load: spec(load.Create, func(s *load.Spec) { s.WatchAll = true }),
			Check: func(o *Outcome) []report.Check {
				return []report.Check{
					o.ratio("writes/s, against the same etcd directly", one, Direct, perSecond, atLeast(2)),
					o.ratio("CPU per write of all servers, against direct", one, Direct, serversCPU, atMost(0.45)),
				}
			},
		}, {
			Name: "gets", Title: "linearizable gets, 256 clients, one shard",
			Targets: []string{Direct, one}, Load: spec(load.Get, nil),
			Check: func(o *Outcome) []report.Check {
				return []report.Check{
					o.ratio("gets/s, against direct", one, Direct, perSecond, atLeast(2.5)),
					o.ratio("CPU per get of all servers, against direct", one, Direct, serversCPU, atMost(0.35)),
				}
			},
		}, {
			// A name's length decides how many keys fit into a page of bbolt. Objects of one size, all of them, may need a sixth
			// more space with a stamp of 9 bytes, or none (RESULTS.md); those of a cluster have many sizes.
			Name: "disks", Title: "creates, 2,048 clients, names of 48 to 79 bytes, every member on a disk of its own that is throttled",
			Targets: []string{Direct, one, SpindlePrefix + "2", four}, Disks: true, Load: spec(load.Create, disks(32)), Check: fourDisks,
		}, {
			Name: "disks-equal", Title: "the same, all names of 48 bytes: 6 keys in a page of bbolt without a stamp, 5 with it",
			Targets: []string{Direct, four}, Disks: true, Load: spec(load.Create, disks(0)), Check: fourDisks,
		}, {
			Name: "one-create", Title: "one client, creates",
			Targets: []string{Direct, TwoStep, one}, Load: spec(load.Create, single),
			Check: func(o *Outcome) []report.Check {
				// direct + one round trip to the coordinator is what the tick and the batch take one after the other, without a
				// proxy. What a create on direct takes is no measure of that round trip: its process never sleeps, and feeds no watch.
				return []report.Check{
					o.pair("p50, minus that of the tick and the batch without Spindle", one, TwoStep, medianTime,
						func(a, b float64) float64 { return a - b }, duration, atMost(100*us)),
				}
			},
		}, {
			Name: "one-get", Title: "one client, linearizable gets",
			Targets: []string{Direct, one}, Load: spec(load.Get, single),
			Check: func(o *Outcome) []report.Check {
				return []report.Check{o.pair("p50, minus that of direct", one, Direct, medianTime,
					func(a, b float64) float64 { return a - b }, duration, atMost(100*us))}
			},
		}, {
			Name: "proxy-create", Title: "what the proxy itself costs: creates, 256 clients on 8 connections",
			Targets: []string{Proxied, one, one + TLSSuffix}, Load: spec(load.Create, nil),
			Check: proxyCost("create", 10*us),
		}, {
			Name: "proxy-get", Title: "what the proxy itself costs: linearizable gets, 256 clients on 8 connections",
			Targets: []string{Proxied, one, one + TLSSuffix}, Load: spec(load.Get, nil),
			Check: proxyCost("get", 6*us),
		}, {
			Name: "fanout", Title: "1,000 watchers of one prefix, events of 1 KiB, 64 writers",
			Targets: []string{Direct, one}, Load: spec(load.Create, fanout),
			Check: func(o *Outcome) []report.Check {
				return []report.Check{o.ratio("events delivered per second, against direct", one, Direct, events, atLeast(5))}
			},
		}, {
			Name: "lag", Title: "creates at half of the maximum rate, one watch of everything",
			Targets: []string{Direct, one}, Load: spec(load.Create, func(s *load.Spec) { s.WatchAll = true }), Half: true,
			Check: lagCheck(one),
		}, {
			Name: "lag-fanout", Title: "the same with 1,000 watchers of one prefix, events of 1 KiB",
			Targets: []string{Direct, one}, Load: spec(load.Create, fanout), Half: true,
			Check: lagCheck(one),
		}, {
			Name: "list", Title: "lists of 100,000 keys of 1 KiB over 4 shards, one Range",
			Targets: []string{Direct, four}, Load: spec(load.List, bigList),
			Check: listCheck(four),
		}, {
			Name: "list-stream", Title: "lists of 100,000 keys of 1 KiB over 4 shards, one RangeStream",
			Targets: []string{Direct, four}, Load: spec(load.Stream, bigList),
			Check: listCheck(four),
		}, {
			Name: "idle", Title: "2,000 connections, each with a watch, idle",
			Targets: []string{Direct, one}, Rounds: 1,
			Load: spec(load.Idle, func(s *load.Spec) {
				single(s)
				s.Watchers, s.WatchConnections = idleWatchers, idleWatchers
			}),
			Check: func(o *Outcome) []report.Check {
				return []report.Check{o.value("proxy's memory for a connection", one,
					func(r *load.Result) float64 { return grown(r) / idleWatchers }, kib, atMost(16<<10))}
			},
		},
	}
}

const idleWatchers = 2000

// listMemory bounds the proxy's memory with one list of 100 MB under way: the answer, its copy in the connection's queue,
// the garbage of them, and what a proxy that has just seen 100,000 writes holds for watches.
const listMemory = 800 << 20

// listTime is how many rounds' time a round of lists takes: a list is long.
const listTime = 3

func bigList(s *load.Spec) {
	s.Clients, s.Connections, s.Keys, s.ValueSize = 1, 1, 100_000, 1024
	s.Duration *= listTime
}

func lagCheck(target string) func(o *Outcome) []report.Check {
	return func(o *Outcome) []report.Check {
		return []report.Check{
			o.value("p99 from the acknowledgement to the delivery", target, lagFromAck, duration, atMost(float64(10*time.Millisecond))),
		}
	}
}

func listCheck(target string) func(o *Outcome) []report.Check {
	return func(o *Outcome) []report.Check {
		return []report.Check{
			o.ratio("time of a list, against one etcd directly", target, Direct, medianTime, atMost(1)),
			o.value("the most memory that the proxy has", target, peak, mib, atMost(listMemory)),
		}
	}
}
