package codec

// judgePing counts the PINGs of a client that come too early (grpc-go's enforcement, which etcd turns on):
// a few are forgiven, and all are once something was sent to the client, since clients measure the
// bandwidth by PINGs beside DATA.
func (c *Conn) judgePing() error {
	if c.client || c.cfg.PingMinTime <= 0 || c.cfg.Now == nil {
		return nil
	}
	now := c.cfg.Now()
	last := c.lastPing
	c.lastPing = now
	if c.pingExcused || last == 0 {
		c.pingExcused, c.pingStrikes = false, 0
		return nil
	}
	least := c.cfg.PingMinTime
	if c.streams.n == 0 {
		least = max(least, pingIdleTime)
	}
	if now-last < int64(least) {
		if c.pingStrikes++; c.pingStrikes > maxPingStrikes {
			return limitErr(LimitPings, "too_many_pings")
		}
	}
	return nil
}

// A server on grpc-go measures the bandwidth (BDP) with a PING beside the first DATA that it receives, and with the next
// one as soon as that is answered: for small requests a message more in each direction, and two processes that wake up for
// it, per request. Such a PING is answered late, with what is written anyway, once so much was sent that the
// measurement may be of use to it; on a quiet connection by Tick. RFC 9113 6.7 wants an answer, and only recommends that
// it comes at once. Any other PING asks for a sign of life and gets it at once.
const bandwidthBytes = 16 << 10

// bandwidthPing is how grpc-go marks them (internal/transport, bdpPing).
var bandwidthPing = [8]byte{2, 4, 16, 16, 9, 14, 7, 7}

// holdPing keeps the answer to a PING of the server back, if that may be. One at a time is held.
func (c *Conn) holdPing(data [8]byte) bool {
	if !c.client || data != bandwidthPing || c.pingHeld || c.sentData-c.heldAt >= bandwidthBytes {
		c.heldAt = c.sentData
		return false
	}
	c.pingHeld = true
	return true
}

// answerHeld answers the PING that is held, if it is time for it.
func (c *Conn) answerHeld(late bool) {
	if c.pingHeld && c.usable() && (late || c.sentData-c.heldAt >= bandwidthBytes) {
		c.pingHeld, c.heldAt = false, c.sentData
		c.out = appendPing(c.o(), true, bandwidthPing)
	}
}
