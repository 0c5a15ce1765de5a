package shard

import (
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"spindle/codec"
)

// A stream on a node that has become mute is opened again as soon as that is known; one whose member is only slow has
// its time, from the moment when it lacks something.
func TestStreamLeavesMuteNode(t *testing.T) {
	for _, mute := range []bool{true, false} {
		r := newStreamRig(t, 1)
		s, w := r.c.shards[0], r.open()[0]
		r.tick(time.Minute)
		r.local[0]++
		s.expectOnStream(r.local[0])
		w.mute = mute
		r.tick(stallLook)
		if w.closed != mute {
			t.Errorf("mute %v: after %v it is closed: %v", mute, stallLook, w.closed)
		}
		r.tick(streamStall - stallLook)
		if !w.closed {
			t.Errorf("mute %v: after %v it is still open", mute, streamStall)
		}
		// The next one has its time in any case, so that a member where all nodes are slow is not asked ever more.
		r.tick(maxReopenDelay)
		w = r.open()[0]
		w.mute = true
		r.tick(stallTime(1) - 2*maxReopenDelay)
		if w.closed {
			t.Errorf("mute %v: the second opening was given up, too", mute)
		}
	}
}

// Whoever waits for what nobody has told this proxy of has the shard asked for its clock after a second, once for all: the
// stream that lacks it is found to be dead then, and the read goes on as soon as another one brings it.
func TestReaderAsksForTheClock(t *testing.T) {
	r := newStreamRig(t, 2)
	s := r.c.shards[0]
	w := r.open()[0]
	w.mute = true
	rev := int64(7)
	r.handOut(6, 0) // 2 to 7, another proxy's
	events := r.events(0, 2, rev, map[int64]string{2: "a"})
	r.c.Flush()
	r.local[0]++
	done := 0
	for range 3 {
		r.tick(firstPatience / 4)
		s.awaitClock(rev, r.now+int64(10*time.Second), func(p point, st codec.Status) {
			if done++; st.Code != codec.OK || p.last != rev {
				t.Errorf("%v %v", p, st)
			}
		})
	}
	if r.tick(firstPatience / 4); len(r.calls) > 0 || w.closed {
		t.Fatalf("%d calls after less than a second, the stream is closed: %v", len(r.calls), w.closed)
	}
	r.tick(firstPatience / 4)
	if len(r.calls) != 1 || r.calls[0].to != 0 || string(r.calls[0].req.Key) != KeyClock {
		t.Fatalf("calls: %v", r.calls)
	}
	r.tick(firstPatience / 4) // the next one has waited for long
	if len(r.calls) != 1 {
		t.Fatalf("%d calls", len(r.calls))
	}
	record := AppendRecord(nil, &Record{First: 2, Last: rev, Kind: KindBatch})
	r.calls[0].c.Complete(mustMarshal(t, &etcdserverpb.RangeResponse{Header: &etcdserverpb.ResponseHeader{Revision: r.local[0]},
		Kvs: []*mvccpb.KeyValue{{Key: []byte(KeyClock), Value: record, CreateRevision: 1, ModRevision: r.local[0], Version: 2}}}), codec.Status{}, true)
	for range 20 {
		if w.closed && len(r.streamsOf()) > 0 && r.streamsOf()[0] != nil {
			break
		}
		r.tick(stallLook / 4)
	}
	if !w.closed {
		t.Fatal("the stream is still open")
	}
	r.streamsOf()[0].bring(false, events...)
	r.c.Flush()
	if done != 3 {
		t.Errorf("%d of 3 who waited were answered", done)
	}
}
