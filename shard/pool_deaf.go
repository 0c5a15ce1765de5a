package shard

import "errors"

// A connection may be dead in one direction only: what is sent vanishes, while the events of a watch go on coming. Any
// bytes count as a sign of life otherwise, so this would never be noticed. So after a call without an answer the
// member is asked whether it hears, and that must be answered by a pong, or by a reply to another call.

// deafPings is how many times PingTimeout that may take: the pong stands behind what is on its way already.
const deafPings = 2

var errDeafPeer = errors.New("no answer to requests and pings, though other data comes")

// deafness is the timer of that question; a part of poolLink.
type deafness poolLink

// unanswered follows the timeout of a call on l. Until l answers it is used last.
func (l *poolLink) unanswered(now int64) {
	if l.dead || !l.ready {
		return
	}
	if l.deaf.place == 0 && l.mayPing(now) {
		l.deaf.owner = (*deafness)(l)
		l.pool.timers.set(&l.deaf, now+deafPings*int64(l.pool.cfg.PingTimeout))
		l.ping(now)
	}
	if l.doubted() {
		l.challenge(now)
	}
}

// answered follows whatever shows that the member has heard l.
func (l *poolLink) answered() {
	l.pool.timers.cancel(&l.deaf)
	if l.slot.old == l {
		l.slot.settle()
	}
}

// due is the end of the wait.
func (d *deafness) due(now int64) {
	l := (*poolLink)(d)
	if l.dead {
		return
	}
	if now-l.deaf.at > int64(l.pool.cfg.PingTimeout)/2 {
		// The loop stalled, and has not looked at its sockets since: the answer may be there.
		l.pool.timers.set(&l.deaf, now+int64(l.pool.cfg.PingTimeout)/2)
		return
	}
	l.ep.cluster.metrics.deadConns.Inc()
	l.shutdown(errDeafPeer)
}
