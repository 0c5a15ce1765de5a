package shard

// coreOp is what the Core keeps with a request while it is under way.
type coreOp struct {
	plan Plan
	w    write
	gate int // of listGate, plus 1, while the list is under way
	// gateUntil is until when it may wait there, in the Core's nanoseconds.
	gateUntil int64
}

// reset forgets the request, and keeps the memory of ordinary size.
func (o *coreOp) reset() {
	o.plan.Reset()
	o.w = write{}
	o.gate = 0
}
