package revclock

import "spindle/codec"

// snapState is the snapshot on the coordinator. Everybody may write it; a guard on the revision of the
// one that it replaces lets only one do so, and it can only grow newer: who knows that revision has folded
// everything that the old one had.
type snapState struct {
	busy  bool
	retry retry
	mod   int64 // revision of the coordinator at which s was written, 0 if it is missing
	rev   int64 // revision that it folds
	after int   // ticks after which this proxy writes the next one
	wrote int64 // revision that the snapshot under way folds
	// replaced is the revision that the snapshot before it folds.
	replaced int64
}

// drawSnapshot decides after how many ticks this proxy writes a snapshot, if nobody else has.
func (c *Clock) drawSnapshot() {
	c.snap.after = c.cfg.SnapshotEvery + c.cfg.Rand.IntN(c.cfg.SnapshotEvery/8+1)
}

func (c *Clock) snapshotDue() bool { return c.log.ticks >= c.snap.after }

func (c *Clock) sendSnapshot(now int64) {
	s := &c.snap
	if s.busy || !c.snapshotDue() || now < s.retry.at {
		return
	}
	s.busy, s.wrote = true, c.log.rev
	s.replaced = s.rev // as of now: the watch may bring the new one before the reply does
	c.val = c.log.AppendSnapshot(c.val[:0])
	c.buf = appendSnapshotTxn(c.buf[:0], c.epoch, c.val, s.mod)
	c.call(codec.MethodTxn, c.buf, 0, (*Clock).snapshotDone)
}

// snapshotDone: history behind the snapshot that was replaced is of no use to anybody who starts.
// Behind the new one it still is, to proxies whose watch is a little late.
func (c *Clock) snapshotDone(_ uint64, resp []byte, st codec.Status, _ bool) {
	s := &c.snap
	s.busy = false
	if st.Code != codec.OK {
		c.failed(&s.retry, "writing a snapshot to the coordinator", st)
		return
	}
	r, ok := parseReply(resp, 0)
	if !ok || !r.succeeded {
		// Somebody else was faster; the watch will bring theirs.
		c.failed(&s.retry, "writing a snapshot to the coordinator", codec.Status{Code: codec.Aborted, Msg: "another proxy wrote one"})
		c.lastErr = ""
		return
	}
	s.retry = retry{}
	c.stats.Snapshots++
	if r.rev > s.mod {
		s.mod, s.rev, c.log.ticks = r.rev, s.wrote, 0
		c.drawSnapshot()
	}
	if s.replaced > 0 && s.replaced < s.wrote {
		c.buf = appendCompact(c.buf[:0], s.replaced)
		c.call(codec.MethodCompact, c.buf, 0, (*Clock).compactDone)
	}
}

// compactDone takes any outcome: another proxy may have compacted as far, and the next snapshot tries anew.
func (c *Clock) compactDone(uint64, []byte, codec.Status, bool) {}

// sawSnapshot notes a snapshot that the watch brought.
func (c *Clock) sawSnapshot(kv *codec.KV, del bool) {
	s := &c.snap
	if kv.ModRevision <= s.mod {
		return
	}
	if del {
		// Whoever starts now finds nothing to begin with: write another one at once.
		s.mod, s.after = 0, 0
		return
	}
	var snap Snapshot
	if err := snap.Parse(kv.Value); err != nil {
		c.lose(err)
		return
	}
	s.mod, s.rev, s.retry = kv.ModRevision, snap.Rev, retry{}
	c.log.ticks = 0
	c.drawSnapshot()
}
