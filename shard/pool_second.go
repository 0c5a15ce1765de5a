package shard

import (
	"errors"
	"time"
)

// This file has a second connection dialed beside one that is suspected. A connection may be dead while its node is not: packets
// were lost in one or both directions, and the state of TCP somewhere on the way is gone. Its pings find that after seconds.
// A new connection that works is the better proof: once it has passed its look, whoever is still mute is given up for it, and
// what was under way there is settled as on any lost connection. Each slot has one such second at most, dialed with the
// usual pauses; the suspected connection stays in use meanwhile, behind all others.

const (
	// secondPause is how long a suspected connection may take to answer its ping before a second one is dialed.
	secondPause = 100 * time.Millisecond
	// shortDial is how long a dial may take, and after it the wait for the server's SETTINGS, beside a suspected connection and
	// in every other attempt besides: what dials into the void must not wait there when packets flow again.
	shortDial = time.Second
)

var (
	errMute      = errors.New("no answer to requests and a ping, while a new connection answers")
	errNotNeeded = errors.New("not needed: the connection beside it answers")
)

// doubted says that l is to be used last: a request was not answered, and nothing has shown since that the node hears.
func (l *poolLink) doubted() bool { return l.silent || l.deaf.place != 0 }

// mute says that l was asked, and had neither an answer nor much else to say.
func (l *poolLink) mute() bool {
	return l.silent && l.pinged != 0 || l.deaf.place != 0 && l.sincePing < replyProgress
}

// challenge has a second connection dialed beside l, unless one is already.
func (l *poolLink) challenge(now int64) {
	s := l.slot
	if !l.ready || s.link != l || s.old != nil || l.ep.gone || l.pool.closed {
		return
	}
	s.old = l
	l.vacate(true)
	l.pool.timers.set(&s.timer, now+int64(secondPause))
}

// settle decides between the two connections of a slot, as far as that is known: it is called when the second becomes ready, and
// when the first answers. While it does not answer, but brings much data, both are in use: a pong stands behind all that is on its
// way (pool_deaf.go).
func (s *poolSlot) settle() {
	old, second := s.old, s.link
	if old == nil {
		return
	}
	ready := second != nil && second.ready
	switch {
	case ready && old.mute():
		old.ep.cluster.metrics.deadConns.Inc()
		old.shutdown(errMute)
	case ready && old.renewing:
		old.drain()
	case !old.renewing && !old.doubted():
		s.callOff()
	}
}

// callOff leaves the slot to the connection that was suspected. What was sent on the second one is finished.
func (s *poolSlot) callOff() {
	second := s.link
	s.link, s.old = s.old, nil
	s.ep.pool.timers.cancel(&s.timer)
	switch {
	case second == nil:
	case second.ready || second.used():
		second.drain()
	default:
		second.shutdown(errNotNeeded)
	}
}

// patience is how long the next dial may take, and the server's SETTINGS after it.
func (s *poolSlot) patience() time.Duration {
	if s.old != nil || s.attempts%2 == 0 {
		return min(shortDial, s.ep.pool.cfg.DialTimeout)
	}
	return s.ep.pool.cfg.DialTimeout
}
