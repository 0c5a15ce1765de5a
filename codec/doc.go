// Package codec is Spindle's wire: HTTP/2 frames (RFC 9113), HPACK (RFC 7541), gRPC messages,
// and the etcd protobuf messages read and rewritten in place (protowire). It does no I/O, starts no
// goroutine, and imports no other package of Spindle.
//
// The bytes that a function hands out are views into the bytes it was given, unless its comment says
// otherwise; encoders append to a caller's slice and return it (AppendX(dst, ...) []byte).
package codec
