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
