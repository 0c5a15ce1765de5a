package watchring

// Sink is where the responses of a Stream go: one Watch RPC. The Hub calls it on the loop's goroutine, from
// within its own methods. A Sink may call any method of Hub, Stream and Watcher meanwhile.
type Sink interface {
	// Send takes one encoded WatchResponse, in two pieces, which are copied before return. If events are shared, which
	// means that others get them as well, the Sink may also keep them as they are, and says so: the Hub leaves their
	// memory alone from then on.
	Send(head, events []byte, shared bool) (kept bool)
	// Blocked says that so much waits for the client that no events should be added. Once it was true,
	// the owner calls Stream.Drained when it is false again.
	Blocked() bool
	// Ended reports that the Hub has canceled w, after the response that says so.
	Ended(w *Watcher)
	// Failed reports that a watch of the Stream cannot be served any more, and why. Its Watcher was removed, nothing
	// was sent: the owner is to end the RPC, so that the client comes back with all its watches.
	Failed(reason string)
}

// Watcher is one watch. The caller fills in the exported fields, which then must not change.
type Watcher struct {
	// ID is the watch_id in responses.
	ID int64
	// Key and End are the keys watched: Key alone if End is "", all keys from Key on if End is "\x00",
	// else those from Key up to but without End (which must be above Key).
	Key, End string
	// Start is the first revision wanted, at least 1. It may lie in the future.
	Start int64
	// PrevKV asks for prev_kv.
	PrevKV bool
	// NoPut and NoDelete filter events out.
	NoPut, NoDelete bool
	// Fragment allows a response to be split.
	Fragment bool
	// ProgressNotify asks for periodic progress notifications.
	ProgressNotify bool

	quiet  bool // nothing was sent since the last round of progress notifications
	closed bool // removed; still in the lists while the Hub is at work
	state  state
	stream *Stream
	group  *group
	cohort *cohort // state member
	reader *reader // state deep; nil while it waits for one
	// pos is the revision up to which everything was delivered, in states lagging and deep.
	pos    int64
	slot   int // where it stands in cohort.members, group.future, stream.lagging, reader.watchers or hub.divers
	seat   int // in stream.watchers
	notify int // in hub.notify, if ProgressNotify
}

type state uint8

const (
	outside state = iota // not added, or removed
	member               // in a cohort: it has what its group's cursor has passed
	future               // in group.future: it wants nothing yet
	lagging              // in stream.lagging: it reads the ring from pos on
	deep                 // it is served by a reader of the past, or waits for one
)

// holds reports whether key is one of the keys watched.
func (w *Watcher) holds(key []byte) bool {
	switch w.End {
	case "":
		return w.Key == string(key)
	case fromKey:
		return string(key) >= w.Key
	}
	return string(key) >= w.Key && string(key) < w.End
}

// Delivered returns the revision up to which w has everything; call it outside of Pump and Notify.
func (w *Watcher) Delivered() int64 {
	switch w.state {
	case member, future:
		return w.group.cursor
	}
	return w.pos
}

// fromKey is the range end that means "all keys from the key on".
const fromKey = "\x00"

// Stream is the watches of one Watch RPC.
type Stream struct {
	hub      *Hub
	sink     Sink
	watchers []*Watcher
	live     int // of watchers: not removed
	lagging  []*Watcher
	deep     int  // watchers in that state
	next     int  // of lagging: whose turn it is
	ready    bool // in hub.ready
	closed   bool

	shown    int64 // the greatest header.revision sent on the stream, of events and progress
	asking   bool  // in hub.asking
	want     int64 // a progress answer at or above it is owed; 0 for none
	wantNext int64 // owed after that one
}

// Watchers returns the number of watches on the stream.
func (s *Stream) Watchers() int { return s.live }

// Drained says that the sink is not blocked any more. The caller then calls Hub.Pump.
func (s *Stream) Drained() {
	if !s.closed && len(s.lagging) > 0 {
		s.hub.enqueue(s)
	}
}

// Close removes all watches. The sink is not called any more.
func (s *Stream) Close() {
	s.closed = true
	s.want, s.wantNext = 0, 0
	for i := len(s.watchers) - 1; i >= 0; i-- {
		s.hub.Remove(s.watchers[i])
	}
}

// Progress asks for one progress answer for the whole stream (watch_id -1): it is sent once every watch
// of the stream has everything up to a revision R that is at least now and no watch's start - 1. now is
// a revision that was read after the client asked. If a watch of a single shard has already been shown
// more than R, because its shard is ahead of the others, an answer for all would run backwards for
// it: then every watch gets an answer of its own instead, with its own watch_id and revision.
// Answers that are owed may be merged, but a later
// request never delays an earlier one. A stream without watches, or
// that loses its last one meanwhile, gets none, as with etcd. The caller then
// calls Hub.Pump.
func (s *Stream) Progress(now int64) {
	switch {
	case s.closed || s.live == 0:
		return
	case s.want == 0:
		s.want = max(now, 1)
	default:
		s.wantNext = max(s.wantNext, now)
	}
	if !s.asking {
		s.asking = true
		s.hub.asking = append(s.hub.asking, s)
	}
}
