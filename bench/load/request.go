package load

import "spindle/codec"

// The requests that kube-apiserver sends, and nothing else: the shapes of its Txns have one compare, one operation
// and at most one range in the else-branch (k8s.io/apiserver, storage/etcd3).

const (
	pathRange       = "/etcdserverpb.KV/Range"
	pathRangeStream = "/etcdserverpb.KV/RangeStream"
	pathTxn         = "/etcdserverpb.KV/Txn"
	pathGrant       = "/etcdserverpb.Lease/LeaseGrant"
	pathWatch       = "/etcdserverpb.Watch/Watch"
)

// Numbers of etcdserverpb that the shapes need.
const (
	compareMod   = 2 // Compare.target MOD; result EQUAL is 0
	opRange      = 1 // RequestOp
	opPut        = 2
	opDelete     = 3
	txnCompare   = 1 // TxnRequest
	txnSuccess   = 2
	txnFailure   = 3
	eventsTTL    = 3660 // seconds: the hour that events live, and the slack that kube-apiserver adds
	leaseObjects = 1000 // events that share a lease (--lease-max-object-count)
)

// appendGuard appends MOD(key) == rev. The oneof member is written also where it is 0, as generated code does.
func appendGuard(m, key []byte, rev int64) []byte {
	m, mark := codec.BeginMessage(m, txnCompare)
	m = codec.AppendInt(m, 2, compareMod)
	m = codec.AppendBytes(m, 3, key)
	if rev == 0 {
		m = append(m, 6<<3, 0)
	}
	m = codec.AppendInt(m, 6, rev)
	return codec.EndMessage(m, mark)
}

func appendPutOp(m, key, value []byte, lease int64) []byte {
	m, op := codec.BeginMessage(m, txnSuccess)
	m, put := codec.BeginMessage(m, opPut)
	m = codec.AppendBytes(m, 1, key)
	m = codec.AppendBytes(m, 2, value)
	m = codec.AppendInt(m, 3, lease)
	m = codec.EndMessage(m, put)
	return codec.EndMessage(m, op)
}

func appendElseRange(m, key []byte) []byte {
	m, op := codec.BeginMessage(m, txnFailure)
	m, r := codec.BeginMessage(m, opRange)
	m = codec.AppendBytes(m, 1, key)
	m = codec.EndMessage(m, r)
	return codec.EndMessage(m, op)
}

// appendCreate is a create: if the key is not there, put it.
func appendCreate(m, key, value []byte, lease int64) []byte {
	return appendPutOp(appendGuard(m, key, 0), key, value, lease)
}

// appendUpdate is an update by compare-and-swap, with the present object in the answer if it fails.
func appendUpdate(m, key, value []byte, rev int64) []byte {
	return appendElseRange(appendPutOp(appendGuard(m, key, rev), key, value, 0), key)
}

// appendDelete is a delete of the object as it was at rev.
func appendDelete(m, key []byte, rev int64) []byte {
	m = appendGuard(m, key, rev)
	m, op := codec.BeginMessage(m, txnSuccess)
	m, del := codec.BeginMessage(m, opDelete)
	m = codec.AppendBytes(m, 1, key)
	m = codec.EndMessage(m, del)
	m = codec.EndMessage(m, op)
	return appendElseRange(m, key)
}

// appendRange is a get (no end, limit 1) or a list.
func appendRange(m, key, end []byte, limit, rev int64) []byte {
	m = codec.AppendBytes(m, 1, key)
	m = codec.AppendBytes(m, 2, end)
	m = codec.AppendInt(m, 3, limit)
	return codec.AppendInt(m, 4, rev)
}

// appendWatch creates a watch of [key, end) from now on, as kube-apiserver's cache does.
func appendWatch(m, key, end []byte) []byte {
	m, create := codec.BeginMessage(m, 1)
	m = codec.AppendBytes(m, 1, key)
	m = codec.AppendBytes(m, 2, end)
	m = codec.AppendBool(m, 4, true) // progress_notify
	m = codec.AppendBool(m, 6, true) // prev_kv
	return codec.EndMessage(m, create)
}

// appendGrant asks for a lease.
func appendGrant(m []byte, ttl int64) []byte { return codec.AppendInt(m, 1, ttl) }

// txnReply is what the load needs of a TxnResponse.
type txnReply struct {
	rev       int64 // of the header
	succeeded bool
	found     bool  // the else-branch's range found the key,
	mod       int64 // at this revision
}

func parseTxn(resp []byte) (r txnReply, ok bool) {
	it := codec.Fields{Msg: resp}
	for it.Next() {
		switch it.Field.Num {
		case 1:
			h, good := codec.ParseHeader(it.Field.Bytes)
			if !good {
				return r, false
			}
			r.rev = h.Revision
		case 2:
			r.succeeded = it.Field.Val != 0
		case 3:
			op := codec.Fields{Msg: it.Field.Bytes}
			for op.Next() {
				if op.Field.Num != opRange {
					continue
				}
				l, good := parseList(op.Field.Bytes)
				if !good {
					return r, false
				}
				r.found, r.mod = l.n > 0, l.mod
			}
		}
	}
	return r, !it.Bad
}

// listReply is what the load needs of a RangeResponse.
type listReply struct {
	rev, count int64
	n          int
	more       bool
	mod        int64  // mod revision of the last key (only if there is one alone)
	last       []byte // last key, a view
}

func parseList(resp []byte) (r listReply, ok bool) {
	var kv []byte
	it := codec.Fields{Msg: resp}
	for it.Next() {
		switch it.Field.Num {
		case 1:
			h, good := codec.ParseHeader(it.Field.Bytes)
			if !good {
				return r, false
			}
			r.rev = h.Revision
		case 2:
			kv = it.Field.Bytes
			r.n++
		case 3:
			r.more = it.Field.Val != 0
		case 4:
			r.count = int64(it.Field.Val)
		}
	}
	if it.Bad {
		return r, false
	}
	if kv != nil {
		last, good := codec.ParseKV(kv)
		if !good {
			return r, false
		}
		r.last, r.mod = last.Key, last.ModRevision
	}
	return r, true
}

// parseGrant returns the ID of the lease.
func parseGrant(resp []byte) (id int64) {
	it := codec.Fields{Msg: resp}
	for it.Next() {
		if it.Field.Num == 2 {
			id = int64(it.Field.Val)
		}
	}
	return id
}
