package shard

import (
	"bytes"
	"slices"

	"spindle/codec"
)

// deleteAll is a DeleteRange that lies on several shards: one request per shard, each atomic and with a
// revision of its own. The answer carries the sum and the largest revision.
type deleteAll struct {
	c       *Core
	op      *Op
	waiting int
	rev     int64
	deleted int64
	prev    []prevKV
	err     codec.Status
}

type prevKV struct{ key, raw []byte }

func (c *Core) submitDeleteAll(op *Op) {
	p := &op.core.plan
	d := &deleteAll{c: c, op: op}
	shards := c.part.AppendShards(nil, p.Writes[0].Key, p.Writes[0].End)
	d.waiting = len(shards)
	for _, i := range shards {
		c.shards[i].enqueue(&write{op: op, plan: p, since: c.cfg.Now(), finish: d.part})
	}
}

// part takes one shard's answer, a DeleteRangeResponse.
func (d *deleteAll) part(w *write, resp []byte, st codec.Status) {
	if st.Code != codec.OK {
		d.err = st
	}
	d.rev = max(d.rev, w.rev)
	it := codec.Fields{Msg: resp}
	for it.Next() {
		switch it.Field.Num {
		case 2:
			d.deleted += int64(it.Field.Val)
		case 3:
			kv, _ := codec.ParseKV(it.Field.Bytes)
			d.prev = append(d.prev, prevKV{kv.Key, it.Field.Bytes})
		}
	}
	if d.waiting--; d.waiting > 0 {
		return
	}
	op := d.op
	if d.err.Code != codec.OK {
		d.c.finish(op, d.err)
		return
	}
	slices.SortFunc(d.prev, func(a, b prevKV) int { return bytes.Compare(a.key, b.key) })
	hdr := d.c.hdr
	hdr.Revision = d.rev
	out := codec.AppendHeaderField(op.Resp[:0], &hdr)
	out = codec.AppendInt(out, 2, d.deleted)
	for _, kv := range d.prev {
		out = codec.AppendBytes(out, 3, kv.raw)
	}
	op.Resp = out
	d.c.finish(op, codec.Status{})
}
