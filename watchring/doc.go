// Package watchring merges the watch streams of all shards into one line of revisions and fans it out.
//
// A Ring holds the events of recent revisions, one slot a revision, filled out of order by the shards'
// streams without locks. A Frontier says up to which revision each shard's part of the ring is complete.
// A Hub per event loop follows the frontier and hands the events to that loop's watchers, as encoded
// etcd WatchResponses; the bytes of an event are encoded once, by whoever published it, and shared.
//
// # Who may call what
//
// Ring and Frontier are shared: their methods say who may call them. A Hub, its Streams and its Watchers
// belong to one goroutine, the event loop's. The Hub calls the Sinks of its Streams on that goroutine.
//
// # What a watcher gets
//
// Every event of its keys from Watcher.Start on, once, in order of revision, all events of one revision
// in one response (or in the fragments of one, if asked for). header.revision of a response with events
// is the last revision contained in it. A response without events promises that everything up to its
// header.revision was delivered before.
//
// # A slow client
//
// Nothing is queued for it here. A watcher whose sink is over its high-water mark keeps a position in the
// ring and reads on from there once the sink has drained. Only the ring bounds how far back that may be:
// a watcher whose next revision was dropped from the ring, or lies below the compact revision, is
// canceled as etcd cancels one that was compacted. Reading the shards' own history instead is not
// part of this package yet.
//
// The package does no I/O, starts no goroutine, knows no time, and imports no other package of Spindle
// but codec's protobuf helpers.
package watchring
