package shard

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"spindle/codec"
	"spindle/revclock"
)

// This file reads what each cluster holds at a start.

// probe is what one cluster answered. It is the Completion of its call.
type probe struct {
	b        *bootstrap
	round    int
	id       codec.ClusterID
	name     string
	answered bool
	err      string // why not
	empty    bool   // there is no key at all
	why      string // it is refused
	adopt    bool   // it is empty, and the operator accepts what it has lost
	cluster  uint64
	local    int64
	identity revclock.ID
	clock    Record
	clockAt  int64
	clockVal []byte
	mapBytes []byte
	mapMod   int64
	compact  int64
	marked   int64 // where KeyLoss was put, 0 if it is not there
	mark     LossMark
	notEmpty bool // a look for any key at all has found one
}

func (p *probe) send() {
	c := p.b.c
	var body []byte
	if p.id == codec.Coordinator {
		body = codec.AppendString(body, rangeKey, revclock.KeyEpoch)
		c.tr.Call(p.id, codec.MethodRange, body, c.cfg.ShardTimeout, p)
		return
	}
	for _, k := range []string{KeyID, KeyClock, KeyMap, KeyCompact, KeyLoss} {
		body = appendGet(body, txnSuccess, k, 0)
	}
	c.tr.Call(p.id, codec.MethodTxn, body, c.cfg.ShardTimeout, p)
}

// peek looks whether a member without an identity holds anything at all. The guard of firstTxn compares all keys, and
// would make a member that is full read everything it has before it does anything else.
func (p *probe) peek() {
	b := p.b
	body := codec.AppendString(nil, rangeKey, "\x00")
	body = codec.AppendString(body, rangeEnd, "\x00")
	body = codec.AppendInt(body, rangeLimit, 1)
	body = codec.AppendBool(body, 8, true)
	b.c.tr.Call(p.id, codec.MethodRange, body, b.c.cfg.ShardTimeout, completion(func(resp []byte, st codec.Status, sent bool) {
		if p.round != b.round || b.c.state != stateStarting {
			return
		}
		_, found := firstKV(resp)
		switch {
		case st.Code != codec.OK:
			p.Complete(nil, st, sent)
		case found: // another proxy may have been faster
			p.notEmpty = true
			p.send()
		default:
			p.empty, p.compact = true, -1
			p.finish()
		}
	}))
}

// firstTxn makes a shard of a member with no key at all: it gets an identity, and a clock for the guard to look at.
func (p *probe) firstTxn() []byte {
	r := p.b.c.cfg.Rand
	var id revclock.ID
	binary.BigEndian.PutUint64(id[:], r.Uint64())
	binary.BigEndian.PutUint64(id[8:], r.Uint64())
	body := appendCompareInt(nil, "\x00", "\x00", resultEqual, targetMod, cmpMod, 0)
	body = appendPutOp(body, txnSuccess, KeyID, AppendIdentity(nil, id))
	return appendPutOp(body, txnSuccess, KeyClock, AppendInitialRecord(nil, revclock.ID{}))
}

func (p *probe) Complete(resp []byte, st codec.Status, sent bool) {
	b := p.b
	c := b.c
	if p.round != b.round || c.state != stateStarting {
		return
	}
	if st.Code != codec.OK {
		if p.err == "" {
			c.log.Warn("does not answer, trying again", "who", p.name, "code", st.Code, "err", st.Msg)
		}
		p.err = st.Msg
		c.after(c.jitter(20*retryDelay), p.sendAgain)
		return
	}
	if p.id == codec.Coordinator {
		it := codec.Fields{Msg: resp}
		for it.Next() {
			if it.Field.Num == 1 {
				h, _ := codec.ParseHeader(it.Field.Bytes)
				p.cluster = h.ClusterID
			}
		}
	} else {
		t, ok := parseTxnReply(resp, nil)
		if !ok {
			c.mistaken(fmt.Errorf("%s does not speak etcd's protocol", p.name))
			return
		}
		if len(t.resps) == 5 && !p.notEmpty {
			if _, found := firstKV(t.resps[0]); !found {
				p.cluster, p.local = t.cluster, t.rev
				p.peek()
				return
			}
		}
		if err := p.read(t); err != nil {
			c.mistaken(err)
			return
		}
	}
	p.finish()
}

// finish takes what p has found for its answer.
func (p *probe) finish() {
	p.answered, p.err = true, ""
	if p.b.waiting--; p.b.waiting == 0 {
		p.b.fitMap()
	}
}

func (p *probe) sendAgain() {
	if p.round == p.b.round && p.b.c.state == stateStarting {
		p.send()
	}
}

func (p *probe) read(t txnReply) error {
	if len(t.resps) != 5 {
		return fmt.Errorf("%s does not speak etcd's protocol", p.name)
	}
	p.cluster, p.local = t.cluster, t.rev
	id, found := firstKV(t.resps[0])
	if !found {
		return fmt.Errorf("%s holds keys that are not Spindle's: give it an empty etcd, or see whether the address is right", p.name)
	}
	var ok bool
	if p.identity, ok = ParseIdentity(id.Value); !ok {
		return fmt.Errorf("%s has an identity that this version of spindle cannot read: upgrade spindle", p.name)
	}
	clock, found := firstKV(t.resps[1])
	if !found {
		return fmt.Errorf("%s has lost its clock key: restore the member from a backup", p.name)
	}
	p.clockVal = bytes.Clone(clock.Value)
	if p.clock, ok = ParseRecord(p.clockVal); !ok {
		return fmt.Errorf("%s has a clock record that this version of spindle cannot read: upgrade spindle", p.name)
	}
	p.clockAt = clock.ModRevision
	if m, found := firstKV(t.resps[2]); found {
		p.mapBytes, p.mapMod = bytes.Clone(m.Value), m.ModRevision
	}
	p.compact = -1
	if kv, found := firstKV(t.resps[3]); found {
		if p.compact, ok = ParseCompaction(kv.Value); !ok {
			return fmt.Errorf("%s has a compaction record that this version of spindle cannot read: upgrade spindle", p.name)
		}
	}
	if kv, found := firstKV(t.resps[4]); found {
		p.marked = kv.ModRevision
		if p.mark, ok = ParseLossMark(kv.Value); !ok {
			return fmt.Errorf("%s has a mark of an accepted loss that this version of spindle cannot read: upgrade spindle", p.name)
		}
	}
	return nil
}
