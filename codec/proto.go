package codec

import "google.golang.org/protobuf/encoding/protowire"

// Field is one protobuf field as it stands on the wire.
type Field struct {
	Num  protowire.Number
	Type protowire.Type
	// Val is the value of a varint (or fixed) field.
	Val uint64
	// Bytes is the payload of a length-delimited field, a view into the message.
	Bytes []byte
	// Raw is the whole field with its tag, a view into the message.
	Raw []byte
}

// Fields walks the fields of one encoded message. The zero value walks nothing.
//
//	it := codec.Fields{Msg: msg}
//	for it.Next() { use it.Field }
//	if it.Bad { not protobuf }
type Fields struct {
	Msg   []byte
	Field Field
	// Bad is set when the message is not well-formed protobuf; Next then returns false.
	Bad bool
}

// Next moves to the next field. It allocates nothing.
func (it *Fields) Next() bool {
	if len(it.Msg) == 0 {
		return false
	}
	num, typ, n := protowire.ConsumeTag(it.Msg)
	if n < 0 || num > protowire.MaxValidNumber {
		it.Bad = true
		return false
	}
	f := &it.Field
	f.Num, f.Type, f.Val, f.Bytes = num, typ, 0, nil
	var m int
	switch typ {
	case protowire.VarintType:
		f.Val, m = protowire.ConsumeVarint(it.Msg[n:])
	case protowire.BytesType:
		f.Bytes, m = protowire.ConsumeBytes(it.Msg[n:])
	case protowire.Fixed64Type:
		f.Val, m = protowire.ConsumeFixed64(it.Msg[n:])
	case protowire.Fixed32Type:
		var v uint32
		v, m = protowire.ConsumeFixed32(it.Msg[n:])
		f.Val = uint64(v)
	default:
		m = protowire.ConsumeFieldValue(num, typ, it.Msg[n:])
	}
	if m < 0 {
		it.Bad = true
		return false
	}
	f.Raw = it.Msg[:n+m]
	it.Msg = it.Msg[n+m:]
	return true
}

// AppendInt appends a varint field as proto3 does: nothing when v is 0.
func AppendInt(dst []byte, num protowire.Number, v int64) []byte {
	if v == 0 {
		return dst
	}
	dst = protowire.AppendTag(dst, num, protowire.VarintType)
	return protowire.AppendVarint(dst, uint64(v))
}

// AppendBool appends a bool field as proto3 does: nothing when v is false.
func AppendBool(dst []byte, num protowire.Number, v bool) []byte {
	if !v {
		return dst
	}
	return AppendInt(dst, num, 1)
}

// AppendBytes appends a bytes field as proto3 does: nothing when v is empty.
func AppendBytes(dst []byte, num protowire.Number, v []byte) []byte {
	if len(v) == 0 {
		return dst
	}
	dst = protowire.AppendTag(dst, num, protowire.BytesType)
	return protowire.AppendBytes(dst, v)
}

// AppendString is AppendBytes for a string.
func AppendString(dst []byte, num protowire.Number, v string) []byte {
	if len(v) == 0 {
		return dst
	}
	dst = protowire.AppendTag(dst, num, protowire.BytesType)
	return protowire.AppendString(dst, v)
}

// BeginMessage opens an embedded message (or oneof member): it appends the tag and a place for a one-byte
// length, and returns the mark that EndMessage needs. Messages nest.
func BeginMessage(dst []byte, num protowire.Number) (out []byte, mark int) {
	dst = protowire.AppendTag(dst, num, protowire.BytesType)
	dst = append(dst, 0)
	return dst, len(dst)
}

// EndMessage closes the message opened at mark: it writes the length, and moves the body when the length
// needs more than one byte.
func EndMessage(dst []byte, mark int) []byte {
	n := len(dst) - mark
	size := protowire.SizeVarint(uint64(n))
	if size > 1 {
		var pad [9]byte
		dst = append(dst, pad[:size-1]...)
		copy(dst[mark+size-1:], dst[mark:mark+n])
	}
	protowire.AppendVarint(dst[:mark-1], uint64(n))
	return dst
}
