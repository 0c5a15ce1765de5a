package shard

import "spindle/codec"

// pageEnd is what stands at the end of a member's RangeResponse.
type pageEnd struct {
	key       []byte // the last one
	n, count  int64
	more, bad bool
}

// pageSum is what one walk over a page tells. Its values lie a memory access apart each, so there is one walk only.
type pageSum struct {
	end     pageEnd
	foreign bool  // it holds a value that somebody else wrote
	keys    int64 // that clients see
	size    int64 // of these in client form, as fields of the answer
	client  bool  // the page is just these: it was rewritten
}

func sumPage(resp []byte) (s pageSum) {
	it := codec.Fields{Msg: resp}
	var kv snapKV
	for it.Next() {
		switch it.Field.Num {
		case 2:
			stamped, ok := parseStored(it.Field.Bytes, &kv)
			s.end.n++
			s.end.key = kv.Key
			switch {
			case !ok:
				s.end.bad = true
				return s
			case stamped:
				s.keys++
				s.size += int64(sizeKVField(&kv.KV))
			case !isReserved(kv.Key):
				s.foreign = true
			}
		case 3:
			s.end.more = it.Field.Val != 0
		case 4:
			s.end.count = int64(it.Field.Val)
		}
	}
	s.end.bad = it.Bad
	return s
}
