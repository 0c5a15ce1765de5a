package sim

import (
	"sort"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// Stream is one Watch stream at a modelled cluster. Messages wait in it until the network takes them.
type Stream struct {
	e        *Etcd
	watchers []*watcher
	nextID   int64
}

type watcher struct {
	id              int64
	key, end        []byte
	start           int64
	next            int64 // first revision not delivered
	synced          bool  // as etcd: a synced watcher is no longer touched by compactions
	prevKV          bool
	fragment        bool
	noPut, noDelete bool
}

// OpenStream opens a Watch stream.
func (e *Etcd) OpenStream() *Stream { return &Stream{e: e} }

func encode(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil
	}
	return b
}

// Request takes one WatchRequest and returns the messages that answer it at once.
func (s *Stream) Request(req []byte) [][]byte {
	r := &pb.WatchRequest{}
	if proto.Unmarshal(req, r) != nil {
		return nil
	}
	switch v := r.RequestUnion.(type) {
	case *pb.WatchRequest_CreateRequest:
		return [][]byte{encode(s.create(v.CreateRequest))}
	case *pb.WatchRequest_CancelRequest:
		for i, w := range s.watchers {
			if w.id == v.CancelRequest.WatchId {
				s.watchers = append(s.watchers[:i], s.watchers[i+1:]...)
				return [][]byte{encode(&pb.WatchResponse{Header: s.e.header(s.e.rev), WatchId: w.id, Canceled: true})}
			}
		}
	case *pb.WatchRequest_ProgressRequest:
		if len(s.watchers) == 0 {
			return nil
		}
		for _, w := range s.watchers {
			if w.next <= s.e.rev || s.e.rev < w.start {
				return nil // etcd stays silent then
			}
		}
		return [][]byte{encode(&pb.WatchResponse{Header: s.e.header(s.e.rev), WatchId: -1})}
	}
	return nil
}

func (s *Stream) create(c *pb.WatchCreateRequest) *pb.WatchResponse {
	w := &watcher{key: c.Key, end: c.RangeEnd, start: c.StartRevision, next: c.StartRevision, prevKV: c.PrevKv, fragment: c.Fragment}
	if len(w.key) == 0 {
		w.key = []byte{0}
	}
	for _, f := range c.Filters {
		w.noPut = w.noPut || f == pb.WatchCreateRequest_NOPUT
		w.noDelete = w.noDelete || f == pb.WatchCreateRequest_NODELETE
	}
	resp := &pb.WatchResponse{Header: s.e.header(s.e.rev), Created: true}
	refuse := func(reason string) *pb.WatchResponse {
		resp.WatchId, resp.Canceled, resp.CancelReason = -1, true, reason
		return resp
	}
	if c.StartRevision < 0 {
		return refuse("etcdserver: mvcc: required revision has been compacted")
	}
	if len(w.end) != 0 && !(len(w.end) == 1 && w.end[0] == 0) && string(w.key) >= string(w.end) {
		return refuse("mvcc: watcher range is empty")
	}
	w.id = c.WatchId
	if w.id == 0 {
		for s.find(s.nextID) != nil {
			s.nextID++
		}
		w.id = s.nextID
		s.nextID++
	} else if s.find(w.id) != nil {
		return refuse("mvcc: duplicate watch ID provided on the WatchStream")
	}
	if w.start == 0 || w.start > s.e.rev {
		w.synced = true
		w.next = max(w.start, s.e.rev+1)
	}
	s.watchers = append(s.watchers, w)
	resp.WatchId = w.id
	return resp
}

func (s *Stream) find(id int64) *watcher {
	for _, w := range s.watchers {
		if w.id == id {
			return w
		}
	}
	return nil
}

// Pending reports whether Pull would find revisions not delivered yet.
func (s *Stream) Pending() bool {
	for _, w := range s.watchers {
		if w.next <= s.e.rev {
			return true
		}
	}
	return false
}

// Pull delivers what every watcher has not had: each revision in a message of its own, as to a synced
// watcher, or (combine) all in one, as to one that lags. All events of one revision stay together, unless the
// watcher takes fragments: then a message that combines is cut anywhere, as etcd cuts large ones.
func (s *Stream) Pull(combine bool) [][]byte {
	var out [][]byte
	live := s.watchers[:0]
	for _, w := range s.watchers {
		if !w.synced && w.next < s.e.compact {
			out = append(out, encode(&pb.WatchResponse{Header: s.e.header(s.e.rev), WatchId: w.id, Canceled: true, CompactRevision: s.e.compact}))
			continue
		}
		live = append(live, w)
		out = append(out, s.pull(w, combine)...)
	}
	s.watchers = live
	return out
}

func (s *Stream) pull(w *watcher, combine bool) [][]byte {
	e := s.e
	var out [][]byte
	var events []*mvccpb.Event
	var last int64
	send := func(rev int64) {
		for n := 1 + int(rev%4); combine && w.fragment && len(events) > n; events = events[n:] {
			out = append(out, encode(&pb.WatchResponse{Header: e.header(rev), WatchId: w.id, Events: events[:n], Fragment: true}))
		}
		if len(events) > 0 {
			out = append(out, encode(&pb.WatchResponse{Header: e.header(rev), WatchId: w.id, Events: events}))
			events = nil
		}
	}
	i := sort.Search(len(e.log), func(i int) bool { return e.log[i].Main >= w.next })
	for ; i < len(e.log); i++ {
		c := e.log[i]
		if c.Main > e.rev {
			break
		}
		if c.Main != last && !combine {
			send(last)
		}
		last = c.Main
		if !w.wants(c) || !w.synced && e.gone(c) {
			continue
		}
		ev := &mvccpb.Event{Kv: c.KV}
		if c.Delete {
			ev.Type = mvccpb.Event_DELETE
		}
		if w.prevKV && !(ev.Type == mvccpb.Event_PUT && c.KV.CreateRevision == c.KV.ModRevision) && c.Main-1 >= e.compact {
			if old := e.at(c.KV.Key, c.Main-1); old != nil {
				ev.PrevKv = old.KV
			}
		}
		events = append(events, ev)
	}
	if combine {
		send(e.rev)
	} else {
		send(last)
	}
	w.next = max(w.next, e.rev+1)
	w.synced = true
	return out
}

func (w *watcher) wants(c *Change) bool {
	if c.Delete && w.noDelete || !c.Delete && w.noPut {
		return false
	}
	return within(string(c.KV.Key), string(w.key), string(w.end))
}

// within reports whether k lies in [key, end), in etcd's notation: end "" is the one key, end "\0" is no end.
func within(k, key, end string) bool {
	switch end {
	case "":
		return k == key
	case "\x00":
		return k >= key
	}
	return k >= key && k < end
}

// gone reports whether a compaction took c: at the compact revision only the newest change of a key
// is left.
func (e *Etcd) gone(c *Change) bool {
	if c.Main > e.compact {
		return false
	}
	h := e.hist[string(c.KV.Key)]
	for i := len(h) - 1; i >= 0; i-- {
		if h[i].Main <= e.compact {
			return h[i] != c
		}
	}
	return true
}
