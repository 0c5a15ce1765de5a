package sim

import (
	"fmt"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/watchring"
)

// follower reads a proxy's ring behind a frontier, as a Hub does.
type follower struct {
	p       *proxy
	ring    *watchring.Ring
	front   *watchring.Frontier
	shard   int // or watchring.All
	start   int64
	cursor  int64
	last    int64 // where the frontier was
	got     []*delivered
	stopped bool
	name    string
	at      int64 // when it began, virtual ns
}

type delivered struct {
	rev    int64
	shard  int
	events []*mvccpb.Event
}

// follow begins to follow all frontiers of a proxy that became ready.
func (p *proxy) follow() {
	core := p.core
	for i := watchring.All; i < p.r.Shards; i++ {
		f := &follower{p: p, ring: core.Ring(), front: core.Frontier(), shard: i, name: fmt.Sprintf("%s/%d", p.host.Name, i), at: p.r.net.now}
		f.start = f.ring.Tail()
		f.cursor = f.start
		p.followed = append(p.followed, f)
		p.r.follows = append(p.r.follows, f)
	}
	core.OnFrontier(func() {
		for _, f := range p.followed {
			f.advance()
		}
		p.pump = true
	})
	for _, f := range p.followed {
		f.advance()
	}
}

func (f *follower) advance() {
	if f.stopped {
		return
	}
	r := f.p.r
	to := f.front.Get(f.shard)
	if to < f.last {
		r.fail("%s: the frontier fell from %d to %d", f.name, f.last, to)
		return
	}
	f.last = to
	if to <= f.cursor {
		return // while a stream was down the ring may have gone past what is complete
	}
	for rev := f.cursor + 1; rev <= to; rev++ {
		e, lapped := f.ring.Load(rev)
		if lapped {
			// Lost: a Hub would go on from the history. Here a new follower begins.
			r.stats.Lapped++
			f.cursor = rev - 1
			f.stopped = true
			n := &follower{p: f.p, ring: f.ring, front: f.front, shard: f.shard, start: to, cursor: to, name: f.name + "'", at: r.net.now}
			for i := range f.p.followed {
				if f.p.followed[i] == f {
					f.p.followed[i] = n
				}
			}
			r.follows = append(r.follows, n)
			return
		}
		if e == nil {
			rev = f.ring.Skip(rev, to) // as a Hub does: a rebuild leaves out a million
			continue
		}
		if f.shard != watchring.All && e.Shard != f.shard {
			continue
		}
		d := &delivered{rev: rev, shard: e.Shard}
		for i := range e.Events {
			ev := &mvccpb.Event{}
			if err := proto.Unmarshal(e.Events[i].Body, ev); err != nil {
				r.fail("%s: event at %d: %v", f.name, rev, err)
				return
			}
			bare := &mvccpb.Event{}
			if err := proto.Unmarshal(e.Events[i].Body[:e.Events[i].NoPrev], bare); err != nil || bare.PrevKv != nil || !proto.Equal(bare.Kv, ev.Kv) {
				r.fail("%s: event at %d: NoPrev is wrong", f.name, rev)
				return
			}
			if string(e.Events[i].Key) != string(ev.Kv.Key) || e.Events[i].Delete != (ev.Type == mvccpb.Event_DELETE) {
				r.fail("%s: event at %d: key or kind do not fit the body", f.name, rev)
				return
			}
			d.events = append(d.events, ev)
		}
		f.got = append(f.got, d)
		r.show(rev)
	}
	f.cursor = to
	r.show(to) // a progress notification
}
