package revclock

import "time"

// Ranges should reach a shard in order, for a batch that comes behind a later one is rejected. All
// proxies see all ticks, so a proxy whose range stands behind another's, of which no record was seen,
// lets a short slot pass after the other's tick was seen. How short is learned per shard and
// predecessor: the wait grows when one of its ranges was overtaken, by whomever, and shrinks slowly
// while its records come in order. A predecessor that was rejected twice in a row (turn mark) is waited
// for until its record is there, within a bound.

const (
	// slotBase is the part of the wait that is always there.
	slotBase = int64(250 * time.Microsecond)
	// slotMax bounds the wait behind one predecessor.
	slotMax = int64(20 * time.Millisecond)
	// slotStep is what an overtaken range adds at least; else the learned part grows by half.
	slotStep = int64(250 * time.Microsecond)
	// slotDecay: a record in order takes away this fraction of the learned part. Growth against decay
	// lets about one range in thirty be overtaken where proxies are at unequal distance.
	slotDecay = 64
	// turnWait bounds the wait for a predecessor with a turn mark.
	turnWait = int64(250 * time.Millisecond)
	// maxHolders bounds the predecessors that a shard's order remembers.
	maxHolders = 64
)

// order is what a Log has learned about the other proxies' ways to each shard.
type order struct{ shards [][]slot }

type slot struct {
	holder ID
	part   int64 // ns, on top of slotBase
}

func (o *order) init(shards int) { o.shards = make([][]slot, shards) }

func (o *order) part(shard int, holder ID) int64 {
	for i := range o.shards[shard] {
		if s := &o.shards[shard][i]; s.holder == holder {
			return s.part
		}
	}
	return 0
}

func (o *order) overtaken(shard int, holder ID) {
	all := o.shards[shard]
	least := 0
	for i := range all {
		s := &all[i]
		if s.holder == holder {
			s.part = min(s.part+max(slotStep, s.part/2), slotMax-slotBase)
			return
		}
		if s.part < all[least].part {
			least = i
		}
	}
	s := slot{holder, slotStep}
	if len(all) < maxHolders {
		o.shards[shard] = append(all, s)
	} else {
		all[least] = s
	}
}

func (o *order) inOrder(shard int, holder ID) {
	for i := range o.shards[shard] {
		if s := &o.shards[shard][i]; s.holder == holder {
			s.part -= (s.part + slotDecay - 1) / slotDecay
			return
		}
	}
}

// Earliest returns when this proxy's range that begins at first may be sent to the shard: now, or a
// later time while ranges of others before it are open. It is to be asked again when that time has come,
// and after each record of the shard. It waits for no own range (batches of one proxy follow each other),
// nor for what a snapshot summed up.
func (l *Log) Earliest(shard int, first, now int64) (at int64) {
	at = now
	open := l.shards[shard].open
	for i := range open {
		r := &open[i]
		if r.First >= first {
			break
		}
		if r.Holder == l.self || r.Merged {
			continue
		}
		wait := slotBase + l.order.part(shard, r.Holder)
		if r.Turn {
			wait = turnWait
		}
		at = max(at, r.Seen+wait)
	}
	return at
}
