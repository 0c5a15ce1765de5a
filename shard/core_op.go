package shard

// coreOp is what the Core keeps with a request while it is under way.
type coreOp struct {
	plan Plan
	w    write
}
