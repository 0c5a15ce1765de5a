package watchring

import "sync/atomic"

// Stats counts what Hubs do. One Stats may be shared by the Hubs of all loops; any goroutine may read it.
type Stats struct {
	Watchers  atomic.Int64  // open now
	Lagging   atomic.Int64  // of those, how many read the ring on their own now
	Deep      atomic.Int64  // how many read the shards' history, or wait for it
	Events    atomic.Uint64 // events sent, counted per watcher
	Responses atomic.Uint64 // responses with events sent (fragments of one count once)
	Compacted atomic.Uint64 // watchers canceled because what they needed is gone
	Histories atomic.Uint64 // reads of the shards' history begun
	Progress  atomic.Uint64 // progress notifications sent, periodic and on demand
}
