package watchring

import (
	"cmp"

	"spindle/codec"
)

// HubConfig bounds a Hub. Zero fields take the defaults.
type HubConfig struct {
	// MaxResponse is the size of a response's events, in bytes, beyond which no further revision is added
	// to it. One revision is never divided.
	MaxResponse int
	// MaxFragment is the size of a message below which the fragments of a watcher that asked for them
	// stay (etcd: --max-request-bytes and 512 KiB).
	MaxFragment int
	// MaxCollected is how many bytes may be collected for watchers before they are sent.
	MaxCollected int
	// PumpRevisions and PumpBytes are what one Pump reads from the ring and sends, roughly, before
	// it lets the loop do something else.
	PumpRevisions int
	PumpBytes     int
	// TurnRevisions and TurnBytes are what one watcher that catches up reads and sends before it is
	// another's turn.
	TurnRevisions int
	TurnBytes     int
	// History serves watchers that need what the ring does not hold any more. Without one they are canceled
	// as compacted.
	History HistorySource
	// MaxReaders is how many reads of the past there are at a time. Watchers beyond share one of them, or wait;
	// but each group (of a shard, or of all) may have one in any case.
	MaxReaders int
}

// DefaultHubConfig holds the defaults.
var DefaultHubConfig = HubConfig{
	MaxResponse:   1 << 20,
	MaxFragment:   2 << 20,
	MaxCollected:  4 << 20,
	PumpRevisions: 64 << 10,
	PumpBytes:     16 << 20,
	TurnRevisions: 8 << 10,
	TurnBytes:     1 << 20,
	MaxReaders:    4,
}

// Hub fans the ring out to the watchers of one event loop. All watchers of the same shard (or of more
// than one: of all) form a group, which reads every revision once.
//
// A Hub belongs to one goroutine. Nothing is sent from within Add, Remove, Drained or Progress, only from
// Pump and Notify.
type Hub struct {
	ring     *Ring
	frontier *Frontier
	shardsOf func(key, end []byte) int
	header   codec.Header
	stats    *Stats

	maxResponse, maxFragment, maxCollected        int
	pumpRevs, pumpBytes, turnRevisions, turnBytes int

	groups []*group // index shard + 1; nil until used
	notify []*Watcher
	ready  []*Stream // streams with lagging watchers whose sink may take more
	asking []*Stream // streams that are owed a progress answer

	history    HistorySource
	maxReaders int
	readers    []*reader
	// firstReader is the reader that the last Pump began with, modulo their number.
	firstReader int
	divers      []*Watcher // wait for a reader

	// While the Hub is at work, removed watchers stay where they are (but for the laggards' lists) and are
	// taken out at the end. They are not put into another list meanwhile.
	working bool
	dead    []*Watcher
	lost    []*Watcher // scratch of lapped

	// Scratch of a scan.
	hits      []*target
	dirty     []*cohort // have collected something
	full      []*cohort // have collected enough for a response
	collected int       // bytes collected and not sent
	first     int       // group that this Pump began with
	revs      int       // revisions read in this Pump
	work      int       // bytes sent in this Pump

	free      [][]byte
	freeBytes int
	headerBuf []byte
	head      []byte
}

// group is all watchers that follow one frontier.
type group struct {
	set    int   // shard index, or All
	cursor int64 // every member has everything up to here, unless a scan is under way
	size   int   // watchers in any state

	exact   map[string]*target
	ranges  rangeTree
	members int
	future  futureHeap
}

// NewHub makes a Hub. shardsOf returns the index of the shard that all keys of a range lie on, or All;
// end is nil for a single key, and "\0" for all keys from key on. header is the template for responses;
// its revision is not used.
//
// shardsOf is asked once a watch, when it is added: if keys move to another shard one day, the watches of
// theirs that follow a single shard have to be removed and added again from Watcher.Delivered on.
func NewHub(ring *Ring, frontier *Frontier, shardsOf func(key, end []byte) int, header codec.Header, stats *Stats, cfg HubConfig) *Hub {
	d := &DefaultHubConfig
	if stats == nil {
		stats = new(Stats)
	}
	return &Hub{
		ring: ring, frontier: frontier, shardsOf: shardsOf, header: header, stats: stats,
		maxResponse:   cmp.Or(cfg.MaxResponse, d.MaxResponse),
		maxFragment:   cmp.Or(cfg.MaxFragment, d.MaxFragment),
		maxCollected:  cmp.Or(cfg.MaxCollected, d.MaxCollected),
		pumpRevs:      cmp.Or(cfg.PumpRevisions, d.PumpRevisions),
		pumpBytes:     cmp.Or(cfg.PumpBytes, d.PumpBytes),
		turnRevisions: cmp.Or(cfg.TurnRevisions, d.TurnRevisions),
		turnBytes:     cmp.Or(cfg.TurnBytes, d.TurnBytes),
		history:       cfg.History,
		maxReaders:    cmp.Or(cfg.MaxReaders, d.MaxReaders),
		groups:        make([]*group, frontier.Shards()+1),
	}
}

// SetHeader changes the template for responses.
func (h *Hub) SetHeader(header codec.Header) { h.header = header }

// encodeHeader returns the header field of a response at rev, valid until the next call.
func (h *Hub) encodeHeader(rev int64) []byte {
	h.header.Revision = rev
	h.headerBuf = codec.AppendHeaderField(h.headerBuf[:0], &h.header)
	return h.headerBuf
}

// NewStream makes the Stream of one Watch RPC.
func (h *Hub) NewStream(sink Sink) *Stream { return &Stream{hub: h, sink: sink} }

// Frontier returns the revision up to which the keys' shards are known completely.
func (h *Hub) Frontier(key, end string) int64 { return h.frontier.Get(h.setOf(key, end)) }

func (h *Hub) setOf(key, end string) int {
	var e []byte
	if end != "" {
		e = []byte(end)
	}
	set := h.shardsOf([]byte(key), e)
	if set < 0 || set >= h.frontier.Shards() {
		return All
	}
	return set
}

func (h *Hub) group(set int) *group {
	g := h.groups[set+1]
	if g == nil {
		g = &group{set: set, exact: make(map[string]*target)}
		h.groups[set+1] = g
	}
	if g.size == 0 {
		// Nobody has read anything, so nothing has to be read for anybody.
		g.cursor = max(g.cursor, h.frontier.Get(set))
	}
	return g
}

// Add adds w to s. w.Start at or below what was already handed out is read from the ring, or from the
// shards' history if the ring does not have it any more. The caller then calls Pump.
func (h *Hub) Add(s *Stream, w *Watcher) {
	if s.closed || w.state != outside {
		return
	}
	w.Start = max(w.Start, 1)
	if w.Key != "" && len(w.End) == len(w.Key)+1 && w.End[len(w.Key)] == 0 && w.End[:len(w.Key)] == w.Key {
		w.End = "" // no other key lies between a key and itself with a zero byte appended
	}
	g := h.group(h.setOf(w.Key, w.End))
	g.size++
	w.stream, w.group, w.closed, w.quiet = s, g, false, true
	w.seat = len(s.watchers)
	s.watchers = append(s.watchers, w)
	s.live++
	if w.ProgressNotify {
		w.notify = len(h.notify)
		h.notify = append(h.notify, w)
	}
	h.stats.Watchers.Add(1)
	if h.working || w.Start <= g.cursor || w.Start <= h.ring.Tail() || w.Start < h.frontier.Compacted() {
		h.lag(w, w.Start-1)
		h.enqueue(s)
		return
	}
	h.join(w)
}

// Remove ends w without a response. It may be called more than once.
func (h *Hub) Remove(w *Watcher) {
	if w.state == outside || w.closed {
		return
	}
	w.closed = true
	if s := w.stream; s.live == 1 {
		s.live, s.want, s.wantNext = 0, 0, 0
	} else {
		s.live--
	}
	if h.working {
		if w.state == lagging || w.state == deep {
			h.leave(w) // progress answers wait for who is in that list
		}
		h.dead = append(h.dead, w)
		return
	}
	h.bury(w)
}

// bury takes a closed watcher out of all lists.
func (h *Hub) bury(w *Watcher) {
	s, g := w.stream, w.group
	h.leave(w)
	g.size--
	last := len(s.watchers) - 1
	s.watchers[w.seat] = s.watchers[last]
	s.watchers[w.seat].seat = w.seat
	s.watchers[last] = nil
	s.watchers = s.watchers[:last]
	if last == 0 {
		s.watchers = nil
	}
	if w.ProgressNotify {
		last := len(h.notify) - 1
		h.notify[w.notify] = h.notify[last]
		h.notify[w.notify].notify = w.notify
		h.notify[last] = nil
		h.notify = h.notify[:last]
	}
	h.stats.Watchers.Add(-1)
}

// leave takes w out of its cohort, the future, the laggards or the readers of the past.
func (h *Hub) leave(w *Watcher) {
	switch w.state {
	case member:
		w.group.leaveCohort(w)
	case future:
		w.group.future.remove(w.slot)
	case lagging:
		s := w.stream
		last := len(s.lagging) - 1
		s.lagging[w.slot] = s.lagging[last]
		s.lagging[w.slot].slot = w.slot
		s.lagging[last] = nil
		s.lagging = s.lagging[:last]
		if last == 0 {
			s.lagging = nil
		}
		h.stats.Lagging.Add(-1)
	case deep:
		h.surface(w)
	}
	w.state = outside
}

// lag makes w, which is in no list, read the ring on its own from pos on.
func (h *Hub) lag(w *Watcher, pos int64) {
	w.state, w.pos = lagging, pos
	w.slot = len(w.stream.lagging)
	w.stream.lagging = append(w.stream.lagging, w)
	h.stats.Lagging.Add(1)
}

// join makes w, which is in no list and has everything up to the group's cursor, follow the group.
func (h *Hub) join(w *Watcher) {
	if w.Start > w.group.cursor+1 {
		w.state = future
		w.group.future.push(w)
		return
	}
	w.state = member
	w.group.joinCohort(w)
}

// joinCohort puts w into its cohort, which must not have collected anything.
func (g *group) joinCohort(w *Watcher) {
	var t *target
	single := w.End == ""
	end := w.End
	if end == fromKey {
		end = ""
	}
	if single {
		t = g.exact[w.Key]
	} else {
		t = g.ranges.get(w.Key, end)
	}
	if t == nil {
		t = &target{key: w.Key, end: end, single: single}
		if single {
			g.exact[w.Key] = t
		} else {
			g.ranges.insert(t)
		}
	}
	w.Key = t.key // one copy of the bytes for all
	if !single && end != "" {
		w.End = t.end
	}
	v := variant{w.PrevKV, w.NoPut, w.NoDelete, w.Fragment}
	var c *cohort
	for _, x := range t.cohorts {
		if x.variant == v {
			c = x
		}
	}
	if c == nil {
		c = &cohort{target: t, variant: v}
		t.cohorts = append(t.cohorts, c)
	}
	w.cohort, w.slot = c, len(c.members)
	c.members = append(c.members, w)
	g.members++
}

func (g *group) leaveCohort(w *Watcher) {
	c := w.cohort
	last := len(c.members) - 1
	c.members[w.slot] = c.members[last]
	c.members[w.slot].slot = w.slot
	c.members[last] = nil
	c.members = c.members[:last]
	w.cohort = nil
	g.members--
	if last > 0 {
		return
	}
	t := c.target
	for i, x := range t.cohorts {
		if x == c {
			t.cohorts = append(t.cohorts[:i], t.cohorts[i+1:]...)
			break
		}
	}
	if len(t.cohorts) > 0 {
		return
	}
	if t.single {
		delete(g.exact, t.key)
	} else {
		g.ranges.remove(t)
	}
}

// enqueue gives s a turn at catching up.
func (h *Hub) enqueue(s *Stream) {
	if !s.ready {
		s.ready = true
		h.ready = append(h.ready, s)
	}
}
