package load

import (
	"time"

	"spindle/codec"
)

// maxPrepRetries bounds how often an object is tried that must exist before the load begins.
const maxPrepRetries = 200

// objects returns how many objects of each kind worker w has to care for: all numbers that are its own modulo
// the number of clients.
func (w *worker) objects() (pods, nodes int) {
	s := &w.g.run.spec
	n := (s.Keys - w.id + s.Clients - 1) / s.Clients
	if s.Mix.has(Update, Get, List, Page, Stream) {
		pods = max(n, 0)
	}
	if s.Mix.has(Heartbeat) {
		nodes = max(n, 0)
	}
	return pods, nodes
}

// prep makes the worker's next object, or finds out its revision: an update from revision 0 does either.
func (w *worker) prep(now int64) {
	r := w.g.run
	i := w.prepNext
	if i == len(w.pods)+len(w.nodes) {
		w.prepping = false
		r.prepared.done()
		return
	}
	w.kind = kindUpdate
	if i < len(w.pods) {
		w.key = r.keys.pod(w.key, int64(w.id+i*r.spec.Clients))
	} else {
		w.key = r.keys.node(w.key, int64(w.id+(i-len(w.pods))*r.spec.Clients))
	}
	w.send(appendUpdate(w.msg[:0], w.key, w.value(now), 0))
}

func (w *worker) prepped(st codec.Status, now int64) {
	if st.Code != codec.OK {
		if w.g.run.refused(st) {
			return
		}
		if w.retries++; w.retries > maxPrepRetries {
			w.g.run.abort("cannot make the objects that the load needs: %s", st.Msg)
			return
		}
		w.g.park(w)
		return
	}
	w.retries = 0
	rev := w.txn.rev
	if !w.txn.succeeded {
		rev = w.txn.mod
	}
	if i := w.prepNext; i < len(w.pods) {
		w.pods[i] = rev
	} else {
		w.nodes[i-len(w.pods)] = rev
	}
	w.prepNext++
	w.next(now, now)
}

// prepare makes the objects, and returns when they are there.
func (r *run) prepare() error {
	begin := time.Now()
	n := 0
	for _, g := range r.groups {
		for _, w := range g.workers {
			pods, nodes := w.objects()
			w.pods, w.nodes = make([]int64, pods), make([]int64, nodes)
			n += pods + nodes
		}
	}
	if n == 0 {
		return nil
	}
	r.prepared.begin(r.spec.Clients)
	for _, g := range r.groups {
		g.conn.Lock()
		now := r.now()
		for _, w := range g.workers {
			w.prepping = true
			w.next(now, now)
		}
		g.conn.Unlock()
	}
	every := time.NewTicker(time.Second)
	defer every.Stop()
	for {
		select {
		case <-r.prepared.open:
			r.say("%d objects are there after %v", n, time.Since(begin).Round(time.Millisecond))
			return nil
		case <-r.ctx.Done():
			return r.why()
		case <-every.C:
			left := 0
			for _, g := range r.groups {
				g.conn.Lock()
				for _, w := range g.workers {
					left += len(w.pods) + len(w.nodes) - w.prepNext
				}
				g.conn.Unlock()
			}
			r.say("making objects: %d of %d", n-left, n)
		}
	}
}
