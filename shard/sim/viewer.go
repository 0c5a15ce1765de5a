package sim

import (
	"fmt"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/shard"
	"spindle/watchring"
)

// viewer is a client with one Watch stream at a proxy: it begins behind something that it, or somebody
// else, was told ("list at H, watch from H+1"), reads slowly now and then, and asks for progress. It is the
// stream's Sink.
type viewer struct {
	p       *proxy
	hub     *watchring.Hub
	stream  *watchring.Stream
	name    string
	at      int64 // when it was opened, virtual ns
	views   []*view1
	blocked bool
	dead    bool
	owed    []int64 // nows of progress requests that are not answered yet
}

// view1 is one watch of a viewer.
type view1 struct {
	w        *watchring.Watcher
	got      []*delivered
	promised int64 // everything up to here was delivered, as it was told
	ended    bool
}

// newViewer opens a stream without watches.
func (p *proxy) newViewer() *viewer {
	r := p.r
	g := r.net.Rand
	if p.hub == nil {
		part := p.core.Partition()
		p.hub = watchring.NewHub(p.core.Ring(), p.core.Frontier(), func(key, end []byte) int {
			shard, all := part.ShardsOf(key, end)
			if all {
				return watchring.All
			}
			return shard
		}, codec.Header{ClusterID: 1, MemberID: 1, RaftTerm: 1}, nil, watchring.HubConfig{PumpRevisions: 1 + g.IntN(40), TurnRevisions: 1 + g.IntN(20), History: past{p}})
	}
	v := &viewer{p: p, hub: p.hub, name: fmt.Sprintf("%s/v%d", p.host.Name, len(r.viewers)), at: r.net.now}
	r.viewers = append(r.viewers, v)
	p.viewers = append(p.viewers, v)
	v.stream = p.hub.NewStream(v)
	return v
}

// watch adds a watch to the stream.
func (v *viewer) watch(w *watchring.Watcher) *view1 {
	w.ID = int64(len(v.views))
	o := &view1{w: w, promised: w.Start - 1}
	v.views = append(v.views, o)
	v.hub.Add(v.stream, w)
	v.p.r.net.tracef("%s: watch %d of %s from %d", v.name, w.ID, describeKey([]byte(w.Key), []byte(w.End)), w.Start)
	v.p.pump = true
	return o
}

// watchNow opens a stream with one or two watches.
func (p *proxy) watchNow() {
	r := p.r
	g := r.net.Rand
	v := p.newViewer()
	for range 1 + g.IntN(2) {
		w := &watchring.Watcher{Key: "k", End: "y", PrevKV: g.IntN(3) > 0, Start: r.shown + 1}
		switch g.IntN(4) {
		case 0:
			w.Key, w.End = r.key(), ""
		case 1:
			w.Key, w.End = "\x01", "\x00"
		}
		switch g.IntN(8) {
		case 6, 7:
			w.Start = 1 + g.Int64N(r.shown+1) // before the ring's tail, mostly
		case 0:
			w.Start = max(1, r.shown-int64(g.IntN(40)))
		case 1:
			w.Start = r.shown + int64(g.IntN(20))
		case 2:
			if n := len(r.ops); n > 0 {
				if o := r.ops[g.IntN(n)]; o.rev > 0 {
					w.Start = o.rev + 1
				}
			}
		}
		v.watch(w)
	}
	v.live()
}

// live does something with the stream now and then.
func (v *viewer) live() {
	w := v.p.r.net
	w.After(w.Between(0, 100*time.Millisecond), func() {
		if v.dead || !v.p.r.chaos {
			v.unblock()
			return
		}
		switch w.Rand.IntN(6) {
		case 0:
			v.blocked = true
		case 1, 2:
			v.unblock()
		case 3:
			v.askProgress()
		}
		v.live()
	})
}

func (v *viewer) unblock() {
	if v.blocked && !v.dead {
		v.blocked = false
		v.stream.Drained()
		v.p.pump = true
		v.p.turn()
	}
}

func (v *viewer) askProgress() {
	if v.dead {
		return
	}
	v.p.core.Now(func(rev int64, st codec.Status) {
		if v.dead || st.Code != codec.OK {
			return
		}
		v.owed = append(v.owed, rev)
		v.stream.Progress(rev)
		v.p.pump = true
	})
	v.p.turn()
}

// Send implements watchring.Sink.
func (v *viewer) Send(head, events []byte, shared bool) (kept bool) {
	v.take(slices.Concat(head, events))
	return false
}

func (v *viewer) take(msg []byte) {
	r := v.p.r
	m := &pb.WatchResponse{}
	if err := proto.Unmarshal(msg, m); err != nil || m.Header == nil {
		r.fail("%s: a response cannot be read: %v", v.name, err)
		return
	}
	h := m.Header.Revision
	if r.net.Trace != nil {
		r.net.tracef("%s: %s", v.name, describeWatchResponse(msg))
	}
	if m.Canceled {
		if m.CompactRevision == 0 {
			r.fail("%s: watch %d is canceled without a compact revision", v.name, m.WatchId)
		}
		return
	}
	r.show(h)
	if len(m.Events) == 0 {
		if m.WatchId == -1 {
			for len(v.owed) > 0 && v.owed[0] <= h {
				v.owed = v.owed[1:]
			}
		}
		for _, o := range v.views {
			if !o.ended && (m.WatchId == -1 || m.WatchId == o.w.ID) {
				if h < o.promised {
					r.fail("%s: progress of watch %d runs back from %d to %d", v.name, o.w.ID, o.promised, h)
				}
				o.promised = max(o.promised, h)
			}
		}
		return
	}
	o := v.views[m.WatchId]
	for i, e := range m.Events {
		rev := e.Kv.ModRevision
		n := len(o.got)
		switch {
		case o.ended:
			r.fail("%s: an event of a watch that was canceled", v.name)
		case rev > h:
			r.fail("%s: an event of %d under header revision %d", v.name, rev, h)
		case rev <= o.promised:
			r.fail("%s: an event of %d, and everything up to %d was said to be delivered", v.name, rev, o.promised)
		case n > 0 && rev < o.got[n-1].rev, n > 0 && rev == o.got[n-1].rev && (i == 0 || m.Events[i-1].Kv.ModRevision != rev):
			r.fail("%s: an event of %d follows one of %d, in another response", v.name, rev, o.got[n-1].rev)
		}
		if n == 0 || o.got[n-1].rev < rev {
			o.got = append(o.got, &delivered{rev: rev})
			n++
		}
		o.got[n-1].events = append(o.got[n-1].events, e)
	}
	// A client resumes behind the last event: it has everything up to there.
	o.promised = max(o.promised, m.Events[len(m.Events)-1].Kv.ModRevision)
}

// Blocked implements watchring.Sink.
func (v *viewer) Blocked() bool { return v.blocked }

// past is the history of a proxy's shards, as its Hub reads it.
type past struct{ p *proxy }

// pastReader is one read of it. Chunks are small, so that there are many.
type pastReader struct {
	p *proxy
	h *shard.History
}

// OpenHistory implements watchring.HistorySource.
func (s past) OpenHistory(set int, from int64) watchring.HistoryReader {
	s.p.r.stats.Histories++
	return &pastReader{s.p, s.p.core.OpenHistory(set, from)}
}

// Next implements watchring.HistoryReader.
func (r *pastReader) Next(most int, done func(watchring.HistoryChunk)) {
	r.h.Next(min(most, 1+r.p.r.net.Rand.IntN(4000)), func(entries []*watchring.Entry, upTo, compact int64, st codec.Status) {
		c := watchring.HistoryChunk{Entries: entries, UpTo: upTo}
		switch {
		case st == codec.ErrCompacted:
			c.Compact = compact
		case st.Code != codec.OK:
			r.p.r.fail("%s: the history cannot be read: %v %s", r.p.host.Name, st.Code, st.Msg)
			return
		}
		r.p.r.stats.PastEntries += len(entries)
		r.p.pump = true
		done(c)
	})
}

// Close implements watchring.HistoryReader.
func (r *pastReader) Close() { r.h.Close() }

// Ended implements watchring.Sink.
func (v *viewer) Ended(w *watchring.Watcher) {
	v.views[w.ID].ended = true
	v.p.r.stats.Canceled++
}

// Failed implements watchring.Sink.
func (v *viewer) Failed(reason string) { v.p.r.fail("%s: a stream failed: %s", v.p.host.Name, reason) }

// died ends the viewer with its proxy.
func (v *viewer) died() { v.dead = true }

// settled reports whether every watch has been told of everything up to now.
func (v *viewer) settled(now int64) bool {
	if v.dead {
		return true
	}
	behind := false
	for _, o := range v.views {
		if o.ended {
			continue
		}
		if o.w.Start > now+1 {
			return true // as with etcd, a stream with a watch of the future gets no progress
		}
		behind = behind || o.promised < now
	}
	return !behind
}

// viewed checks that a watch got exactly what happened to its keys, from its start to what it was promised.
func (c *checker) viewed(v *viewer, o *view1) error {
	got, gone := o.got, c.unreadableUpTo()
	if most := c.compactedUpTo(); o.ended && o.promised+1 > most {
		return fmt.Errorf("it was canceled as compacted where it needed %d, and nothing above %d was compacted", o.promised+1, most)
	}
	for _, rev := range c.h.revs {
		if rev < o.w.Start || rev > o.promised {
			continue
		}
		var want []*mvccpb.Event
		for _, f := range c.h.byRev[rev] {
			if within(f.key, o.w.Key, o.w.End) {
				e := c.event(f)
				if !o.w.PrevKV {
					e.PrevKv = nil
				}
				want = append(want, e)
			}
		}
		if len(want) == 0 {
			continue
		}
		if len(got) == 0 || got[0].rev != rev {
			return fmt.Errorf("%v was never delivered, and everything up to %d was promised", want[0], o.promised)
		}
		d := got[0]
		got = got[1:]
		if len(d.events) != len(want) {
			return fmt.Errorf("at %d it got %v, must be %v", rev, d.events, want)
		}
		for i := range want {
			if d.events[i].PrevKv == nil && rev <= gone {
				want[i].PrevKv = nil
			}
			if !proto.Equal(d.events[i], want[i]) {
				return fmt.Errorf("at %d it got %v, must be %v", rev, d.events[i], want[i])
			}
		}
		c.r.stats.Viewed += len(want)
	}
	if len(got) > 0 {
		return fmt.Errorf("it got events of %d (%v), where nothing happened", got[0].rev, got[0].events)
	}
	return nil
}
