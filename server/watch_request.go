package server

import (
	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// Members of etcdserverpb.WatchRequest's oneof (api/etcdserverpb/rpc.proto).
const (
	watchCreate   = 1
	watchCancel   = 2
	watchProgress = 3
)

// Values of WatchCreateRequest.FilterType.
const (
	filterNoPut    = 0
	filterNoDelete = 1
)

// watchRequest is one decoded WatchRequest. Key and End point into the message.
type watchRequest struct {
	kind            int // watchCreate, watchCancel, watchProgress; 0 for none of them
	key, end        []byte
	start           int64
	id              int64
	progress        bool
	prevKV          bool
	fragment        bool
	noPut, noDelete bool
}

// parseWatchRequest decodes msg. ok is false when it is not protobuf. Of several requests in one message
// the last counts, as in any oneof; fields of an unexpected type are unknown fields.
func parseWatchRequest(msg []byte) (r watchRequest, ok bool) {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		f := &it.Field
		if f.Type != protowire.BytesType || f.Num < watchCreate || f.Num > watchProgress {
			continue
		}
		if int(f.Num) != r.kind {
			r = watchRequest{kind: int(f.Num)} // the same one twice is merged, field by field
		}
		switch f.Num {
		case watchCreate:
			ok = r.parseCreate(f.Bytes)
		case watchCancel:
			ok = r.parseCancel(f.Bytes)
		default:
			ok = wellFormed(f.Bytes)
		}
		if !ok {
			return r, false
		}
	}
	return r, !it.Bad
}

func (r *watchRequest) parseCreate(msg []byte) bool {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		f := &it.Field
		switch f.Type {
		case protowire.BytesType:
			switch f.Num {
			case 1:
				r.key = f.Bytes
			case 2:
				r.end = f.Bytes
			case 5: // packed
				for b := f.Bytes; len(b) > 0; {
					v, n := protowire.ConsumeVarint(b)
					if n < 0 {
						return false
					}
					r.filter(v)
					b = b[n:]
				}
			}
		case protowire.VarintType:
			switch f.Num {
			case 3:
				r.start = int64(f.Val)
			case 4:
				r.progress = f.Val != 0
			case 5:
				r.filter(f.Val)
			case 6:
				r.prevKV = f.Val != 0
			case 7:
				r.id = int64(f.Val)
			case 8:
				r.fragment = f.Val != 0
			}
		}
	}
	return !it.Bad
}

func (r *watchRequest) filter(v uint64) {
	switch int32(v) { // enums are cut to 32 bits
	case filterNoPut:
		r.noPut = true
	case filterNoDelete:
		r.noDelete = true
	}
}

func (r *watchRequest) parseCancel(msg []byte) bool {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		if it.Field.Num == 1 && it.Field.Type == protowire.VarintType {
			r.id = int64(it.Field.Val)
		}
	}
	return !it.Bad
}

func wellFormed(msg []byte) bool {
	it := codec.Fields{Msg: msg}
	for it.Next() {
	}
	return !it.Bad
}
