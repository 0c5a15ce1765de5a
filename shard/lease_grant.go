package shard

import "spindle/codec"

// leaseGrant is one LeaseGrant under way.
type leaseGrant struct {
	c        *Core
	op       *Op
	x, m     int64
	ttl      int64
	chosen   bool // X is Spindle's choice
	deadline int64

	granted int64 // the TTL that home gave
	now     int64
	waiting int // for now, and for the member
	st      codec.Status
	done    bool
}

func (c *Core) submitLeaseGrant(op *Op, r *leaseRequest) {
	g := &leaseGrant{c: c, op: op, x: r.id, ttl: r.ttl, chosen: r.id == 0, deadline: c.leaseDeadline(op), waiting: 2}
	c.Now(func(rev int64, st codec.Status) {
		g.now = rev
		g.part(st)
	})
	g.begin()
}

// part takes one of the two things that the answer needs.
func (g *leaseGrant) part(st codec.Status) {
	if g.waiting--; st.Code != codec.OK {
		g.st = st
	}
	if g.done || g.waiting > 0 && g.st.Code == codec.OK {
		return
	}
	g.done = true
	if g.st.Code == codec.OK {
		hdr := g.c.hdr
		hdr.Revision = g.now
		b := codec.AppendHeaderField(g.op.Resp[:0], &hdr)
		b = codec.AppendInt(b, 2, g.x)
		g.op.Resp = codec.AppendInt(b, 3, g.granted)
	}
	g.c.finish(g.op, g.st)
}

// begin draws an ID for the members and grants it at home. An ID is never used twice, and what makes a lease or
// its marker is sent once for each: a copy that comes late would bring back a lease that was revoked meanwhile. So
// an outcome that was not learned means another ID.
func (g *leaseGrant) begin() {
	c := g.c
	until := g.deadline
	if g.chosen {
		g.m = c.drawLease(g.x)
		g.x = g.m
		// Another home may answer when this one does not.
		until = min(until, c.cfg.Now()+int64(c.cfg.ShardTimeout/3))
	} else {
		g.m = c.drawAlias(g.x)
	}
	if c.home(g.x).refusesPut() {
		g.part(codec.ErrNoSpace)
		return
	}
	c.home(g.x).askOnce(codec.MethodLeaseGrant, grantRequest(g.m, g.ttl), until, func(resp []byte, st codec.Status, unknown bool) {
		switch {
		case st.Code == codec.OK:
			g.granted = parseLeaseReply(resp).ttl
			g.mark(until)
		case unknown, st == codec.ErrLeaseExist, st == codec.ErrTimeout:
			g.again(st)
		default:
			g.part(st)
		}
	})
}

// again begins with another ID, if there is time.
func (g *leaseGrant) again(st codec.Status) {
	c := g.c
	if g.done {
		return
	}
	if c.cfg.Now() >= g.deadline {
		g.part(st)
		return
	}
	c.after(c.jitter(retryDelay), g.begin)
}

// mark puts the marker.
func (g *leaseGrant) mark(until int64) {
	home := g.c.home(g.x)
	home.askOnce(codec.MethodTxn, createLeaseKey(g.x, g.m), until, func(resp []byte, st codec.Status, unknown bool) {
		switch {
		case unknown:
			g.settle()
			return
		case st == codec.ErrTimeout, st == codec.ErrLeaseNotFound: // not found: its TTL was short, and is over
			g.again(codec.ErrTimeout)
			return
		case st.Code != codec.OK:
			g.part(st)
			return
		}
		t, ok := parseTxnReply(resp, nil)
		switch {
		case !ok:
			g.part(errMemberReply)
		case t.succeeded:
			g.marked(t.rev)
		default:
			g.c.leases.revokeLater(home, g.m)
			g.part(codec.ErrLeaseExist)
		}
	})
}

// settle finds out whether the marker was put. If not, M is ended first, so that the marker does not come late.
func (g *leaseGrant) settle() {
	g.c.readMarker(g.x, g.deadline, func(kv codec.KV, mk LeaseMarker, found bool, st codec.Status) {
		switch {
		case st.Code != codec.OK:
			g.part(st)
		case found && mk.Member == g.m:
			g.marked(kv.CreateRevision)
		default:
			g.c.home(g.x).ask(codec.MethodLeaseRevoke, revokeRequest(g.m), g.deadline, func(_ []byte, st codec.Status, _ bool) {
				switch {
				case st == codec.ErrLeaseNotFound && !g.chosen:
					// Perhaps the marker was put, and somebody has revoked X meanwhile: then X has been there, and
					// must not come back.
					g.part(codec.ErrTimeout)
				case st.Code != codec.OK && st != codec.ErrLeaseNotFound:
					g.part(st)
				default:
					g.again(codec.ErrTimeout)
				}
			})
		}
	})
}

func (g *leaseGrant) marked(create int64) {
	g.c.leases.table.learn(g.x, g.m, g.c.part.HomeOf(g.x), create)
	g.part(codec.Status{})
}

// drawLease draws an ID for a lease that Spindle chooses: its home has a connection and room if any has, and is not that of
// last, which did not answer (0: none).
func (c *Core) drawLease(last int64) (id int64) {
	for range maxHomeDraws {
		id = c.cfg.Rand.Int64N(aliasBit-1) + 1
		home := c.part.HomeOf(id)
		if c.connected(home) && !c.shards[home].refusesPut() && (last == 0 || len(c.shards) == 1 || home != c.part.HomeOf(last)) {
			break
		}
	}
	return id
}

// drawAlias draws an ID for a lease whose ID x a client chose: it has the same home. That shard has at least one of
// the slots, so one draw in Slots succeeds at least.
func (c *Core) drawAlias(x int64) int64 {
	home := c.part.HomeOf(x)
	for {
		if id := c.cfg.Rand.Int64N(aliasBit) | aliasBit; c.part.HomeOf(id) == home {
			return id
		}
	}
}

// connected says whether a shard has a connection, as far as the transport tells.
func (c *Core) connected(shard int) bool {
	l, ok := c.tr.(liveness)
	return !ok || l.Connected(c.shards[shard].cluster)
}
