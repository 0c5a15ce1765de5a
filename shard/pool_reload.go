package shard

import (
	"fmt"
	"slices"

	"spindle/codec"
)

// This file changes the endpoints of a cluster while it is in use.

// SetEndpoints makes urls the endpoints of a cluster. Those that stay keep their connections. New ones are dialed;
// those that are gone take no new requests as soon as another endpoint answers: then what was sent on them is
// finished, their streams end, to be opened on another one, and they are closed. urls that PoolConfig.Validate refuses
// change nothing. It returns whether anything is another than before.
func (p *Pool) SetEndpoints(id codec.ClusterID, urls []string) bool {
	cl := p.clusters[id]
	if cl == nil || p.closed || len(urls) == 0 {
		return false
	}
	for _, u := range urls {
		if _, err := parseEndpoint(u); err != nil {
			return false
		}
	}
	before := cl.endpoints
	cl.endpoints = nil
	var added []*poolEndpoint
	for _, u := range urls {
		if cl.endpoint(u) != nil {
			continue // named twice
		}
		i := slices.IndexFunc(before, func(ep *poolEndpoint) bool { return ep.url == u })
		if i < 0 {
			ep := newPoolEndpoint(p, cl, u)
			added, cl.endpoints = append(added, ep), append(cl.endpoints, ep)
			continue
		}
		cl.endpoints = append(cl.endpoints, before[i])
	}
	changed := len(added) > 0
	for _, ep := range before {
		if cl.endpoint(ep.url) != ep {
			changed = true
			ep.gone = true
			ep.stop()
			cl.leaving = append(cl.leaving, ep)
			p.log.Info(fmt.Sprintf("%s: endpoint %s was removed", cl.label, ep.url))
		}
	}
	if p.started {
		for _, ep := range added {
			p.log.Info(fmt.Sprintf("%s: endpoint %s was added", cl.label, ep.url))
			ep.start()
		}
	}
	cl.describeDown()
	cl.leave()
	return changed
}

// endpoint returns the endpoint with a URL, nil if there is none.
func (cl *poolCluster) endpoint(url string) *poolEndpoint {
	for _, ep := range cl.endpoints {
		if ep.url == url {
			return ep
		}
	}
	return nil
}

// leave gives up the endpoints that were removed, if there is another connection.
func (cl *poolCluster) leave() {
	if len(cl.leaving) == 0 || !slices.ContainsFunc(cl.ready, func(l *poolLink) bool { return !l.ep.gone }) {
		return
	}
	leaving := cl.leaving
	cl.leaving = nil
	for _, ep := range leaving {
		p := ep.pool
		for _, l := range slices.Clone(p.links) {
			if l.ep == ep {
				l.remove()
			}
		}
		if cl.endpoint(ep.url) == nil {
			cl.metrics.forget(ep.url)
		}
	}
}

// remove ends l because its endpoint was removed: at once if it is not in use, else when its calls are finished.
func (l *poolLink) remove() {
	switch {
	case l.dead:
		return
	case !l.ready && !l.draining && !l.used():
		l.shutdown(errRemoved)
		return
	case !l.draining:
		l.drain()
	}
	st := codec.Status{Code: codec.Unavailable, Msg: l.ep.cluster.label + ": endpoint " + l.ep.url + " was removed from the configuration"}
	for _, w := range slices.Clone(l.watches) {
		s := w.stream
		w.detach()
		l.reset(s)
		w.endLater(st)
	}
}

// used says that there is more on l than a look at it, which is so if it was in use before (Distrust).
func (l *poolLink) used() bool {
	if l.conn == nil {
		return false
	}
	looks := 0
	if l.check.busy {
		looks = 1
	}
	return l.conn.Streams() > looks
}

// detach takes w from its connection.
func (w *poolWatch) detach() {
	l := w.link
	if i := slices.Index(l.watches, w); i >= 0 {
		l.watches = slices.Delete(l.watches, i, i+1)
	}
	w.link, w.stream = nil, nil
}
