package shard

import (
	"bytes"

	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// This file translates compares. A stored value begins with the big-endian mod revision, so that a
// shard compares meta revisions by comparing values.

// etcdserverpb.Compare.CompareTarget and CompareResult.
const (
	targetOfVersion, targetOfCreate, targetOfMod, targetOfValue, targetOfLease = 0, 1, 2, 3, 4
	resultIsEqual, resultIsGreater, resultIsLess, resultIsNotEqual             = 0, 1, 2, 3
)

// unionOf returns the field of a Compare's union that belongs to a target.
func unionOf(target int32) (protowire.Number, bool) {
	switch target {
	case targetOfVersion:
		return 4, true
	case targetOfCreate:
		return 5, true
	case targetOfMod:
		return 6, true
	case targetOfValue:
		return 7, true
	case targetOfLease:
		return 8, true
	}
	return 0, false
}

// compareForm is what a compare becomes on a shard.
type compareForm uint8

const (
	compareSlow     compareForm = iota // cannot be made there
	compareTrue                        // always holds: left out
	compareFalse                       // never holds: VERSION < 0
	compareAbsent                      // MOD == 0
	comparePresent                     // MOD > 0
	compareModIs                       // VALUE > be64(x) and VALUE < be64(x+1)
	compareModAbove                    // VALUE > be64(x+1)
	compareNative                      // as it is
)

// formOf chooses the form of c. All forms hold for ranges too: a range must satisfy a compare with each
// of its keys, and an empty one is compared as a missing key is (revisions 0; VALUE false). Revisions
// are never negative, and 0 only of a missing key.
func formOf(c *planCompare) compareForm {
	known := c.result >= resultIsEqual && c.result <= resultIsNotEqual
	switch c.target {
	case targetOfVersion:
		if !known {
			return compareTrue
		}
		return compareNative
	case targetOfLease:
		// A lease's ID on the shard may be another one: only whether there is one can be seen there.
		switch {
		case !known:
			return compareTrue
		case c.x == 0 && (c.result == resultIsEqual || c.result == resultIsNotEqual):
			return compareNative
		}
		return compareSlow
	case targetOfValue:
		return compareSlow
	case targetOfCreate, targetOfMod:
		return formOfRevision(c.target, c.result, c.x)
	}
	// To etcd a target that it does not know is equal to everything.
	if c.result == resultIsEqual || !known {
		return compareTrue
	}
	return compareFalse
}

func formOfRevision(target, result int32, x int64) compareForm {
	mod := target == targetOfMod
	switch result {
	case resultIsEqual:
		switch {
		case x < 0:
			return compareFalse
		case x == 0:
			return compareAbsent
		case mod:
			return compareModIs
		}
	case resultIsNotEqual:
		switch {
		case x < 0:
			return compareTrue
		case x == 0:
			return comparePresent
		}
	case resultIsGreater:
		switch {
		case x < 0:
			return compareTrue
		case x == 0:
			return comparePresent
		case mod:
			return compareModAbove
		}
	case resultIsLess:
		switch {
		case x <= 0:
			return compareFalse
		case x == 1:
			return compareAbsent
		}
	default:
		return compareTrue
	}
	return compareSlow
}

// compares returns how many compares the form takes on a shard.
func (f compareForm) compares() int {
	switch f {
	case compareTrue:
		return 0
	case compareModIs:
		return 2
	}
	return 1
}

// appendCompares appends c in member form as compares of a TxnRequest.
func (c *planCompare) appendCompares(dst []byte) []byte {
	switch c.form {
	case compareFalse:
		return appendNumberCompare(dst, c.key, c.end, targetOfVersion, resultIsLess, 0)
	case compareAbsent:
		return appendNumberCompare(dst, c.key, c.end, targetOfMod, resultIsEqual, 0)
	case comparePresent:
		return appendNumberCompare(dst, c.key, c.end, targetOfMod, resultIsGreater, 0)
	case compareModIs:
		dst = appendBoundCompare(dst, c.key, c.end, resultIsGreater, uint64(c.x))
		return appendBoundCompare(dst, c.key, c.end, resultIsLess, uint64(c.x)+1)
	case compareModAbove:
		return appendBoundCompare(dst, c.key, c.end, resultIsGreater, uint64(c.x)+1)
	case compareNative:
		return appendNumberCompare(dst, c.key, c.end, c.target, c.result, c.x)
	}
	return dst
}

func appendNumberCompare(dst, key, end []byte, target, result int32, x int64) []byte {
	dst, m := codec.BeginMessage(dst, 1)
	dst = codec.AppendInt(dst, 1, int64(result))
	dst = codec.AppendInt(dst, 2, int64(target))
	dst = codec.AppendBytes(dst, 3, key)
	if num, ok := unionOf(target); ok {
		dst = protowire.AppendTag(dst, num, protowire.VarintType)
		dst = protowire.AppendVarint(dst, uint64(x))
	}
	dst = codec.AppendBytes(dst, 64, end)
	return codec.EndMessage(dst, m)
}

func appendBoundCompare(dst, key, end []byte, result int32, bound uint64) []byte {
	dst, m := codec.BeginMessage(dst, 1)
	dst = codec.AppendInt(dst, 1, int64(result))
	dst = codec.AppendInt(dst, 2, targetOfValue)
	dst = codec.AppendBytes(dst, 3, key)
	dst = protowire.AppendTag(dst, 7, protowire.BytesType)
	dst = protowire.AppendVarint(dst, 8)
	dst = AppendRevBound(dst, bound)
	dst = codec.AppendBytes(dst, 64, end)
	return codec.EndMessage(dst, m)
}

// holds evaluates c in client form on kvs, the keys that it names, as etcd's applyCompare does.
// at is the index of the key that decides a false result, -1 if there is no key.
func (c *planCompare) holds(kvs []snapKV) (ok bool, at int) {
	if len(kvs) == 0 {
		return c.target != targetOfValue && c.holdsFor(&codec.KV{}), -1
	}
	for i := range kvs {
		if !c.holdsFor(&kvs[i].KV) {
			return false, i
		}
	}
	return true, -1
}

func (c *planCompare) holdsFor(kv *codec.KV) bool {
	r := 0
	switch c.target {
	case targetOfValue:
		r = bytes.Compare(kv.Value, c.value)
	case targetOfCreate:
		r = compareNumbers(kv.CreateRevision, c.x)
	case targetOfMod:
		r = compareNumbers(kv.ModRevision, c.x)
	case targetOfVersion:
		r = compareNumbers(kv.Version, c.x)
	case targetOfLease:
		r = compareNumbers(kv.Lease, c.x)
	}
	switch c.result {
	case resultIsEqual:
		return r == 0
	case resultIsNotEqual:
		return r != 0
	case resultIsGreater:
		return r > 0
	case resultIsLess:
		return r < 0
	}
	return true
}

func compareNumbers(a, b int64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}
