package sim

import (
	"bytes"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// This file is what goes wrong for long: partitions, in both directions or one, clusters that die and return, members
// that are full, and proxies that stop in the middle of something.

// cut parts a proxy from a cluster, from some, or from all: what it sends does not arrive, what it is answered does
// not, or neither. Connections that were cut are broken at the end.
func (r *Run) cut(p *proxy) {
	w := r.net
	var ids []codec.ClusterID
	all := p.host.ids() // the coordinator first
	switch w.Rand.IntN(5) {
	case 0, 1:
		ids = all[:1]
	case 2:
		ids = all[1+w.Rand.IntN(len(all)-1):][:1]
	case 3:
		ids = all[1:]
	case 4: // from some
		for _, id := range all {
			if w.Chance(0.5) {
				ids = append(ids, id)
			}
		}
	}
	deaf, mute := true, true
	switch w.Rand.IntN(3) {
	case 0:
		deaf = false
	case 1:
		mute = false
	}
	d := w.Between(100*time.Millisecond, time.Second)
	if w.Chance(0.4) {
		d = w.Between(time.Second, 15*time.Second)
	}
	r.stats.Cuts++
	for _, id := range ids {
		l := p.host.Link(id)
		w.tracef("%s-%s: cut for %v, requests lost: %v, replies lost: %v", p.host.Name, l.cluster, d, deaf, mute)
		l.Deaf, l.Mute = l.Deaf || deaf, l.Mute || mute
		w.After(d, l.heal)
	}
}

// heal ends a partition.
func (l *Link) heal() {
	if l.Deaf || l.Mute {
		l.net().tracef("%s-%s: whole again", l.host.Name, l.cluster)
		l.Deaf, l.Mute = false, false
		l.Reset()
	}
}

// die takes a cluster away from everybody, connections and all, and brings it back with everything it had.
func (r *Run) die(c *Cluster, d time.Duration) {
	w := r.net
	if c.paused {
		return
	}
	w.tracef("%s: dies, back in %v", c, d)
	r.stats.Deaths++
	c.Pause()
	var down []*Link
	for _, p := range r.proxies {
		if !p.up {
			continue
		}
		if l := p.host.Link(c.ID); l.cluster == c && !l.Down {
			l.Reset()
			l.Down = true
			down = append(down, l)
		}
	}
	w.After(d, func() {
		w.tracef("%s: is back", c)
		c.Resume()
		for _, l := range down {
			l.Down = false
			l.up()
		}
	})
}

// fill lets a member be out of space for a while: it answers so to everything that takes some, and does a part of it
// all the same (etcd applies what made it full, and refuses what comes later). Somebody disarms the alarm then.
func (r *Run) fill(c *Cluster, d time.Duration) {
	if c.full {
		return
	}
	w := r.net
	w.tracef("%s: is full for %v", c, d)
	r.stats.Fulls++
	c.full = true
	w.After(d, func() {
		w.tracef("%s: has space again", c)
		c.full = false
	})
}

// takesSpace reports whether etcd refuses a request while it is full.
func takesSpace(m codec.Method, req []byte) bool {
	switch m {
	case codec.MethodLeaseGrant:
		return true
	case codec.MethodTxn:
		t := &pb.TxnRequest{}
		return proto.Unmarshal(req, t) == nil && hasPut(t)
	}
	return false
}

func hasPut(t *pb.TxnRequest) bool {
	for _, ops := range [][]*pb.RequestOp{t.Success, t.Failure} {
		for _, o := range ops {
			if o.GetRequestPut() != nil || o.GetRequestTxn() != nil && hasPut(o.GetRequestTxn()) {
				return true
			}
		}
	}
	return false
}

// serve answers a request as the cluster is at the moment.
func (c *Cluster) serve(m codec.Method, req []byte) ([]byte, codec.Status) {
	if !c.full || !takesSpace(m, req) {
		return c.Serve(m, req)
	}
	if c.net.Chance(0.3) {
		if _, st := c.Serve(m, req); st.Code != codec.OK {
			return nil, st
		}
	}
	c.net.refuseRecord(m, req)
	return nil, codec.ErrNoSpace
}

// refuseRecord notes that a compaction was told that there is no space for its record: it goes on without, for a full
// member must be able to free space, and does not hold on every proxy then.
func (w *Net) refuseRecord(m codec.Method, req []byte) {
	if m == codec.MethodTxn && bytes.Contains(req, []byte("\x00compact")) {
		w.unrecorded = append(w.unrecorded, w.now)
	}
}

// isBatch reports whether a Txn is a batch, or the fence of a rebuild.
func isBatch(t *pb.TxnRequest) bool {
	for _, o := range t.Success {
		if p := o.GetRequestPut(); p != nil && string(p.Key) == keyClock {
			return len(t.Compare) > 1
		}
	}
	return false
}

// The steps in whose middle a proxy may stop.
const (
	midReplace = iota // of a rebuild: the coordinator's keys
	midRebuild        // of a rebuild: a shard's fence
	midFence
	midCompaction
	midLease
	midSteps
)

// midOf tells what a request is a step of, -1 for nothing that matters.
func midOf(to codec.ClusterID, m codec.Method, req []byte) int {
	switch m {
	case codec.MethodCompact:
		return midCompaction
	case codec.MethodLeaseGrant:
		return midLease
	case codec.MethodTxn:
	default:
		return -1
	}
	t := &pb.TxnRequest{}
	if proto.Unmarshal(req, t) != nil {
		return -1
	}
	for _, ops := range [][]*pb.RequestOp{t.Success, t.Failure} {
		for _, o := range ops {
			p := o.GetRequestPut()
			switch {
			case p == nil:
			case to == codec.Coordinator && string(p.Key) == "e":
				return midReplace
			case to == codec.Coordinator:
			case string(p.Key) == "\x00map":
				return midRebuild
			case string(p.Key) == "\x00compact":
				return midCompaction
			case bytes.HasPrefix(p.Key, []byte("\x00lease")):
				return midLease
			case string(p.Key) == keyClock:
				if rec, err := parseRecord(p.Value); err == nil && rec.kind == 2 {
					return midFence
				}
			}
		}
	}
	return -1
}

// sent is told of every request that leaves a proxy, and stops some of them behind it: what the proxy would have
// sent next, and the answer, wait until it goes on.
func (r *Run) sent(h *Host, to codec.ClusterID, m codec.Method, req []byte) {
	r.cutShort(h, m, req)
	if !r.chaos || r.Chaos == 0 || !r.Events.StallMid || h.stalled || r.stats.Stalls >= maxStalls {
		return
	}
	mid := midOf(to, m, req)
	if mid < 0 || !r.net.Chance(0.2) {
		return
	}
	for _, p := range r.proxies {
		if p.host == h {
			r.stats.Mid[mid]++
			d := r.net.Between(0, time.Second)
			if r.net.Chance(0.3) {
				d = r.net.Between(0, 10*time.Second)
			}
			r.stall(p, d)
		}
	}
}
