// Package shard is the protocol of one proxy, and its road to the member clusters.
//
// A Core takes clients' requests (Op) and answers them. Plan understands one request and rewrites it
// between the client's form and the member's, where every value carries a Stamp. Writes wait in their shard's
// queue until they travel together as one batch under a range of revisions from revclock; reads travel
// together beside a linearizable now; the shards' watch streams fill the watchring. Pool is the
// codec.Transport that carries all of it over HTTP/2.
//
// A Core, its Pool and everything below them belong to one goroutine, the core loop; nothing here locks,
// blocks or sleeps. Time comes from CoreConfig.Now, timers are Deadline and Tick, and Flush must be called at
// the end of every turn of the loop. That makes the Core a state machine that shard/sim runs under
// seeded schedules.
//
// The bytes of an Op belong to the Core from Submit until Done; replies of members are valid during
// Completion.Complete only and are copied if they must be kept. What is stored on the members is written
// down in docs/formats.md. Every wait is bounded by CoreConfig.ShardTimeout, every queue by the requests that
// the server admits; a request that waits too long gets etcd's "request timed out".
package shard
