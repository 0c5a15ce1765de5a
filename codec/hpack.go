package codec

import (
	"bytes"
	"errors"
	"strconv"

	"golang.org/x/net/http2/hpack"
)

// Header blocks coming in. A headerDecoder belongs to one Conn. Whatever is wrong with the fields of a
// block, the block is decoded to its end, so that the dynamic table stays the peer's; only a block that is
// not HPACK ends the connection.

// hpackTable is the dynamic table that the peer's encoder may use (RFC 7541's default; never changed).
const hpackTable = 4096

// Pseudo-header fields seen in a block.
const (
	sawMethod = 1 << iota
	sawScheme
	sawPath
	sawAuthority
	sawStatus
)

// fields is what a Conn wants to know of one header block. Strings are the decoder's; they may be kept.
type fields struct {
	method, path    string
	status          string // :status
	contentType     string
	encoding        string // grpc-encoding
	timeout         string // grpc-timeout
	grpcStatus      string
	grpcMessage     string
	contentLength   int64 // -1 without
	pseudo          uint8 // saw...
	hosts           uint8
	hasTimeout      bool
	hasGRPCStatus   bool
	hasLeader       bool
	sawHasLeader    bool
	sawRegular      bool
	overLimit       bool   // more bytes or fields than allowed; the other fields then say nothing
	malformed       string // why RFC 9113 8.1.1 calls the message malformed, "" when it does not
	bytes, numField int
}

// headerDecoder turns header blocks into fields.
type headerDecoder struct {
	dec       *hpack.Decoder // made with the first block
	cur       fields
	maxBytes  int
	maxFields int
	// cached are the last block of headers and the last of trailers that left the dynamic table as it was.
	// Equal bytes mean equal fields until a block that changes the table comes.
	cached [2]*cachedBlock
}

type cachedBlock struct {
	valid bool
	raw   []byte
	f     fields
}

// decode reads one whole header block. The fields are valid until the next call. slot separates headers (0)
// from trailers (1) for the cache.
func (d *headerDecoder) decode(block []byte, slot int) (*fields, error) {
	if c := d.cached[slot]; c != nil && c.valid && bytes.Equal(c.raw, block) {
		return &c.f, nil
	}
	if d.dec == nil {
		d.dec = hpack.NewDecoder(hpackTable, d.emit)
	}
	d.cur = fields{contentLength: -1}
	shape := scanBlock(block)
	if shape.bad != nil {
		return nil, shape.bad
	}
	// hpack.Decoder refuses a second size update while the table has entries, though RFC 7541 4.2 allows
	// two; each is a block of its own to it.
	for ; shape.updates > 1; shape.updates-- {
		n := intLen(block, 5)
		if err := d.write(block[:n]); err != nil {
			return nil, err
		}
		block = block[n:]
	}
	if err := d.write(block); err != nil {
		return nil, err
	}
	if shape.changesTable {
		for _, c := range d.cached {
			if c != nil {
				c.valid = false
			}
		}
	} else if len(block) <= maxCachedBlock {
		c := d.cached[slot]
		if c == nil {
			c = &cachedBlock{}
			d.cached[slot] = c
		}
		c.valid, c.raw, c.f = true, append(c.raw[:0], block...), d.cur
	}
	return &d.cur, nil
}

func (d *headerDecoder) write(p []byte) error {
	if _, err := d.dec.Write(p); err != nil {
		return err
	}
	return d.dec.Close()
}

// emit takes one field from the decoder.
func (d *headerDecoder) emit(hf hpack.HeaderField) {
	f := &d.cur
	if f.overLimit {
		return // decoded all the same: for the table, and because it must be HPACK
	}
	f.numField++
	f.bytes += len(hf.Name) + len(hf.Value) + 32
	if f.overLimit = f.numField > d.maxFields || f.bytes > d.maxBytes; f.overLimit {
		return
	}
	if hf.Name == "" || !validValue(hf.Value) {
		f.bad("invalid header field")
		return
	}
	if hf.Name[0] == ':' {
		f.addPseudo(hf.Name, hf.Value)
		return
	}
	if !validName(hf.Name) {
		f.bad("invalid header field name")
		return
	}
	f.sawRegular = true
	f.addRegular(hf.Name, hf.Value)
}

func (f *fields) bad(why string) {
	if f.malformed == "" {
		f.malformed = why
	}
}

func (f *fields) addPseudo(name, value string) {
	var bit uint8
	switch name {
	case ":method":
		bit, f.method = sawMethod, value
	case ":path":
		bit, f.path = sawPath, internPath(value)
	case ":scheme":
		bit = sawScheme
	case ":authority":
		bit = sawAuthority
	case ":status":
		bit, f.status = sawStatus, value
	default:
		f.bad("unknown pseudo-header field")
		return
	}
	if f.pseudo&bit != 0 {
		f.bad("pseudo-header field twice")
	}
	if f.sawRegular {
		f.bad("pseudo-header field after a regular one")
	}
	f.pseudo |= bit
}

func (f *fields) addRegular(name, value string) {
	switch name {
	case "content-type":
		f.contentType = value
	case "te":
		if value != "trailers" {
			f.bad("te other than trailers")
		}
	case "grpc-timeout":
		f.timeout, f.hasTimeout = value, true
	case "grpc-encoding":
		f.encoding = value
	case "grpc-status":
		f.grpcStatus, f.hasGRPCStatus = value, true
	case "grpc-message":
		f.grpcMessage = value
	case "hasleader":
		if !f.sawHasLeader {
			f.sawHasLeader, f.hasLeader = true, value == "true"
		}
	case "host":
		f.hosts = min(f.hosts+1, 2)
	case "content-length":
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil || n < 0 || value[0] == '+' || (f.contentLength >= 0 && f.contentLength != n) {
			f.bad("invalid content-length")
			return
		}
		f.contentLength = n
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		f.bad("connection-specific header field")
	}
}

// checkRequest applies RFC 9113 8.3.1 to the headers of a request.
func (f *fields) checkRequest() string {
	const need = sawMethod | sawScheme | sawPath
	switch {
	case f.malformed != "":
		return f.malformed
	case f.pseudo&sawStatus != 0:
		return "response pseudo-header field in a request"
	case f.pseudo&need != need:
		return "missing pseudo-header field"
	case f.path == "":
		return "empty :path"
	}
	return ""
}

// checkResponse applies RFC 9113 8.3.2 to the headers of a response.
func (f *fields) checkResponse() string {
	switch {
	case f.malformed != "":
		return f.malformed
	case f.pseudo != sawStatus:
		return "response without exactly :status"
	}
	return ""
}

// checkTrailers applies RFC 9113 8.1: no pseudo-header fields.
func (f *fields) checkTrailers() string {
	switch {
	case f.malformed != "":
		return f.malformed
	case f.pseudo != 0:
		return "pseudo-header field in trailers"
	}
	return ""
}

// validName says whether name is a lower-case token (RFC 9113 8.2.1).
func validName(name string) bool {
	for i := 0; i < len(name); i++ {
		if c := name[i]; c <= ' ' || c >= 0x7f || c == ':' || (c >= 'A' && c <= 'Z') {
			return false
		}
	}
	return true
}

func validValue(value string) bool {
	for i := 0; i < len(value); i++ {
		if c := value[i]; c == 0 || c == '\r' || c == '\n' {
			return false
		}
	}
	return true
}

// blockShape is what the representations of a header block say without being decoded.
type blockShape struct {
	changesTable bool
	updates      int // dynamic table size updates at the start
	bad          error
}

var (
	errLateSizeUpdate  = errors.New("dynamic table size update after a field")
	errManySizeUpdates = errors.New("more than two dynamic table size updates")
)

// scanBlock walks over the representations of RFC 7541 section 6. A block that it cannot read is left to the
// decoder to refuse.
func scanBlock(p []byte) (s blockShape) {
	fieldSeen := false
	for len(p) > 0 {
		b := p[0]
		n := 0
		switch {
		case b&0x80 != 0: // indexed field
			n = intLen(p, 7)
		case b&0xe0 == 0x20: // dynamic table size update
			if fieldSeen {
				s.bad = errLateSizeUpdate
				return s
			}
			if s.updates++; s.updates > 2 {
				s.bad = errManySizeUpdates
				return s
			}
			s.changesTable = true
			n = intLen(p, 5)
		case b&0xc0 == 0x40: // literal with incremental indexing
			s.changesTable = true
			n = literalLen(p, 6)
		default: // literal without indexing, or never indexed
			n = literalLen(p, 4)
		}
		if n == 0 {
			s.changesTable = true
			return s
		}
		fieldSeen = fieldSeen || b&0xe0 != 0x20
		p = p[n:]
	}
	return s
}

// intLen returns how many bytes the integer with an n-bit prefix at the start of p takes, 0 when it is cut
// off or too long.
func intLen(p []byte, n uint) int {
	_, k := readInt(p, n)
	return k
}

// readInt reads an integer with an n-bit prefix (RFC 7541 5.1); k is 0 when it is cut off or too long.
func readInt(p []byte, n uint) (v uint64, k int) {
	if len(p) == 0 {
		return 0, 0
	}
	mask := uint64(1)<<n - 1
	v = uint64(p[0]) & mask
	if v < mask {
		return v, 1
	}
	for i := 1; i < len(p) && i <= 9; i++ {
		v += uint64(p[i]&0x7f) << (7 * (i - 1))
		if p[i]&0x80 == 0 {
			return v, i + 1
		}
	}
	return 0, 0
}

// literalLen returns the length of the literal field at the start of p, 0 when it is cut off.
func literalLen(p []byte, prefix uint) int {
	idx, n := readInt(p, prefix)
	if n == 0 {
		return 0
	}
	strs := 1
	if idx == 0 {
		strs = 2
	}
	for ; strs > 0; strs-- {
		l, k := readInt(p[n:], 7)
		if k == 0 || l > uint64(len(p)-n-k) {
			return 0
		}
		n += k + int(l)
	}
	return n
}
