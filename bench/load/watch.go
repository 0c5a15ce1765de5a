package load

import (
	"sync/atomic"

	"spindle/bench/client"
	"spindle/bench/hist"
	"spindle/codec"
)

// ackSlots is how many acknowledgements are remembered: a watch that is further behind has no lag from the
// acknowledgement, only one from the sending.
const ackSlots = 1 << 18

// acks remembers when writes were acknowledged, by revision.
type acks []struct{ rev, at atomic.Int64 }

func (a acks) put(rev, now int64) {
	s := &a[rev&(ackSlots-1)]
	s.at.Store(now)
	s.rev.Store(rev)
}

// get returns 0 if the write was not acknowledged yet, or too long ago.
func (a acks) get(rev int64) int64 {
	s := &a[rev&(ackSlots-1)]
	if s.rev.Load() != rev {
		return 0
	}
	return s.at.Load()
}

// sampledWatchers is about how many of many watchers look at what they get; the others only count it.
const sampledWatchers = 16

// feed is one connection with watches. All of it is guarded by the connection's lock.
type feed struct {
	run  *run
	conn *client.Conn

	all       uint64 // events since the watches began
	events    uint64 // since the last harvest, as what follows
	bytes     uint64
	messages  uint64
	fromAck   hist.Hist // delivery, after the acknowledgement; 0 where it came first
	fromSend  hist.Hist // delivery, after the sending of the write
	backwards uint64    // events out of order
}

// watcher is one watch on a stream of its own.
type watcher struct {
	f       *feed
	sampled bool
	created bool
	rev     int64
}

// Message implements client.Sink.
func (w *watcher) Message(m []byte) {
	f := w.f
	f.messages++
	f.bytes += uint64(len(m))
	now, canceled, why := int64(0), false, []byte(nil)
	it := codec.Fields{Msg: m}
	for it.Next() {
		switch it.Field.Num {
		case 3: // created
			if !w.created {
				w.created = true
				f.run.watching.done()
			}
		case 4: // canceled
			canceled = it.Field.Val != 0
		case 6:
			why = it.Field.Bytes
		case 11:
			f.events++
			f.all++
			if w.sampled {
				if now == 0 {
					now = f.run.now()
				}
				w.event(it.Field.Bytes, now)
			}
		}
	}
	if canceled {
		f.run.abort("the server canceled a watch: %s", why)
	}
	if it.Bad {
		f.run.abort("a watch response is not protobuf")
	}
}

func (w *watcher) event(ev []byte, now int64) {
	f := w.f
	it := codec.Fields{Msg: ev}
	for it.Next() {
		if it.Field.Num != 2 {
			continue
		}
		kv, ok := codec.ParseKV(it.Field.Bytes)
		if !ok {
			f.run.abort("an event is not protobuf")
			return
		}
		if kv.ModRevision < w.rev {
			f.backwards++
		}
		w.rev = kv.ModRevision
		sent, known := sentAt(kv.Value)
		if known && sent > now { // of another run, whose clock began earlier
			known = false
		}
		if known {
			f.fromSend.Record(now - sent)
		}
		if at := f.run.acks.get(kv.ModRevision); at != 0 {
			f.fromAck.Record(now - at)
		} else if known && now-sent < int64(ackUnknown) {
			f.fromAck.Record(0)
		}
	}
}

// ackUnknown: an event whose write was sent longer ago than this, and has no acknowledgement, may have lost it from
// the table; it has no lag.
const ackUnknown = 5e9

// End implements client.Sink.
func (w *watcher) End(st codec.Status) {
	if !w.f.run.ending.Load() {
		w.f.run.abort("a watch has ended: %s", st.Msg)
	}
}

// open starts n watches of [key, end), the first-th to the (first+n-1)-th of a group of feeds; every sampleEvery-th of
// the group looks at what it gets.
func (f *feed) open(first, n, sampleEvery int, key, end []byte) {
	msg := appendWatch(nil, key, end)
	f.conn.Lock()
	defer f.conn.Unlock()
	for i := first; i < first+n; i++ {
		if !f.conn.Stream(pathWatch, msg, &watcher{f: f, sampled: i%sampleEvery == 0}) {
			f.run.abort("the server takes no more streams on a connection")
			return
		}
	}
}
