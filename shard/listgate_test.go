package shard

import (
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// The gate by itself: order, cancellation, time, and the end of the Core. What passes it ends at once here, since
// the Core is not ready.
func TestListGate(t *testing.T) {
	now := int64(0)
	c := &Core{cfg: CoreConfig{ShardTimeout: time.Second, Now: func() int64 { return now }}, shards: make([]*shardState, 2)}
	c.part = NewPartition(NewMap(goldenID(1), 1, []MapShard{{goldenID(2), "a"}, {goldenID(3), "b"}}))
	var ended []codec.Status
	list := func() *Op {
		op := &Op{Kind: OpRange, Done: func(op *Op) { ended = append(ended, op.Status) }}
		op.Msg = protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "a")
		one := op.core.plan.Parse(OpRange, op.Msg, &Limits{})
		if one.Code != codec.OK || !c.enterList(op) {
			t.Fatal("a single key has to wait")
		}
		op.Msg = protowire.AppendString(protowire.AppendTag(op.Msg, 2, protowire.BytesType), "b")
		op.core.plan.Reset()
		if st := op.core.plan.Parse(OpRange, op.Msg, &Limits{}); st.Code != codec.OK || c.enterList(op) {
			t.Fatal("a list does not wait for the end of the turn", st)
		}
		return op
	}
	c.gates = make([]listGate, 3)
	c.gates[2].out = maxLists
	a, b := list(), list()
	if c.gatesOpen {
		t.Error("there is no room")
	}
	b.canceled = true
	list()
	busy := &Op{Done: func(*Op) {}}
	busy.core.gate = 3
	c.finish(busy, codec.Status{})
	if !c.gatesOpen || c.gates[2].out != maxLists-1 {
		t.Fatal("room is not seen")
	}
	now = int64(time.Second) + 1 // too late for all that waited
	c.startLists()
	if len(ended) != 3 || ended[0] != codec.ErrTimeout || ended[1] != statusCanceled || ended[2] != codec.ErrTimeout || c.gates[2].out != maxLists-1 {
		t.Errorf("%v, %d under way", ended, c.gates[2].out)
	}
	ended = nil
	list()
	c.stopLists(codec.ErrStopped)
	if len(ended) != 1 || ended[0] != codec.ErrStopped || a.core.gate != 0 {
		t.Errorf("%v", ended)
	}
	for range maxListsWaiting {
		list()
	}
	ended = nil
	if list(); len(ended) != 1 || ended[0] != codec.ErrTooManyRequests {
		t.Errorf("%v", ended)
	}
}
