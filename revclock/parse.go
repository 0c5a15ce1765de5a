package revclock

import (
	"encoding/binary"

	"google.golang.org/protobuf/encoding/protowire"
)

// Parser reads the stored formats, here and on the shards. It hands out views into the bytes that it was
// made of. After an error Bad is set for good and everything reads as zero, so that a caller checks once,
// at the end. The zero value is an empty input.
type Parser struct {
	B   []byte // what is left
	Bad bool
}

func (p *Parser) fail() { p.B, p.Bad = nil, true }

// Done says that everything was read, without an error.
func (p *Parser) Done() bool { return !p.Bad && len(p.B) == 0 }

// Uvarint reads a minimal uvarint, the only kind in stored formats: what is written in one way only can
// be compared byte by byte.
func (p *Parser) Uvarint() uint64 {
	if len(p.B) > 0 && p.B[0] < 0x80 {
		v := uint64(p.B[0])
		p.B = p.B[1:]
		return v
	}
	v, n := protowire.ConsumeVarint(p.B)
	if n < 0 || n != protowire.SizeVarint(v) {
		p.fail()
		return 0
	}
	p.B = p.B[n:]
	return v
}

// Take reads n bytes.
func (p *Parser) Take(n uint64) []byte {
	if n > uint64(len(p.B)) {
		p.fail()
		return nil
	}
	v := p.B[:n:n]
	p.B = p.B[n:]
	return v
}

// Bytes reads a field with its length before it.
func (p *Parser) Bytes() []byte { return p.Take(p.Uvarint()) }

// Byte reads one byte.
func (p *Parser) Byte() byte {
	if v := p.Take(1); len(v) == 1 {
		return v[0]
	}
	return 0
}

// Be64 reads eight bytes, big-endian.
func (p *Parser) Be64() uint64 {
	if v := p.Take(8); len(v) == 8 {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

// ID reads an identity.
func (p *Parser) ID() (id ID) {
	copy(id[:], p.Take(16))
	return id
}
