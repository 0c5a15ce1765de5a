// Package sim runs the protocol of Spindle (shard.Core, revclock.Clock and watchring.Hub, the real code) in a
// deterministic simulation: modelled member clusters and a modelled coordinator, a network with delays and
// faults, and virtual time. One seed is one run; the same seed is the same run, event by event.
//
// The parts:
//   - Etcd (model.go, txn.go, watch.go) is one modelled cluster. It works on the bytes that go over the wire, and
//     a test compares it with etcd itself, request by request.
//   - Net, Host, Link (net.go, link.go) are virtual time, and the connections of proxies to clusters with their
//     faults: lost, late, refused requests, lost replies, resets, holes, lagging and standing streams.
//   - Run (config.go, run.go, proxy.go, client.go, stream.go, generate.go, follow.go, viewer.go, mischief.go, faults.go, coordinator.go,
//     dead.go) is one
//     run: proxies that crash and return, clients that contend for few keys, readers of the ring, watches on
//     a Hub, keys that expire, somebody who writes to members directly, members that are compacted behind everybody's back.
//   - The check (history.go, eval.go, check.go, check_watch.go, check_foreign.go, lease_client.go) reads from the clusters' full histories what
//     happened at every revision, with its own reading of the stored formats, and compares with it everything
//     that any client was told. porcupine judges each key again (linear.go), without a look at what the members hold.
//
// Keys named x.. carry a lease of the members' own, and may expire. Members are restored to older states (restore.go), and
// get their newest state back: what a client was told by the older one contradicts the history then.
//
// Nothing here is built into Spindle itself, so it may use etcd's generated protobuf code.
package sim
