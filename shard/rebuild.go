package shard

import (
	"encoding/binary"
	"fmt"

	"spindle/codec"
	"spindle/revclock"
)

// rebuild is one attempt to give the coordinator a new epoch (DESIGN section 3). First its keys are replaced, all
// at once and only if they are as they were read; then every shard is fenced, and the fence names the epoch in
// the shard's map. Other proxies may do the same at any time: of two only one finds the coordinator as it read
// it, and of their fences on a shard only one finds the map as it read it. Whoever loses begins anew, with
// another epoch. A rebuild that stops anywhere, and one that goes on after hours, does no harm: its
// fences fail.
type rebuild struct {
	k      *connecting
	epoch  revclock.ID
	fences []rebuildFence
	open   int
	fresh  bool
	late   func() // planted bug: the replacement of the coordinator's keys
}

// rebuildFence is the fence of one shard. It is the Completion of its Txn, which may be sent again and again: its
// guard on the map lets one copy commit, of all fences of all rebuilds that have read the same map.
type rebuildFence struct {
	r    *rebuild
	turn uint64
	s    *shardState
	body []byte
	done bool
	err  string
}

// newEpoch draws an epoch. It begins with the first shard's identity, so that a coordinator tells whose it is also
// where etcd's cluster IDs repeat.
func (c *Core) newEpoch() (id revclock.ID) {
	copy(id[:8], c.m.Shards[0].Identity[:8])
	binary.BigEndian.PutUint64(id[8:], c.cfg.Rand.Uint64())
	return id
}

// made says that an epoch was made for these shards.
func (c *Core) made(epoch revclock.ID) bool {
	return string(epoch[:8]) == string(c.m.Shards[0].Identity[:8])
}

// replace puts a new epoch and its snapshot into the coordinator, if that still holds what was found.
func (k *connecting) replace() {
	c := k.c
	f := k.found
	k.found = nil
	if k.signature(f) != k.sign { // somebody else goes on
		k.look()
		return
	}
	snap, fresh, err := k.successor(f)
	if err != nil {
		c.fail(fmt.Errorf("coordinator: %w", err))
		return
	}
	r := &rebuild{k: k, epoch: c.newEpoch(), fresh: fresh}
	for i := range k.looks {
		r.fence(&k.looks[i], snap.Shards[i].A, fresh, f.Cluster)
	}
	if c.cfg.Sabotage.RebuildFencesFirst && !fresh {
		r.late = func() {
			c.tr.Call(codec.Coordinator, codec.MethodTxn, f.AppendReplaceTxn(nil, r.epoch, snap), connectCall, completion(func(resp []byte, st codec.Status, _ bool) {
				if replaced, _ := revclock.ParseReplaced(resp); replaced && st.Code == codec.OK {
					k.trust = r.epoch
				}
				k.lookLater(lookAgain)
			}))
		}
		r.send()
		return
	}
	k.phase = phaseReplace
	turn := k.turn
	c.tr.Call(codec.Coordinator, codec.MethodTxn, f.AppendReplaceTxn(nil, r.epoch, snap), connectCall, completion(func(resp []byte, st codec.Status, _ bool) {
		if !k.live(turn) {
			return
		}
		replaced, ok := revclock.ParseReplaced(resp)
		switch {
		case st.Code == codec.OK && ok && replaced:
			c.log.Info("the coordinator has a new epoch, the member clusters are fenced now", "epoch", fmt.Sprintf("%x", r.epoch), "revision", snap.N, "why", k.why)
			if c.cfg.Sabotage.RebuildNoFence && !fresh {
				k.trust = r.epoch
				k.look()
				return
			}
			r.send()
		case st.Code == codec.OK:
			k.lookLater(lookAgain) // another proxy was faster
		default:
			// It may have been done, or still will be. It is never sent again: what is there now is looked at.
			k.mute = st.Msg
			k.tell()
			k.lookLater(lookAgain)
		}
	}))
}

// successor computes what follows the coordinator that was found: N above all that it may have handed out, and a
// revision for each shard's fence. As long as a map names no epoch none was ever believed, so nothing was handed
// out: then everything begins at 1.
func (k *connecting) successor(f *revclock.Found) (snap *revclock.Snapshot, fresh bool, err error) {
	c := k.c
	base, err := f.N()
	if err != nil {
		return nil, false, err
	}
	base = max(base, c.knownN)
	for i := range k.looks {
		base = max(base, k.looks[i].rec.Last)
		fresh = fresh || k.looks[i].m.Epoch == revclock.ID{}
	}
	snap = &revclock.Snapshot{N: 1, Shards: make([]revclock.SnapshotShard, len(k.looks))}
	if fresh {
		for i := range k.looks {
			if k.looks[i].rec.Last > 0 {
				return nil, true, fmt.Errorf("the partition maps name no epoch, and member cluster %s is at revision %d: somebody changed the maps", k.looks[i].s.name, k.looks[i].rec.Last)
			}
		}
		return snap, true, nil
	}
	// Of two rebuilds that nobody has believed, since the coordinator was lost again in the middle of each, one may have fenced one shard and
	// the other another. What they knew may differ by a few revisions: so each shard has a remainder of its own.
	n := int64(len(k.looks))
	base = (base + revclock.Margin + n - 1) / n * n
	snap.N = base + n
	for i := range k.looks {
		snap.Shards[i] = revclock.SnapshotShard{A: base + 1 + int64(i), Holder: c.cfg.Proxy, C: k.looks[i].rec.Last}
	}
	if sab := &c.cfg.Sabotage; sab.RebuildNoFence || sab.RebuildSkipsShard {
		for i := range snap.Shards {
			if sh := &snap.Shards[i]; sab.RebuildNoFence || i == len(snap.Shards)-1 {
				sh.A = sh.C
			}
		}
	}
	return snap, false, nil
}

// fence writes the Txn that fences a shard at revision a.
func (r *rebuild) fence(l *look, a int64, fresh bool, cluster uint64) {
	c := r.k.c
	m := *l.m
	m.Epoch, m.Coordinator = r.epoch, cluster
	body := appendCompareInt(nil, KeyMap, "", resultEqual, targetMod, cmpMod, l.mapMod)
	if !fresh {
		var bound [8]byte
		body = appendCompareValue(body, KeyClock, resultLess, AppendRevBound(bound[:0], uint64(a)))
		body = appendPutOp(body, txnSuccess, KeyClock, AppendRecord(nil, &Record{First: a, Last: a, Kind: KindRebuild, Epoch: r.epoch, Proxy: c.cfg.Proxy}))
	}
	body = appendPutOp(body, txnSuccess, KeyMap, AppendMap(nil, &m))
	body = appendGet(body, txnFailure, KeyMap, 0)
	r.fences = append(r.fences, rebuildFence{r: r, turn: r.k.turn, s: l.s, body: body})
}

func (r *rebuild) send() {
	k := r.k
	k.phase, k.now = phaseFence, r
	if n := len(r.fences); k.c.cfg.Sabotage.RebuildSkipsShard && n > 1 && !r.fresh {
		r.fences = r.fences[:n-1]
	}
	r.open = len(r.fences)
	for i := range r.fences {
		r.fences[i].send()
	}
}

// missing names the shards whose fence is not known to be there.
func (r *rebuild) missing() (names []string) {
	for i := range r.fences {
		if f := &r.fences[i]; !f.done {
			names = append(names, memberAnd(f.s, f.err))
		}
	}
	return names
}

func (f *rebuildFence) send() {
	f.r.k.c.tr.Call(f.s.cluster, codec.MethodTxn, f.body, connectCall, f)
}

func (f *rebuildFence) Complete(resp []byte, st codec.Status, sent bool) {
	k := f.r.k
	c := k.c
	if !k.live(f.turn) || f.done {
		return
	}
	if st.Code != codec.OK {
		f.err = st.Msg
		k.tell()
		c.after(c.jitter(5*retryDelay), func() {
			if k.live(f.turn) {
				f.send()
			}
		})
		return
	}
	t, ok := parseTxnReply(resp, nil)
	if !ok || len(t.resps) == 0 {
		c.fail(fmt.Errorf("member cluster %s gave an answer that is not a TxnResponse", f.s.name))
		return
	}
	if !t.succeeded {
		// An earlier copy was there, or somebody else's fence, or a batch beyond it.
		kv, _ := firstKV(t.resps[0])
		if m, err := ParseMap(kv.Value); err != nil || m.Epoch != f.r.epoch {
			k.lookLater(lookAgain)
			return
		}
	}
	f.done = true
	if f.r.open--; f.r.open == 0 {
		c.stats.Rebuilds++
		if f.r.late != nil {
			f.r.late()
			return
		}
		k.look()
	}
}
