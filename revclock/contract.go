package revclock

// ID is a random 128-bit identity: of a proxy process, of an epoch.
type ID [16]byte

// Range is a range of revisions that one tick handed out for one shard.
type Range struct {
	First, Last int64
	Holder      ID
	Nonce       uint64 // of the tick
	Rev         int64  // the coordinator's revision of the tick
	Turn        bool   // the holder was rejected twice in a row and asks to be waited for
	Seen        int64  // when the tick was folded here, ns
	// Filter says which keys the batch may write; see FilterMayContain. Its bytes do not change.
	Filter []byte
	// Orphan marks a range of this proxy that no Request got (a lost reply turned up late): nothing will
	// be written under it, and it stays open until another record passes it.
	Orphan bool
	// Merged marks several ranges of several holders in one, of which only the last holder is known: what
	// a snapshot summed up. It may write anything, and has no Nonce.
	Merged bool
}

// Request is a shard's wish for revisions; it travels in the next tick.
type Request struct {
	Shard     int
	Count     int
	Committed int64 // C_i: the last clock that was seen committed on the shard
	Turn      bool
	Filter    []byte // owned by the Clock from Request on, until Granted
	Token     uint64 // the caller's, comes back with Granted
}

// Events is what a Clock reports to its owner, from within Clock's methods or a Transport completion.
type Events interface {
	// Granted reports the range that a Request got.
	Granted(shard int, token uint64, r Range)
	// Folded reports that the Log moved on: N, A_i and open ranges may have changed. At most once per
	// incoming message, after Granted of the same ticks.
	Folded()
	// NowDone reports that every now with a ticket up to this one is known: n is N at that point and
	// a[i] is A_i, valid only during the call. A linearizable read of the coordinator, sent after the
	// ticket was given, was folded up to its revision.
	NowDone(ticket uint64, n int64, a []int64)
	// Started reports that Start has succeeded and the Log is folded up to the present.
	Started()
	// Lost reports that the coordinator is not the one believed in (wrong epoch, lost data, behind the
	// shards' clocks): err is one clear sentence for an operator; Rebuildable and Foreign say what can be done.
	// The Clock does nothing more until Start is called again.
	Lost(err error)
}
