package node

type watches struct{}

func newWatches(n *Node) *watches { return &watches{} }

func (w *watches) start() {}
