package codec

// KV is a view of an encoded mvccpb.KeyValue: Key and Value point into the message that was parsed.
type KV struct {
	Key            []byte
	CreateRevision int64
	ModRevision    int64
	Version        int64
	Value          []byte
	Lease          int64
}

// ParseKV reads an mvccpb.KeyValue. ok is false when msg is not well-formed.
func ParseKV(msg []byte) (kv KV, ok bool) {
	if parsePlainKV(msg, &kv) {
		return kv, true
	}
	return parseAnyKV(msg)
}

// parsePlainKV reads a message that has the fields of a KeyValue alone, with numbers below 2^63: what members send. false: it
// is another one, and kv is of no use. Long lists have a hundred thousand of them, for which the general road takes twice
// the time.
func parsePlainKV(msg []byte, kv *KV) bool {
	for i := 0; i < len(msg); {
		tag := msg[i]
		v := uint64(0)
		for shift := uint(0); ; shift += 7 {
			if i++; i >= len(msg) || shift > 56 {
				return false
			}
			b := msg[i]
			v |= uint64(b&0x7f) << shift
			if b < 0x80 {
				break
			}
		}
		i++
		switch tag {
		case 1<<3 | 2, 5<<3 | 2:
			if v > uint64(len(msg)-i) {
				return false
			}
			b := msg[i:][:v]
			if i += int(v); tag == 1<<3|2 {
				kv.Key = b
			} else {
				kv.Value = b
			}
		case 2 << 3:
			kv.CreateRevision = int64(v)
		case 3 << 3:
			kv.ModRevision = int64(v)
		case 4 << 3:
			kv.Version = int64(v)
		case 6 << 3:
			kv.Lease = int64(v)
		default:
			return false
		}
	}
	return true
}

func parseAnyKV(msg []byte) (kv KV, ok bool) {
	it := Fields{Msg: msg}
	for it.Next() {
		switch it.Field.Num {
		case 1:
			kv.Key = it.Field.Bytes
		case 2:
			kv.CreateRevision = int64(it.Field.Val)
		case 3:
			kv.ModRevision = int64(it.Field.Val)
		case 4:
			kv.Version = int64(it.Field.Val)
		case 5:
			kv.Value = it.Field.Bytes
		case 6:
			kv.Lease = int64(it.Field.Val)
		}
	}
	return kv, !it.Bad
}

// AppendKV appends the fields of kv (without a tag or length).
func AppendKV(dst []byte, kv *KV) []byte {
	dst = AppendBytes(dst, 1, kv.Key)
	dst = AppendInt(dst, 2, kv.CreateRevision)
	dst = AppendInt(dst, 3, kv.ModRevision)
	dst = AppendInt(dst, 4, kv.Version)
	dst = AppendBytes(dst, 5, kv.Value)
	return AppendInt(dst, 6, kv.Lease)
}

// Header is etcdserverpb.ResponseHeader.
type Header struct {
	ClusterID uint64
	MemberID  uint64
	Revision  int64
	RaftTerm  uint64
}

// AppendHeader appends the fields of h (without a tag or length).
func AppendHeader(dst []byte, h *Header) []byte {
	dst = AppendInt(dst, 1, int64(h.ClusterID))
	dst = AppendInt(dst, 2, int64(h.MemberID))
	dst = AppendInt(dst, 3, h.Revision)
	return AppendInt(dst, 4, int64(h.RaftTerm))
}

// AppendHeaderField appends h as the embedded message num (field 1 of most responses).
func AppendHeaderField(dst []byte, h *Header) []byte {
	dst, mark := BeginMessage(dst, 1)
	dst = AppendHeader(dst, h)
	return EndMessage(dst, mark)
}

// ParseHeader reads an etcdserverpb.ResponseHeader.
func ParseHeader(msg []byte) (h Header, ok bool) {
	it := Fields{Msg: msg}
	for it.Next() {
		switch it.Field.Num {
		case 1:
			h.ClusterID = it.Field.Val
		case 2:
			h.MemberID = it.Field.Val
		case 3:
			h.Revision = int64(it.Field.Val)
		case 4:
			h.RaftTerm = it.Field.Val
		}
	}
	return h, !it.Bad
}

// MaxKVHeader is the most that the fields of an mvccpb.KeyValue other than key and value take, with the
// tags and lengths of all, and of the message itself.
const MaxKVHeader = 4*11 + 2*6 + 6
