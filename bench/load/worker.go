package load

import (
	"math/rand/v2"

	"spindle/codec"
)

// Kind is a kind of request, as it is counted.
type Kind int

// The kinds of requests. A page is a whole list in pages.
const (
	kindCreate Kind = iota
	kindUpdate
	kindDelete
	kindGet
	kindList
	kindPage
	kindStream
	kindHeartbeat
	kindEvent
	kindGrant
	kindCount
)

var kindNames = [kindCount]string{"create", "update", "delete", "get", "list", "page", "stream", "heartbeat", "event", "grant"}

// podUpdates is how often the status of a pod changes before it is deleted.
const podUpdates = 4

// Errors that no server sends: the answer is well-formed, and wrong.
var (
	errNoAnswer = codec.Status{Code: codec.Internal, Msg: "bench: no answer, or one that is not protobuf"}
	errMissing  = codec.Status{Code: codec.DataLoss, Msg: "bench: an object that was written is missing"}
	errCount    = codec.Status{Code: codec.DataLoss, Msg: "bench: the keys of a list are not as many as its count"}
)

// worker is a logical client: one request under way, or none. All of it is guarded by its connection's lock.
type worker struct {
	g   *group
	id  int
	rng rand.PCG

	// The request under way.
	kind  Kind
	start int64 // when it was due
	key   []byte
	msg   []byte
	idx   int  // of its object in pods or nodes
	life  bool // it is part of a pod's life
	good  bool
	txn   txnReply
	list  listReply
	lease int64 // in the answer to a grant

	// What it knows of its objects: their mod revisions, 0 where it knows none.
	pods, nodes []int64
	fresh       int64 // objects made so far

	podStep  int // of the pod's life: 0 is its creation
	podKey   []byte
	podRev   int64
	curLease int64 // lease of events, 0 for none
	leaseUse int
	pageKey  []byte
	pageRev  int64
	got      int64 // keys in the pages or chunks so far
	total    int64 // count of the first page

	prepping bool
	prepNext int
	retries  int
}

// next sends the next request, due at start. now is the time.
func (w *worker) next(start, now int64) {
	w.start = start
	r := w.g.run
	if r.stopped.Load() {
		return
	}
	if w.prepping {
		w.prep(now)
		return
	}
	n := int(w.rng.Uint64() % uint64(r.weights))
	work := r.spec.Mix[0].Work
	for _, s := range r.spec.Mix {
		if work = s.Work; n < s.Weight {
			break
		}
		n -= s.Weight
	}
	k, m := &r.keys, w.msg[:0]
	w.life = work == Pod
	switch work {
	case Create:
		w.key = k.fresh(w.key, "pods", w.id, w.fresh)
		w.fresh++
		w.kind, m = kindCreate, appendCreate(m, w.key, w.value(now), 0)
	case Update:
		w.idx = w.pick(len(w.pods))
		w.key = k.pod(w.key, int64(w.id+w.idx*r.spec.Clients))
		w.kind, m = kindUpdate, appendUpdate(m, w.key, w.value(now), w.pods[w.idx])
	case Heartbeat:
		w.idx = w.pick(len(w.nodes))
		w.key = k.node(w.key, int64(w.id+w.idx*r.spec.Clients))
		w.kind, m = kindHeartbeat, appendUpdate(m, w.key, w.value(now), w.nodes[w.idx])
	case Get:
		w.key = k.pod(w.key, int64(w.pick(r.spec.Keys)))
		w.kind, m = kindGet, appendRange(m, w.key, nil, 1, 0)
	case List:
		w.kind, m = kindList, appendRange(m, r.podsKey, r.podsEnd, 0, 0)
	case Stream:
		w.got = 0
		w.kind, m = kindStream, appendRange(m, r.podsKey, r.podsEnd, 0, 0)
	case Page:
		w.got, w.pageRev = 0, 0
		w.pageKey = append(w.pageKey[:0], r.podsKey...)
		w.kind, m = kindPage, appendRange(m, w.pageKey, r.podsEnd, int64(r.spec.PageSize), 0)
	case Event:
		if w.curLease == 0 || w.leaseUse >= leaseObjects {
			w.kind, m = kindGrant, appendGrant(m, eventsTTL)
			break
		}
		w.key = k.fresh(w.key, "events", w.id, w.fresh)
		w.fresh++
		w.leaseUse++
		w.kind, m = kindEvent, appendCreate(m, w.key, w.value(now), w.curLease)
	case Pod:
		switch {
		case w.podStep == 0:
			w.podKey = k.fresh(w.podKey, "pods", w.id, w.fresh)
			w.fresh++
			w.kind, m = kindCreate, appendCreate(m, w.podKey, w.value(now), 0)
		case w.podStep <= podUpdates:
			w.kind, m = kindUpdate, appendUpdate(m, w.podKey, w.value(now), w.podRev)
		default:
			w.kind, m = kindDelete, appendDelete(m, w.podKey, w.podRev)
		}
	}
	w.send(m)
}

func (w *worker) pick(n int) int { return int(w.rng.Uint64() % uint64(n)) }

// value is the connection's value with the time in it. It is good until the next request is made.
func (w *worker) value(now int64) []byte {
	stampValue(w.g.value, now)
	return w.g.value
}

var kindPaths = [kindCount]string{pathTxn, pathTxn, pathTxn, pathRange, pathRange, pathRange, pathRangeStream, pathTxn, pathTxn, pathGrant}

func (w *worker) send(m []byte) {
	w.msg, w.good = m, false
	if !w.g.conn.Call(kindPaths[w.kind], m, w) {
		w.g.lost()
		return
	}
	w.g.busy++
}

// Message implements client.Sink.
func (w *worker) Message(m []byte) {
	switch w.kind {
	case kindGrant:
		w.lease = parseGrant(m)
		w.good = w.lease != 0
	case kindGet, kindList, kindPage, kindStream:
		w.list, w.good = parseList(m)
		w.got += int64(w.list.n)
		if w.kind == kindPage && w.good && w.list.more {
			w.pageKey = append(append(w.pageKey[:0], w.list.last...), 0)
		}
		w.list.last = nil
	default:
		w.txn, w.good = parseTxn(m)
	}
}

// End implements client.Sink.
func (w *worker) End(st codec.Status) {
	g := w.g
	g.busy--
	now := g.run.now()
	if st.Code == codec.OK && !w.good {
		st = errNoAnswer
	}
	if w.prepping {
		w.prepped(st, now)
		return
	}
	if st.Code != codec.OK && g.run.ctx.Err() != nil {
		return // cut off by the end of the load
	}
	again, conflict := false, false
	if st.Code == codec.OK {
		again, conflict, st = w.answered(now)
	} else {
		w.failed()
	}
	if again {
		if !g.run.stopped.Load() {
			w.send(appendRange(w.msg[:0], w.pageKey, g.run.podsEnd, int64(g.run.spec.PageSize), w.pageRev))
		}
		return
	}
	s := g.stat(w.kind)
	switch {
	case st.Code != codec.OK:
		g.failed(s, st)
		g.park(w)
		return
	case conflict:
		s.conflicts++
	}
	s.lat.Record(now - w.start)
	g.free(w, now)
}

// answered takes over what the answer says. again: the next page is to be fetched; conflict: a compare failed.
func (w *worker) answered(now int64) (again, conflict bool, st codec.Status) {
	switch w.kind {
	case kindGrant:
		w.curLease, w.leaseUse = w.lease, 0
		return
	case kindGet:
		if w.list.n != 1 {
			return false, false, errMissing
		}
		return
	case kindList, kindStream:
		if w.kind == kindList {
			w.got, w.total = int64(w.list.n), w.list.count
		} else {
			w.total = w.list.count
		}
		if w.got != w.total || w.list.more {
			return false, false, errCount
		}
		return
	case kindPage:
		if w.pageRev == 0 {
			w.pageRev, w.total = w.list.rev, w.list.count
		}
		if w.list.more && w.list.n > 0 {
			return true, false, st
		}
		if w.got != w.total {
			return false, false, errCount
		}
		return
	}
	// A Txn.
	rev := w.txn.rev
	if w.txn.succeeded {
		w.g.wrote++
		if w.kind != kindHeartbeat && w.kind != kindEvent {
			w.g.wrotePods++
		}
		w.g.run.acks.put(rev, now)
	} else {
		conflict, rev = true, 0
		if w.txn.found {
			rev = w.txn.mod
		}
	}
	switch {
	case w.kind == kindHeartbeat:
		w.nodes[w.idx] = rev
	case w.kind == kindEvent:
	case w.life:
		w.podRev = rev
		w.podStep++
		if conflict || w.kind == kindDelete {
			w.podStep = 0
		}
	case w.kind == kindUpdate:
		w.pods[w.idx] = rev
	}
	return
}

// failed forgets what a failed request makes doubtful.
func (w *worker) failed() {
	switch w.kind {
	case kindEvent:
		w.curLease = 0
	default:
		if w.life {
			w.podStep = 0
		}
	}
}
