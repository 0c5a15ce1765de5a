package server

import (
	"spindle/codec"
	"spindle/watchring"
)

const (
	// watchHighWater is how many bytes may wait for a client before its watches get no further events. They
	// go on when all of it was taken. At most one response comes on top.
	watchHighWater = 512 << 10
	// watchHoldBytes waiting makes the service stop reading requests: a client that creates and cancels
	// watches without reading the answers.
	watchHoldBytes = 4 << 20
	// maxPendingCreates is how many creates of one stream may wait for `now`, or behind one that does. Refused
	// ones count too. Beyond, the stream ends with etcd's "too many requests".
	maxPendingCreates = 8192
)

// Reasons in created-and-canceled answers. The first two are etcd's (server/storage/mvcc/watcher.go), the
// third is what other requests for such keys get.
const (
	reasonEmptyRange  = "mvcc: watcher range is empty"
	reasonDuplicateID = "mvcc: duplicate watch ID provided on the WatchStream"
	reasonReserved    = "spindle: keys that begin with a zero byte are reserved"
)

// statusBadMessage is the answer to what is not protobuf, as grpc-go words it.
var statusBadMessage = codec.Status{Code: codec.Internal, Msg: "grpc: error unmarshalling request: proto: cannot parse invalid wire-format data"}

// watchRPC is what a watchStream needs of its RPC.
type watchRPC interface {
	Send(msg []byte)
	Push(head, events []byte, shared bool) (kept bool)
	Finish(st codec.Status)
	Queued() int
	Hold(hold bool)
}

// watchStream is one Watch RPC. The order of answers is that of etcd's server: creates are answered in the
// order of the requests, and a cancel's answer follows its create's.
type watchStream struct {
	loop   *watchLoop
	rpc    watchRPC
	key    any // of watchLoop.conns
	conn   *watchConn
	hub    *watchring.Stream
	closed bool
	held   bool

	watches map[int64]*watch
	nextID  int64

	pending []*watchPending // creates not answered yet, in order
	head    int             // of pending: the first one
	// progress requests wait until all creates before them were answered, then for a `now`.
	wantProgress  bool // waits for pending creates, or to be asked for
	askedProgress bool // the `now` under way is for it

	place [2]int // in watchLoop.waiting and asked, plus 1; 0 for not there
}

var (
	_ StreamHandler  = (*watchStream)(nil)
	_ watchring.Sink = (*watchStream)(nil)
	_ watchRPC       = (*RPC)(nil)
)

// watch is one watch of a client.
type watch struct {
	watchring.Watcher
	size     int // bytes of its keys, in watchConn.keyBytes
	created  bool
	canceled bool // by the client, before it was created
}

// watchPending is a create that waits for its answer.
type watchPending struct {
	w      *watch // nil: refused
	reason string
	now    nowState
	rev    int64 // header.revision of the answer; 0: the frontier
}

type nowState uint8

const (
	nowNone   nowState = iota // ready
	nowWanted                 // to be asked for
	nowAsked                  // under way
)

// Open implements StreamHandler.
func (s *watchStream) Open(rpc *RPC) { s.open(rpc, rpc.conn) }

func (s *watchStream) open(rpc watchRPC, conn any) {
	s.rpc, s.key = rpc, conn
	s.conn = s.loop.conns[conn]
	if s.conn == nil {
		s.conn = new(watchConn)
		s.loop.conns[conn] = s.conn
	}
	s.conn.streams++
	s.loop.streams.Add(1)
	s.watches = make(map[int64]*watch)
	s.hub = s.loop.hub.NewStream(s)
}

// Message implements StreamHandler.
func (s *watchStream) Message(msg []byte) {
	if s.closed {
		return
	}
	r, ok := parseWatchRequest(msg)
	if !ok {
		s.finish(statusBadMessage)
		return
	}
	switch r.kind {
	case watchCreate:
		s.create(&r)
	case watchCancel:
		s.cancel(r.id)
	case watchProgress:
		s.wantProgress = true
		s.settle()
	}
	if !s.closed && !s.held && s.rpc.Queued() > watchHoldBytes {
		s.held = true
		s.rpc.Hold(true)
	}
}

// HalfClose implements StreamHandler. As with etcd, a client that says nothing more still gets events.
func (s *watchStream) HalfClose() {}

// Cancel implements StreamHandler.
func (s *watchStream) Cancel() { s.close() }

// Drained implements StreamHandler.
func (s *watchStream) Drained() {
	if s.closed {
		return
	}
	if s.held {
		s.held = false
		s.rpc.Hold(false)
	}
	s.hub.Drained()
	s.loop.dirty = true
	if l := s.loop.loop; l != nil && l.inTurn {
		l.nested = true // this comes from the turn's own output: its hooks have run, and are to run once more
	}
}

// Send implements watchring.Sink. The Hub is at work in the loop's hooks and its mailbox only.
func (s *watchStream) Send(head, events []byte, shared bool) (kept bool) {
	return s.rpc.Push(head, events, shared)
}

// Blocked implements watchring.Sink.
func (s *watchStream) Blocked() bool {
	n := s.rpc.Queued()
	return n >= watchHighWater || n > 0 && s.loop.pressed()
}

// Drain implements Drainer: what is in the queue goes out, then clients resume their watches elsewhere.
func (s *watchStream) Drain() { s.finish(codec.ErrStopped) }

// Ended implements watchring.Sink.
func (s *watchStream) Ended(w *watchring.Watcher) { s.forget(w.ID) }

// Failed implements watchring.Sink.
func (s *watchStream) Failed(reason string) {
	s.finish(codec.Status{Code: codec.Unavailable, Msg: reason})
}

func (s *watchStream) forget(id int64) {
	if w := s.watches[id]; w != nil {
		delete(s.watches, id)
		s.counted(-1, -w.size)
	}
}

// counted counts watches and the bytes of their keys, of the connection and of all.
func (s *watchStream) counted(watches, keyBytes int) {
	s.conn.watches += watches
	s.conn.keyBytes += keyBytes
	s.loop.svc.watches.Add(int64(watches))
	s.loop.svc.keyBytes.Add(int64(keyBytes))
}

func (s *watchStream) finish(st codec.Status) {
	if !s.closed {
		s.close()
		s.rpc.Finish(st)
	}
}

// close frees everything.
func (s *watchStream) close() {
	if s.closed {
		return
	}
	s.closed = true
	s.hub.Close()
	l := s.loop
	l.waiting.remove(s)
	l.asked.remove(s)
	size := 0
	for _, w := range s.watches {
		size += w.size
	}
	s.counted(-len(s.watches), -size)
	if s.conn.streams--; s.conn.streams == 0 {
		delete(l.conns, s.key)
	}
	l.streams.Add(-1)
	s.watches, s.pending, s.head = nil, nil, 0
}

// create takes a create request: it gets its id now and its answer in its turn.
func (s *watchStream) create(r *watchRequest) {
	if len(s.pending)-s.head >= maxPendingCreates {
		metricWatchesRefused.Inc()
		hitLimit(limitPendingCreates)
		s.finish(codec.ErrTooManyRequests)
		return
	}
	p := new(watchPending)
	if p.reason = s.check(r); p.reason == "" {
		w := &watch{Watcher: watchring.Watcher{
			ID: r.id, Key: string(r.key), End: string(r.end), Start: r.start,
			PrevKV: r.prevKV, NoPut: r.noPut, NoDelete: r.noDelete, Fragment: r.fragment, ProgressNotify: r.progress,
		}, size: len(r.key) + len(r.end)}
		p.w = w
		s.watches[w.ID] = w
		s.counted(1, w.size)
		if w.Start == 0 {
			p.now = nowWanted
			s.loop.waiting.add(s)
		}
	}
	if s.head > 0 && s.head >= len(s.pending)/2 {
		n := copy(s.pending, s.pending[s.head:])
		clear(s.pending[n:])
		s.pending, s.head = s.pending[:n], 0
	}
	s.pending = append(s.pending, p)
	s.settle()
}

// check brings a create request to the form that the Hub wants and gives it an id, in etcd's order
// (server/etcdserver/api/v3rpc/watch.go, storage/mvcc/watcher.go). It returns why it is refused.
func (s *watchStream) check(r *watchRequest) (reason string) {
	if len(r.key) == 0 {
		r.key = zeroKey // the smallest key
	}
	if r.start < 0 {
		return codec.ErrCompacted.Msg
	}
	fromKey := len(r.end) == 1 && r.end[0] == 0
	if len(r.end) > 0 && !fromKey && string(r.key) >= string(r.end) {
		return reasonEmptyRange
	}
	c := &s.loop.svc.cfg
	if len(s.watches) >= c.WatchesPerStream || s.conn.watches >= c.WatchesPerConn ||
		s.conn.keyBytes+len(r.key)+len(r.end) > c.KeyBytesPerConn ||
		s.loop.svc.watches.Load() >= int64(c.Watches) || s.loop.svc.keyBytes.Load() > int64(c.KeyBytes) {
		metricWatchesRefused.Inc()
		hitLimit(limitWatches)
		return codec.ErrTooManyRequests.Msg
	}
	if r.key[0] == 0 {
		// Spindle's own keys: a range begins behind them, and has to have something there.
		if len(r.end) == 0 || !fromKey && string(r.end) <= firstKey {
			return reasonReserved
		}
		r.key = []byte(firstKey)
	}
	if r.id == 0 {
		for s.watches[s.nextID] != nil {
			s.nextID++
		}
		r.id = s.nextID
		s.nextID++
	} else if s.watches[r.id] != nil {
		return reasonDuplicateID
	}
	return ""
}

var zeroKey = []byte{0}

// firstKey is the smallest key that a client may have.
const firstKey = "\x01"

// cancel takes a cancel request. Unknown ids are ignored.
func (s *watchStream) cancel(id int64) {
	w := s.watches[id]
	switch {
	case w == nil:
	case !w.created:
		w.canceled = true
	default:
		rev := w.Delivered()
		s.loop.hub.Remove(&w.Watcher)
		s.forget(id)
		s.respond(&watchring.Response{Header: codec.Header{Revision: rev}, WatchID: id, Canceled: true})
	}
}

// settle answers the creates whose turn it is, then sees to a progress request.
func (s *watchStream) settle() {
	for !s.closed && s.head < len(s.pending) && s.pending[s.head].now == nowNone {
		p := s.pending[s.head]
		s.pending[s.head] = nil
		if s.head++; s.head == len(s.pending) {
			s.pending, s.head = nil, 0
		}
		s.answer(p)
	}
	if !s.closed && s.wantProgress && len(s.pending) == 0 {
		s.loop.waiting.add(s)
	}
}

// answer sends a create's answer and starts the watch.
func (s *watchStream) answer(p *watchPending) {
	hub, w := s.loop.hub, p.w
	if w == nil {
		rev := s.loop.svc.cfg.Frontier.Get(watchring.All)
		s.respond(&watchring.Response{Header: codec.Header{Revision: rev}, WatchID: watchring.AllWatches,
			Created: true, Canceled: true, CancelReason: p.reason})
		return
	}
	rev := p.rev
	if rev == 0 {
		rev = hub.Frontier(w.Key, w.End)
	}
	w.created = true
	s.respond(&watchring.Response{Header: codec.Header{Revision: rev}, WatchID: w.ID, Created: true})
	switch {
	case s.closed: // by what Send has found out
	case w.canceled:
		s.forget(w.ID)
		s.respond(&watchring.Response{Header: codec.Header{Revision: w.Start - 1}, WatchID: w.ID, Canceled: true})
	default:
		hub.Add(s.hub, &w.Watcher)
		s.loop.dirty = true
	}
}

func (s *watchStream) respond(r *watchring.Response) {
	h := &s.loop.svc.cfg.Header
	r.Header.ClusterID, r.Header.MemberID, r.Header.RaftTerm = h.ClusterID, h.MemberID, h.RaftTerm
	var room [128]byte
	s.rpc.Send(watchring.AppendResponse(room[:0], r))
}

// askedNow says that a `now` is being asked for which speaks for all that waits on this stream.
func (s *watchStream) askedNow() {
	for _, p := range s.pending[s.head:] {
		if p.now == nowWanted {
			p.now = nowAsked
		}
	}
	if s.wantProgress && len(s.pending) == 0 {
		s.wantProgress, s.askedProgress = false, true
	}
}

// knowsNow takes the answer. Without one, a create cannot be answered: the stream ends, and clients
// resume all its watches on another. A progress request just stays without an answer.
func (s *watchStream) knowsNow(now int64, st codec.Status) {
	progress := s.askedProgress
	s.askedProgress = false
	for _, p := range s.pending[s.head:] {
		if p.now != nowAsked {
			continue
		}
		if st.Code != codec.OK {
			s.finish(st)
			return
		}
		p.now, p.rev = nowNone, now
		p.w.Start = now + 1
	}
	if progress && st.Code == codec.OK {
		s.hub.Progress(now)
		s.loop.dirty = true
	}
	s.settle()
}
