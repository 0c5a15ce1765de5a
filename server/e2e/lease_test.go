package e2e

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// leaseKeys is how many keys the lease tests use: enough to lie on all of three shards.
const leaseKeys = 12

// leaseTalk does to one system what a script says, and writes down what it answers, in words that are the
// same for every system: leases whose ID the server chose are numbered, revisions left out. Requests go to conns in turn.
type leaseTalk struct {
	t     *testing.T
	conns []*rpc
	turn  int
	names map[int64]string
	out   []string
	watch []*eventLog // one on each connection
}

func newLeaseTalk(t *testing.T, urls ...string) *leaseTalk {
	l := &leaseTalk{t: t, names: map[int64]string{0: "none"}}
	for _, u := range urls {
		l.conns = append(l.conns, dial(t, u))
	}
	for _, c := range l.conns {
		l.watch = append(l.watch, openWatch(t, c, "L/", 1))
	}
	return l
}

func (l *leaseTalk) next() *rpc {
	l.turn++
	return l.conns[l.turn%len(l.conns)]
}

func (l *leaseTalk) ctx() context.Context { return callContext(l.t) }

func (l *leaseTalk) say(format string, args ...any) {
	l.out = append(l.out, fmt.Sprintf(format, args...))
}

// name is what a lease is called in the transcript.
func (l *leaseTalk) name(id int64) string {
	if n, ok := l.names[id]; ok {
		return n
	}
	return fmt.Sprint(id)
}

func (l *leaseTalk) kv(kv *mvccpb.KeyValue) string {
	if kv == nil {
		return "-"
	}
	return fmt.Sprintf("%s=%s version %d lease %s", kv.Key, kv.Value, kv.Version, l.name(kv.Lease))
}

func (l *leaseTalk) grant(id, ttl int64) int64 {
	r, err := l.next().l.LeaseGrant(l.ctx(), &pb.LeaseGrantRequest{ID: id, TTL: ttl})
	if err != nil {
		l.say("grant %s ttl %d: %s", l.name(id), ttl, errText(err))
		return 0
	}
	if err := checkHeader(r.Header); err != nil {
		l.t.Error(err)
	}
	if id == 0 {
		if r.ID <= 0 {
			l.t.Errorf("the server chose the ID %d", r.ID)
		}
		l.names[r.ID] = fmt.Sprintf("#%d", len(l.names))
	}
	l.say("grant %d ttl %d: %s ttl %d error %q", id, ttl, l.name(r.ID), r.TTL, r.Error)
	return r.ID
}

func (l *leaseTalk) revoke(id int64) {
	_, err := l.next().l.LeaseRevoke(l.ctx(), &pb.LeaseRevokeRequest{ID: id})
	l.say("revoke %s: %s", l.name(id), errText(err))
}

func (l *leaseTalk) put(r *pb.PutRequest) {
	resp, err := l.next().kv.Put(l.ctx(), r)
	l.say("put %s lease %s %v: %s prev %s", r.Key, l.name(r.Lease), r.IgnoreLease, errText(err), l.kv(resp.GetPrevKv()))
}

func (l *leaseTalk) putAll(value string, lease int64) {
	for i := range leaseKeys {
		l.put(&pb.PutRequest{Key: leaseKey(i), Value: []byte(value), Lease: lease, PrevKv: i%2 == 0})
	}
}

func leaseKey(i int) []byte { return fmt.Appendf(nil, "L/%02d", i) }

func (l *leaseTalk) get() {
	r, err := l.next().kv.Range(l.ctx(), &pb.RangeRequest{Key: []byte("L/"), RangeEnd: prefixEnd("L/")})
	if err != nil {
		l.say("get: %s", errText(err))
		return
	}
	var kvs []string
	for _, kv := range r.Kvs {
		kvs = append(kvs, l.kv(kv))
	}
	l.say("get: %q", kvs)
}

func (l *leaseTalk) timeToLive(id int64) {
	for _, keys := range []bool{false, true} {
		r, err := l.next().l.LeaseTimeToLive(l.ctx(), &pb.LeaseTimeToLiveRequest{ID: id, Keys: keys})
		if err != nil {
			l.say("time to live %s: %s", l.name(id), errText(err))
			continue
		}
		slices.SortFunc(r.Keys, slices.Compare)
		left := fmt.Sprint(r.TTL)
		if r.TTL > 0 { // both have all but a moment left
			left = "fresh"
			if r.TTL > r.GrantedTTL || r.TTL < r.GrantedTTL/2 {
				left = "odd: " + left
			}
		}
		l.say("time to live %s: %s left %s of %d, keys %q", l.name(id), l.name(r.ID), left, r.GrantedTTL, r.Keys)
	}
}

func (l *leaseTalk) leases() {
	r, err := l.next().l.LeaseLeases(l.ctx(), &pb.LeaseLeasesRequest{})
	var names []string
	for _, s := range r.GetLeases() {
		names = append(names, l.name(s.ID))
	}
	slices.Sort(names)
	l.say("leases: %q %s", names, errText(err))
}

func (l *leaseTalk) keepAlive(ids ...int64) {
	for _, id := range ids {
		st, err := l.next().l.LeaseKeepAlive(l.ctx())
		if err != nil {
			l.t.Fatal(err)
		}
		if err := st.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
			l.t.Fatal(err)
		}
		r, err := st.Recv()
		l.say("keep alive %s: %s ttl %d %s", l.name(id), l.name(r.GetID()), r.GetTTL(), errText(err))
		_ = st.CloseSend()
		_, err = st.Recv()
		l.say("then %v", err)
	}
}

func (l *leaseTalk) txn(what string, r *pb.TxnRequest) {
	resp, err := l.next().kv.Txn(l.ctx(), r)
	l.say("txn %s: %v %s", what, resp.GetSucceeded(), errText(err))
}

// keepLease puts a value and leaves the key's lease as it is. (All keys of a Txn have to lie on one shard.)
func keepLease(key []byte, value string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: []byte(value), IgnoreLease: true}}}
}

// compare compares the lease of a key, in each way.
func (l *leaseTalk) compare(key []byte, lease int64) {
	for _, result := range []pb.Compare_CompareResult{pb.Compare_EQUAL, pb.Compare_GREATER, pb.Compare_LESS, pb.Compare_NOT_EQUAL} {
		l.txn(fmt.Sprintf("lease of %s %v %s", key, result, l.name(lease)), &pb.TxnRequest{
			Compare: []*pb.Compare{{Key: key, Result: result, Target: pb.Compare_LEASE, TargetUnion: &pb.Compare_Lease{Lease: lease}}},
			Success: []*pb.RequestOp{rangeOp(string(key), "")},
			Failure: []*pb.RequestOp{rangeOp(string(key), "")},
		})
		l.txn(fmt.Sprintf("lease of %s %v %s, writing", key, result, l.name(lease)), &pb.TxnRequest{
			Compare: []*pb.Compare{{Key: key, Result: result, Target: pb.Compare_LEASE, TargetUnion: &pb.Compare_Lease{Lease: lease}}},
			Success: []*pb.RequestOp{keepLease(key, "then")},
			Failure: []*pb.RequestOp{keepLease(key, "else")},
		})
	}
	l.get()
}

// events waits until all watches have brought n events, and writes down what each key went through. (The order
// between keys is not one etcd's: keys of one lease on several shards vanish at several revisions.) All
// watches must have brought the same, with the same revisions.
func (l *leaseTalk) events(n int) {
	l.t.Helper()
	var all [][]*mvccpb.Event
	for i, w := range l.watch {
		waitUntil(l.t, fmt.Sprintf("watch %d has %d events", i, n), readyTimeout, func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.err != nil || len(w.events) >= n
		})
		w.mu.Lock()
		if w.err != nil {
			l.t.Fatal(w.err)
		}
		all = append(all, slices.Clone(w.events))
		w.mu.Unlock()
	}
	stories := map[string][]string{}
	for _, e := range all[0] {
		k := string(e.Kv.Key)
		stories[k] = append(stories[k], fmt.Sprintf("%v %s (%s)", e.Type, l.kv(e.Kv), l.kv(e.PrevKv)))
	}
	var keys []string
	for k := range stories {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		l.say("%s: %s", k, strings.Join(stories[k], "; "))
	}
	for i := range all[1:] {
		sameEvents(l.t, all[0], all[i+1])
	}
}

// sameEvents holds what two watches brought against each other, revisions included. Within a revision the order of
// keys is the proxy's own.
func sameEvents(t *testing.T, a, b []*mvccpb.Event) {
	t.Helper()
	words := func(events []*mvccpb.Event) (out []string) {
		for _, e := range events {
			out = append(out, fmt.Sprintf("%012d %v", e.Kv.ModRevision, e))
		}
		slices.Sort(out)
		return out
	}
	sameLines(t, "two watches", words(a), words(b))
}

const chosen = 777 // an ID that a client chooses

// leaseScript is everything that a client can do with leases that do not expire meanwhile.
func leaseScript(l *leaseTalk) {
	l.leases()
	a := l.grant(0, 600)
	l.grant(chosen, 700)
	l.grant(chosen, 700)
	l.grant(a, 600)
	for _, ttl := range []int64{0, -1, math.MinInt64, 9_000_000_000, 9_000_000_001, math.MaxInt64} {
		if id := l.grant(0, ttl); id != 0 {
			l.revoke(id)
		}
	}
	odd := []int64{-1, -chosen, math.MinInt64, math.MaxInt64, 1 << 62, 1<<62 | 5}
	for i, id := range odd {
		l.grant(id, 600)
		l.put(&pb.PutRequest{Key: leaseKey(i), Value: []byte("odd"), Lease: id})
	}
	l.get()
	l.leases()
	for _, id := range odd {
		l.keepAlive(id)
		l.timeToLive(id)
		l.revoke(id)
	}
	l.get()

	// Keys of all shards come to a, some go to the other lease, some are detached, one is deleted.
	l.putAll("one", a)
	l.get()
	l.timeToLive(a)
	l.putAll("two", a)
	l.put(&pb.PutRequest{Key: leaseKey(0), Value: []byte("moved"), Lease: chosen, PrevKv: true})
	l.put(&pb.PutRequest{Key: leaseKey(1), Value: []byte("moved"), Lease: chosen})
	l.put(&pb.PutRequest{Key: leaseKey(2), Value: []byte("detached"), PrevKv: true})
	l.put(&pb.PutRequest{Key: leaseKey(3), Value: []byte("detached")})
	l.put(&pb.PutRequest{Key: leaseKey(4), Value: []byte("kept"), IgnoreLease: true, PrevKv: true})
	l.put(&pb.PutRequest{Key: leaseKey(5), IgnoreValue: true, Lease: chosen})
	l.put(&pb.PutRequest{Key: []byte("L/new"), Value: []byte("x"), IgnoreLease: true})
	l.put(&pb.PutRequest{Key: leaseKey(4), Value: []byte("x"), IgnoreLease: true, Lease: a})
	del, err := l.next().kv.DeleteRange(l.ctx(), &pb.DeleteRangeRequest{Key: leaseKey(6), PrevKv: true})
	l.say("delete: %d %s %s", del.GetDeleted(), l.kv(del.GetPrevKvs()[0]), errText(err))
	l.get()
	l.timeToLive(a)
	l.timeToLive(chosen)
	l.keepAlive(a, chosen, 4242, 0)

	for _, lease := range []int64{a, chosen, 0, 4242} {
		for _, k := range [][]byte{leaseKey(0), leaseKey(2), leaseKey(7), []byte("L/nothing")} {
			if lease == a || lease == chosen {
				// Which of two IDs is larger is a matter of chance: only whether they are equal.
				l.txn(fmt.Sprintf("lease of %s is %s", k, l.name(lease)), &pb.TxnRequest{
					Compare: []*pb.Compare{{Key: k, Target: pb.Compare_LEASE, TargetUnion: &pb.Compare_Lease{Lease: lease}}},
					Success: []*pb.RequestOp{keepLease(k, "compared")},
				})
				continue
			}
			if lease == 0 {
				l.compare(k, lease)
			}
		}
	}
	l.compare(leaseKey(0), chosen)
	l.compare(leaseKey(0), chosen-1)
	l.compare(leaseKey(0), chosen+1)

	// A lease that is not there, on the path that is taken and on the one that is not.
	ghost := func(key []byte) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: []byte("ghost"), Lease: 4242}}}
	}
	live := func(key []byte, lease int64) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: []byte("txn"), Lease: lease}}}
	}
	is := func(key []byte, version int64) []*pb.Compare {
		return []*pb.Compare{{Key: key, Target: pb.Compare_VERSION, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_Version{Version: version}}}
	}
	k := leaseKey(8)
	l.put(&pb.PutRequest{Key: k, Value: []byte("ghost"), Lease: 4242})
	l.txn("ghost taken", &pb.TxnRequest{Compare: is(k, 0), Success: []*pb.RequestOp{ghost(k)}, Failure: []*pb.RequestOp{live(k, a)}})
	l.txn("ghost not taken", &pb.TxnRequest{Compare: is(k, 99), Success: []*pb.RequestOp{ghost(k)}, Failure: []*pb.RequestOp{live(k, chosen)}})
	l.txn("ghost beside", &pb.TxnRequest{Compare: is(k, 0), Success: []*pb.RequestOp{rangeOp(string(k), ""), ghost(k)}})
	l.txn("ghost nested, taken", &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{
		Compare: is(k, 0), Success: []*pb.RequestOp{ghost(k)}}}}}})
	l.txn("ghost nested, not taken", &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{
		Compare: is(k, 99), Success: []*pb.RequestOp{ghost(k)}, Failure: []*pb.RequestOp{live(k, a)}}}}}})
	l.txn("live", &pb.TxnRequest{Compare: is(k, 0), Success: []*pb.RequestOp{live(k, chosen)}})
	l.txn("by value", &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: k, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte("txn")}}},
		Success: []*pb.RequestOp{live(k, a)}})
	l.txn("by value, ghost", &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: k, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte("txn")}}},
		Success: []*pb.RequestOp{ghost(k)}})
	l.get()
	l.timeToLive(a)
	l.timeToLive(chosen)
	l.leases()

	// Revoke: what is on the lease goes, what was moved or detached stays.
	l.revoke(a)
	l.get()
	l.timeToLive(a)
	l.leases()
	l.revoke(a)
	l.revoke(4242)
	l.revoke(0)
	l.put(&pb.PutRequest{Key: leaseKey(9), Value: []byte("late"), Lease: a})
	l.keepAlive(a)
	l.txn("late", &pb.TxnRequest{Success: []*pb.RequestOp{live(leaseKey(9), a)}})
	l.get()
	l.revoke(chosen)
	l.get()

	// An ID that a client chose can be chosen again; nothing of its first life is left.
	l.grant(chosen, 800)
	l.timeToLive(chosen)
	l.putAll("again", chosen)
	l.get()
	l.timeToLive(chosen)
	l.revoke(chosen)
	l.get()
	l.leases()
}

// shortTTL is that of leases that end by themselves, in seconds: what is done before has time on a busy machine.
const shortTTL = 8

// leaseExpires lets leases end by themselves, while one is kept alive and one was emptied.
func leaseExpires(l *leaseTalk, before int) {
	kept := l.grant(0, 600)
	a, b, empty := l.grant(0, shortTTL), l.grant(chosen, shortTTL), l.grant(0, shortTTL)
	for i := range leaseKeys {
		l.put(&pb.PutRequest{Key: leaseKey(i), Value: []byte("short"), Lease: []int64{a, b, kept}[i/2%3]})
	}
	l.put(&pb.PutRequest{Key: []byte("L/empty"), Value: []byte("x"), Lease: empty})
	l.put(&pb.PutRequest{Key: []byte("L/empty"), Value: []byte("y")})
	l.events(before + leaseKeys + 2 + leaseKeys/3*2)
	l.get()
	gone := func(id int64) func() bool {
		return func() bool {
			r, err := l.next().l.LeaseTimeToLive(l.ctx(), &pb.LeaseTimeToLiveRequest{ID: id})
			return err == nil && r.TTL == -1
		}
	}
	for _, id := range []int64{a, b, empty} {
		waitUntil(l.t, "the lease is gone everywhere", readyTimeout, gone(id))
		l.timeToLive(id)
		l.put(&pb.PutRequest{Key: leaseKey(0), Value: []byte("late"), Lease: id})
		l.keepAlive(id)
		l.revoke(id)
	}
	l.timeToLive(kept)
	l.leases()
	l.revoke(kept)
	l.get()
}

// count is how many events the watches have now.
func (l *leaseTalk) count(t *testing.T) int {
	rev := int64(0)
	for _, c := range l.conns {
		r, err := c.kv.Range(l.ctx(), &pb.RangeRequest{Key: []byte("L/")})
		if err != nil {
			t.Fatal(err)
		}
		rev = max(rev, r.Header.Revision)
	}
	return len(l.watch[0].until(t, rev))
}

// Leases on a plain etcd and on Spindle, through one proxy and through two in turn: the same answers, the same
// events.
func TestLeaseDifferential(t *testing.T) {
	t.Parallel()
	run := func(l *leaseTalk) []string {
		leaseScript(l)
		n := l.count(t)
		l.events(n)
		leaseExpires(l, n)
		l.events(l.count(t))
		return l.out
	}
	want := run(newLeaseTalk(t, startEtcd(t)))
	for _, proxies := range []int{1, 2} {
		t.Run(fmt.Sprintf("proxies=%d", proxies), func(t *testing.T) {
			t.Parallel()
			var urls []string
			for _, n := range startSpindle(t, 3, proxies, ringAll) {
				urls = append(urls, n.ClientURLs()[0])
			}
			got := run(newLeaseTalk(t, urls...))
			for i := range min(len(got), len(want)) {
				if got[i] != want[i] {
					t.Errorf("line %d:\n  etcd:    %s\n  spindle: %s", i, want[i], got[i])
				}
			}
			if len(got) != len(want) {
				t.Errorf("%d lines, etcd has %d", len(got), len(want))
			}
		})
	}
}
