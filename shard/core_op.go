package shard

// coreOp is what the Core keeps with a request while it is under way.
type coreOp struct {
	plan Plan
	w    write
	// since is when a request arrived that may write, in the Core's nanoseconds, 0 for others: whatever roads it takes, it waits from then on.
	since int64
	gate  int // of listGate, plus 1, while the list is under way
	// gateUntil is until when it may wait there, in the Core's nanoseconds.
	gateUntil int64
}

// reset forgets the request, and keeps the memory of ordinary size.
func (o *coreOp) reset() {
	o.plan.Reset()
	o.w = write{}
	o.gate, o.since = 0, 0
}
