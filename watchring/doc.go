// Package watchring merges the watch streams of all shards into one line of revisions and fans it out.
//
// A Ring holds the events of recent revisions, one slot a revision, filled out of order by the shards'
// streams without locks. A Frontier says up to which revision each shard's part of the ring is complete.
// Readers (a Hub per event loop) follow the frontier, each with its own cursor, and share the encoded
// bytes of an event between all watchers.
//
// The package does no I/O, starts no goroutine, and imports no other package of Spindle but codec's
// protobuf helpers.
package watchring
