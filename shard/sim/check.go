package sim

import (
	"fmt"
	"math"
	"sort"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/watchring"
)

// This file compares everything that clients and watchers were told with what really happened: promises 1
// to 5 of the design.

// check judges a run that has ended.
func (r *Run) check() error {
	h, err := readHistory(logsOf(r.net.Members))
	if err != nil {
		return err
	}
	r.stats.Facts = len(h.values)
	for _, x := range h.ranges {
		if x.spare {
			r.stats.Spared++
		}
	}
	r.forced = r.forcedRevision()
	if h.wait > 0 {
		return fmt.Errorf("%d changes without a record still wait for one at the end", h.wait)
	}
	for k, w := range h.raw {
		return fmt.Errorf("key %q has a foreign value since L%d at the end", k, w.from)
	}
	for _, p := range r.proxies {
		if f := p.core.Frontier().Get(watchring.All); f < h.last {
			return fmt.Errorf("p%d: the frontier is %d at the end, the last record ends at %d", p.idx, f, h.last)
		}
	}
	c := &checker{r: r, h: h, writer: map[string]*op{}, owner: map[*fact]*op{}, to: math.MaxInt64}
	old := c // for what happened before a loss
	if l := r.loss; l != nil {
		was, err := readHistory(l.before(r.net.Members))
		if err != nil {
			return fmt.Errorf("before the loss: %w", err)
		}
		c.from, c.fenceEnd = l.fence()
		if c.lost, err = lostFacts(was, h, c.from); err != nil {
			return err
		}
		if m := r.unrecorded(c.fenceEnd); m != nil {
			return fmt.Errorf("%s: the compaction that ends the loss, at %d, is not recorded there at the end", m, c.fenceEnd)
		}
		old = &checker{r: r, h: was, writer: c.writer, owner: map[*fact]*op{}, to: c.from - 1, fenceEnd: c.fenceEnd}
	}
	for _, o := range r.ops {
		for _, v := range valuesOf(o.req) {
			c.writer[v] = o
		}
	}
	for _, o := range r.ops {
		took := time.Duration(o.end - o.begin)
		r.stats.Slowest = max(r.stats.Slowest, took)
		if !r.touchesDead(o.req) {
			r.stats.SlowestAlive = max(r.stats.SlowestAlive, took)
		}
		if took > maxTimeouts*r.Timeout+o.client.p.still {
			return fmt.Errorf("%s: it took %v", o, took)
		}
		by := c
		if r.loss != nil && o.st.Code == codec.OK && o.rev < c.from {
			by = old
		} else if r.loss != nil && o.st.Code == codec.OK && c.readsLost(o) {
			return fmt.Errorf("%s: what it reads is below the end of the loss, at %d, and recorded as compacted", o, c.fenceEnd)
		}
		err := by.answer(o)
		if _, list := o.req.(*pb.RangeRequest); err != nil && by != c && list && o.end >= r.loss.fenced() {
			// It waited for the shard at a revision from before, and shows what is left. Who watches from there is told to list anew.
			if c.answer(o) == nil {
				err = nil
			}
		}
		if err != nil {
			return fmt.Errorf("%s: %w", o, err)
		}
	}
	if old != c {
		if err := old.facts(); err != nil {
			return fmt.Errorf("before the loss: %w", err)
		}
	}
	if err := c.facts(); err != nil {
		return err
	}
	if err := c.leases(); err != nil {
		return err
	}
	for _, f := range r.follows {
		by := c
		if r.loss != nil && f.at < r.loss.begun {
			by = old
		}
		if err := by.watch(f); err != nil {
			return fmt.Errorf("watch %s from %d: %w", f.name, f.start, err)
		}
	}
	for _, v := range r.viewers {
		for _, o := range v.views {
			by := c
			if r.loss != nil && v.at < r.loss.begun {
				by = old
			}
			err := by.viewed(v, o)
			if err == nil && by == c {
				err = c.overLoss(o)
			}
			if err != nil {
				return fmt.Errorf("%s: watch %d of %q..%q from %d: %w", v.name, o.w.ID, o.w.Key, o.w.End, o.w.Start, err)
			}
		}
	}
	return nil
}

type checker struct {
	r      *Run
	h      *history
	writer map[string]*op // by value: who put it
	owner  map[*fact]*op
	// from and to are the revisions whose facts are looked at; behind a loss from is the first of its fence, fenceEnd the last, and lost
	// what is gone.
	from, to, fenceEnd int64
	lost               []*fact
	missed             map[*fact]bool // deletes that the answer being checked does not know
}

// valuesOf returns every value that a request might put.
func valuesOf(req proto.Message) (vs []string) {
	switch q := req.(type) {
	case *pb.PutRequest:
		vs = append(vs, string(q.Value))
	case *pb.TxnRequest:
		for _, ops := range [][]*pb.RequestOp{q.Success, q.Failure} {
			for _, o := range ops {
				if p := o.GetRequestPut(); p != nil {
					vs = append(vs, string(p.Value))
				} else if t := o.GetRequestTxn(); t != nil {
					vs = append(vs, valuesOf(t)...)
				}
			}
		}
	}
	return vs
}

// answer checks what one operation was told: it is exact, or lacks what it may lack.
func (c *checker) answer(o *op) error {
	err := c.exact(o)
	if err == nil || !c.r.Events.Foreign || mayWrite(o.req) && !c.onlyRead(o) {
		return err
	}
	may := c.mayMiss(o)
	for set := 1; set < 1<<len(may); set++ {
		c.missed = map[*fact]bool{}
		for i, f := range may {
			c.missed[f] = set&(1<<i) != 0
		}
		less := c.exact(o)
		c.missed = nil
		if less == nil {
			return nil
		}
	}
	return err
}

func (c *checker) exact(o *op) error {
	if o.st.Code != codec.OK {
		if o.st.Code == codec.Canceled {
			return nil
		}
		if leaseError(o.st) {
			return c.leaseAnswer(o)
		}
		if o.st == codec.ErrKeyNotFound && mayMissKey(o.req) {
			return nil
		}
		if o.st == codec.ErrCompacted && c.compactedFor(o) {
			return nil
		}
		if o.st == codec.ErrTooManyOps && c.r.MaxTxnOps < 64 {
			return nil // it does not fit through such members
		}
		if q, ok := o.req.(*pb.CompactionRequest); ok && o.st == codec.ErrFutureRev && q.Revision > o.floor {
			return nil
		}
		if !o.unknown() {
			return fmt.Errorf("this error cannot be")
		}
		if r := c.r; r.Faults == (Faults{}) && r.Chaos == 0 && !r.touchesDead(o.req) {
			return fmt.Errorf("an error although nothing went wrong")
		}
		return nil
	}
	if isLease(o.req) {
		return c.leaseAnswer(o)
	}
	if o.rev < 1 {
		return fmt.Errorf("header.revision is %d", o.rev)
	}
	if k := c.lateRead(o); k != nil {
		return fmt.Errorf("what it reads was compacted before it began, by %v", k)
	}
	switch q := o.req.(type) {
	case *pb.RangeRequest:
		return c.rangeAnswer(o, q)
	case *pb.CompactionRequest, *pb.WatchProgressRequest:
		if o.rev < o.floor {
			return fmt.Errorf("it was told %d, and a client had been shown %d before it began", o.rev, o.floor)
		}
		return nil
	}
	if q, ok := o.req.(*pb.DeleteRangeRequest); ok && len(q.RangeEnd) > 0 && c.r.Shards > 1 {
		if c.meets(func(w *window) bool {
			return w.until > o.floor && w.after <= o.rev && within(w.key, string(q.Key), string(q.RangeEnd))
		}) {
			c.own(o)
			return nil
		}
		return c.deleteAll(o, q)
	}
	if c.metForeign(o) {
		// What the shard compared with, or shows, was not what clients see: documented. What it was told that it has put,
		// it has put.
		for _, v := range told(o.req, o.resp) {
			if f := c.h.values[v]; f == nil || f.rev != o.rev {
				return fmt.Errorf("it was told that %q was put, and there is %v", v, f)
			}
		}
		c.own(o)
		return nil
	}
	// A request that wrote must be exactly what happened at its revision.
	v := c.before(o.rev)
	want := v.eval(o.req)
	if len(v.writes) > 0 && !c.onlyRead(o) && c.same(v.writes, o.rev) {
		if o.rev <= o.floor {
			return fmt.Errorf("it wrote at %d, and a client had been shown %d before it began", o.rev, o.floor)
		}
		for _, f := range c.h.byRev[o.rev] {
			if !f.unrecorded {
				if other := c.owner[f]; other != nil {
					return fmt.Errorf("revision %d belongs to %s too", o.rev, other)
				}
				c.owner[f] = o
			}
		}
		return c.compare(o, want)
	}
	wrote := len(v.writes) > 0
	// Otherwise it must have been right to write nothing, at the revision that it was told.
	v = c.after(o.rev)
	want = v.eval(o.req)
	if len(v.writes) > 0 || wrote && !c.failed(o) {
		return fmt.Errorf("at %d it should have written %v, what happened there is %v", o.rev, v.writes, c.h.byRev[o.rev])
	}
	if o.rev < o.floor {
		return fmt.Errorf("it was told %d, and a client had been shown %d before it began", o.rev, o.floor)
	}
	return c.compare(o, want)
}

// failed reports whether a transaction was told that its compares did not hold.
func (c *checker) failed(o *op) bool {
	t, ok := o.resp.(*pb.TxnResponse)
	return ok && !t.Succeeded
}

// onlyRead reports whether a transaction was told that it failed, and writes nothing then: it may have been a read, whose
// revision is somebody else's.
func (c *checker) onlyRead(o *op) bool {
	t, ok := o.req.(*pb.TxnRequest)
	return ok && c.failed(o) && !mayWrite(&pb.TxnRequest{Failure: t.Failure})
}

func mayMissKey(req proto.Message) bool {
	t, ok := req.(*pb.TxnRequest)
	if !ok {
		return false
	}
	for _, ops := range [][]*pb.RequestOp{t.Success, t.Failure} {
		for _, o := range ops {
			if p := o.GetRequestPut(); p != nil && p.IgnoreLease {
				return true
			}
			if n := o.GetRequestTxn(); n != nil && mayMissKey(n) {
				return true
			}
		}
	}
	return false
}

func (c *checker) rangeAnswer(o *op, q *pb.RangeRequest) error {
	if !q.Serializable && o.rev < o.floor {
		return fmt.Errorf("a read at %d, and a client had been shown %d before it began", o.rev, o.floor)
	}
	at := o.rev
	if q.Revision > 0 {
		at = q.Revision
	}
	want := c.after(at).eval(q)
	if (q.CountOnly || q.Limit > 0) && c.hidden(q, at) {
		// The member counts a key that clients do not see yet: documented.
		got, w := o.resp.(*pb.RangeResponse), want.(*pb.RangeResponse)
		w.Count, w.More = got.Count, got.More
	}
	return c.compare(o, want)
}

// deleteAll checks a delete over several shards: each shard's part has a revision of its own, the
// answer has the sum and the largest.
func (c *checker) deleteAll(o *op, q *pb.DeleteRangeRequest) error {
	resp := o.resp.(*pb.DeleteRangeResponse)
	if o.rev < o.floor {
		return fmt.Errorf("it was told %d, and a client had been shown %d before it began", o.rev, o.floor)
	}
	deletes := 0
	for _, fs := range c.h.byKey {
		for i, f := range fs {
			if f.delete && !f.unrecorded && f.rev > o.floor && f.rev <= o.rev && within(f.key, string(q.Key), string(q.RangeEnd)) {
				deletes++
			}
			// What was there when it began must not have outlived it.
			if !f.delete && f.rev <= o.floor && within(f.key, string(q.Key), string(q.RangeEnd)) && (i+1 == len(fs) || fs[i+1].rev > o.rev) {
				return fmt.Errorf("%v is still there at %d", f, o.rev)
			}
		}
	}
	if int64(deletes) < resp.Deleted {
		return fmt.Errorf("it was told of %d deletes, there were %d", resp.Deleted, deletes)
	}
	if q.PrevKv {
		if int64(len(resp.PrevKvs)) != resp.Deleted {
			return fmt.Errorf("%d pairs for %d deletes", len(resp.PrevKvs), resp.Deleted)
		}
		for i, kv := range resp.PrevKvs {
			f := c.h.values[string(kv.Value)]
			if f == nil || !proto.Equal(kv, f.kv()) {
				return fmt.Errorf("previous pair %v is %v", kv, f)
			}
			if i > 0 && string(resp.PrevKvs[i-1].Key) >= string(kv.Key) {
				return fmt.Errorf("previous pairs are not in order of key")
			}
			fs := c.h.byKey[f.key]
			j := sort.Search(len(fs), func(j int) bool { return fs[j].rev >= f.rev })
			for j < len(fs) && fs[j] != f {
				j++
			}
			if j+1 >= len(fs) || !fs[j+1].delete || fs[j+1].rev <= o.floor || fs[j+1].rev > o.rev {
				return fmt.Errorf("previous pair %v was not deleted by this", kv)
			}
		}
	}
	return nil
}

// compare compares an answer with what it must be.
func (c *checker) compare(o *op, want proto.Message) error {
	got := proto.Clone(o.resp)
	strip(got)
	strip(want)
	if t, ok := o.req.(*pb.TxnRequest); ok && c.countsHidden(t) {
		// A member counts a key that clients do not see yet: documented.
		uncount(got)
		uncount(want)
	}
	if q, ok := o.req.(*pb.RangeRequest); ok && q.SortTarget != pb.RangeRequest_KEY { // etcd does not say how ties are sorted
		g, w := got.(*pb.RangeResponse), want.(*pb.RangeResponse)
		if len(g.Kvs) == len(w.Kvs) {
			same := true
			for i := range g.Kvs {
				same = same && g.Kvs[i].ModRevision == w.Kvs[i].ModRevision
			}
			if same {
				g.Kvs, w.Kvs = nil, nil
			}
		}
	}
	if !proto.Equal(got, want) {
		return fmt.Errorf("the answer must be {%v}", want)
	}
	return nil
}

// uncount removes the counts of ranges.
func uncount(m proto.Message) {
	switch v := m.(type) {
	case *pb.RangeResponse:
		v.Count, v.More = 0, false
	case *pb.TxnResponse:
		for _, r := range v.Responses {
			if x := r.GetResponseRange(); x != nil {
				uncount(x)
			}
			if x := r.GetResponseTxn(); x != nil {
				uncount(x)
			}
		}
	}
}

// strip removes headers, in nested answers too: they are checked by themselves. It removes leases as well:
// those of a simulation come from the model (Etcd.AutoLease), the core cannot know which a put gets.
func strip(m proto.Message) {
	bare := func(kvs ...*mvccpb.KeyValue) {
		for _, kv := range kvs {
			if kv != nil {
				kv.Lease = 0
			}
		}
	}
	switch v := m.(type) {
	case *pb.RangeResponse:
		v.Header = nil
		bare(v.Kvs...)
	case *pb.PutResponse:
		v.Header = nil
		bare(v.PrevKv)
	case *pb.DeleteRangeResponse:
		v.Header = nil
		bare(v.PrevKvs...)
	case *pb.TxnResponse:
		v.Header = nil
		for _, o := range v.Responses {
			switch w := o.Response.(type) {
			case *pb.ResponseOp_ResponseRange:
				strip(w.ResponseRange)
			case *pb.ResponseOp_ResponsePut:
				strip(w.ResponsePut)
			case *pb.ResponseOp_ResponseDeleteRange:
				strip(w.ResponseDeleteRange)
			case *pb.ResponseOp_ResponseTxn:
				strip(w.ResponseTxn)
			}
		}
	}
}

// same reports whether writes are exactly the facts of rev.
func (c *checker) same(writes []*fact, rev int64) bool {
	var facts []*fact
	for _, f := range c.h.byRev[rev] {
		if !f.unrecorded {
			facts = append(facts, f)
		}
	}
	if len(facts) != len(writes) {
		return false
	}
	for i, f := range facts {
		w := writes[i]
		if f.key != w.key || f.delete != w.delete || f.value != w.value || f.create != w.create || f.version != w.version || f.lease != w.lease {
			return false
		}
	}
	return true
}

// facts checks that everything that happened was somebody's request, once, and of a kind that this
// request could do.
func (c *checker) facts() error {
	for _, rev := range c.h.revs {
		if rev < c.from || rev > c.to {
			continue
		}
		for _, f := range c.h.byRev[rev] {
			if f.unrecorded {
				if f.delete && !c.r.expired[expiry{f.shard, f.local}] && !c.leaseEnded(f) {
					return fmt.Errorf("%v: in no record, and nothing expired", f)
				}
				continue
			}
			if c.r.expired[expiry{f.shard, f.local}] {
				return fmt.Errorf("%v: it expired, and a record names it", f)
			}
			if c.owner[f] != nil {
				continue
			}
			if f.delete {
				if err := c.orphanDelete(f); err != nil {
					return err
				}
				continue
			}
			o := c.writer[f.value]
			switch {
			case c.r.foreigns[f.value]:
				continue // taken over
			case o == nil:
				return fmt.Errorf("%v: nobody wrote this", f)
			case o.st.Code == codec.OK && o.ended && o.rev > c.to:
				continue // lost, and written again
			case o.st.Code == codec.OK && o.ended:
				return fmt.Errorf("%v: %s was told something else", f, o)
			case !o.unknown():
				return fmt.Errorf("%v: %s was told that it failed", f, o)
			case f.rev <= o.floor:
				return fmt.Errorf("%v: by %s, which began when a client had been shown %d", f, o, o.floor)
			}
			v := c.before(rev)
			v.eval(o.req)
			if !c.same(v.writes, rev) && !c.metForeignAt(o, rev) {
				return fmt.Errorf("%v: by %s, which must have written %v there, and there is %v", f, o, v.writes, c.h.byRev[rev])
			}
		}
	}
	return nil
}

// orphanDelete looks for a request that may be the reason for a delete that no answer accounts for.
func (c *checker) orphanDelete(f *fact) error {
	for _, o := range c.r.ops {
		if f.rev <= o.floor || !deletes(o.req, f.key) {
			continue
		}
		if o.unknown() || o.st.Code == codec.OK && o.rev > c.to {
			return nil
		}
		if q, ok := o.req.(*pb.DeleteRangeRequest); ok && o.st.Code == codec.OK && len(q.RangeEnd) > 0 && f.rev <= o.rev && c.r.Shards > 1 {
			return nil
		}
	}
	return fmt.Errorf("%v: nobody deleted this", f)
}

func deletes(req proto.Message, key string) bool {
	switch q := req.(type) {
	case *pb.DeleteRangeRequest:
		return within(key, string(q.Key), string(q.RangeEnd))
	case *pb.TxnRequest:
		for _, ops := range [][]*pb.RequestOp{q.Success, q.Failure} {
			for _, o := range ops {
				if d := o.GetRequestDeleteRange(); d != nil && deletes(d, key) {
					return true
				}
				if t := o.GetRequestTxn(); t != nil && deletes(t, key) {
					return true
				}
			}
		}
	}
	return false
}
