// Package server is Spindle's side towards clients, on gnet: listeners, event loops, connections, and the
// gRPC services of etcd, one file each. It imports the other packages; none of them imports it.
//
// # Loops
//
// An Engine runs one gnet engine with a few event loops. Loop 0 is the core's: the *shard.Core and its
// connections to member clusters live there, and so do some of the clients. A client's connection stays on
// one loop; its requests reach the core by a direct call on loop 0, by the mailbox (Loop.Post) from
// others. Nothing in a loop blocks, and nothing but the loop's goroutine touches what belongs to it.
//
// gnet knows no end of a turn and reorders what is posted to a loop, so Loop adds both: a mailbox in order, and hooks
// after each event. The core collects during a turn and sends in its hook; client connections collect
// output during a turn and write once, after the hooks. Only what a hook has for many clients at once, events, is written
// meanwhile, in pieces that fit into a cache (Loop.pushed). With few requests under way a loop polls for a short time after a
// turn, before gnet has it sleep (busyPoll).
//
// # What bounds memory
//
// A client that asks: the streams of its connection (codec.ConnConfig), maxOpsPerConn requests and
// maxOpBytesPerConn bytes of them with the core, canceled ones included. A client that does not read:
// Config.MaxOutbound bytes for its socket, then its answers wait in the codec (maxWaitingReplies), and after
// Config.StallTimeout without progress it is dropped. Many clients: Config.MaxConns, maxOps and
// Config.Memory.
//
// # Lifetimes
//
// A connection may end within any Write, and its descriptor may be another client's a moment later, so each
// clientConn has its own closed flag that is looked at before the socket is touched. An op stays with the
// core until its Done, however its stream ended; the call that ties both together is not used again before.
package server
