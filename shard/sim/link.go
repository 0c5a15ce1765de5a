package sim

import (
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/shard"
)

// Host is one life of one proxy process as the network sees it: its links to the clusters. It implements
// codec.Transport for the proxy's Core.
type Host struct {
	Name string
	// Turn is called after everything that is reported to the Core.
	Turn func()
	// OnConnected is told of a cluster that had no connection and has one again; nil if nobody wants to know.
	OnConnected func(codec.ClusterID)
	// Ways is how many endpoints each cluster seems to have, 0 if nothing is said of them.
	Ways int

	net   *Net
	links map[codec.ClusterID]*Link
	dead  bool

	newCheck func(codec.ClusterID) *shard.Check // looks at new connections, see restore.go

	stalled bool     // the process stands still
	waiting []func() // what happens to it meanwhile
}

// NewHost makes a host whose links take base plus up to jitter one way.
func (w *Net) NewHost(name string, base, jitter time.Duration) *Host {
	h := &Host{Name: name, net: w, links: map[codec.ClusterID]*Link{}}
	for _, c := range append([]*Cluster{w.Coord}, w.Members...) {
		l := &Link{host: h, cluster: c, Base: base, Jitter: jitter}
		h.links[c.ID] = l
		c.links = append(c.links, l)
	}
	return h
}

// Link returns the link to a cluster.
func (h *Host) Link(id codec.ClusterID) *Link { return h.links[id] }

// Connected reports whether the host has a connection to the cluster; the core asks before it hands out
// revisions that it could not use. (A hole looks like a connection.)
func (h *Host) Connected(id codec.ClusterID) bool { return !h.links[id].Down && !h.links[id].untrusted }

// Endpoints tells of the endpoints of a cluster, as a pool does.
func (h *Host) Endpoints(codec.ClusterID) []shard.EndpointStatus {
	list := make([]shard.EndpointStatus, h.Ways)
	for i := range list {
		list[i].Connected = true
	}
	return list
}

// Down reports for how long the host has had no connection to the cluster, and why; 0 while it has one. A shard that is
// down for long is not waited for.
func (h *Host) Down(id codec.ClusterID) (why string, since time.Duration) {
	if h.Connected(id) {
		return "", 0
	}
	l := h.links[id]
	return "simulated: not connected", time.Duration(h.net.now - l.lost)
}

// up tells the process that it may have a connection again.
func (l *Link) up() {
	h := l.host
	h.do(func() {
		if h.dead || h.OnConnected == nil || !h.Connected(l.cluster.ID) {
			return
		}
		h.OnConnected(l.cluster.ID)
		h.Turn()
	})
}

// Kill ends the process: nothing is reported to it any more. Requests that are under way arrive, or not.
func (h *Host) Kill() {
	h.dead = true
	for _, id := range h.ids() {
		l := h.links[id]
		for _, s := range append([]*stream(nil), l.streams...) {
			s.remove()
		}
		for _, c := range l.calls {
			c.orphan()
		}
	}
}

func (h *Host) ids() []codec.ClusterID {
	ids := []codec.ClusterID{codec.Coordinator}
	for _, c := range h.net.Members {
		ids = append(ids, c.ID)
	}
	return ids
}

// Link is the way between a host and a cluster.
type Link struct {
	Base, Jitter time.Duration
	// Down refuses new requests and streams.
	Down bool
	// Hole swallows everything, in both directions; callers only notice by their timeouts.
	Hole bool
	// Deaf swallows what goes to the cluster, Mute what comes from it.
	Deaf, Mute bool
	// StreamLag is how much later than replies the streams' messages come.
	StreamLag time.Duration
	// StreamHole swallows the streams' messages alone until it ends.
	StreamHole bool

	host      *Host
	cluster   *Cluster
	conn      int    // counts connections, and looks at one
	untrusted bool   // it was not looked at yet: nothing else may use it
	lost      int64  // when it was last in use
	mistaken  func() // leads a link that was led astray back, nil for none
	calls     []*call
	streams   []*stream
}

func (l *Link) delay() time.Duration { return l.Base + l.net().Between(0, l.Jitter) }

func (l *Link) net() *Net { return l.host.net }

// Reset breaks the connection: calls fail, some of them are applied later all the same; streams end.
func (l *Link) Reset() {
	w := l.net()
	w.tracef("%s-%s: connection reset", l.host.Name, l.cluster)
	for _, c := range append([]*call(nil), l.calls...) {
		c.lost = w.Chance(0.5)
		if !c.arrived && !c.lost && w.Chance(0.5) {
			c.after = w.Between(0, MaxLate)
		}
		c.complete(w.Between(0, time.Millisecond), nil, codec.Status{Code: codec.Unavailable, Msg: "simulated: connection reset"}, true)
	}
	for _, s := range append([]*stream(nil), l.streams...) {
		s.fail(codec.Status{Code: codec.Unavailable, Msg: "simulated: connection reset"})
	}
	l.look()
}

// call is one unary request under way.
type call struct {
	l       *Link
	m       codec.Method
	req     []byte
	done    codec.Completion // nil once the outcome is on its way, or the host is dead
	arrived bool
	lost    bool
	after   time.Duration // further delay before it arrives
	id      uint64
	twice   bool // it arrives a second time, and nobody hears of that
	process int  // of the cluster, to which it was sent
}

// repeatable reports whether a second copy of a request must do no harm: a batch, for its guard, and a tick.
func repeatable(to codec.ClusterID, m codec.Method, req []byte) bool {
	q := &pb.TxnRequest{}
	if m != codec.MethodTxn || proto.Unmarshal(req, q) != nil {
		return false
	}
	return to != codec.Coordinator && isBatch(q) || to == codec.Coordinator && len(q.Compare) == 1 && hasPut(q)
}

// Call implements codec.Transport.
func (h *Host) Call(to codec.ClusterID, m codec.Method, req []byte, timeout time.Duration, done codec.Completion) {
	if l := h.links[to]; l.untrusted && !h.dead && !h.stalled {
		c := &call{l: l, done: done}
		c.complete(h.net.Between(0, time.Millisecond), nil, statusUntrusted, false)
		return
	}
	h.send(to, m, req, timeout, done)
}

// send sends a request whether the connection is trusted or not.
func (h *Host) send(to codec.ClusterID, m codec.Method, req []byte, timeout time.Duration, done codec.Completion) {
	w := h.net
	l := h.links[to]
	c := &call{l: l, process: l.cluster.process, m: m, req: append([]byte(nil), req...), done: done}
	if w.Tamper != nil {
		c.req = w.Tamper(to, m, c.req)
	}
	w.seq++
	c.id = w.seq
	if h.dead {
		return
	}
	if h.stalled {
		h.waiting = append(h.waiting, func() { h.Call(to, m, c.req, timeout, done) })
		return
	}
	l.calls = append(l.calls, c)
	if w.Trace != nil {
		w.tracef("%s>%s #%d %s", h.Name, l.cluster, c.id, describeRequest(m, c.req))
	}
	unavailable := codec.Status{Code: codec.Unavailable, Msg: "simulated: connection lost"}
	f := &w.Faults
	out := l.delay()
	back := l.delay()
	if w.Chance(f.SlowRequest) {
		out += w.Between(0, 400*time.Millisecond)
	}
	if w.Chance(f.SlowReply) {
		back += w.Between(0, 400*time.Millisecond)
	}
	send := true
	switch {
	case l.Down || w.Chance(f.Unsent):
		c.complete(w.Between(0, time.Millisecond), nil, codec.Status{Code: codec.Unavailable, Msg: "simulated: not connected"}, false)
		return
	case l.Hole || l.Deaf:
		send = false
	case w.Chance(f.LoseRequest):
		send = false
		if w.Chance(0.5) {
			c.complete(out+back, nil, unavailable, true)
		}
	case w.Chance(f.LoseReply):
		c.lost = true // the reply
		w.After(out, func() { l.cluster.arrive(func() { c.arrive(-1) }) })
		send = false
		if w.Chance(0.5) {
			c.complete(out+back, nil, unavailable, true)
		}
	case w.Chance(f.Late):
		d := w.Between(0, 20*time.Millisecond)
		if w.Chance(0.3) {
			d = w.Between(0, MaxLate)
		}
		c.complete(out, nil, unavailable, true)
		w.After(out+d, func() { l.cluster.arrive(func() { c.arrive(-1) }) })
		send = false
	case w.Chance(f.Refused):
		c.complete(out+back, nil, codec.ErrTooManyRequests, true)
		send = false
	case w.Chance(f.NoLeader):
		st := troubleAnswers[w.Rand.IntN(len(troubleAnswers))]
		switch w.Rand.IntN(3) {
		case 0:
			w.After(out, func() { l.cluster.arrive(func() { c.arrive(-1) }) })
		case 1:
			w.After(out+w.Between(0, 300*time.Millisecond), func() { l.cluster.arrive(func() { c.arrive(-1) }) })
		}
		if st == codec.ErrNoSpace {
			w.refuseRecord(m, c.req)
		}
		c.complete(out+back, nil, st, true)
		send = false
	}
	c.twice = send && w.Chance(f.Duplicate) && repeatable(to, m, c.req)
	if send {
		w.After(out, func() {
			if c.after > 0 {
				w.After(c.after, func() { l.cluster.arrive(func() { c.arrive(back) }) })
				return
			}
			l.cluster.arrive(func() { c.arrive(back) })
		})
	}
	if w.Sent != nil {
		w.Sent(h, to, m, c.req)
	}
	w.After(timeout, func() {
		c.complete(0, nil, codec.Status{Code: codec.DeadlineExceeded, Msg: "context deadline exceeded"}, true)
	})
}

// arrive applies the request; back < 0 means that nobody hears of it.
func (c *call) arrive(back time.Duration) {
	if c.arrived || c.lost && back >= 0 || c.process != c.l.cluster.process {
		return // or it was sent to a process that is gone
	}
	c.arrived = true
	e := c.l.cluster
	resp, st := e.serve(c.m, c.req)
	if c.twice {
		w := c.l.net()
		w.After(w.Between(0, MaxLate), func() {
			e.arrive(func() {
				if c.process == e.process {
					w.tracef("%s: #%d arrives a second time", e, c.id)
					e.serve(c.m, c.req)
				}
			})
		})
	}
	if w := c.l.net(); w.Trace != nil {
		w.tracef("%s: #%d of %s applied: %s", e, c.id, c.l.host.Name, describeResponse(c.m, resp, st))
	}
	if w := c.l.net(); w.TamperReply != nil && st.Code == codec.OK {
		resp = w.TamperReply(e.ID, c.m, c.req, resp)
	}
	if back >= 0 && !c.l.Hole && !c.l.Mute {
		c.complete(back, resp, st, true)
	}
}

// orphan decides what becomes of a request whose sender died.
func (c *call) orphan() {
	if !c.arrived && c.l.net().Chance(0.5) {
		c.lost = true
	}
	c.done = nil
}

// complete reports the outcome after d; only the first outcome counts.
func (c *call) complete(d time.Duration, resp []byte, st codec.Status, sent bool) {
	done := c.done
	if done == nil {
		return
	}
	c.done = nil
	c.l.net().After(d, func() {
		for i, o := range c.l.calls {
			if o == c {
				c.l.calls = append(c.l.calls[:i], c.l.calls[i+1:]...)
				break
			}
		}
		c.l.host.do(func() {
			if c.l.host.dead {
				return
			}
			if w := c.l.net(); w.Trace != nil && st.Code != codec.OK {
				w.tracef("%s: #%d completes: %v %q sent=%v", c.l.host.Name, c.id, st.Code, st.Msg, sent)
			} else if w.Trace != nil {
				w.tracef("%s: #%d completes", c.l.host.Name, c.id)
			}
			done.Complete(resp, st, sent)
			if len(resp) <= codec.KeptReply {
				poison(resp)
			}
			c.l.host.Turn()
		})
	})
}

// poison overwrites bytes that were valid only during a call, so that whoever kept them shows.
func poison(b []byte) {
	for i := range b {
		b[i] = 0xA5
	}
}

// stream is an open Watch stream in the network.
type stream struct {
	l        *Link
	s        *Stream // nil until the request has arrived
	cluster  *Etcd
	sink     codec.WatchSink // nil after the end
	held     bool
	credit   int      // while held: messages that may still arrive
	kept     [][]byte // have crossed the network, and wait for the owner, in order
	pumping  bool
	in, out  int64 // when the latest message arrives, per direction: streams keep their order
	alive    bool  // a KeepAlive stream: each request is a call that MethodLeaseKeepAlive answers
	combines bool
}

// Watch implements codec.Transport.
func (h *Host) Watch(to codec.ClusterID, req []byte, sink codec.WatchSink) codec.WatchHandle {
	h.net.tracef("%s>%s watch %s", h.Name, h.links[to].cluster, describeWatchRequest(req))
	s := h.open(to, &stream{sink: sink})
	s.Send(req)
	return s
}

// KeepAlive implements codec.Transport.
func (h *Host) KeepAlive(to codec.ClusterID, sink codec.WatchSink) codec.WatchHandle {
	return h.open(to, &stream{sink: sink, alive: true})
}

func (h *Host) open(to codec.ClusterID, s *stream) *stream {
	s.l = h.links[to]
	if h.dead {
		s.sink = nil
		return s
	}
	s.l.streams = append(s.l.streams, s)
	if s.l.Down {
		s.fail(codec.Status{Code: codec.Unavailable, Msg: "simulated: not connected"})
		return s
	}
	if s.l.untrusted {
		s.fail(statusUntrusted)
		return s
	}
	s.l.cluster.streams = append(s.l.cluster.streams, s)
	return s
}

// Send implements codec.WatchHandle.
func (s *stream) Send(req []byte) {
	if !s.isOpen() {
		return
	}
	req = append([]byte(nil), req...)
	w := s.l.net()
	s.out = max(s.out, w.now+int64(s.l.delay()))
	w.at(s.out, func() {
		s.l.cluster.arrive(func() {
			if s.sink == nil || s.l.Hole || s.l.Deaf {
				return
			}
			if s.alive {
				if resp, st := s.l.cluster.Serve(codec.MethodLeaseKeepAlive, req); st.Code == codec.OK {
					s.deliver(resp)
				}
				return
			}
			if s.s == nil {
				s.cluster = s.l.cluster.Etcd
				s.s = s.cluster.OpenStream()
			}
			for _, m := range s.s.Request(req) {
				s.deliver(m)
			}
			s.schedulePump()
		})
	})
}

// streamWindow is how many messages still arrive on a stream that was held back. Without an end of that, a
// wait for something that stands behind it would not be noticed.
const streamWindow = 2

// Hold implements codec.WatchHandle.
func (s *stream) Hold(hold bool) {
	if hold && !s.held {
		s.credit = streamWindow
	}
	s.held = hold
	if hold {
		return
	}
	if len(s.kept) > 0 {
		s.l.net().at(s.l.net().now, func() { s.l.host.do(s.drain) }) // the owner is in the middle of something
	}
	s.schedulePump()
}

// drain hands to the owner what has arrived, as far as its window goes.
func (s *stream) drain() {
	w := s.l.net()
	for len(s.kept) > 0 && (!s.held || s.credit > 0) {
		if s.sink == nil || s.l.host.dead || !s.isOpen() {
			return
		}
		if s.held {
			s.credit--
		}
		m := s.kept[0]
		s.kept = s.kept[1:]
		if w.Trace != nil {
			w.tracef("%s: stream of %s: %s", s.l.host.Name, s.l.cluster, describeWatchResponse(m))
		}
		s.sink.OnMessage(m)
		poison(m)
		s.l.host.Turn()
	}
}

// Close implements codec.WatchHandle.
func (s *stream) Close() { s.remove() }

// remove takes the stream out of the network; nothing more is reported.
func (s *stream) remove() {
	s.sink = nil
	for _, list := range []*[]*stream{&s.l.streams, &s.l.cluster.streams} {
		for i, o := range *list {
			if o == s {
				*list = append((*list)[:i:i], (*list)[i+1:]...)
				break
			}
		}
	}
}

// fail ends the stream for its owner.
func (s *stream) fail(st codec.Status) {
	sink := s.sink
	s.remove()
	if sink == nil {
		return
	}
	// The handle may be closed before the end is reported.
	s.sink = sink
	s.l.net().After(s.l.net().Between(0, time.Millisecond), func() {
		s.l.host.do(func() {
			if s.sink == nil || s.l.host.dead {
				return
			}
			s.sink = nil
			s.l.net().tracef("%s: stream of %s ends: %s", s.l.host.Name, s.l.cluster, st.Msg)
			sink.OnEnd(st)
			s.l.host.Turn()
		})
	})
}

func (s *stream) schedulePump() {
	if s.s == nil || s.pumping || s.held || s.l.Hole || s.l.Mute || s.l.StreamHole || !s.s.Pending() {
		return
	}
	s.pumping = true
	w := s.l.net()
	d := w.Between(0, 300*time.Microsecond)
	if s.l.StreamLag > 0 {
		d += w.Between(0, s.l.StreamLag)
	}
	w.After(d, func() {
		s.pumping = false
		if s.sink == nil || s.held || s.l.Hole || s.l.Mute || s.l.StreamHole {
			return
		}
		for _, m := range s.s.Pull(w.Chance(0.5)) {
			s.deliver(m)
		}
	})
}

// deliver sends m to the owner, behind what was sent before.
func (s *stream) deliver(m []byte) {
	if s.l.Mute {
		return // the connection will not outlive it
	}
	w := s.l.net()
	s.in = max(s.in, w.now+int64(s.l.delay()))
	w.at(s.in, func() {
		s.kept = append(s.kept, m)
		s.l.host.do(s.drain)
	})
}

// isOpen is false when the end of the stream is on its way: what was sent before it is lost.
func (s *stream) isOpen() bool {
	for _, o := range s.l.streams {
		if o == s {
			return true
		}
	}
	return false
}

// Resume lets streams flow again after Hole or StreamHole ended. A hole loses no bytes of a connection
// that survives it.
func (l *Link) Resume() {
	l.Hole, l.StreamHole = false, false
	for _, s := range l.streams {
		s.schedulePump()
	}
}
