//go:build !race

package shard

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/codec"
)

// TestLeasePutAllocatesNothing: a put with a lease that is attached costs nothing but its bytes.
func TestLeasePutAllocatesNothing(t *testing.T) {
	r := newLeaseRig(t, 2)
	x := r.leaseAt(0, 0)
	r.c.leases.table.learn(x, aliasBit|5, 1, 9)
	msg := mustMarshal(t, &pb.PutRequest{Key: r.keyOn(1), Value: []byte("v"), Lease: x})
	r.c.creates.Learn(r.keyOn(1), 3, 4, 5)
	op := &Op{Done: func(*Op) { t.Error("answered") }}
	s := r.c.shards[1]
	buf := make([]byte, 0, 4096)
	n := testing.AllocsPerRun(100, func() {
		op.Kind, op.Msg = OpPut, msg
		r.c.Submit(op)
		if len(s.queue) != 1 {
			t.Fatal("not in the queue")
		}
		s.queue = s.queue[:0]
		buf = op.core.plan.AppendRequestOp(buf[:0], 77)
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
	kv := codec.KV{Value: append(Stamp{Rev: 77, Create: 4, Lease: x}.Append(nil), 'v')}
	if !unstamp(&kv) || kv.Lease != x {
		t.Errorf("%+v", kv)
	}
}
