package shard

import (
	"bytes"
	"slices"
)

// This file follows etcd's checkIntervals: no key may be put twice on a path, nor be put and deleted at
// one level or between a level and those below it. It is exact in what it lets pass too: deletes
// and puts in sibling Txns do not meet, and a delete to infinity (range_end "\0") meets nothing, for
// etcd takes its end literally here.

// fewOps is up to how many operations every pair is compared.
const fewOps = 16

// intervalsOK checks both branches of the client's Txn.
func (p *Plan) intervalsOK() bool {
	if len(p.PutSlots) == 0 {
		return true
	}
	if len(p.txns) == 1 && len(p.ops) <= fewOps {
		return p.flatOK(p.txns[0].then) && p.flatOK(p.txns[0].els)
	}
	for _, span := range [2]planSpan{p.txns[0].then, p.txns[0].els} {
		if _, _, ok := p.overlaps(span); !ok {
			return false
		}
	}
	return true
}

// flatOK checks a short branch without nested Txns, and allocates nothing.
func (p *Plan) flatOK(span planSpan) bool {
	for i := span.from; i < span.to; i++ {
		a := &p.ops[i]
		if a.kind != planPut {
			continue
		}
		for j := span.from; j < span.to; j++ {
			b := &p.ops[j]
			switch {
			case b.kind == planPut && j < i && bytes.Equal(a.key, b.key),
				b.kind == planDelete && literallyContains(b.key, b.end, a.key):
				return false
			}
		}
	}
	return true
}

// literallyContains is Interval.Contains without infinity.
func literallyContains(from, end, key []byte) bool {
	if len(end) == 0 {
		return bytes.Equal(from, key)
	}
	return bytes.Compare(from, key) <= 0 && bytes.Compare(key, end) < 0
}

// overlaps returns what a branch puts and deletes, nested Txns included; ok is false if it overlaps.
func (p *Plan) overlaps(span planSpan) (puts map[string]struct{}, dels deleteSet, ok bool) {
	for i := span.from; i < span.to; i++ {
		if o := &p.ops[i]; o.kind == planDelete {
			dels.add(o.key, o.end)
		}
	}
	puts = map[string]struct{}{}
	for i := span.from; i < span.to; i++ {
		o := &p.ops[i]
		if o.kind != planNested {
			continue
		}
		tx := &p.txns[o.idx]
		then, delsThen, ok := p.overlaps(tx.then)
		if !ok {
			return nil, dels, false
		}
		els, delsElse, ok := p.overlaps(tx.els)
		if !ok {
			return nil, dels, false
		}
		for _, side := range [2]map[string]struct{}{then, els} {
			for k := range side {
				if _, twice := puts[k]; twice || dels.has(k) {
					return nil, dels, false
				}
			}
		}
		// The branches exclude each other, so they are joined only after both were checked.
		puts = joinKeys(puts, joinKeys(then, els))
		dels.join(&delsThen)
		dels.join(&delsElse)
	}
	for i := span.from; i < span.to; i++ {
		if o := &p.ops[i]; o.kind == planPut {
			k := string(o.key)
			if _, twice := puts[k]; twice || dels.has(k) {
				return nil, dels, false
			}
			puts[k] = struct{}{}
		}
	}
	return puts, dels, true
}

// joinKeys joins two sets into the larger one.
func joinKeys(a, b map[string]struct{}) map[string]struct{} {
	if len(a) < len(b) {
		a, b = b, a
	}
	for k := range b {
		a[k] = struct{}{}
	}
	return a
}

// deleteSet is a set of keys as disjoint ranges [from, to) in order.
type deleteSet struct{ ranges []keyRange }

type keyRange struct{ from, to string }

func (d *deleteSet) add(key, end []byte) {
	r := keyRange{string(key), string(end)}
	if len(end) == 0 {
		r.to = r.from + "\x00"
	}
	d.insert(r)
}

func (d *deleteSet) insert(r keyRange) {
	if r.to <= r.from {
		return // empty, or to infinity
	}
	// lo: the first range that ends at or after r begins; hi: the first that begins after r ends.
	lo, _ := slices.BinarySearchFunc(d.ranges, r.from, func(x keyRange, k string) int { return compareKeys(x.to, k) })
	hi := lo
	for hi < len(d.ranges) && d.ranges[hi].from <= r.to {
		r.from, r.to = min(r.from, d.ranges[hi].from), max(r.to, d.ranges[hi].to)
		hi++
	}
	d.ranges = slices.Replace(d.ranges, lo, hi, r)
}

// join adds o to d, the smaller to the larger.
func (d *deleteSet) join(o *deleteSet) {
	if len(d.ranges) < len(o.ranges) {
		d.ranges, o.ranges = o.ranges, d.ranges
	}
	for _, r := range o.ranges {
		d.insert(r)
	}
}

func (d *deleteSet) has(key string) bool {
	i, found := slices.BinarySearchFunc(d.ranges, key, func(x keyRange, k string) int { return compareKeys(x.from, k) })
	if found {
		return true
	}
	return i > 0 && key < d.ranges[i-1].to
}

func compareKeys(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}
