package sim

import (
	"fmt"
	"math"
	"sort"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// This file judges a run a second time, with porcupine: is there, for each key, an order of all operations that fits
// what clients were told and when? It shares nothing with check.go, and looks at no record, no stamp and no
// revision of a member; all it takes from the members is when a key went by itself. What has several keys, of
// several shards too, is looked at key by key.

// linearBudget is how long porcupine may take for one run. What it has not decided by then is counted.
const linearBudget = 400 * time.Millisecond

// keyState is what a key holds.
type keyState struct {
	exists               bool
	value                string
	mod, create, version int64 // a revision is 0 while nobody was told it
}

// keyOp is an operation as one key sees it: porcupine's input. It has its output, too.
type keyOp struct {
	key  string
	op   *op // nil: the key goes by itself
	told bool
}

// linear reports the first key whose operations fit no order.
func (r *Run) linear() error {
	if r.Events.Foreign {
		return nil // clients may notice that: see check_foreign.go
	}
	var ops []porcupine.Operation
	seen := map[string]*mvccpb.KeyValue{}
	for _, o := range r.ops {
		told := o.ended && o.st.Code == codec.OK
		if q, ok := o.req.(*pb.RangeRequest); !told && (!o.unknown() || !mayWrite(o.req)) || ok && (q.Serializable || q.Revision > 0) {
			continue
		}
		end := int64(math.MaxInt64)
		if told {
			end = o.ret
			eachKV(o.resp, func(kv *mvccpb.KeyValue) { seen[string(kv.Value)] = kv })
		}
		for i := range r.Keys {
			if k := keyName(i); mentions(o.req, k) && (r.loss == nil || r.part.ShardOf([]byte(k)) != r.loss.shard) {
				ops = append(ops, porcupine.Operation{ClientId: o.id, Input: &keyOp{key: k, op: o, told: told}, Call: o.call, Return: end})
			}
		}
	}
	for _, m := range r.net.Members {
		ops = append(ops, goneByThemselves(m.Log())...)
	}
	byKey := map[string][]porcupine.Operation{}
	for _, o := range ops {
		k := o.Input.(*keyOp).key
		byKey[k] = append(byKey[k], o)
	}
	model := (&porcupine.NondeterministicModel{
		Init:  func() []any { return []any{keyState{}} },
		Step:  func(s, in, _ any) []any { return in.(*keyOp).step(s.(keyState), seen) },
		Equal: func(a, b any) bool { return a == b },
	}).ToModel()
	until := time.Now().Add(linearBudget)
	for i := range r.Keys {
		k := keyName(i)
		r.stats.Judged += len(byKey[k])
		switch porcupine.CheckOperationsTimeout(model, byKey[k], max(time.Until(until), time.Millisecond)) {
		case porcupine.Unknown:
			r.stats.Undecided++
		case porcupine.Illegal:
			return fmt.Errorf("porcupine finds no order for key %q: %s", k, listing(byKey[k]))
		}
	}
	return nil
}

func listing(ops []porcupine.Operation) string {
	sort.SliceStable(ops, func(i, j int) bool { return ops[i].Call < ops[j].Call })
	var b strings.Builder
	for _, o := range ops {
		if in := o.Input.(*keyOp); in.op != nil {
			fmt.Fprintf(&b, "\n%d..%d %s", o.Call, o.Return, in.op)
		} else {
			fmt.Fprintf(&b, "\n%d..%d goes by itself", o.Call, o.Return)
		}
	}
	return b.String()
}

// goneByThemselves returns the deletes that no batch did: leases that ended. One is there for every read that begins
// after the record that follows it.
func goneByThemselves(log []*Change) (ops []porcupine.Operation) {
	waiting := 0 // of ops, from here on
	for i := 0; i < len(log); {
		group := log[i:]
		for n := range group {
			if group[n].Main != group[0].Main {
				group = group[:n]
				break
			}
		}
		i += len(group)
		batch := false
		for _, c := range group {
			batch = batch || string(c.KV.Key) == keyClock
		}
		if batch {
			for ; waiting < len(ops); waiting++ {
				ops[waiting].Return = group[0].Seq
			}
			continue
		}
		for _, c := range group {
			if c.Delete && c.KV.Key[0] != 0 {
				ops = append(ops, porcupine.Operation{Input: &keyOp{key: string(c.KV.Key)}, Call: c.Seq, Return: math.MaxInt64})
			}
		}
	}
	return ops
}

// step returns what the key may hold behind the operation, nothing if it cannot have happened on s.
func (in *keyOp) step(s keyState, seen map[string]*mvccpb.KeyValue) (next []any) {
	if in.op == nil {
		return []any{keyState{}}
	}
	e := keyEval{key: in.key, was: s, is: s}
	if in.told {
		e.rev = in.op.rev
		if d, ok := in.op.req.(*pb.DeleteRangeRequest); ok && len(d.RangeEnd) > 0 {
			e.rev = 0 // each shard's part has its own
		}
		if !e.told(in.op.req, in.op.resp) {
			return nil
		}
		return []any{e.is}
	}
	// It may have happened, as any of these. That it never did is the same as that it did last of all.
	for _, end := range e.untold(in.op.req, seen) {
		next = append(next, end)
	}
	return next
}

// keyEval is one operation on one key: compares see what was there, all else what is.
type keyEval struct {
	key     string
	was, is keyState
	rev     int64 // of what it writes, 0 if it is not known
}

// told goes through a request with its answer, and reports whether that can be.
func (e *keyEval) told(req, resp proto.Message) bool {
	switch q := req.(type) {
	case *pb.RangeRequest:
		return q.Revision > 0 || !within(e.key, string(q.Key), string(q.RangeEnd)) || e.shows(q, resp.(*pb.RangeResponse))
	case *pb.PutRequest:
		if string(q.Key) != e.key {
			return true
		}
		if q.IgnoreLease && !e.is.exists || q.PrevKv && !e.matches(resp.(*pb.PutResponse).PrevKv) {
			return false
		}
		return e.put(string(q.Value), e.rev, e.rev)
	case *pb.DeleteRangeRequest:
		if !within(e.key, string(q.Key), string(q.RangeEnd)) {
			return true
		}
		r := resp.(*pb.DeleteRangeResponse)
		switch {
		case q.PrevKv && !e.matches(find(r.PrevKvs, e.key)),
			len(q.RangeEnd) == 0 && e.is.exists != (r.Deleted == 1),
			r.Deleted == 0 && e.is.exists,
			e.is.exists && e.rev > 0 && e.rev <= e.is.mod:
			return false
		}
		e.is = keyState{}
	case *pb.TxnRequest:
		t := resp.(*pb.TxnResponse)
		ops, mine, all := q.Failure, true, true
		if t.Succeeded {
			ops = q.Success
		}
		for _, c := range q.Compare {
			holds := e.compare(c, t.Succeeded)
			if t.Succeeded && holds == never {
				return false
			}
			mine = mine && string(c.Key) == e.key && len(c.RangeEnd) == 0
			all = all && holds == always
		}
		if !t.Succeeded && mine && all || len(ops) != len(t.Responses) {
			return false
		}
		for i, o := range ops {
			if !e.told(requestOf(o), responseOf(t.Responses[i])) {
				return false
			}
		}
	}
	return true
}

// untold goes through a request without an answer, and returns how it may have ended.
func (e keyEval) untold(req proto.Message, seen map[string]*mvccpb.KeyValue) []keyState {
	switch q := req.(type) {
	case *pb.PutRequest:
		if string(q.Key) == e.key && (e.is.exists || !q.IgnoreLease) {
			var mod, create int64
			if kv := seen[string(q.Value)]; kv != nil {
				mod, create = kv.ModRevision, kv.CreateRevision
			}
			e.put(string(q.Value), mod, create)
		}
	case *pb.DeleteRangeRequest:
		if within(e.key, string(q.Key), string(q.RangeEnd)) {
			e.is = keyState{}
		}
	case *pb.TxnRequest:
		least, most := always, always
		for _, c := range q.Compare {
			holds := e.compare(c, false)
			if string(c.Key) != e.key || len(c.RangeEnd) > 0 {
				least = never // another key decides
			}
			least, most = min(least, holds), min(most, holds)
		}
		var ends []keyState
		if most > never {
			ends = append(ends, e.untoldAll(q.Success, seen)...)
		}
		if least < always {
			ends = append(ends, e.untoldAll(q.Failure, seen)...)
		}
		return ends
	}
	return []keyState{e.is}
}

func (e keyEval) untoldAll(ops []*pb.RequestOp, seen map[string]*mvccpb.KeyValue) []keyState {
	ends := []keyState{e.is}
	for _, o := range ops {
		var next []keyState
		for _, s := range ends {
			e.is = s
			next = append(next, e.untold(requestOf(o), seen)...)
		}
		ends = next
	}
	return ends
}

func (e *keyEval) put(value string, mod, create int64) bool {
	if mod > 0 && e.is.exists && mod <= e.is.mod {
		return false
	}
	if e.is.exists {
		create = e.is.create
	}
	e.is = keyState{exists: true, value: value, mod: mod, create: create, version: e.is.version + 1}
	return true
}

// shows reports whether a range may have shown what it has of the key.
func (e *keyEval) shows(q *pb.RangeRequest, r *pb.RangeResponse) bool {
	kv := find(r.Kvs, e.key)
	switch {
	case kv != nil && q.KeysOnly:
		return e.matches(&mvccpb.KeyValue{Value: []byte(e.is.value), ModRevision: kv.ModRevision, CreateRevision: kv.CreateRevision, Version: kv.Version})
	case kv != nil:
		return e.matches(kv)
	case q.CountOnly && len(q.RangeEnd) > 0, r.More, q.MinModRevision > 0, q.MaxModRevision > 0, q.MinCreateRevision > 0, q.MaxCreateRevision > 0:
		return true
	case q.CountOnly:
		return e.is.exists == (r.Count == 1)
	}
	return !e.is.exists
}

// matches reports whether kv, nil for nothing, may be what is there, and learns its revisions.
func (e *keyEval) matches(kv *mvccpb.KeyValue) bool {
	s := &e.is
	switch {
	case kv == nil || !s.exists:
		return kv == nil && !s.exists
	case string(kv.Value) != s.value, kv.Version != s.version, s.mod > 0 && s.mod != kv.ModRevision, s.create > 0 && s.create != kv.CreateRevision:
		return false
	}
	s.mod, s.create = kv.ModRevision, kv.CreateRevision
	return true
}

// holds says whether a compare holds.
type holds int

const (
	never holds = iota
	perhaps
	always
)

// compare says whether c holds for this key, as far as that is known. If it is known to hold, it may teach the mod
// revision.
func (e *keyEval) compare(c *pb.Compare, known bool) holds {
	s := &e.was
	if !within(e.key, string(c.Key), string(c.RangeEnd)) || len(c.RangeEnd) > 0 && !s.exists {
		return perhaps
	}
	if !s.exists && c.Target == pb.Compare_VALUE {
		return never
	}
	if s.exists && (c.Target == pb.Compare_MOD && s.mod == 0 || c.Target == pb.Compare_CREATE && s.create == 0) {
		if known && c.Target == pb.Compare_MOD && c.Result == pb.Compare_EQUAL && e.is == *s {
			s.mod = c.GetModRevision()
			e.is.mod = s.mod
			if s.mod == 0 {
				return never
			}
		}
		return perhaps
	}
	if compareKV(c, &mvccpb.KeyValue{Value: []byte(s.value), ModRevision: s.mod, CreateRevision: s.create, Version: s.version}) {
		return always
	}
	return never
}

func find(kvs []*mvccpb.KeyValue, key string) *mvccpb.KeyValue {
	for _, kv := range kvs {
		if string(kv.Key) == key {
			return kv
		}
	}
	return nil
}

// eachKV calls f with every whole pair that an answer shows.
func eachKV(resp proto.Message, f func(*mvccpb.KeyValue)) {
	all := func(kvs ...*mvccpb.KeyValue) {
		for _, kv := range kvs {
			if kv != nil && len(kv.Value) > 0 {
				f(kv)
			}
		}
	}
	switch v := resp.(type) {
	case *pb.RangeResponse:
		all(v.Kvs...)
	case *pb.PutResponse:
		all(v.PrevKv)
	case *pb.DeleteRangeResponse:
		all(v.PrevKvs...)
	case *pb.TxnResponse:
		for _, o := range v.Responses {
			eachKV(responseOf(o), f)
		}
	}
}

func requestOf(o *pb.RequestOp) proto.Message {
	switch v := o.Request.(type) {
	case *pb.RequestOp_RequestRange:
		return v.RequestRange
	case *pb.RequestOp_RequestPut:
		return v.RequestPut
	case *pb.RequestOp_RequestDeleteRange:
		return v.RequestDeleteRange
	case *pb.RequestOp_RequestTxn:
		return v.RequestTxn
	}
	return nil
}

func responseOf(o *pb.ResponseOp) proto.Message {
	switch v := o.Response.(type) {
	case *pb.ResponseOp_ResponseRange:
		return v.ResponseRange
	case *pb.ResponseOp_ResponsePut:
		return v.ResponsePut
	case *pb.ResponseOp_ResponseDeleteRange:
		return v.ResponseDeleteRange
	case *pb.ResponseOp_ResponseTxn:
		return v.ResponseTxn
	}
	return nil
}
