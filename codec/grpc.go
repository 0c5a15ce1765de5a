package codec

import (
	"encoding/binary"
	"errors"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// gRPC over HTTP/2: the message prefix, grpc-timeout, grpc-message, and what statuses of HTTP and error
// codes of HTTP/2 mean to a client. Texts and codes are grpc-go's, because clients match on them.

// prefixLen is the length of a gRPC message's prefix: a flag for compression, and four bytes of length.
const prefixLen = 5

func appendPrefix(dst []byte, n int) []byte {
	dst = append(dst, 0)
	return binary.BigEndian.AppendUint32(dst, uint32(n))
}

// ReceivedLargerThanMax is how grpc-go's text begins when a server refuses a request by its size, which it does before
// anybody looks at it. What a client of this package says of an answer that is too large for it begins otherwise.
const ReceivedLargerThanMax = "grpc: received message larger than max ("

// checkPrefix judges the prefix of a message. The zero Status says that the message is welcome.
func checkPrefix(flag byte, n uint32, limit int, encoding string, client bool) Status {
	if uint64(n) > uint64(limit) {
		text := ReceivedLargerThanMax
		if client {
			text = "spindle: an answer larger than max ("
		}
		return Status{ResourceExhausted, text +
			strconv.FormatUint(uint64(n), 10) + " vs. " + strconv.Itoa(limit) + ")"}
	}
	switch flag {
	case 0:
		return Status{}
	case 1:
		if encoding == "" || encoding == "identity" {
			return Status{Internal, "grpc: compressed flag set with identity or empty encoding"}
		}
		if !client && encoding == "gzip" {
			return Status{}
		}
		code := Unimplemented
		if client {
			code = Internal // none was offered
		}
		return Status{code, "grpc: Decompressor is not installed for grpc-encoding " + quote(encoding)}
	}
	return Status{Internal, "grpc: received unexpected payload format " + strconv.Itoa(int(flag))}
}

// isGRPCContentType says whether a content-type is application/grpc, alone or with a +suffix or ;suffix.
func isGRPCContentType(v string) bool {
	const base = "application/grpc"
	if !strings.HasPrefix(v, base) {
		return false
	}
	return len(v) == len(base) || v[len(base)] == '+' || v[len(base)] == ';'
}

// parseTimeout reads a grpc-timeout: up to eight digits and a unit.
func parseTimeout(s string) (time.Duration, error) {
	if len(s) < 2 {
		return 0, errors.New("transport: timeout string is too short: " + quote(s))
	}
	if len(s) > 9 {
		return 0, errors.New("transport: timeout string is too long: " + quote(s))
	}
	var unit time.Duration
	for _, u := range timeoutUnits {
		if u.c == s[len(s)-1] {
			unit = u.d
		}
	}
	if unit == 0 {
		return 0, errors.New("transport: timeout unit is not recognized: " + quote(s))
	}
	n, err := strconv.ParseUint(s[:len(s)-1], 10, 64)
	if err != nil {
		return 0, err
	}
	if n > uint64(math.MaxInt64/unit) {
		return math.MaxInt64, nil
	}
	return time.Duration(n) * unit, nil
}

// maxQuoted is how many bytes of what a peer sent are repeated to it in a status. A field in its dynamic table
// costs the peer one byte a request, so a whole one would make small requests into large answers.
const maxQuoted = 128

func quote(s string) string { return strconv.Quote(s[:min(len(s), maxQuoted)]) }

const upperHex = "0123456789ABCDEF"

// grpcMessageStep returns how many bytes of msg its first character takes, and how many encoded.
func grpcMessageStep(msg string) (in, out int, r rune) {
	c := msg[0]
	if c >= ' ' && c <= '~' && c != '%' {
		return 1, 1, 0
	}
	if c < utf8.RuneSelf {
		return 1, 3, rune(c)
	}
	// An invalid byte becomes U+FFFD, as in grpc-go.
	r, in = utf8.DecodeRuneInString(msg)
	return in, 3 * utf8.RuneLen(r), r
}

// grpcMessageLen returns the length of what appendGRPCMessage appends.
func grpcMessageLen(msg string) int {
	n := 0
	for len(msg) > 0 {
		in, out, _ := grpcMessageStep(msg)
		if n+out > maxStatusText {
			break
		}
		n += out
		msg = msg[in:]
	}
	return n
}

// appendGRPCMessage percent-encodes msg for grpc-message, cut off after maxStatusText bytes.
func appendGRPCMessage(dst []byte, msg string) []byte {
	n := 0
	for len(msg) > 0 {
		in, out, r := grpcMessageStep(msg)
		if n += out; n > maxStatusText {
			break
		}
		if out == 1 {
			dst = append(dst, msg[0])
		} else {
			var u [utf8.UTFMax]byte
			for _, b := range u[:utf8.EncodeRune(u[:], r)] {
				dst = append(dst, '%', upperHex[b>>4], upperHex[b&15])
			}
		}
		msg = msg[in:]
	}
	return dst
}

// decodeGRPCMessage undoes the percent-encoding; what is not an encoding stays as it is.
func decodeGRPCMessage(s string) string {
	if strings.IndexByte(s, '%') < 0 {
		return s
	}
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+3], 16, 8); err == nil {
				out = append(out, byte(v))
				i += 2
				continue
			}
		}
		out = append(out, s[i])
	}
	return string(out)
}

// parseGRPCStatus reads grpc-status and grpc-message. ok is false when grpc-status is not a number; st then
// says so.
func parseGRPCStatus(f *fields) (st Status, ok bool) {
	if !f.hasGRPCStatus {
		return Status{Unknown, decodeGRPCMessage(f.grpcMessage)}, true
	}
	if f.grpcStatus == "0" {
		return Status{}, true
	}
	n, err := strconv.ParseInt(f.grpcStatus, 10, 32)
	if err != nil {
		return Status{Unknown, "transport: malformed grpc-status: " + err.Error()}, false
	}
	st = Status{Code: Code(uint32(n)), Msg: decodeGRPCMessage(f.grpcMessage)}
	if st.Code == OK {
		st.Msg = ""
	}
	return st, true
}

// statusOfHTTP is the status of a response that is not gRPC (a proxy's error page, say).
func statusOfHTTP(httpStatus, contentType string) Status {
	n, err := strconv.Atoi(httpStatus)
	if err != nil {
		return Status{Internal, "transport: malformed http-status: " + err.Error()}
	}
	code := Unknown
	switch n {
	case 400:
		code = Internal
	case 401:
		code = Unauthenticated
	case 403:
		code = PermissionDenied
	case 404:
		code = Unimplemented
	case 429, 502, 503, 504:
		code = Unavailable
	}
	msg := "unexpected HTTP status code received from server: " + httpStatus + " (" + httpText[n] + ")"
	if contentType == "" {
		return Status{code, msg + "; malformed header: missing HTTP content-type"}
	}
	return Status{code, msg + "; transport: received unexpected content-type " + quote(contentType)}
}

var httpText = map[int]string{200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden",
	404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 413: "Request Entity Too Large",
	415: "Unsupported Media Type", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
	500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway",
	503: "Service Unavailable", 504: "Gateway Timeout", 505: "HTTP Version Not Supported"}

// statusOfReset is the status of an RPC that ended by the server's RST_STREAM.
func statusOfReset(code h2Code) Status {
	c := Unknown
	switch code {
	case h2NoError, h2Protocol, h2Internal, h2SettingsTimeout, h2StreamClosed, h2FrameSize, h2Compression,
		h2Connect, h2HTTP11Required:
		c = Internal
	case h2FlowControl, h2EnhanceYourCalm:
		c = ResourceExhausted
	case h2RefusedStream:
		c = Unavailable
	case h2Cancel:
		c = Canceled
	case h2InadequateSecurity:
		c = PermissionDenied
	}
	return Status{c, "stream terminated by RST_STREAM with error code: " + code.String()}
}

// knownPaths interns the :path of the methods of etcd, so that a Stream does not hold on to a string of its
// own for each request.
var knownPaths = internPaths(map[string]string{
	"KV":          "Range RangeStream Put DeleteRange Txn Compact",
	"Watch":       "Watch",
	"Lease":       "LeaseGrant LeaseRevoke LeaseKeepAlive LeaseTimeToLive LeaseLeases",
	"Cluster":     "MemberAdd MemberRemove MemberUpdate MemberList MemberPromote",
	"Maintenance": "Alarm Status Defragment Hash HashKV Snapshot MoveLeader Downgrade",
	"Auth": "AuthEnable AuthDisable AuthStatus Authenticate UserAdd UserGet UserList UserDelete " +
		"UserChangePassword UserGrantRole UserRevokeRole RoleAdd RoleGet RoleList RoleDelete " +
		"RoleGrantPermission RoleRevokePermission",
})

func internPaths(services map[string]string) map[string]string {
	m := make(map[string]string)
	for service, methods := range services {
		for _, method := range strings.Fields(methods) {
			path := "/etcdserverpb." + service + "/" + method
			m[path] = path
		}
	}
	return m
}

func internPath(path string) string {
	if p, ok := knownPaths[path]; ok {
		return p
	}
	return path
}
