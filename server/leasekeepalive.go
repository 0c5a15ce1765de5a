package server

import (
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
	"spindle/shard"
)

// leaseKeepAlivePath is the :path of etcd's LeaseKeepAlive RPC.
const leaseKeepAlivePath = "/etcdserverpb.Lease/LeaseKeepAlive"

// Limits of LeaseKeepAlive streams.
const (
	// maxKeepAlivesInFlight is how many messages of one stream may be with the core. Further ones wait on the
	// stream, which is not read meanwhile; at most one stream window of them is on its way.
	maxKeepAlivesInFlight = 256
	// maxKeepAlivesWaiting is how many messages may wait on all streams of one connection together. A client
	// that sends keep-alives for all its leases at once, 70,000 to a window, stays below; the stream of one
	// that goes beyond ends with etcd's "too many requests".
	maxKeepAlivesWaiting = 1 << 18
	// maxKeepAliveTwins is how many messages for a lease may wait for one Op's answer; further ones wait on the stream.
	maxKeepAliveTwins = 64
	// maxKeepAliveQueued is how many bytes of answers may wait for the client before no further message is
	// handed to the core; those that are with it come on top.
	maxKeepAliveQueued = 64 << 10
	// maxKeepAlivesPut bounds the leases of one connection that are asked for again in a while. A further one gets no answer.
	maxKeepAlivesPut = 1 << 14
	// maxKeepAlivesAgain is how many of them a stream asks for in one second.
	maxKeepAlivesAgain = 1024
	// defaultKeepAlivePatience is how long an answer is waited for: etcd's time for a request.
	defaultKeepAlivePatience = 5 * time.Second
)

// keepAliveStream is one LeaseKeepAlive RPC: every message is an Op of its own, and answers go out as they
// come. A lease that cannot be answered for now (its home is away or says nothing, or its time is over and it has not been
// revoked yet) is put aside, and is asked for again when the client does, or within a second: so it takes no place among those
// of others. A lease whose home does not answer for KeepAlivePatience gets no answer, as with an etcd that is slow, and does
// not end the stream for the others. But when the client has named no other lease on it, the error ends the stream: there
// is nobody else to spare, and clientv3's KeepAliveOnce waits for exactly that.
//
// A message for a lease that the core is asked for already takes no Op of its own, but gets its answer too: a client
// sends again what was not answered, and must not fill the places of other leases with one that hangs.
//
// It lives on its client's loop; what is said of keepAliveOp.coreDone is the exception.
type keepAliveStream struct {
	rpc  *RPC
	over bool
	held bool // the client's window is withheld

	// IDs that wait, from head on.
	waiting []int64
	head    int
	// flying are the Ops that the core has, by lease; free those of before, to be used again.
	flying   map[int64]*keepAliveOp
	free     []*keepAliveOp
	put      map[int64]*keepAlivePut // put aside
	halfDone bool                    // the client will send no more
	draining bool                    // the server ends: what the core has is answered, then the stream ends

	lease int64 // the first ID seen
	seen  bool
	many  bool // there was another one
}

// keepAliveOp is one message on its way through the core. Its functions are made once, so that the next
// messages cost no memory.
type keepAliveOp struct {
	s        *keepAliveStream
	id       int64
	twins    int   // further messages that its answer is for
	since    int64 // when the first of them was handed to the core
	op       *shard.Op
	coreDone bool   // the core's loop only: Done was called
	submit   func() // on the core's loop
	cancel   func() // on the core's loop
	answered func() // on the stream's loop
}

// keepAlivePut is a lease that is put aside. It counts as one of the connection's keepAlives.
type keepAlivePut struct {
	msgs  int   // that its answer is for
	since int64 // when the first of them was handed to the core
	again bool  // it is among those that wait
}

var _ StreamHandler = (*keepAliveStream)(nil)

func newKeepAliveStream(*Loop) StreamHandler {
	return &keepAliveStream{flying: make(map[int64]*keepAliveOp), put: make(map[int64]*keepAlivePut)}
}

// Open implements StreamHandler.
func (s *keepAliveStream) Open(rpc *RPC) { s.rpc = rpc }

// Message implements StreamHandler.
func (s *keepAliveStream) Message(msg []byte) {
	if s.over {
		return
	}
	var id int64
	it := codec.Fields{Msg: msg}
	for it.Next() {
		if it.Field.Num == 1 && it.Field.Type == protowire.VarintType {
			id = int64(it.Field.Val)
		}
	}
	if it.Bad {
		s.finish(statusBadMessage)
		return
	}
	switch {
	case !s.seen:
		s.seen, s.lease = true, id
	case id != s.lease:
		s.many = true
	}
	if s.rpc.conn.keepAlives >= maxKeepAlivesWaiting {
		metricRefused.Inc()
		s.finish(codec.ErrTooManyRequests)
		return
	}
	if s.head > 0 && s.head >= len(s.waiting)/2 {
		s.waiting, s.head = s.waiting[:copy(s.waiting, s.waiting[s.head:])], 0
	}
	if p := s.put[id]; p != nil {
		p.msgs = min(p.msgs+1, maxKeepAliveTwins)
		s.again(id, p)
	} else {
		s.wait(id)
	}
	s.pump()
}

// again lets a lease that is put aside wait for its turn.
func (s *keepAliveStream) again(id int64, p *keepAlivePut) {
	if !p.again {
		p.again = true
		s.wait(id)
	}
}

// wait puts a message behind those that wait.
func (s *keepAliveStream) wait(id int64) {
	s.waiting = append(s.waiting, id)
	s.rpc.conn.keepAlives++
}

// HalfClose implements StreamHandler.
func (s *keepAliveStream) HalfClose() {
	s.halfDone = true
	s.pump()
}

// Drained implements StreamHandler.
func (s *keepAliveStream) Drained() { s.pump() }

// Cancel implements StreamHandler.
func (s *keepAliveStream) Cancel() { s.close() }

// Drain implements Drainer: what the core has is answered, the rest is asked for elsewhere.
func (s *keepAliveStream) Drain() {
	s.draining = true
	s.pump()
}

// pump hands to the core what may go, then sees to the client's window and to the end. What may not go because the
// client, or all of them, have too much with the core waits for the next answer, or the next second.
func (s *keepAliveStream) pump() {
	if s.draining && !s.over && len(s.flying) == 0 {
		s.finish(codec.ErrStopped)
	}
	for !s.over && !s.draining && s.head < len(s.waiting) && s.rpc.Queued() <= maxKeepAliveQueued {
		c := s.rpc.conn
		id := s.waiting[s.head]
		if k := s.flying[id]; k != nil {
			if k.twins >= maxKeepAliveTwins {
				break
			}
			k.twins++
			s.taken()
			continue
		}
		if _, full := c.full(0); full || len(s.flying) >= maxKeepAlivesInFlight {
			break
		}
		s.taken()
		c.ops++
		c.loop.working.Add(1)
		k := s.take()
		k.id, k.twins, k.since = id, 0, s.rpc.loop.eng.now()
		if p := s.put[id]; p != nil {
			k.since = p.since
			if k.twins = p.msgs; p.again {
				k.twins-- // id stands for one of them, not for one more
			}
			s.unput(id)
		}
		k.op.Msg = codec.AppendInt(k.op.Msg[:0], 1, id)
		s.flying[id] = k
		s.rpc.loop.atHome(k.submit)
	}
	if s.over {
		return
	}
	if hold := s.head < len(s.waiting); hold != s.held {
		s.held = hold
		s.rpc.Hold(hold)
	}
	if s.halfDone && !s.held && len(s.flying) == 0 && len(s.put) == 0 {
		s.finish(codec.Status{})
	}
}

// taken takes the first message off those that wait.
func (s *keepAliveStream) taken() {
	if s.head++; s.head == len(s.waiting) {
		s.waiting, s.head = s.waiting[:0], 0
		if cap(s.waiting) > maxKeepAlivesInFlight {
			s.waiting = nil
		}
	}
	s.rpc.conn.keepAlives--
}

// putAside keeps the messages that k was for until they are asked for again. It returns false if they have waited
// long enough, or too many do.
func (s *keepAliveStream) putAside(k *keepAliveOp) bool {
	c := s.rpc.conn
	if c.keepAlives >= maxKeepAlivesPut || s.rpc.loop.eng.now()-k.since >= int64(c.eng.cfg.KeepAlivePatience) {
		return false
	}
	s.put[k.id] = &keepAlivePut{msgs: 1 + k.twins, since: k.since}
	c.keepAlives++
	return true
}

func (s *keepAliveStream) unput(id int64) {
	delete(s.put, id)
	s.rpc.conn.keepAlives--
}

// pumpKeepAlives looks whether messages of the connection's LeaseKeepAlive streams that wait may go now; with again set
// also those that were put aside.
func (c *clientConn) pumpKeepAlives(again bool) {
	if c.keepAlives == 0 {
		return
	}
	for k := range c.streaming {
		s, ok := k.handler.(*keepAliveStream)
		if !ok {
			continue
		}
		n := 0
		for id, p := range s.put {
			if n++; !again || s.over || n > maxKeepAlivesAgain {
				break
			}
			s.again(id, p)
		}
		s.pump()
	}
}

// take returns a keepAliveOp with an Op.
func (s *keepAliveStream) take() *keepAliveOp {
	var k *keepAliveOp
	if n := len(s.free); n > 0 {
		k = s.free[n-1]
		s.free = s.free[:n-1]
	} else {
		k = &keepAliveOp{s: s}
		home := s.rpc.loop.eng.loops[0]
		k.submit = func() {
			k.coreDone = false
			home.submit(k.op)
		}
		k.cancel = func() {
			if !k.coreDone {
				home.cancel(k.op)
			}
		}
		k.answered = func() { s.answered(k) }
	}
	k.op = shard.AcquireOp()
	k.op.Kind = shard.OpLeaseKeepAlive
	k.op.Done = keepAliveDone
	k.op.User = k
	return k
}

// keepAliveDone is the Done of all these Ops. It may run within submit, so the answer always goes by the
// mailbox: pump is not to be entered twice.
func keepAliveDone(op *shard.Op) {
	k := op.User.(*keepAliveOp)
	k.coreDone = true
	k.s.rpc.loop.Post(k.answered)
}

// answered takes the core's answer.
func (s *keepAliveStream) answered(k *keepAliveOp) {
	op := k.op
	k.op = nil
	c := s.rpc.conn
	c.ops--
	c.loop.working.Add(-1)
	if !s.over {
		delete(s.flying, k.id)
	}
	switch st := op.Status; {
	case s.over:
		c.h2.AddWork(-1)
	case st.Code == codec.OK:
		s.rpc.Send(op.Resp)
		alive := keepAliveTTL(op.Resp) > 0
		for range k.twins {
			if alive {
				s.rpc.Send(op.Resp)
			} else {
				s.wait(k.id) // that was later: the lease may have been granted meanwhile
			}
		}
		s.free = append(s.free, k)
	case st.Code == codec.Unavailable && s.putAside(k):
		s.free = append(s.free, k)
	case !s.many:
		s.finish(st)
	default:
		metricKeepAlivesLost.Add(1 + k.twins)
		s.free = append(s.free, k)
	}
	shard.ReleaseOp(op)
	if !s.over {
		s.pump()
	}
}

// keepAliveTTL is the TTL of a LeaseKeepAliveResponse.
func keepAliveTTL(resp []byte) (ttl int64) {
	for it := (codec.Fields{Msg: resp}); it.Next(); {
		if it.Field.Num == 3 {
			ttl = int64(it.Field.Val)
		}
	}
	return ttl
}

func (s *keepAliveStream) finish(st codec.Status) {
	if !s.over {
		s.close()
		s.rpc.Finish(st)
	}
}

// close lets go of everything. What the core has is canceled; until the core says so it takes places of the
// connection.
func (s *keepAliveStream) close() {
	if s.over {
		return
	}
	s.over = true
	c := s.rpc.conn
	c.keepAlives -= len(s.waiting) - s.head + len(s.put)
	s.waiting, s.head, s.free, s.put = nil, 0, nil, nil
	c.h2.AddWork(len(s.flying))
	for _, k := range s.flying {
		// Behind submit in that mailbox, and before any other use of k: it is not used again.
		s.rpc.loop.atHome(k.cancel)
	}
}

// atHome runs f on the core's loop, behind what was handed to it before: at once where that is this loop.
func (l *Loop) atHome(f func()) {
	if home := l.eng.loops[0]; home != l {
		home.Post(f)
	} else {
		f()
	}
}
