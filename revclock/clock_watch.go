package revclock

import (
	"bytes"
	"errors"

	"github.com/cespare/xxhash/v2"

	"spindle/codec"
)

// watchState is the watch of the whole coordinator.
type watchState struct {
	gen     uint64 // of the stream: what an older one brings is ignored
	handle  codec.WatchHandle
	retry   retry
	again   bool  // one was open before
	pos     int64 // everything up to this revision of the coordinator was seen on the watch
	mark    watchMark
	proving bool  // the stream that is open must show mark first
	stallAt int64 // when the watch is given up if the log has not moved, 0 for never
	stall   int64 // what the log lacked when stallAt was set
}

// watchMark is the last event that was taken. A watch that is opened again begins with it, and so shows that it is of the
// same coordinator: another one, to which an address leads for a moment, would be taken for a part of the log, and
// what the right one did meanwhile would be left out. An epoch or a cluster ID does not come along with events, and
// etcd's cluster IDs repeat when default flags do.
type watchMark struct {
	rev  int64 // 0: none
	key  byte
	hash uint64
}

func markOf(kv *codec.KV) watchMark {
	return watchMark{kv.ModRevision, kv.Key[0], xxhash.Sum64(kv.Value)}
}

// proven looks for the mark among the events of a stream's first message that has any. found is false while there are none.
func (m watchMark) proven(msg []byte) (proven, found bool) {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		if it.Field.Num != 11 {
			continue
		}
		found = true
		if kv, del, ok := parseEvent(it.Field.Bytes); ok && !del && len(kv.Key) > 0 && markOf(&kv) == m {
			return true, true
		}
	}
	return false, found
}

type watchSink struct {
	c   *Clock
	gen uint64
}

func (c *Clock) openWatch(now int64) {
	if c.watch.handle != nil || now < c.watch.retry.at || c.state != stateCatching && c.state != stateRunning {
		return
	}
	c.stats.Watches++
	c.watch.gen++
	from := c.watch.pos + 1
	if c.watch.proving = c.watch.mark.rev == c.watch.pos && c.watch.pos > 0; c.watch.proving {
		from = c.watch.pos
	}
	c.buf = appendWatch(c.buf[:0], from)
	c.watch.handle = c.tr.Watch(codec.Coordinator, c.buf, &watchSink{c, c.watch.gen})
	if c.state == stateRunning && c.watch.again {
		// A coordinator that was wiped meanwhile would let the watch wait for a revision that is far away:
		// a read tells.
		c.now.ticket++
	}
	c.watch.again = true
	c.armStall()
}

func (c *Clock) closeWatch() {
	c.watch.gen++
	if c.watch.handle != nil {
		c.watch.handle.Close()
		c.watch.handle = nil
	}
}

func (k *watchSink) OnEnd(st codec.Status) {
	c := k.c
	if k.gen != c.watch.gen {
		return
	}
	c.watch.handle = nil
	c.watch.gen++
	c.failed(&c.watch.retry, "watching the coordinator", st)
}

func (k *watchSink) OnMessage(msg []byte) {
	c := k.c
	if k.gen != c.watch.gen {
		return
	}
	canceled, compacted, reason, ok, strange := false, int64(0), "", true, false
	it := codec.Fields{Msg: msg}
	for it.Next() {
		switch it.Field.Num {
		case 1:
			h, _ := codec.ParseHeader(it.Field.Bytes)
			if strange = c.args.Cluster != 0 && h.ClusterID != c.args.Cluster; strange {
				reason = ErrOtherCluster(h.ClusterID, c.args.Cluster).Error()
			}
		case 4:
			canceled = it.Field.Val != 0
		case 5:
			compacted = int64(it.Field.Val)
		case 6:
			if !strange {
				reason = string(it.Field.Bytes)
			}
		}
	}
	ok = !it.Bad
	switch {
	case strange:
		c.closeWatch()
		c.failed(&c.watch.retry, "watching the coordinator", codec.Status{Code: codec.Unavailable, Msg: reason})
		return
	case compacted > 0:
		if c.watch.pos == c.snap.rev {
			c.hole(c.snap.rev) // not even the snapshot's history is there
			if c.state == stateIdle {
				return
			}
		}
		c.reload()
		return
	case canceled || !ok:
		c.closeWatch()
		c.failed(&c.watch.retry, "watching the coordinator", codec.Status{Code: codec.Unknown, Msg: reason})
		return
	}
	c.watch.retry = retry{}
	if c.watch.proving {
		proven, found := c.watch.mark.proven(msg)
		if found && !proven {
			c.reload() // e tells whose coordinator this is
			return
		}
		c.watch.proving = !found
	}
	folded, pos, gen := false, c.watch.pos, c.gen
	it = codec.Fields{Msg: msg}
	for it.Next() {
		if it.Field.Num != 11 {
			continue
		}
		kv, del, ok := parseEvent(it.Field.Bytes)
		if !ok || kv.ModRevision <= 0 {
			c.lose(errors.New("the coordinator sent an event that cannot be read"))
			return
		}
		if kv.ModRevision <= c.watch.pos {
			continue // seen before
		}
		pos = max(pos, kv.ModRevision)
		if !del && len(kv.Key) > 0 {
			c.watch.mark = markOf(&kv)
		}
		folded = c.event(&kv, del) || folded
		if c.gen != gen {
			return
		}
	}
	c.watch.pos = pos
	if folded {
		c.moved(true)
	}
}

// event takes one change on the coordinator. It returns whether the log moved.
func (c *Clock) event(kv *codec.KV, del bool) bool {
	switch string(kv.Key) {
	case KeyEpoch:
		if kv.ModRevision <= c.epochMod {
			return false // an older epoch, or the one that was read
		}
		if del {
			c.lose(errDeleted)
		} else if !bytes.Equal(kv.Value, c.epoch) {
			c.lose(errOtherEpoch(kv.Value[min(1, len(kv.Value)):], c.epoch[1:]))
		}
	case keyTick:
		if del {
			c.lose(errDeleted)
			return false
		}
		return c.fold(kv.Value, kv.ModRevision)
	case keySnapshot:
		c.sawSnapshot(kv, del)
	}
	return false
}

// fold takes a tick into the log, and notes what it grants.
func (c *Clock) fold(tick []byte, rev int64) bool {
	waiting := uint64(0)
	if c.ticks.active {
		waiting = c.ticks.nonce
	}
	folded, err := c.log.Fold(tick, rev, c.cfg.Now(), waiting)
	if err != nil {
		c.lose(err)
		return false
	}
	if !folded {
		return false
	}
	c.stats.Folded++
	c.ticks.last = rev
	c.tookTick()
	return true
}

// lacking returns the revision up to which the coordinator is known to have ticks.
func (c *Clock) lacking() int64 {
	goal := c.read.goal
	if c.ticks.active {
		goal = max(goal, c.ticks.rev)
	}
	if n := len(c.now.queue); n > 0 {
		goal = max(goal, c.now.queue[n-1].mod)
	}
	return goal
}

// armStall watches over the watch while it lacks a tick that is there. Every tick that it brings
// gives it new time.
func (c *Clock) armStall() {
	w := &c.watch
	if c.state != stateCatching && c.state != stateRunning || c.lacking() <= c.log.rev {
		w.stallAt = 0
	} else if w.stallAt == 0 || w.stall != c.log.rev {
		w.stallAt, w.stall = c.cfg.Now()+int64(c.cfg.WatchStall), c.log.rev
	}
}

func (c *Clock) checkStall(now int64) {
	w := &c.watch
	if w.stallAt == 0 || now < w.stallAt || c.state != stateCatching && c.state != stateRunning {
		return
	}
	w.stallAt = 0
	if w.handle != nil {
		c.stats.Stalls++
		c.closeWatch()
		c.lastErr = "watching the coordinator: the watch has stalled"
	}
	if c.state == stateCatching {
		// What it waits for may be gone: the coordinator was wiped after it was read.
		c.reload()
	}
}
