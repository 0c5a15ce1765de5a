// Package embedded starts real etcd members inside the process: a handful of single-node member clusters
// and a coordinator, with their data in one directory. It is what `spindle` without flags runs on, and
// what the tests run on. Nobody should keep data that matters on it: every cluster has one node, and all
// of them share one disk.
//
// # The directory
//
//	members.json   format number, number of shards, whether the first start was completed
//	lock           flock'ed as long as a process uses the directory
//	shard-1 ...    one etcd data directory per member cluster
//	coordinator    etcd data directory of the coordinator
//
// The number of shards is fixed by the first start. A directory that holds anything else is refused, and
// so is one that another process is using (etcd itself would wait for ever on its database's lock).
//
// # The members
//
// Each listens on 127.0.0.1, on free ports that the kernel chooses at every start, so they never meet a
// port that the user needs; find them in Members.Shards and Members.Coordinator. Every member cluster has
// a random token and so a cluster ID of its own.
package embedded
