package watchring

import (
	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// Fields of etcdserverpb.WatchResponse (api/etcdserverpb/rpc.proto).
const (
	fieldWatchID         = 2
	fieldCreated         = 3
	fieldCanceled        = 4
	fieldCompactRevision = 5
	fieldCancelReason    = 6
	fieldFragment        = 7
	fieldEvents          = 11
)

// AllWatches is the watch_id of an answer that speaks for all watches of its stream, and of a create that
// was refused.
const AllWatches = -1

// Response is an etcdserverpb.WatchResponse without events.
type Response struct {
	Header          codec.Header
	WatchID         int64
	Created         bool
	Canceled        bool
	CompactRevision int64
	CancelReason    string
}

// AppendResponse appends the encoded r.
func AppendResponse(dst []byte, r *Response) []byte {
	dst = codec.AppendHeaderField(dst, &r.Header)
	dst = codec.AppendInt(dst, fieldWatchID, r.WatchID)
	dst = codec.AppendBool(dst, fieldCreated, r.Created)
	dst = codec.AppendBool(dst, fieldCanceled, r.Canceled)
	dst = codec.AppendInt(dst, fieldCompactRevision, r.CompactRevision)
	return codec.AppendString(dst, fieldCancelReason, r.CancelReason)
}

// headroom is what a response's fields before the events take at most: a header of four varints, the
// watch id, the fragment flag. Events are collected behind that much room, so that the same
// bytes can be sent to one watcher after another with only the room rewritten.
const headroom = 64

// appendEvent appends one event to the events of a response.
func appendEvent(dst []byte, ev *Event, prevKV bool) []byte {
	body := ev.Body
	if !prevKV && ev.NoPrev < len(body) {
		body = body[:ev.NoPrev]
	}
	dst = protowire.AppendTag(dst, fieldEvents, protowire.BytesType)
	return protowire.AppendBytes(dst, body)
}

// sendEvents sends buf, which is headroom and then at least one event, to w as one response or, if w
// asked for fragments and they are too large for one, as several (etcd's sendFragments: a fragment
// stays below the limit unless a single event exceeds it; all but the last are marked). header holds
// the encoded header field.
func (h *Hub) sendEvents(w *Watcher, header, buf []byte) {
	if w.Fragment && len(buf)-headroom+len(header)+1+protowire.SizeVarint(uint64(w.ID)) >= h.maxFragment {
		h.sendFragments(w, header, buf[headroom:])
		return
	}
	w.stream.sink.Send(prepend(buf, header, w.ID))
}

// prepend writes the fields before the events into the headroom of buf, and returns the message.
func prepend(buf, header []byte, id int64) []byte {
	var idField [11]byte
	f := codec.AppendInt(idField[:0], fieldWatchID, id)
	at := headroom - len(f)
	copy(buf[at:], f)
	at -= len(header)
	copy(buf[at:], header)
	return buf[at:]
}

func (h *Hub) sendFragments(w *Watcher, header, events []byte) {
	for len(events) > 0 {
		msg := append(h.fragment[:0], header...)
		msg = codec.AppendInt(msg, fieldWatchID, w.ID)
		more := len(msg)
		msg = codec.AppendInt(msg, fieldFragment, 1)
		n := 0
		for n < len(events) {
			_, _, size := protowire.ConsumeField(events[n:])
			if size < 0 || n > 0 && len(msg)+n+size >= h.maxFragment {
				break
			}
			n += size
		}
		if n == 0 {
			return // not what appendEvent wrote; cannot happen
		}
		if n == len(events) {
			msg = msg[:more]
		}
		msg = append(msg, events[:n]...)
		events = events[n:]
		h.fragment = msg
		w.stream.sink.Send(msg)
		if w.closed {
			break
		}
	}
	if cap(h.fragment) > maxKeptBuffer {
		h.fragment = nil
	}
}

// sendControl sends a response without events.
func (h *Hub) sendControl(s *Stream, r *Response) {
	r.Header.ClusterID, r.Header.MemberID, r.Header.RaftTerm = h.header.ClusterID, h.header.MemberID, h.header.RaftTerm
	h.control = AppendResponse(h.control[:0], r)
	s.sink.Send(h.control)
}
