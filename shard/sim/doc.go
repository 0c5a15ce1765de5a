// Package sim runs the protocol of Spindle (shard.Core and revclock.Clock, the real code) in a deterministic
// simulation: modelled member clusters and a modelled coordinator, a network with delays and faults, and
// virtual time. One seed is one run; the same seed is the same run, event by event.
//
// The parts:
//   - Etcd (model.go, txn.go, watch.go) is one modelled cluster. It works on the bytes that go over the wire, and
//     a test compares it with etcd itself, request by request.
//   - Net (net.go, link.go) is virtual time, and the connections between proxies and clusters with their faults.
//   - Run (run.go, client.go) is one run: proxies, clients, watchers, crashes.
//   - Check (history.go, check.go) computes from the clusters' full histories what happened at every
//     revision, and compares with it everything that any client was told.
//
// Nothing here is built into Spindle itself, so it may use etcd's generated protobuf code.
package sim
