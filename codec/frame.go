package codec

import "encoding/binary"

// Frames of RFC 9113 section 4: the nine-byte header, the parser of it, and one appender per frame.
// Appenders trust their caller for lengths and identifiers; they write the reserved bits as zero.

const (
	frameHeaderLen = 9
	// maxFrameSize is SETTINGS_MAX_FRAME_SIZE on this side. It is RFC 9113's smallest value, never raised:
	// it bounds what a frame that arrives in pieces can make a Conn keep, and it is the grain at which
	// streams take turns on the way out.
	maxFrameSize = 16384

	initialWindow = 65535     // RFC 9113 6.9.2, until SETTINGS say otherwise
	maxWindow     = 1<<31 - 1 // RFC 9113 6.9.1
	maxStreamID   = 1<<31 - 1
)

// Frame types (RFC 9113 section 6).
const (
	frameData         = 0x0
	frameHeaders      = 0x1
	framePriority     = 0x2
	frameRSTStream    = 0x3
	frameSettings     = 0x4
	framePushPromise  = 0x5
	framePing         = 0x6
	frameGoAway       = 0x7
	frameWindowUpdate = 0x8
	frameContinuation = 0x9
)

// Frame flags.
const (
	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

// Settings (RFC 9113 section 6.5.2).
const (
	settingHeaderTableSize      = 0x1
	settingEnablePush           = 0x2
	settingMaxConcurrentStreams = 0x3
	settingInitialWindowSize    = 0x4
	settingMaxFrameSize         = 0x5
	settingMaxHeaderListSize    = 0x6
)

// clientPreface opens every connection of a client (RFC 9113 section 3.4).
const clientPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// h2Code is an error code of RST_STREAM and GOAWAY (RFC 9113 section 7).
type h2Code uint32

const (
	h2NoError            h2Code = 0x0
	h2Protocol           h2Code = 0x1
	h2Internal           h2Code = 0x2
	h2FlowControl        h2Code = 0x3
	h2SettingsTimeout    h2Code = 0x4
	h2StreamClosed       h2Code = 0x5
	h2FrameSize          h2Code = 0x6
	h2RefusedStream      h2Code = 0x7
	h2Cancel             h2Code = 0x8
	h2Compression        h2Code = 0x9
	h2Connect            h2Code = 0xa
	h2EnhanceYourCalm    h2Code = 0xb
	h2InadequateSecurity h2Code = 0xc
	h2HTTP11Required     h2Code = 0xd
)

var h2Names = [...]string{"NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR",
	"SETTINGS_TIMEOUT", "STREAM_CLOSED", "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL",
	"COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM", "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED"}

func (c h2Code) String() string {
	if int(c) < len(h2Names) {
		return h2Names[c]
	}
	return "unknown error code " + string(appendUint(nil, uint64(c)))
}

// ConnError ends a whole connection. Feed returns it; the peer finds the code in GOAWAY.
type ConnError struct {
	Code   uint32 // error code of RFC 9113 section 7
	Reason string
	Limit  Limit // which bound it was; LimitProtocol for a violation of the protocol
}

func (e *ConnError) Error() string { return "http2: " + h2Code(e.Code).String() + ": " + e.Reason }

func connErr(code h2Code, reason string) error {
	return &ConnError{uint32(code), reason, LimitProtocol}
}

// frameHeader is the fixed part of a frame.
type frameHeader struct {
	length uint32
	typ    uint8
	flags  uint8
	stream uint32 // without the reserved bit
}

func (h frameHeader) has(flag uint8) bool { return h.flags&flag != 0 }

// parseFrameHeader reads the header at the start of p, which has at least frameHeaderLen bytes.
func parseFrameHeader(p []byte) frameHeader {
	_ = p[8]
	return frameHeader{
		length: uint32(p[0])<<16 | uint32(p[1])<<8 | uint32(p[2]),
		typ:    p[3],
		flags:  p[4],
		stream: binary.BigEndian.Uint32(p[5:9]) & maxStreamID,
	}
}

func appendFrameHeader(dst []byte, length int, typ, flags uint8, stream uint32) []byte {
	return append(dst, byte(length>>16), byte(length>>8), byte(length), typ, flags,
		byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

func appendRSTStream(dst []byte, stream uint32, code h2Code) []byte {
	dst = appendFrameHeader(dst, 4, frameRSTStream, 0, stream)
	return binary.BigEndian.AppendUint32(dst, uint32(code))
}

func appendWindowUpdate(dst []byte, stream, increment uint32) []byte {
	dst = appendFrameHeader(dst, 4, frameWindowUpdate, 0, stream)
	return binary.BigEndian.AppendUint32(dst, increment)
}

func appendPing(dst []byte, ack bool, data [8]byte) []byte {
	var flags uint8
	if ack {
		flags = flagAck
	}
	dst = appendFrameHeader(dst, 8, framePing, flags, 0)
	return append(dst, data[:]...)
}

func appendGoAway(dst []byte, last uint32, code h2Code, debug string) []byte {
	dst = appendFrameHeader(dst, 8+len(debug), frameGoAway, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, last)
	dst = binary.BigEndian.AppendUint32(dst, uint32(code))
	return append(dst, debug...)
}

func appendSettingsAck(dst []byte) []byte {
	return appendFrameHeader(dst, 0, frameSettings, flagAck, 0)
}

func appendSetting(dst []byte, id uint16, val uint32) []byte {
	dst = binary.BigEndian.AppendUint16(dst, id)
	return binary.BigEndian.AppendUint32(dst, val)
}

// appendHeaders frames one header block: HEADERS, and CONTINUATION when it is larger than a frame.
func appendHeaders(dst []byte, stream uint32, endStream bool, block []byte) []byte {
	typ, flags := uint8(frameHeaders), uint8(0)
	if endStream {
		flags = flagEndStream
	}
	for len(block) > maxFrameSize {
		dst = appendFrameHeader(dst, maxFrameSize, typ, flags, stream)
		dst = append(dst, block[:maxFrameSize]...)
		block = block[maxFrameSize:]
		typ, flags = frameContinuation, 0
	}
	dst = appendFrameHeader(dst, len(block), typ, flags|flagEndHeaders, stream)
	return append(dst, block...)
}

func appendUint(dst []byte, v uint64) []byte {
	var b [20]byte
	i := len(b)
	for {
		i--
		b[i] = byte('0' + v%10)
		if v /= 10; v == 0 {
			return append(dst, b[i:]...)
		}
	}
}
