package revclock

import (
	"bytes"
	"fmt"

	"spindle/codec"
)

// readState is the read of e, s and t with which a start begins, and a fold whose history was compacted.
type readState struct {
	busy  bool
	retry retry
	goal  int64 // the log must be folded up to this revision of the coordinator

	holes   int   // times that history did not reach back to the snapshot
	holeRev int64 // ... of this revision
}

func (c *Clock) sendRead(now int64) {
	if c.read.busy || now < c.read.retry.at {
		return
	}
	c.read.busy = true
	c.buf = appendStartTxn(c.buf[:0])
	c.call(codec.MethodTxn, c.buf, 0, (*Clock).readDone)
}

func (c *Clock) readDone(_ uint64, resp []byte, st codec.Status, _ bool) {
	c.read.busy = false
	var r reply
	if st.Code == codec.OK {
		var ok bool
		if r, ok = parseReply(resp, 3); !ok {
			st = statusUnreadable
		}
	}
	if st.Code != codec.OK {
		c.failed(&c.read.retry, "reading the coordinator", st)
		return
	}
	c.lastErr = ""
	if c.args.Cluster != 0 && r.cluster != c.args.Cluster {
		c.lose(ErrOtherCluster(r.cluster, c.args.Cluster))
		return
	}
	e, s, t := &r.ops[0], &r.ops[1], &r.ops[2]
	if !e.found || !s.found {
		c.lose(errLostData)
		return
	}
	if _, err := ParseEpoch(e.kv.Value); err != nil {
		c.lose(err)
		return
	}
	if !bytes.Equal(e.kv.Value, c.epoch) {
		c.lose(errOtherEpoch(e.kv.Value[1:], c.epoch[1:]))
		return
	}
	c.load(e, s, t)
}

// load goes on from a snapshot.
func (c *Clock) load(e, s, t *replyOp) {
	var snap Snapshot
	if err := snap.Parse(s.kv.Value); err != nil {
		c.lose(err)
		return
	}
	if c.started && t.kv.ModRevision < c.ticks.last {
		c.lose(errRegress)
		return
	}
	// Replies of own ticks may have brought the log further than the snapshot is: then it goes on as it is.
	if !c.started || snap.Rev > c.log.rev {
		if err := c.log.Load(s.kv.Value, c.cfg.Now()); err != nil {
			c.lose(err)
			return
		}
		// If all ticks are in the snapshot, t tells which was the last one; else the fold will.
		c.ticks.last = 0
		if t.kv.ModRevision <= snap.Rev {
			c.ticks.last = t.kv.ModRevision
		}
	}
	c.epochMod = e.kv.ModRevision
	c.snap.mod, c.snap.rev = s.kv.ModRevision, snap.Rev
	c.read.goal = t.kv.ModRevision
	c.read.retry = retry{}
	c.watch.pos, c.watch.mark = snap.Rev, watchMark{}
	c.state = stateCatching
	c.moved(true)
}

// caughtUp decides whether what was folded is to be believed.
func (c *Clock) caughtUp() bool {
	c.read.holes = 0
	if !c.started && c.log.n < c.args.N {
		c.lose(&lossError{fmt.Errorf("the coordinator is behind: it has handed out revisions up to %d, and has handed out %d before; %w", c.log.n, c.args.N, errLostData), lossData})
		return false
	}
	for i, clock := range c.args.Clocks {
		if !c.started && clock > c.log.n {
			c.lose(&lossError{fmt.Errorf("the coordinator is behind: it has handed out revisions up to %d, but member cluster %d is at %d; %w", c.log.n, i, clock, errLostData), lossData})
			return false
		}
	}
	c.state = stateRunning
	c.drawSnapshot()
	if !c.started {
		c.started = true
		gen := c.gen
		c.ev.Started()
		return c.gen == gen
	}
	return true
}

// reload starts the fold again from the newest snapshot, because the watch cannot go on where it was.
func (c *Clock) reload() {
	c.stats.Reloads++
	c.closeWatch()
	c.watch.stallAt = 0
	c.state = stateReading
}

// hole handles a snapshot that history does not reach back to. A newer one may be under way.
func (c *Clock) hole(rev int64) {
	if rev != c.read.holeRev {
		c.read.holes, c.read.holeRev = 0, rev
	}
	c.read.holes++
	if c.read.holes > maxHoles {
		c.lose(errHole)
		return
	}
	c.failed(&c.read.retry, "reading the coordinator", codec.Status{Code: codec.OutOfRange, Msg: errHole.Error()})
}
