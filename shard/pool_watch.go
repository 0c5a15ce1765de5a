package shard

import (
	"time"

	"spindle/codec"
)

// poolWatch is one Watch or KeepAlive stream; the handle that its owner has. It outlives its connection: calls on a stream
// that has ended do nothing.
type poolWatch struct {
	pool   *Pool
	sink   codec.WatchSink
	link   *poolLink // nil when there is no stream
	stream *codec.Stream
	over   bool // OnEnd was called, or Close
}

var (
	_ codec.WatchHandle = (*poolWatch)(nil)
	_ muteness          = (*poolWatch)(nil)
)

func (w *poolWatch) onMessage(msg []byte) {
	if !w.over {
		w.sink.OnMessage(msg)
	}
}

// onEnd is the end of the stream.
func (w *poolWatch) onEnd(st codec.Status) {
	ep := w.link.ep
	w.detach()
	if st == codec.ErrNoLeader {
		// hasleader did its work: whoever opens the stream again should get another node.
		ep.penalize()
	}
	w.end(st)
}

func (w *poolWatch) endLater(st codec.Status) { w.pool.later(failedCall{watch: w, st: st}) }

func (w *poolWatch) end(st codec.Status) {
	if w.over {
		return
	}
	w.over = true
	w.sink.OnEnd(st)
}

// Send implements codec.WatchHandle.
func (w *poolWatch) Send(req []byte) {
	if w.over || w.link == nil || w.link.dead {
		return
	}
	l := w.link
	l.conn.Send(w.stream, req)
	l.touch()
}

// Hold implements codec.WatchHandle.
func (w *poolWatch) Hold(hold bool) {
	if w.over || w.link == nil || w.link.dead {
		return
	}
	w.link.conn.Hold(w.stream, hold)
	w.link.touch()
}

// Mute implements muteness. Silence alone says nothing where nobody writes, so the connection is asked, and has stallLook for
// the answer. (When it was asked lately, it is some seconds until it may be asked again.)
func (w *poolWatch) Mute(d time.Duration) bool {
	l := w.link
	if w.over || l == nil || l.dead {
		return false
	}
	now := w.pool.timers.now()
	if now-l.lastRecv < int64(d) || !l.ep.cluster.heardBut(l, l.lastRecv+1) {
		return false
	}
	l.suspect(now)
	return l.pinged != 0 && now-l.pinged >= int64(stallLook)
}

// Close implements codec.WatchHandle.
func (w *poolWatch) Close() {
	w.over = true
	if w.link == nil || w.link.dead {
		return // a dying connection reports this stream's end to onEnd, which says it to nobody
	}
	l, s := w.link, w.stream
	w.detach()
	l.reset(s)
}
