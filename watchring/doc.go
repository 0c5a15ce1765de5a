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
// ring and reads on from there once the sink has drained.
//
// # Older than the ring
//
// A watcher whose next revision was dropped from the ring reads the shards' own history, through the
// HistorySource: in chunks, one at a time, shared by all watchers of a group that start near one another,
// until what is left is in the ring. It goes on there without a seam. Only what lies below the compact
// revision is gone: then the watcher is canceled as etcd cancels one that was compacted. A watcher whose
// sink is blocked leaves its reader, and begins again from its position once the sink has drained, so a slow
// client holds back nobody else. A Hub has HubConfig.MaxReaders of them at most.
//
// The package does no I/O, starts no goroutine, knows no time, and imports no other package of Spindle
// but codec's protobuf helpers.
package watchring
