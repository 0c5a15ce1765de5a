package shard

import "spindle/codec"

// A nested Txn is dear for a member: its check for overlaps builds two trees and three maps for each, and request, path,
// response and trace have a level more. It is needed only if the request's compares may fail. Those of creates and updates
// hardly ever do, so a batch is first sent in its flat form: the compares and guards of such requests stand beside the
// batch's own, their operations beside the record.
//
//	nested:  Txn{ guard; success: [ Txn{ compares; then; else } ... ], record }
//	flat:    Txn{ guard, compares ...; success: then ..., record }
//
// If one of the compares fails, the whole Txn does, and its failure branch shows a clock below the batch's first revision:
// nothing else tells the two apart. Then the same batch goes again in its nested form: same revisions, same record, same
// requests. That is one more copy of it, and the guard lets one copy commit, whichever form it has. If it was a flat one,
// every compare held in the state before it, which is also what a recovery computes from there.
//
// A failure costs one more round trip, so behind each there are nested batches only, for a while.

const (
	// minFlatPause is the number of batches behind a flat one that failed which are nested from the start. It doubles with
	// each failure and is halved by each flat batch that commits: with 16 the worst that can happen is that one batch of
	// 17 is sent twice.
	minFlatPause = 16
	maxFlatPause = 1024
	// batchCompares is the number of compares of a batch's own guard.
	batchCompares = 3
)

// flatForm is whether a shard's batches are sent flat.
type flatForm struct {
	skip  int // batches that are nested
	pause int // the next pause, in batches; 0: minFlatPause
}

// next says whether the next batch may be flat.
func (f *flatForm) next() bool {
	if f.skip > 0 {
		f.skip--
		return false
	}
	return true
}

func (f *flatForm) failed() {
	f.skip = max(f.pause, minFlatPause)
	f.pause = min(2*f.skip, maxFlatPause)
}

func (f *flatForm) held() { f.pause /= 2 }

// flatten marks the requests of a batch that go flat, and says whether there are any. ops is the member's --max-txn-ops: etcd
// counts a Txn's compares as it counts its operations, and adds the widest nested one.
func flatten(writes []*write, ops int) bool {
	room := ops - batchCompares
	for _, w := range writes {
		if w != nil {
			room = min(room, ops-batchCompares-w.plan.OpCost())
		}
	}
	some := false
	for _, w := range writes {
		if w == nil {
			continue
		}
		n, ok := w.plan.flat()
		if w.flat = ok && n <= room; w.flat {
			room -= n
			some = true
		}
	}
	return some
}

// flat says whether the request may stand in a batch without a Txn of its own, and how many compares it brings along: one
// operation, a put or the delete of a key, and nothing to compare but keys.
func (p *Plan) flat() (compares int, ok bool) {
	if p.slow || p.decided || len(p.ops) == 0 {
		return 0, false
	}
	span := p.success()
	if span.len() != 1 {
		return 0, false
	}
	if o := &p.ops[span.from]; o.kind != planPut && (o.kind != planDelete || o.end != nil) {
		return 0, false
	}
	n := p.createGuards() + p.leaseGuards()
	if p.Kind != OpTxn {
		return n, true
	}
	t := &p.txns[0]
	for i := t.cmps.from; i < t.cmps.to; i++ {
		c := &p.cmps[i]
		if c.end != nil || c.form == compareFalse {
			return 0, false
		}
		n += c.form.compares()
	}
	return n, true
}

// appendFlatCompares appends the guards and compares of a flat request as compares of a TxnRequest.
func (p *Plan) appendFlatCompares(dst []byte) []byte {
	for i := range p.PutSlots {
		if s := &p.PutSlots[i]; p.guardsSlot(i) {
			dst = appendNumberCompare(dst, s.Key, nil, targetOfCreate, resultIsEqual, s.Create.Local)
		}
	}
	dst = p.appendLeaseGuards(dst)
	if p.Kind == OpTxn {
		t := &p.txns[0]
		for i := t.cmps.from; i < t.cmps.to; i++ {
			dst = p.cmps[i].appendCompares(dst)
		}
	}
	return dst
}

// appendFlatOp appends the operation of a flat request to the success branch of a TxnRequest.
func (p *Plan) appendFlatOp(dst []byte, rev int64) []byte {
	return p.appendOps(dst, txnSuccess, p.success(), rev)
}

// AnswerFlat is Answer for a request that went flat in a batch that committed: response is the payload of the ResponseOp that
// answers its operation.
func (p *Plan) AnswerFlat(dst, response []byte, hdr codec.Header, learn Learner) (out []byte, oc Outcome, st codec.Status) {
	return p.answer(dst, memberTxn{succeeded: true, kind: p.ops[p.success().from].kind, only: response}, hdr, learn)
}

// flatFailed is told that a flat copy of b was not applied because a compare of one of its requests failed. Other copies may be
// on their way or have committed, flat ones; the nested one is a copy like them.
func (s *shardState) flatFailed(b *batch) {
	s.c.stats.FlatFailed++
	s.flat.failed()
	b.flat, b.again = false, true
	for _, w := range b.writes {
		if w != nil {
			w.flat = false
		}
	}
	b.body = s.appendBatch(nil, b) // an earlier copy's bytes may not have left yet
	b.send()
}
