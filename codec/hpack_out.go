package codec

import (
	"strconv"
	"time"
)

// Header blocks going out. The server's side uses only the static table and literals without indexing, so
// its blocks are constants and no table has to be kept. The client's side indexes the few fields of its
// requests, because an etcd member decodes an indexed field without allocating.

// Indexes of the static table (RFC 7541 appendix A).
const (
	hpMethodPost  = 0x80 | 3
	hpSchemeHTTP  = 0x80 | 6
	hpSchemeHTTPS = 0x80 | 7
	hpStatus200   = 0x80 | 8
	hpAuthority   = 1
	hpPath        = 4
	hpStatus      = 8
	hpContentType = 31
	hpStaticLen   = 61
)

var (
	// responseHeaders is ":status: 200, content-type: application/grpc".
	responseHeaders = appendLiteralIdx([]byte{hpStatus200}, hpContentType, "application/grpc")
	// trailersOK is "grpc-status: 0".
	trailersOK = appendLiteral(nil, "grpc-status", "0")
)

// appendInt appends an integer with an n-bit prefix (RFC 7541 5.1); first holds the bits above the prefix.
func appendHpackInt(dst []byte, first byte, n uint, v uint64) []byte {
	mask := uint64(1)<<n - 1
	if v < mask {
		return append(dst, first|byte(v))
	}
	dst = append(dst, first|byte(mask))
	v -= mask
	for v >= 0x80 {
		dst = append(dst, byte(v)|0x80)
		v >>= 7
	}
	return append(dst, byte(v))
}

func appendHpackString(dst []byte, s string) []byte {
	dst = appendHpackInt(dst, 0, 7, uint64(len(s)))
	return append(dst, s...)
}

// appendLiteral appends a literal field without indexing (RFC 7541 6.2.2).
func appendLiteral(dst []byte, name, value string) []byte {
	dst = append(dst, 0)
	dst = appendHpackString(dst, name)
	return appendHpackString(dst, value)
}

// appendLiteralIdx is appendLiteral with the name from the static table.
func appendLiteralIdx(dst []byte, name uint64, value string) []byte {
	dst = appendHpackInt(dst, 0, 4, name)
	return appendHpackString(dst, value)
}

// appendStatusFields appends grpc-status and grpc-message.
func appendStatusFields(dst []byte, st Status) []byte {
	if st.Code == OK {
		return append(dst, trailersOK...)
	}
	dst = append(dst, 0)
	dst = appendHpackString(dst, "grpc-status")
	mark := len(dst)
	dst = append(dst, 0)
	dst = appendUint(dst, uint64(st.Code))
	dst[mark] = byte(len(dst) - mark - 1)
	if st.Msg == "" {
		return dst
	}
	dst = append(dst, 0)
	dst = appendHpackString(dst, "grpc-message")
	n := grpcMessageLen(st.Msg)
	dst = appendHpackInt(dst, 0, 7, uint64(n))
	return appendGRPCMessage(dst, st.Msg)
}

// requestEncoder makes the header blocks of a client. It indexes each field that repeats once, in order,
// never evicts one, and stops indexing when the table that every server grants at first is full.
type requestEncoder struct {
	authority string
	secure    bool           // :scheme https
	token     string         // etcd's, "" for none
	entries   []indexedField // in order of insertion
	size      uint32
	// plain is set when the server's SETTINGS allow less than the default table: nothing is indexed any
	// more, and the next block begins with a size update to 0 (RFC 7541 4.2).
	plain      bool
	sizeUpdate bool
}

type indexedField struct{ name, value string }

// setTableSize applies the server's SETTINGS_HEADER_TABLE_SIZE.
func (e *requestEncoder) setTableSize(n uint32) {
	if n < hpackTable && !e.plain {
		e.plain, e.sizeUpdate = true, true
		e.entries, e.size = nil, 0
	}
}

// append appends the header block of one request.
func (e *requestEncoder) append(dst []byte, path string, hasLeader bool, timeout time.Duration) []byte {
	if e.sizeUpdate {
		e.sizeUpdate = false
		dst = append(dst, 0x20)
	}
	scheme := byte(hpSchemeHTTP)
	if e.secure {
		scheme = hpSchemeHTTPS
	}
	dst = append(dst, hpMethodPost, scheme)
	dst = e.field(dst, hpPath, ":path", path)
	dst = e.field(dst, hpAuthority, ":authority", e.authority)
	dst = e.field(dst, hpContentType, "content-type", "application/grpc")
	dst = e.field(dst, 0, "te", "trailers")
	if hasLeader {
		dst = e.field(dst, 0, "hasleader", "true")
	}
	if e.token != "" {
		dst = e.field(dst, 0, "token", e.token)
	}
	if timeout > 0 {
		var b [12]byte
		dst = append(dst, 0)
		dst = appendHpackString(dst, "grpc-timeout")
		t := appendTimeout(b[:0], timeout)
		dst = appendHpackInt(dst, 0, 7, uint64(len(t)))
		dst = append(dst, t...)
	}
	return dst
}

// field appends one field: by its index if it is in the table, else as a literal that enters the table if
// there is place. static is the index of name in the static table, or 0.
func (e *requestEncoder) field(dst []byte, static uint64, name, value string) []byte {
	for i := range e.entries {
		if f := &e.entries[i]; f.value == value && f.name == name {
			// The newest entry has the lowest index (RFC 7541 2.3.3).
			return appendHpackInt(dst, 0x80, 7, uint64(hpStaticLen+len(e.entries)-i))
		}
	}
	size := uint32(len(name) + len(value) + 32)
	first, bits := byte(0), uint(4)
	if !e.plain && e.size+size <= hpackTable {
		e.entries = append(e.entries, indexedField{name, value})
		e.size += size
		first, bits = 0x40, 6
	}
	dst = appendHpackInt(dst, first, bits, static)
	if static == 0 {
		dst = appendHpackString(dst, name)
	}
	return appendHpackString(dst, value)
}

// appendTimeout appends the value of grpc-timeout for t > 0, rounded up in the finest unit whose number has
// at most eight digits.
func appendTimeout(dst []byte, t time.Duration) []byte {
	const most = 100_000_000 - 1
	for _, u := range timeoutUnits {
		n := int64(t / u.d)
		if t%u.d > 0 {
			n++
		}
		if n <= most {
			return append(strconv.AppendInt(dst, n, 10), u.c)
		}
	}
	return append(dst, "99999999H"...)
}

// timeoutUnits are the units of grpc-timeout, finest first.
var timeoutUnits = [...]struct {
	c byte
	d time.Duration
}{
	{'n', time.Nanosecond}, {'u', time.Microsecond}, {'m', time.Millisecond},
	{'S', time.Second}, {'M', time.Minute}, {'H', time.Hour},
}
