package shard

import "spindle/codec"

// This file keeps out of batches what can only fail. A compare MOD == X of a key that has changed behind X never holds
// again: a key's mod revision only grows, or is 0 without the key. So a Txn with such a compare executes its
// else-branch whatever else it says, and if that only reads, so does the Txn: it goes the road of reads, and waits for no batch. That
// is the fate of most swaps of a key that many fight for: each needs a batch of its own (what one writes, the others read), so
// one in the queue that is doomed costs everybody a batch's time.
//
// What the create cache has of the key is only a reason to try it this way. The read brings the compare's key along, at
// the same state as everything else, and the compare is made there. If it holds after all (a member was restored and the
// loss accepted, say) nothing was answered, and the Txn is written as any other.

// doomed returns the place in cmps of a compare that can never hold again, as far as c knows, if p writes nothing but in
// its success branch and reads no past; -1 if there is none. It allocates nothing.
func (p *Plan) doomed(c *CreateCache, orEqual bool) int32 {
	if p.Kind != OpTxn || p.history || p.proved || len(p.Writes) == 0 {
		return -1
	}
	t := &p.txns[0]
	for i := t.els.from; i < t.els.to; i++ {
		if p.ops[i].kind != planRange {
			return -1
		}
	}
	for i := t.cmps.from; i < t.cmps.to; i++ {
		cmp := &p.cmps[i]
		if cmp.form != compareModIs || cmp.end != nil {
			continue
		}
		if _, _, mod, ok := c.Get(cmp.key); ok && (mod > cmp.x || orEqual) {
			return i
		}
	}
	return -1
}

// expectElse makes p a Txn that only reads: the compare at cmp, nothing to do if it holds, and the else-branch.
func (p *Plan) expectElse(cmp int32) {
	p.Writes, p.Reads, p.Deletes = p.Writes[:0], p.Reads[:0], p.Deletes[:0]
	p.PutSlots, p.leases, p.guards = p.PutSlots[:0], p.leases[:0], p.guards[:0]
	p.slow, p.decided, p.elseOnly = false, false, true
	t := &p.txns[0]
	t.cmps, t.then, t.branch = planSpan{cmp, cmp + 1}, planSpan{}, branchOpen
	p.addRead(p.cmps[cmp].interval())
	for i := t.els.from; i < t.els.to; i++ {
		p.addRead(p.ops[i].interval())
	}
}

// holdsAfterAll says that the compare of a Txn whose else-branch was expected holds on snap.
func (p *Plan) holdsAfterAll(snap *Snapshot) bool {
	if !p.elseOnly {
		return false
	}
	c := &p.cmps[p.txns[0].cmps.from]
	ok, _ := c.holds(snap.of(c.interval()))
	return ok
}

// submitDoomed reads for op, a Txn that may write, if it can only fail. It returns false for any other.
func (c *Core) submitDoomed(op *Op) bool {
	p := &op.core.plan
	cmp := p.doomed(c.creates, c.cfg.Sabotage.Doubt || c.cfg.Sabotage.DoomedUnchecked)
	if cmp < 0 {
		return false
	}
	c.readDoomed(op, cmp)
	return true
}

func (c *Core) readDoomed(op *Op, cmp int32) {
	op.core.plan.expectElse(cmp)
	c.stats.Doomed++
	if c.enterList(op) {
		c.submitReadTxn(op)
	}
}

// divertDoomed takes out of the queue what became doomed while it waited there: as the next batch is formed, the answer of
// the one before has told what it changed.
func (s *shardState) divertDoomed() {
	c := s.c
	keep, out := s.queue[:0], s.diverted[:0]
	for _, w := range s.queue {
		cmp := int32(-1)
		if w.finish == nil {
			cmp = w.plan.doomed(c.creates, c.cfg.Sabotage.Doubt)
		}
		if cmp >= 0 {
			out = append(out, diverted{w.op, cmp})
		} else {
			keep = append(keep, w)
		}
	}
	clear(s.queue[len(keep):])
	s.queue = keep
	for i := range out { // only now: whoever is answered may come with the next request
		c.readDoomed(out[i].op, out[i].cmp)
	}
	clear(out)
	s.diverted = out[:0]
}

// diverted is a Txn that left the queue, and the place of the compare that dooms it.
type diverted struct {
	op  *Op
	cmp int32
}

// writeAfterAll sends op, whose expected else-branch is not the one, the road of writes.
func (c *Core) writeAfterAll(op *Op) {
	if c.state != stateReady {
		c.finish(op, codec.ErrStopped)
		return
	}
	c.stats.DoomedWrong++
	c.leaveList(op)
	p := &op.core.plan
	if st := p.Parse(op.Kind, op.Msg, &c.cfg.Limits); st.Code != codec.OK {
		c.finish(op, st)
		return
	}
	p.proved = true
	c.submitWrite(op)
}
