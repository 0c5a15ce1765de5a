package shard

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"spindle/codec"
	"spindle/watchring"
)

// AutoCompactMode says what an AutoCompact counts.
type AutoCompactMode uint8

// The modes, as etcd's --auto-compaction-mode.
const (
	AutoCompactOff AutoCompactMode = iota
	AutoCompactPeriodic
	AutoCompactRevision
)

// AutoCompact says how much history is kept without anybody asking.
type AutoCompact struct {
	Mode AutoCompactMode
	// Period is how long history is kept (periodic).
	Period time.Duration
	// Keep is how many revisions are kept (revision); Every is how often that is looked at, 0 for etcd's
	// five minutes.
	Keep  int64
	Every time.Duration
}

// Bounds and rhythm of automatic compaction; the rhythm is etcd's (etcdserver/api/v3compactor).
const (
	minAutoPeriod    = 100 * time.Millisecond
	maxAutoPeriod    = 10 * 365 * 24 * time.Hour
	maxAutoInterval  = time.Hour // between two periodic compactions, however long the period
	autoSamples      = 10        // looks in that interval
	revisionInterval = 5 * time.Minute
)

// ParseAutoCompact reads etcd's two flags: a retention that is a plain number means hours (periodic) or
// revisions (revision), 0 is off. A duration in mode revision, which etcd takes for a number of revisions, is
// refused, as are negative ones.
func ParseAutoCompact(mode, retention string) (AutoCompact, error) {
	if mode == "" {
		mode = "periodic"
	}
	if mode != "periodic" && mode != "revision" {
		return AutoCompact{}, fmt.Errorf("--auto-compaction-mode %q: say periodic or revision", mode)
	}
	if retention == "" {
		return AutoCompact{}, nil
	}
	n, err := strconv.ParseInt(retention, 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange) || err == nil && n < 0:
		return AutoCompact{}, fmt.Errorf("--auto-compaction-retention %s is out of range: 0 is off", retention)
	case err == nil && n == 0:
		return AutoCompact{}, nil
	case mode == "revision" && err == nil:
		return AutoCompact{Mode: AutoCompactRevision, Keep: n}, nil
	case mode == "revision":
		return AutoCompact{}, fmt.Errorf("--auto-compaction-retention %q: in mode revision give a number of revisions, as in 10000", retention)
	}
	var d time.Duration
	if err == nil {
		d = time.Duration(min(n, int64(maxAutoPeriod/time.Hour)+1)) * time.Hour
	} else if d, err = time.ParseDuration(retention); err != nil {
		return AutoCompact{}, fmt.Errorf("--auto-compaction-retention %q: in mode periodic give a duration, as in 30m, or a number of hours", retention)
	}
	if d == 0 {
		return AutoCompact{}, nil
	}
	if d < minAutoPeriod || d > maxAutoPeriod {
		return AutoCompact{}, fmt.Errorf("--auto-compaction-retention %s: give from %v to %d hours, or 0 for off", retention, minAutoPeriod, maxAutoPeriod/time.Hour)
	}
	return AutoCompact{Mode: AutoCompactPeriodic, Period: d}, nil
}

// autoCompactor decides when to compact, and up to where. Every proxy has one, and they elect nobody:
// whoever finds at its turn that somebody has compacted about as far since its last turn counts that as
// its own. Two that have their turn at the same moment both compact: the second finds the first one's
// record and is told "compacted", or raises it by what was written between their samples; both are
// what a client might have asked for, and neither takes history that is younger than the retention.
// When the one that compacts goes away, another does it one interval later.
//
// A plain state machine: times are nanoseconds, passed in.
type autoCompactor struct {
	cfg     AutoCompact
	samples []autoSample // of the last looks, oldest first (periodic)
	before  int64        // the target of the look before
	seen    int64        // compact revision at the last look
	last    int64        // up to where the last compaction went that went well
	success int64        // when that was
	busy    bool
}

type autoSample struct{ at, rev int64 }

// begin sets the first moment. compacted is the compact revision known then.
func (a *autoCompactor) begin(cfg AutoCompact, now, rev, compacted int64) {
	*a = autoCompactor{cfg: cfg, seen: compacted, success: now - int64(maxAutoInterval), before: rev - cfg.Keep}
	if a.cfg.Every == 0 {
		a.cfg.Every = revisionInterval
	}
	a.samples = append(a.samples, autoSample{now, rev})
}

// every is the time between two looks.
func (a *autoCompactor) every() time.Duration {
	if a.cfg.Mode == AutoCompactRevision {
		return a.cfg.Every
	}
	return a.interval() / autoSamples
}

// interval is the time between two periodic compactions.
func (a *autoCompactor) interval() time.Duration { return min(a.cfg.Period, maxAutoInterval) }

// look is a turn, each every: rev is the present revision, compacted the compact revision, both as known
// here. It returns the revision to compact at, 0 for none. Until done is called, further looks only
// take samples.
func (a *autoCompactor) look(now, rev, compacted int64) int64 {
	target, young := rev-a.cfg.Keep, false
	periodic := a.cfg.Mode == AutoCompactPeriodic
	if periodic {
		target, young = a.samples[0].rev, now-a.samples[0].at < int64(a.cfg.Period)
		a.samples = append(a.samples, autoSample{now, rev})
		if len(a.samples) > int(a.cfg.Period/a.every())+1 {
			a.samples = append(a.samples[:0], a.samples[1:]...)
		}
	}
	others := compacted > a.seen && compacted >= a.before
	a.before, a.seen = target, max(a.seen, compacted)
	switch {
	case a.busy || young || target <= 0 || target == a.last:
	case others:
		a.done(now, compacted, true)
	case periodic && now-a.success < int64(a.interval()):
	case compacted >= target:
		a.done(now, target, true)
	default:
		a.busy = true
		return target
	}
	return 0
}

// done ends what look began. One that did not go well is tried again at the next look.
func (a *autoCompactor) done(now, target int64, ok bool) {
	a.busy = false
	if ok {
		a.last, a.success, a.seen = target, now, max(a.seen, target)
	}
}

// startAutoCompact begins the looks. The first comes after a random part of the time between two: proxies
// that were started together do not look together.
func (c *Core) startAutoCompact() {
	if c.cfg.AutoCompact.Mode == AutoCompactOff {
		return
	}
	a := &c.auto
	a.begin(c.cfg.AutoCompact, c.cfg.Now(), c.frontier.Get(watchring.All), c.compacted)
	c.after(time.Duration(c.cfg.Rand.Int64N(int64(a.every()))), c.autoLook)
}

func (c *Core) autoLook() {
	if c.state != stateReady {
		return
	}
	a := &c.auto
	c.after(a.every(), c.autoLook)
	target := a.look(c.cfg.Now(), c.frontier.Get(watchring.All), c.compacted)
	if target == 0 {
		return
	}
	c.log.Info("compacting by itself", "revision", target)
	c.compact(target, false, func(_ int64, st codec.Status) {
		ok := st.Code == codec.OK || st == codec.ErrCompacted
		if !ok && c.state == stateReady {
			c.log.Warn("compacting by itself failed, trying again later", "revision", target, "code", st.Code, "err", st.Msg)
		}
		a.done(c.cfg.Now(), target, ok)
	})
}
