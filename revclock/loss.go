package revclock

import (
	"errors"
	"fmt"
)

// lossKind says what can be done about a coordinator that is not believed.
type lossKind uint8

const (
	lossFinal   lossKind = iota // this version must not touch it
	lossData                    // its data is gone, old or of another epoch: a rebuild, or reading everything again, heals it
	lossForeign                 // it is another system's
)

// lossError is what Lost reports.
type lossError struct {
	error
	kind lossKind
}

func (e *lossError) Unwrap() error { return e.error }

// Rebuildable reports whether Lost's err means that the coordinator has lost its data or has another epoch: then
// another proxy has rebuilt it, or somebody must.
func Rebuildable(err error) bool { return lossOf(err) == lossData }

// Foreign reports whether Lost's err means that the coordinator belongs to another system.
func Foreign(err error) bool { return lossOf(err) == lossForeign }

func lossOf(err error) lossKind {
	var l *lossError
	if errors.As(err, &l) {
		return l.kind
	}
	return lossFinal
}

func dataLoss(msg string) error { return &lossError{errors.New(msg), lossData} }

// What an operator is told.
var (
	errLostData = dataLoss("the coordinator has lost its data")
	errRegress  = dataLoss("the coordinator went back to an older state, which a restored backup does: it must keep all it acknowledged or lose all")
	errDeleted  = dataLoss("somebody deleted a key on the coordinator: nobody but Spindle may write there; close it to everyone else")
	errHole     = dataLoss("the coordinator's history was compacted beyond its snapshot: switch off auto-compaction on the coordinator")
	errBehind   = dataLoss("the coordinator is behind the member clusters: a tick names a revision as written that it never handed out")
)

func errOtherEpoch(have, want []byte) error {
	return &lossError{fmt.Errorf("the coordinator has epoch %x, and the one that this proxy knows is %x", have, want), lossData}
}

// ErrOtherCluster is the loss of a coordinator whose etcd is not the one that the partition map names.
func ErrOtherCluster(have, want uint64) error {
	return &lossError{fmt.Errorf("the coordinator has cluster ID %x and the partition map names %x: see whether --coordinator is right; if the coordinator was made anew on purpose, start with --replace-coordinator", have, want), lossForeign}
}

// ErrOtherSystem is the loss of a coordinator that another system uses.
func ErrOtherSystem(epoch ID) error {
	return &lossError{fmt.Errorf("the coordinator has epoch %x, which another system made: see whether --coordinator is right, or give this system an empty etcd", epoch[:]), lossForeign}
}
