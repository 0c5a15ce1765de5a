package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	"spindle/server/node"
	"spindle/shard/embedded"
)

// These tests change keys on the members directly, as somebody with etcdctl does, and let leases of members
// end. Through every proxy clients must see that as one etcd shows it: events in order, once, with previous
// pairs, and states at every revision that fit them.

const foreignPrefix = "foreign/"

// foreignRig is a Spindle whose members are written to directly.
type foreignRig struct {
	t       *testing.T
	m       *embedded.Members
	nodes   []*node.Node
	members []*clientv3.Client
	homes   map[string]*clientv3.Client // of a round's keys
}

func newForeignRig(t *testing.T, shards, proxies int) *foreignRig {
	f := &foreignRig{t: t, m: startMembers(t, shards)}
	for _, u := range f.m.Shards {
		f.members = append(f.members, client(t, u))
	}
	f.start(proxies)
	return f
}

func (f *foreignRig) start(proxies int) {
	f.nodes = make([]*node.Node, proxies)
	var wg sync.WaitGroup
	for i := range f.nodes {
		cfg := nodeConfig(f.t, f.m)
		wg.Go(func() { f.nodes[i], _ = node.Start(cfg) })
	}
	wg.Wait()
	for _, n := range f.nodes {
		if n == nil {
			f.t.Fatal("a proxy does not start")
		}
		f.t.Cleanup(n.Close)
		awaitNode(f.t, n)
	}
}

func (f *foreignRig) rpc(i int) *rpc { return dial(f.t, f.nodes[i].ClientURLs()[0]) }

// put writes through a proxy.
func (f *foreignRig) put(key, value string) int64 {
	f.t.Helper()
	r, err := f.rpc(0).kv.Put(callContext(f.t), &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
	if err != nil {
		f.t.Fatal(err)
	}
	return r.Header.Revision
}

// home returns the member on which a key lies. The key is made and deleted again if it is not there.
func (f *foreignRig) home(key string) *clientv3.Client {
	f.t.Helper()
	if m := f.homes[key]; m != nil {
		return m
	}
	ctx := callContext(f.t)
	find := func() *clientv3.Client {
		for _, m := range f.members {
			if r, err := m.Get(ctx, key); err != nil {
				f.t.Fatal(err)
			} else if len(r.Kvs) > 0 {
				return m
			}
		}
		return nil
	}
	if m := find(); m != nil {
		return m
	}
	f.put(key, "to find its place")
	m := find()
	if _, err := f.rpc(0).kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte(key)}); err != nil {
		f.t.Fatal(err)
	}
	return m
}

// foreignPut and foreignDelete write to a member.
func foreignPut(t *testing.T, m *clientv3.Client, key, value string, lease clientv3.LeaseID) {
	t.Helper()
	if _, err := m.Put(callContext(t), key, value, clientv3.WithLease(lease)); err != nil {
		t.Fatal(err)
	}
}

func foreignDelete(t *testing.T, m *clientv3.Client, keys ...string) {
	t.Helper()
	for _, k := range keys {
		if r, err := m.Delete(callContext(t), k); err != nil || r.Deleted != 1 {
			t.Fatalf("delete of %s on its member: %v, %v", k, r, err)
		}
	}
}

// await waits until a watch has brought events that want says.
func (f *foreignRig) await(l *eventLog, what string, want func(*mvccpb.Event) bool) *mvccpb.Event {
	f.t.Helper()
	var found *mvccpb.Event
	waitUntil(f.t, what, readyTimeout, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.err != nil {
			f.t.Fatalf("watch: %v", l.err)
		}
		for _, e := range l.events {
			if want(e) {
				found = e
				return true
			}
		}
		return false
	})
	return found
}

func isPut(key, value string) func(*mvccpb.Event) bool {
	return func(e *mvccpb.Event) bool {
		return e.Type == mvccpb.Event_PUT && string(e.Kv.Key) == key && string(e.Kv.Value) == value
	}
}

func isDelete(key string) func(*mvccpb.Event) bool {
	return func(e *mvccpb.Event) bool { return e.Type == mvccpb.Event_DELETE && string(e.Kv.Key) == key }
}

// check reads the whole history through every proxy, which must be the same and fit itself: previous pairs are
// what was there, versions grow, and every state at a revision is what the events up to there say.
func (f *foreignRig) check(last int64) {
	f.t.Helper()
	var first []*mvccpb.Event
	for i := range f.nodes {
		conn := f.rpc(i)
		l := openWatch(f.t, conn, foreignPrefix, 1)
		events := l.until(f.t, last)
		l.close()
		if i == 0 {
			first = events
		} else if len(events) != len(first) {
			f.t.Fatalf("proxy %d brings %d events, proxy 0 %d", i, len(events), len(first))
		}
		state := map[string]*mvccpb.KeyValue{}
		var order []int64
		for k, e := range events {
			if !proto.Equal(e, first[k]) {
				f.t.Errorf("event %d is %v through proxy %d, and %v through proxy 0", k, e, i, first[k])
			}
			key := string(e.Kv.Key)
			if was := state[key]; !proto.Equal(was, e.PrevKv) && !(was == nil && e.PrevKv == nil) {
				f.t.Errorf("proxy %d: the previous pair of %v must be %v", i, e, was)
			}
			if e.Type == mvccpb.Event_DELETE {
				if state[key] == nil {
					f.t.Errorf("proxy %d: %v of a key that was not there", i, e)
				}
				delete(state, key)
			} else {
				if was := state[key]; was != nil && (e.Kv.CreateRevision != was.CreateRevision || e.Kv.Version <= was.Version) || was == nil && e.Kv.CreateRevision != e.Kv.ModRevision {
					f.t.Errorf("proxy %d: %v follows %v", i, e, was)
				}
				state[key] = e.Kv
			}
			rev := e.Kv.ModRevision
			if n := len(order); n == 0 || order[n-1] != rev {
				order = append(order, rev)
			}
			if k+1 < len(events) && events[k+1].Kv.ModRevision == rev {
				continue
			}
			at := rangeRev(f.t, conn, rev)
			if len(at) != len(state) {
				f.t.Errorf("proxy %d: at revision %d there are %d keys, must be %d", i, rev, len(at), len(state))
			}
			for _, kv := range at {
				if !proto.Equal(kv, state[string(kv.Key)]) {
					f.t.Errorf("proxy %d: at revision %d there is %v, must be %v", i, rev, kv, state[string(kv.Key)])
				}
			}
		}
		if now := rangeRev(f.t, conn, last); len(now) != len(state) {
			f.t.Errorf("proxy %d: at the end there are %d keys, must be %d", i, len(now), len(state))
		}
	}
}

func rangeRev(t *testing.T, s *rpc, rev int64) []*mvccpb.KeyValue {
	t.Helper()
	r, err := s.kv.Range(callContext(t), &pb.RangeRequest{Key: []byte(foreignPrefix), RangeEnd: prefixEnd(foreignPrefix), Revision: rev})
	if err != nil {
		t.Fatalf("range at %d: %v", rev, err)
	}
	return r.Kvs
}

// change does to the members what Spindle does not know of, and returns what must be seen at last.
func (f *foreignRig) change(round int) (wants []func(*mvccpb.Event) bool, what []string) {
	t := f.t
	key := func(s string) string { return foreignPrefix + s }
	v := func(s string) string { return fmt.Sprintf("%s of round %d", s, round) }
	want := func(w string, is func(*mvccpb.Event) bool) { what, wants = append(what, w), append(wants, is) }

	foreignPut(t, f.home(key("known")), key("known"), v("put directly"), 0)
	want("the direct put of a known key", isPut(key("known"), v("put directly")))

	fresh := key(fmt.Sprint("fresh", round))
	foreignPut(t, f.home(fresh), fresh, "x", 0)
	want("the direct put of a new key", isPut(fresh, "x"))

	gone := key(fmt.Sprint("gone", round))
	foreignDelete(t, f.home(gone), gone)
	want("the direct delete", isDelete(gone))

	leased := key(fmt.Sprint("leased", round))
	home := f.home(leased)
	l, err := home.Grant(context.Background(), 3600)
	if err != nil {
		t.Fatal(err)
	}
	foreignPut(t, home, leased, "with a lease", l.ID)
	want("the end of a lease", isDelete(leased))
	// What is put and deleted again before anybody takes it over is seen as a whole or not at all.
	blink := key(fmt.Sprint("blink", round))
	foreignPut(t, f.home(blink), blink, "short", 0)
	foreignDelete(t, f.home(blink), blink)
	return wants, what
}

func TestForeignChanges(t *testing.T) {
	t.Parallel()
	f := newForeignRig(t, 3, 2)
	f.prepare(0)
	logs := []*eventLog{openWatch(t, f.rpc(0), foreignPrefix, 1), openWatch(t, f.rpc(1), foreignPrefix, 1)}
	f.round(0, logs, nil)
	f.check(f.put(foreignPrefix+"last", "one"))
	for _, l := range logs {
		l.close()
	}

	// The same while no proxy runs: the next start takes it over.
	f.prepare(1)
	f.round(1, nil, func() {
		for _, n := range f.nodes {
			n.Close()
		}
	})
	f.check(f.put(foreignPrefix+"last", "two"))
}

// prepare makes the keys that a round changes.
func (f *foreignRig) prepare(round int) {
	f.put(foreignPrefix+"known", fmt.Sprint("through a proxy ", round))
	f.put(foreignPrefix+fmt.Sprint("gone", round), "to be deleted")
	for _, k := range []string{"fresh", "leased", "blink"} {
		f.home(foreignPrefix + fmt.Sprint(k, round)) // it remembers
	}
}

// round changes members and waits until the watches show it. stop, if there is one, ends all proxies first; they
// are started again after the changes.
func (f *foreignRig) round(round int, logs []*eventLog, stop func()) {
	t := f.t
	leased := foreignPrefix + fmt.Sprint("leased", round)
	homes := map[string]*clientv3.Client{}
	for _, k := range []string{"known", fmt.Sprint("fresh", round), fmt.Sprint("gone", round), fmt.Sprint("leased", round), fmt.Sprint("blink", round)} {
		homes[foreignPrefix+k] = f.home(foreignPrefix + k)
	}
	if stop != nil {
		stop()
	}
	saved := f.homes
	f.homes = homes
	wants, what := f.change(round)
	if stop != nil {
		f.start(len(f.nodes))
		logs = []*eventLog{openWatch(t, f.rpc(0), foreignPrefix, 1), openWatch(t, f.rpc(1), foreignPrefix, 1)}
		defer logs[0].close()
		defer logs[1].close()
	}
	f.homes = saved
	for _, l := range logs {
		f.await(l, "the put of a key with a lease", isPut(leased, "with a lease"))
	}
	home := homes[leased]
	kv, err := home.Get(callContext(t), leased)
	if err != nil {
		t.Fatal(err)
	}
	// A proxy takes a lease without a marker for a left-over copy, and may have ended it by now: about a second after
	// its start it looks for such.
	if len(kv.Kvs) == 1 {
		if kv.Kvs[0].Lease == 0 {
			t.Fatalf("the key has lost its lease: %v", kv)
		}
		if bytes.HasPrefix(kv.Kvs[0].Value, []byte("with")) {
			t.Error("seen, and not stamped")
		}
		if _, err := home.Revoke(callContext(t), clientv3.LeaseID(kv.Kvs[0].Lease)); err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
			t.Fatal(err)
		}
	}
	for _, l := range logs {
		for i, want := range wants {
			f.await(l, what[i], want)
		}
	}
}
