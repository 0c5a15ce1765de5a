package tlsconn

import (
	"errors"
	"time"
)

// What crypto/tls does not bound. It ends a connection after 16 records in a row that bring no data, but one byte of data
// lets the next 16 pass, and a KeyUpdate of 27 bytes (RFC 8446 4.6.3) costs as much as some requests: new keys for both
// directions, and an answer. Records of a byte each cost a decryption for every byte. So records that bring next to
// nothing take from a budget of the connection.
const (
	// usefulRecord is the least that a record of honest HTTP/2 brings: no frame is shorter (RFC 9113 4.1), and who writes
	// frames writes whole ones. Only the last record of a long write may bring less.
	usefulRecord = 9
	// uselessBurst records may bring less than that. Each bytesPerUseless bytes give one back, and each second
	// uselessRefill. Beyond: ErrRecords.
	uselessBurst    = 1000
	uselessRefill   = 100
	bytesPerUseless = 1 << 10

	recordHeader = 5 // RFC 8446 5.1: type, version, length
)

// ErrRecords says that too many records came that brought nothing.
var ErrRecords = errors.New("too many TLS records without data (KeyUpdate, or a few bytes each)")

// records counts the records that come from the peer, by their headers alone, and what they bring. It belongs to the loop.
type records struct {
	have, size int       // of the record that is under way: bytes that are here, bytes that it has (once its header is here)
	spent      int       // of uselessBurst
	earned     int       // bytes that have given nothing back yet
	since      time.Time // from when on seconds give something back
}

// scan takes bytes of the socket and returns how many records end in them.
func (r *records) scan(p []byte) (ended int) {
	for len(p) > 0 {
		if r.have < recordHeader {
			switch r.have {
			case 3:
				r.size = int(p[0]) << 8
			case 4:
				r.size += int(p[0]) + recordHeader
			}
			r.have++
			p = p[1:]
		} else {
			n := min(len(p), r.size-r.have)
			r.have += n
			p = p[n:]
		}
		if r.have >= recordHeader && r.have == r.size {
			r.have = 0
			ended++
		}
	}
	return ended
}

// partial is how many bytes of the record that is under way are here: crypto/tls keeps them.
func (r *records) partial() int { return r.have }

// brought counts what records brought: bytes of data, and how many of them were useless (negative: fewer than was said).
func (r *records) brought(bytes, useless int) error {
	if r.earned += bytes; r.earned >= bytesPerUseless {
		r.spent = max(0, r.spent-r.earned/bytesPerUseless)
		r.earned %= bytesPerUseless
	}
	if useless <= 0 {
		r.spent = max(0, r.spent+useless)
		return nil
	}
	if r.spent == 0 {
		r.since = time.Now()
	}
	if r.spent += useless; r.spent <= uselessBurst {
		return nil
	}
	now := time.Now()
	if n := int(now.Sub(r.since).Seconds() * uselessRefill); n > 0 {
		r.spent, r.since = max(0, r.spent-n), now
	}
	if r.spent > uselessBurst {
		return ErrRecords
	}
	return nil
}
