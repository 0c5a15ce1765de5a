package server

import (
	"math/rand/v2"
	"sync/atomic"
	"time"

	"spindle/codec"
	"spindle/watchring"
)

// WatchPath is the :path of etcd's Watch RPC.
const WatchPath = "/etcdserverpb.Watch/Watch"

// Limits of the Watch service where WatchConfig leaves them 0.
const (
	// defaultWatchesPerStream and defaultWatchesPerConn bound the watches that one client may have. A create
	// beyond is refused: created and canceled, with etcd's "too many requests" as the reason.
	defaultWatchesPerStream = 100_000
	defaultWatchesPerConn   = 100_000
	// defaultWatchKeyBytes bounds the keys and range ends of those watches together; refused likewise.
	defaultWatchKeyBytes = 64 << 20
	// defaultWatches and defaultKeyBytes bound those of all clients together, at about 1 KiB a watch; refused likewise.
	defaultWatches  = 1_000_000
	defaultKeyBytes = 256 << 20
	// defaultProgressInterval is etcd's --watch-progress-notify-interval.
	defaultProgressInterval = 10 * time.Minute
)

// WatchConfig says what a WatchService serves. Ring, Frontier, ShardsOf and Now are needed.
type WatchConfig struct {
	Ring     *watchring.Ring
	Frontier *watchring.Frontier
	// ShardsOf returns the index of the shard that all keys of a range lie on, or watchring.All; end is as
	// in etcd (nil: one key). Any loop calls it.
	ShardsOf func(key, end []byte) int
	// Now calls done with a revision that is at least as large as any that anyone was shown before. It is
	// called on loop 0, and calls done there: (*shard.Core).Now.
	Now func(done func(rev int64, st codec.Status))
	// OpenHistory begins a read of what happened on a shard, or all, from a revision on:
	// (*shard.Core).OpenHistory. It is called on loop 0, as are the methods of what it returns. Without it, watches
	// that need what the ring does not hold are canceled as compacted.
	OpenHistory func(set int, from int64) History
	// Header is the template of every response's header.
	Header codec.Header
	// ProgressInterval is how often quiet watches with progress_notify hear of progress.
	ProgressInterval time.Duration

	WatchesPerStream int
	WatchesPerConn   int
	KeyBytesPerConn  int
	Watches          int
	KeyBytes         int
	Hub              watchring.HubConfig
}

// WatchService serves etcd's Watch: one Hub per event loop.
//
// A watch lives on the loop of its client's connection. What it needs of the core is `now`, for a create
// without a start revision and for a progress request: one question per loop is under way, and speaks
// for all streams that waited when it was asked.
type WatchService struct {
	cfg   WatchConfig
	loops []*watchLoop

	watches, keyBytes atomic.Int64 // of all clients
}

// NewWatchService makes the service and registers it with e. To be called before Engine.SetReady(true).
// It ends with the engine.
func NewWatchService(e *Engine, cfg WatchConfig) *WatchService {
	svc := newWatchService(cfg)
	home := e.Loops()[0]
	for _, l := range e.Loops() {
		w := svc.addLoop(l.Post, home.Post)
		w.loop = l
		l.OnTurnEnd(w.turnEnd)
	}
	e.HandleStream(WatchPath, func(l *Loop) StreamHandler { return &watchStream{loop: svc.loops[l.Index()]} })
	go svc.notify(e.Done())
	return svc
}

func newWatchService(cfg WatchConfig) *WatchService {
	cfg.WatchesPerStream = orDefault(cfg.WatchesPerStream, defaultWatchesPerStream)
	cfg.WatchesPerConn = orDefault(cfg.WatchesPerConn, defaultWatchesPerConn)
	cfg.KeyBytesPerConn = orDefault(cfg.KeyBytesPerConn, defaultWatchKeyBytes)
	cfg.Watches = orDefault(cfg.Watches, defaultWatches)
	cfg.KeyBytes = orDefault(cfg.KeyBytes, defaultKeyBytes)
	cfg.ProgressInterval = orDefault(cfg.ProgressInterval, defaultProgressInterval)
	return &WatchService{cfg: cfg}
}

// FrontierRose tells all loops with watches that a frontier or the compact revision rose. To be called on
// loop 0: (*shard.Core).OnFrontier.
func (svc *WatchService) FrontierRose() {
	for _, w := range svc.loops {
		if w.streams.Load() == 0 {
			continue // one that opens now reads the frontier after this
		}
		if l := w.loop; l != nil && l.index == 0 && l.inTurn {
			w.dirty = true
			l.nested = true // the hooks run once more if this loop's has run already
			continue
		}
		w.ring()
	}
}

// notify drives the periodic progress notifications. Like etcd it adds up to a tenth of the interval, so
// that the proxies of one system do not all send at the same moment.
func (svc *WatchService) notify(done <-chan struct{}) {
	interval := svc.cfg.ProgressInterval
	tick := time.NewTicker(interval + rand.N(interval/10+1))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			for _, w := range svc.loops {
				if w.streams.Load() > 0 {
					w.post(w.notifyFn)
				}
			}
		case <-done:
			return
		}
	}
}

// watchLoop is the Watch service on one event loop. Fields belong to that loop unless noted.
type watchLoop struct {
	svc      *WatchService
	loop     *Loop        // nil in tests without an engine
	post     func(func()) // to this loop; any goroutine
	postHome func(func()) // to the core's loop; any goroutine
	hub      *watchring.Hub
	conns    map[any]*watchConn

	streams atomic.Int64 // open Watch RPCs; read by loop 0
	bell    atomic.Bool  // ringFn is in the mailbox
	dirty   bool         // the Hub has something to do at the end of the turn

	// One `now` is under way at a time. waiting is who needs one, asked who waits for the one under way.
	waiting, asked waitList
	asking         bool
	now            int64        // the answer: written by the core's loop before nowFn is posted
	nowStatus      codec.Status // likewise

	// Bound once.
	ringFn, notifyFn, askFn, nowFn func()
	doneFn                         func(int64, codec.Status)
}

// watchConn is what the streams of one client connection have in common.
type watchConn struct {
	streams, watches int
	keyBytes         int // of the watches' keys and range ends
}

func (svc *WatchService) addLoop(post, postHome func(func())) *watchLoop {
	w := &watchLoop{svc: svc, post: post, postHome: postHome, conns: make(map[any]*watchConn)}
	w.waiting.list, w.asked.list = 0, 1
	c := &svc.cfg
	hub := c.Hub
	if c.OpenHistory != nil {
		hub.History = &historySource{w}
	}
	w.hub = watchring.NewHub(c.Ring, c.Frontier, c.ShardsOf, c.Header, &watchStats, hub)
	w.ringFn = func() {
		w.bell.Store(false)
		w.dirty = true
	}
	w.notifyFn = w.hub.Notify
	w.askFn = func() { c.Now(w.doneFn) }
	w.doneFn = func(rev int64, st codec.Status) {
		w.now, w.nowStatus = rev, st
		w.post(w.nowFn)
	}
	w.nowFn = w.nowDone
	svc.loops = append(svc.loops, w)
	return w
}

// pressed says that the process has no memory to spare.
func (w *watchLoop) pressed() bool { return w.loop != nil && w.loop.eng.cfg.Memory.Pressed() }

// ring makes the loop look at the ring soon. Any goroutine may call it.
func (w *watchLoop) ring() {
	if w.bell.CompareAndSwap(false, true) {
		w.post(w.ringFn)
	}
}

// turnEnd runs at the end of each turn of the loop.
func (w *watchLoop) turnEnd() {
	if len(w.waiting.s) > 0 && !w.asking {
		w.asking = true
		w.asked.s, w.waiting.s = w.waiting.s, w.asked.s
		for i, s := range w.asked.s {
			s.place[w.waiting.list], s.place[w.asked.list] = 0, i+1
			s.askedNow()
		}
		w.postHome(w.askFn)
	}
	if w.dirty {
		w.dirty = false
		if w.hub.Pump() {
			w.ring() // the sockets first
		}
	}
}

// nowDone brings the answer to who waited for it.
func (w *watchLoop) nowDone() {
	w.asking = false
	for n := len(w.asked.s); n > 0; n = len(w.asked.s) {
		s := w.asked.s[n-1]
		w.asked.remove(s)
		s.knowsNow(w.now, w.nowStatus)
	}
}

// waitList is a set of streams; a stream knows its place in each of the two.
type waitList struct {
	list int // index in watchStream.place
	s    []*watchStream
}

func (l *waitList) add(s *watchStream) {
	if s.place[l.list] == 0 {
		l.s = append(l.s, s)
		s.place[l.list] = len(l.s)
	}
}

func (l *waitList) remove(s *watchStream) {
	at := s.place[l.list]
	if at == 0 {
		return
	}
	last := len(l.s) - 1
	l.s[at-1] = l.s[last]
	l.s[at-1].place[l.list] = at
	l.s[last] = nil
	l.s = l.s[:last]
	s.place[l.list] = 0
}
