package shard

import (
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"spindle/codec"
	"spindle/revclock"
)

// A look at the connections of a cluster is no outage that began with the process: Down counts from where they were taken out
// of use. A shard that is down for long is not waited for.
func TestPoolDistrustIsNotDead(t *testing.T) {
	m := newFakeMember(t, echo)
	e := newPoolEnv(t, []string{m.url()})
	e.connected(0)
	e.until("time passes", func() bool { return e.pool.timers.now() > int64(50*time.Millisecond) })
	e.loop.do(func() {
		e.pool.newCheck = func(codec.ClusterID) *Check { return &Check{s: &shardState{c: &Core{state: stateFailed}}} }
		before := e.pool.timers.now()
		e.pool.Distrust(0)
		why, since := e.pool.Down(0)
		if spent := e.pool.timers.now() - before; why == "" || int64(since) > spent {
			t.Errorf("%q for %v, %v after Distrust", why, since, time.Duration(spent))
		}
	})
}

// lookedAt is a member that answers looks as it is told.
type lookedAt struct {
	*fakeMember
	asked atomic.Int32
	says  atomic.Value // a string, see newLookedAt
}

// newLookedAt makes a member that says "copy" (it leads elsewhere), "right", "nothing" (an error), or "wait" (no answer).
func newLookedAt(t *testing.T, right []byte) *lookedAt {
	m := &lookedAt{}
	m.says.Store("right")
	copied, err := proto.Marshal(txnOf(nil, nil, nil))
	if err != nil {
		t.Fatal(err)
	}
	m.fakeMember = newFakeMember(t, func(path string, s fakeStream) error {
		return unary(func([]byte) ([]byte, error) {
			m.asked.Add(1)
			for m.says.Load() == "wait" {
				select {
				case <-s.Context().Done():
					return nil, s.Context().Err()
				case <-time.After(time.Millisecond):
				}
			}
			switch m.says.Load() {
			case "copy":
				return copied, nil
			case "nothing":
				return nil, errors.New("no answer")
			}
			return right, nil
		})(path, s)
	})
	return m
}

// txnOf makes the answer to gets of single keys.
func txnOf(kvs ...*mvccpb.KeyValue) *pb.TxnResponse {
	r := &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: 9}, Succeeded: true}
	for _, kv := range kvs {
		one := &pb.RangeResponse{}
		if kv != nil {
			one.Kvs, one.Count = []*mvccpb.KeyValue{kv}, 1
		}
		r.Responses = append(r.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: one}})
	}
	return r
}

// An endpoint that leads to a copy, and answers first, does not decide for its shard while others are being looked at. If they tell
// nothing it does. The log hears of it once, however often it is refused.
func TestPoolFirstLookDoesNotDecide(t *testing.T) {
	id := goldenID(2)
	text := AppendInitialRecord(nil, goldenID(1))
	rec, _ := ParseRecord(text)
	clock := &mvccpb.KeyValue{Key: []byte(KeyClock), Value: text, CreateRevision: 2, ModRevision: 2, Version: 1}
	right, err := proto.Marshal(txnOf(&mvccpb.KeyValue{Key: []byte(KeyID), Value: AppendIdentity(nil, id), CreateRevision: 2, ModRevision: 2, Version: 1}, clock, clock))
	if err != nil {
		t.Fatal(err)
	}
	members := []*lookedAt{newLookedAt(t, right), newLookedAt(t, right), newLookedAt(t, right)}
	var urls []string
	for _, m := range members {
		urls = append(urls, m.url())
	}
	stray, others := members[0], members[1:]
	e := newPoolEnv(t, urls)
	ready := func(n int) func() bool { return func() bool { return len(e.pool.clusters[0].ready) == n } }
	e.until("all", ready(3))
	log := &syncBuffer{}
	begun := time.Now()
	c := &Core{state: stateReady, tr: e.pool, log: slog.New(slog.NewTextHandler(log, nil)), m: NewMap(goldenID(1), 1, []MapShard{{id, "a"}})}
	c.cfg.Names, c.cfg.Now = []string{"a"}, func() int64 { return int64(time.Since(begun)) + 1 }
	c.clock = revclock.New(revclock.Config{Shards: 1, Now: c.cfg.Now}, e.pool, (*clockEvents)(c))
	s := &shardState{c: c, name: "a", begun: true}
	c.shards = []*shardState{s}
	banned := func() bool { return s.banned != "" }
	refusedTwice := func() func() bool {
		asked := stray.asked.Load()
		return func() bool { return stray.asked.Load() >= asked+3 } // the third look follows the second refusal
	}
	distrust := func() {
		e.loop.do(func() {
			e.pool.newCheck = func(codec.ClusterID) *Check {
				return &Check{s: s, known: point{rec.First, rec.Last, 2}}
			}
			e.pool.Distrust(0)
		})
	}

	stray.says.Store("copy")
	for _, m := range others {
		m.says.Store("wait")
	}
	again := refusedTwice()
	distrust()
	e.until("the copy is refused", func() bool {
		if banned() {
			t.Error("the copy has decided: " + s.banned)
			return true
		}
		return again()
	})
	for _, m := range others {
		m.says.Store("right")
	}
	e.until("the others are in use", ready(2))
	e.until("the copy is refused again", refusedTwice())
	if n := len(log.lines("leads to something else")); n != 1 || len(log.lines("is refused")) != 0 {
		t.Errorf("the log was told %d times:\n%s", n, log.lines(""))
	}

	for _, m := range others {
		m.says.Store("nothing")
	}
	distrust()
	e.until("the copy is all there is", banned)
	others[0].says.Store("right")
	e.until("accepted again", func() bool { return !banned() && len(e.pool.clusters[0].ready) == 1 })
}

// A connection that is being looked at again may have calls under way: they are finished also if its endpoint is removed.
func TestPoolRemovedDuringLook(t *testing.T) {
	a, b := newCountedMember(t), newCountedMember(t)
	e := newPoolEnv(t, []string{a.url()})
	e.connected(0)
	held := e.begin(0, codec.MethodTxn, []byte("wait"), testGuard)
	<-a.waiting
	sink, _ := e.watch([]byte("w"))
	sink.message(t)
	e.loop.do(func() {
		// Looks come to nothing, so a stays out of use; b needs none.
		e.pool.newCheck = func(codec.ClusterID) *Check { return &Check{s: &shardState{c: &Core{state: stateFailed}}} }
		e.pool.Distrust(0)
		e.pool.newCheck = nil
		for _, l := range e.pool.links {
			e.pool.timers.cancel(&l.check.timer)
		}
		e.pool.SetEndpoints(0, []string{b.url()})
	})
	sink.end(t)
	close(a.release)
	if r := held.wait(t); r.st.Code != codec.OK {
		t.Errorf("the call that was under way: %+v", r.st)
	}
	e.until("the connection is closed", func() bool { return len(e.pool.links) == 1 && e.pool.links[0].ep.url == b.url() })
}
