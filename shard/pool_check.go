package shard

import (
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"spindle/codec"
)

// This file has every new connection looked at before it is used: see Check. The one request of the look is all that
// goes over it until then.

// checkAgain is the mean pause until a connection is looked at again that has told nothing.
const checkAgain = 200 * time.Millisecond

// CheckWith implements checking. Connections that are in use already stay so.
func (p *Pool) CheckWith(f func(codec.ClusterID) *Check) { p.newCheck = f }

// Distrust implements checking. What is under way on the connections goes on.
func (p *Pool) Distrust(id codec.ClusterID) {
	cl := p.clusters[id]
	if cl == nil || p.newCheck == nil {
		return
	}
	links := cl.ready
	cl.ready = nil
	if len(links) > 0 {
		cl.downSince = p.timers.now()
	}
	for _, l := range links {
		l.ready = false
		l.ep.looked = false
		l.ep.left()
	}
	for _, l := range links {
		l.check.begin()
	}
}

// Looking implements looking. An endpoint counts until the first look at it has come back: one that does not answer, or that is
// refused again each time that it is dialed, keeps nobody from a decision.
func (p *Pool) Looking(id codec.ClusterID) bool {
	return slices.ContainsFunc(p.links, func(l *poolLink) bool {
		return l.ep.cluster.id == id && l.greeted && !l.ready && !l.draining && !l.dead && !l.ep.looked
	})
}

// linkCheck is the look at one connection. It is the Completion of its request, and owner of its timer. Owned by the loop.
type linkCheck struct {
	l     *poolLink
	k     *Check
	busy  bool // the request is under way
	timer poolTimer
}

func (k *linkCheck) init(l *poolLink) { k.l, k.timer.owner = l, k }

// begin looks at the connection, and takes it into use if there is nothing to look at.
func (k *linkCheck) begin() {
	p := k.l.pool
	if k.busy {
		return
	}
	k.k = nil
	if p.newCheck != nil {
		k.k = p.newCheck(k.l.ep.cluster.id)
	}
	if k.k == nil {
		k.l.becomeReady(p.timers.now())
		return
	}
	k.send()
}

func (k *linkCheck) send() {
	l := k.l
	p := l.pool
	s := l.conn.Open(codec.MethodPath(codec.MethodTxn), false, 0)
	if s == nil {
		k.later()
		return
	}
	k.busy = true
	c := p.acquireCall()
	c.cluster, c.method, c.done = l.ep.cluster, codec.MethodTxn, k
	c.cluster.metrics.inFlight.Inc()
	p.timers.set(&c.timer, p.timers.now()+int64(connectCall))
	c.link, c.stream = l, s
	s.User = c
	l.opened(s)
	l.conn.Send(s, k.k.AppendRequest(nil))
	l.conn.CloseSend(s)
	l.touch()
}

// Complete implements codec.Completion.
func (k *linkCheck) Complete(resp []byte, st codec.Status, _ bool) {
	l := k.l
	k.busy = false
	if l.dead || l.draining || l.pool.closed {
		return
	}
	looked := l.ep.looked
	l.ep.looked = true // so that Looking means the others
	switch k.k.Judge(resp, st) {
	case CheckPassed:
		l.becomeReady(l.pool.timers.now())
	case CheckAgain:
		l.ep.looked = looked
		k.send()
	case CheckRefused:
		l.shutdown(errors.New("refused: " + k.k.Why())) // its slot dials, and looks, again
	default:
		k.later()
	}
}

// later looks again after a moment.
func (k *linkCheck) later() {
	p := k.l.pool
	half := int64(checkAgain) / 2
	p.timers.set(&k.timer, p.timers.now()+half+rand.Int64N(2*half))
}

// due is the end of that moment.
func (k *linkCheck) due(int64) {
	switch l := k.l; {
	case l.dead || l.draining || l.ready:
	case l.silent && l.pinged != 0:
		l.shutdown(errPingTimeout) // it is of no use, and another one may be
	default:
		k.begin()
	}
}

// end is the end of the connection.
func (k *linkCheck) end() { k.l.pool.timers.cancel(&k.timer) }
