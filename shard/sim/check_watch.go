package sim

import (
	"fmt"
	"math"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/shard"
	"spindle/watchring"
)

// watch checks that a follower got exactly what happened between its start and where it stands.
func (c *checker) watch(f *follower) error {
	got, gone := f.got, c.unreadableUpTo()
	for _, rev := range c.h.revs {
		if rev <= f.start || rev > f.cursor {
			continue
		}
		facts := c.h.byRev[rev]
		if f.shard != watchring.All && c.r.part.ShardOf([]byte(facts[0].key)) != f.shard {
			continue
		}
		if len(got) == 0 || got[0].rev > rev {
			return fmt.Errorf("%v was never delivered; it stands at %d", facts[0], f.cursor)
		}
		d := got[0]
		got = got[1:]
		if d.rev < rev {
			return fmt.Errorf("it got events of %d (%v), where nothing happened", d.rev, d.events)
		}
		if len(d.events) != len(facts) {
			return fmt.Errorf("at %d it got %v, must be %v", rev, d.events, facts)
		}
		for i, fact := range facts {
			want := c.event(fact)
			if d.events[i].PrevKv == nil && rev <= gone {
				want.PrevKv = nil // etcd leaves it out as well
			}
			if !proto.Equal(d.events[i], want) {
				return fmt.Errorf("at %d it got %v, must be %v", rev, d.events[i], want)
			}
		}
	}
	if len(got) > 0 {
		return fmt.Errorf("it got events of %d (%v), where nothing happened", got[0].rev, got[0].events)
	}
	return nil
}

// event is how a watcher must see a fact.
func (c *checker) event(f *fact) *mvccpb.Event {
	ev := &mvccpb.Event{Kv: f.kv()}
	if f.delete {
		ev.Type = mvccpb.Event_DELETE
		ev.Kv = &mvccpb.KeyValue{Key: []byte(f.key), ModRevision: f.rev}
	}
	var prev *fact
	for _, o := range c.h.byKey[f.key] {
		if o == f {
			break
		}
		prev = o
	}
	if prev != nil && !prev.delete {
		ev.PrevKv = prev.kv()
	}
	return ev
}

func (f *fact) kv() *mvccpb.KeyValue {
	return &mvccpb.KeyValue{Key: []byte(f.key), CreateRevision: f.create, ModRevision: f.rev, Version: f.version, Value: []byte(f.value), Lease: f.lease}
}

// compactedFor reports whether o may be told that what it asks for has been compacted.
func (c *checker) compactedFor(o *op) bool {
	asks := int64(1) << 62
	switch q := o.req.(type) {
	case *pb.RangeRequest:
		switch {
		case q.Revision > 0:
			asks = q.Revision
		case o.stream && q.Serializable:
			asks = 0
		case o.stream: // its revision may be compacted while it lasts
			asks = o.floor
		}
	case *pb.CompactionRequest:
		asks = q.Revision - 1
	case *pb.TxnRequest:
		asks = oldest(q, asks)
	}
	if c.r.loss != nil && asks < c.fenceEnd && o.end >= c.r.loss.begun {
		return true
	}
	if asks < c.tornUpTo() || asks < c.autoCompacted() {
		return true
	}
	if q, ok := o.req.(*pb.CompactionRequest); ok && q.Revision <= 0 {
		return true
	}
	for _, k := range c.r.ops {
		if q, ok := k.req.(*pb.CompactionRequest); ok && k != o && k.begin <= o.end && asks < q.Revision && k.st != codec.ErrFutureRev {
			return true
		}
	}
	return false
}

// autoCompacted returns up to where the proxies may have compacted by themselves: what is recorded in the end.
func (c *checker) autoCompacted() (rev int64) {
	if c.r.AutoCompact.Mode == shard.AutoCompactOff {
		return 0
	}
	for _, m := range c.r.net.Members {
		if r := m.at([]byte(shard.KeyCompact), m.Rev()); r != nil {
			if is, ok := shard.ParseCompaction(r.KV.Value); ok {
				rev = max(rev, is)
			}
		}
	}
	return rev
}

// pastReads returns the ranges of o that named a revision and were answered.
func (o *op) pastReads() (past []*pb.RangeRequest) {
	switch q := o.req.(type) {
	case *pb.RangeRequest:
		if q.Revision > 0 {
			past = append(past, q)
		}
	case *pb.TxnRequest:
		if t, ok := o.resp.(*pb.TxnResponse); ok {
			past = pastReads(past, q, t)
		}
	}
	return past
}

// lateRead reports whether o was answered from history that had been compacted, with an answer, before o
// began.
func (c *checker) lateRead(o *op) *op {
	if o.st.Code != codec.OK {
		return nil
	}
	read := int64(math.MaxInt64)
	for _, q := range o.pastReads() {
		read = min(read, q.Revision)
	}
	for _, k := range c.r.ops {
		if z, ok := k.req.(*pb.CompactionRequest); ok && k.st.Code == codec.OK && k.ended && k.end < o.begin && read < z.Revision && !c.unrecorded(k) {
			return k
		}
	}
	return nil
}

// unrecorded reports whether a compaction may have gone on without its record on some shard.
func (c *checker) unrecorded(k *op) bool {
	return slices.ContainsFunc(c.r.net.unrecorded, func(at int64) bool { return at >= k.begin && at <= k.end })
}

// oldest returns the smallest revision that a transaction's ranges name.
func oldest(t *pb.TxnRequest, rev int64) int64 {
	for _, ops := range [][]*pb.RequestOp{t.Success, t.Failure} {
		for _, o := range ops {
			if q := o.GetRequestRange(); q != nil && q.Revision > 0 {
				rev = min(rev, q.Revision)
			}
			if n := o.GetRequestTxn(); n != nil {
				rev = oldest(n, rev)
			}
		}
	}
	return rev
}

// pastReads appends the ranges with a revision that a transaction has answered.
func pastReads(past []*pb.RangeRequest, t *pb.TxnRequest, resp *pb.TxnResponse) []*pb.RangeRequest {
	ops := t.Failure
	if resp.Succeeded {
		ops = t.Success
	}
	for i, o := range ops {
		if i >= len(resp.Responses) {
			break // compared elsewhere
		}
		if q := o.GetRequestRange(); q != nil && q.Revision > 0 {
			past = append(past, q)
		}
		if n, r := o.GetRequestTxn(), resp.Responses[i].GetResponseTxn(); n != nil && r != nil {
			past = pastReads(past, n, r)
		}
	}
	return past
}

// force is somebody's compaction of a member, at a local revision.
type force struct {
	shard int
	at    int64
}

// tornUpTo returns the first revision that may have lost nothing by others' compactions: each takes what lies below
// the record that follows it, and what shares that record's first revision.
func (c *checker) tornUpTo() (rev int64) {
	for _, x := range c.r.forces {
		next := c.h.last + 1
		for _, r := range c.h.ranges {
			if r.shard == x.shard && r.local > x.at {
				next = min(next, r.first)
			}
		}
		rev = max(rev, next+1)
	}
	return rev
}

// compactedUpTo returns the largest revision up to which a watch may be told that history is gone: the read of the
// past that it shares may give up more than it must.
func (c *checker) compactedUpTo() int64 { return max(c.r.forced, c.unreadableUpTo()) }

// unreadableUpTo returns the largest revision up to which history may be gone.
func (c *checker) unreadableUpTo() int64 {
	rev := max(c.tornUpTo(), c.autoCompacted(), c.fenceEnd)
	for _, k := range c.r.ops {
		if q, ok := k.req.(*pb.CompactionRequest); ok && k.st != codec.ErrFutureRev {
			rev = max(rev, q.Revision)
		}
	}
	return rev
}
