package server

import "slices"

// What one client's connection counts in the process's Memory (shard.Memory), and what follows from it.
const (
	// chargeStep is how far the count may be off for one connection: small requests touch nothing that the loops
	// share.
	chargeStep = 16 << 10
	// smallShare is what a connection may hold and still be served when memory is short.
	smallShare = 256 << 10
	// ownedAnswer is the size from which on an answer is handed to the codec instead of copied.
	ownedAnswer = 256 << 10
)

// held is what the client makes this process hold: answers that wait, messages received in part, requests with
// the core.
func (c *clientConn) held() int {
	if c.closed {
		return c.opsBytes
	}
	n := c.h2.QueueMemory() + c.h2.Partial() + c.opsBytes + c.sock.OutboundBuffered()
	if c.tls != nil {
		n += c.tls.Partial()
	}
	return n
}

// charge brings the count up to date.
func (c *clientConn) charge() {
	n := c.held()
	if d := n - c.charged; d >= chargeStep || d <= -chargeStep || n == 0 && d != 0 {
		c.charged = n
		c.client.SetHeld(int64(n))
		c.eng.cfg.Memory.Add(int64(d))
	}
}

// full says that a request of size bytes is refused, and why.
func (c *clientConn) full(size int) (limit, bool) {
	switch {
	case c.ops >= maxOpsPerConn:
		return limitRequests, true
	case c.crowded():
		return limitAllRequests, true
	case c.opsBytes+size > maxOpBytesPerConn:
		return limitRequestBytes, true
	case c.h2.Queued() > maxWaitingReplies || c.h2.QueueMemory() > maxReplyMemory:
		return limitReplies, true
	case c.charged > smallShare && c.eng.cfg.Memory.Pressed():
		return limitMemory, true
	}
	return 0, false
}

// crowded says that the connection has its share of what the core may have: half of the places that nobody has taken,
// but opsWhenBusy while there are any. So one client may have as many as it likes among idle ones, n greedy ones
// leave 2/(n+2) of the places to the others, and a shard that hangs fills them only when very much waits for it.
func (c *clientConn) crowded() bool {
	if c.ops == 0 {
		return false
	}
	free := maxOps - c.eng.working()
	return free <= 0 || int64(c.ops) >= max(opsWhenBusy, free/2)
}

// working is how many ops the core has.
func (e *Engine) working() (n int64) {
	for _, l := range e.loops {
		n += l.working.Load()
	}
	return n
}

// minTaken is the part of what it holds that a client has to take in a second, when memory is short and it holds the most.
const minTaken = 64

// look says, once a second, whether the client holds much for what it gets done: bytes of answers that its socket took, and
// of requests that were answered. What it holds may stay the same while much goes through it, or shrink by a byte at a time.
func (c *clientConn) look() (slow bool) {
	done := c.wrote + c.opsDone - c.sock.OutboundBuffered()
	held := min(c.charged, c.lastHeld)
	slow = held > smallShare && done-c.lastDone < held/minTaken
	c.lastDone, c.lastHeld = done, c.charged
	if c.slow++; !slow {
		c.slow = 0
	}
	return slow
}

// patience is how many seconds in a row a client may be slow, when memory is short, before it is closed though others hold
// more.
const patience = 3

// relieve closes clients that hold much and take next to nothing, if memory is short: the one of them that holds the most, and
// as many of those that have been slow for longer as bring the memory down to three quarters, or to half if lists wait for room.
func (l *Loop) relieve(slow []*clientConn) {
	m := l.eng.cfg.Memory
	pressed := m.Pressed()
	slices.SortFunc(slow, func(a, b *clientConn) int { return b.charged - a.charged })
	for i, c := range slow {
		most, long := pressed && i == 0, pressed && m.Above(3, 4) || m.Awaited() && m.Above(1, 2)
		if !most && (c.slow < patience || !long) {
			continue
		}
		c.drop(limitMemory, "memory is short, and this client holds much and takes next to nothing")
	}
}

// alive sees to the server's keepalive, as grpc-go does it: a PING after a silence, the end when nothing follows.
func (c *clientConn) alive(now int64) bool {
	interval, timeout := int64(c.eng.cfg.KeepaliveInterval), int64(c.eng.cfg.KeepaliveTimeout)
	switch {
	case interval <= 0 || timeout <= 0:
	case c.pinged != 0 && now-c.pinged >= timeout:
		c.drop(limitKeepalive, "no answer to a keepalive PING")
		return false
	case c.pinged == 0 && now-c.received >= interval:
		c.pinged = now
		c.h2.Ping()
		c.touch()
	}
	return true
}
