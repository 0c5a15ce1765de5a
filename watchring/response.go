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

// appendEvent appends one event to the events of a response.
func appendEvent(dst []byte, ev *Event, prevKV bool) []byte {
	body := ev.Body
	if !prevKV && ev.NoPrev < len(body) {
		body = body[:ev.NoPrev]
	}
	dst = protowire.AppendTag(dst, fieldEvents, protowire.BytesType)
	return protowire.AppendBytes(dst, body)
}

// sendEvents sends events, at least one, to w as one response or, if w asked for fragments and they are too large for
// one, as several (etcd's sendFragments: a fragment stays below the limit unless a single event exceeds it; all but
// the last are marked). header holds the encoded header field. shared and kept are the Sink's.
func (h *Hub) sendEvents(w *Watcher, header, events []byte, shared bool) (kept bool) {
	head := append(h.head[:0], header...)
	head = codec.AppendInt(head, fieldWatchID, w.ID)
	h.head = head
	if !w.Fragment || len(head)+len(events) < h.maxFragment {
		return w.stream.sink.Send(head, events, shared)
	}
	last := len(head)
	head = codec.AppendInt(head, fieldFragment, 1)
	h.head = head
	for len(events) > 0 && !w.closed {
		n := 0
		for n < len(events) {
			_, _, size := protowire.ConsumeField(events[n:])
			if size < 0 || n > 0 && len(head)+n+size >= h.maxFragment {
				break
			}
			n += size
		}
		if n == 0 {
			break // not what appendEvent wrote; cannot happen
		}
		if n == len(events) {
			head = head[:last]
		}
		if w.stream.sink.Send(head, events[:n:n], shared) {
			kept = true
		}
		events = events[n:]
	}
	return kept
}

// sendControl sends a response without events.
func (h *Hub) sendControl(s *Stream, r *Response) {
	r.Header.ClusterID, r.Header.MemberID, r.Header.RaftTerm = h.header.ClusterID, h.header.MemberID, h.header.RaftTerm
	h.head = AppendResponse(h.head[:0], r)
	s.sink.Send(h.head, nil, false)
}
