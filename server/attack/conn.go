// Package attack has clients that mean harm: one for each class of attack on HTTP/2, gRPC and TLS servers that is
// known, and for each bound of this server. What is about HTTP/2 goes inside TLS where the target speaks it. Tests run them for a moment and look at what the server counts;
// `make attack` runs them for longer beside a good client. It imports nothing of Spindle.
package attack

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// turnEvery is how often a connection sends a burst, mostly: the attackers share the machine with the members and the good
// client, and must not starve those by themselves.
const turnEvery = 2 * time.Millisecond

// Attack is one class.
type Attack struct {
	Name string
	// Limits are the bounds (label limit of spindle_client_limit_hits_total) one of which must stop it.
	Limits []string
	// Conns is how many connections do it at a time.
	Conns int
	// Open says the first words, after the preface; nil: nothing.
	Open func(c *Conn) error
	// Turn is one burst; it is repeated until the connection is gone. nil: the connection just stays.
	Turn func(c *Conn) error
	// Raw says that not even a preface is sent.
	Raw bool
	// Deaf says that nothing the server sends is read; Drip, that a byte of the socket is, now and then: with TLS the rest of a
	// record never comes.
	Deaf, Drip bool

	// What follows is for those that only TLS has.

	// Wire says that no handshake is made: what is sent goes to the socket as it is.
	Wire bool
	// Records says that behind the handshake the attack makes its TLS records itself, with at most so many bytes each.
	Records int
	// Tickets says that sessions are resumed.
	Tickets bool
	// Stranger says that the certificate shown is of a CA that the server does not know.
	Stranger bool
}

// Target is who is attacked.
type Target struct {
	Addr string
	// TLS is how its clients speak to it; nil: plain text.
	TLS *tls.Config
	// Stranger is the same with a certificate that it must refuse; nil: it asks for none.
	Stranger *tls.Config
	// Breath is how long a connection waits between two bursts; 0: turnEvery.
	Breath time.Duration
}

// Conn is one connection of an attacker.
type Conn struct {
	C   net.Conn // the socket, or TLS above it
	W   *bufio.Writer
	Fr  *http2.Framer
	ID  uint32 // the stream opened last
	enc *hpack.Encoder
	hdr bytes.Buffer

	rec   *recordWriter // nil: C makes the records
	turns int
	sent  *Sent
}

// Sent counts what an attack sent, over all its connections.
type Sent struct {
	Conns, Turns, Bytes atomic.Int64
}

// Write counts; it is what the Framer writes to, by way of W.
func (c *Conn) Write(p []byte) (int, error) {
	var n int
	var err error
	if c.rec != nil {
		n, err = c.rec.data(p)
	} else {
		n, err = c.C.Write(p)
	}
	c.sent.Bytes.Add(int64(n))
	return n, err
}

// Run attacks to until quit is closed, with new connections for those that are closed. It returns when all
// is over.
func Run(a *Attack, to Target, quit <-chan struct{}, sent *Sent) {
	if to.Breath == 0 {
		to.Breath = turnEvery
	}
	secure := to.TLS
	if a.Stranger {
		secure = to.Stranger
	}
	if secure != nil && a.Tickets {
		secure = secure.Clone()
		secure.ClientSessionCache = tls.NewLRUClientSessionCache(0)
	}
	var wg sync.WaitGroup
	for range max(a.Conns, 1) {
		wg.Go(func() {
			for {
				select {
				case <-quit:
					return
				default:
				}
				if err := a.once(to, secure, quit, sent); errors.Is(err, errDial) {
					// The server has enough of us for now, or its backlog is full.
					select {
					case <-quit:
						return
					case <-time.After(10 * time.Millisecond):
					}
				}
			}
		})
	}
	wg.Wait()
}

var errDial = errors.New("cannot connect")

// once is one connection, from its beginning to its end.
func (a *Attack) once(to Target, secure *tls.Config, quit <-chan struct{}, sent *Sent) error {
	socket, err := net.DialTimeout("tcp", to.Addr, 5*time.Second)
	if err != nil {
		return errDial
	}
	gone := make(chan struct{})
	defer socket.Close()
	c := &Conn{C: socket, sent: sent}
	c.W = bufio.NewWriterSize(c, 32<<10)
	c.Fr = http2.NewFramer(c.W, nil)
	c.Fr.AllowIllegalWrites = true
	c.enc = hpack.NewEncoder(&c.hdr)
	sent.Conns.Add(1)
	go func() { // Write blocks on a server that does not read, and so does a handshake
		select {
		case <-quit:
		case <-gone:
		}
		socket.Close()
	}()
	if a.Deaf || a.Drip {
		defer close(gone)
	}
	if secure != nil && !a.Wire {
		if c.C, c.rec, err = shake(socket, secure, a.Records); err != nil {
			if !a.Deaf && !a.Drip {
				close(gone)
			}
			return err
		}
	}
	switch {
	case a.Drip:
		go drip(socket)
	case !a.Deaf:
		go func() {
			defer close(gone)
			_, _ = io.Copy(io.Discard, c.C)
		}()
	}
	if !a.Raw {
		if _, err := c.W.WriteString(http2.ClientPreface); err != nil {
			return err
		}
		if err := c.Fr.WriteSettings(); err != nil {
			return err
		}
	}
	if a.Open != nil {
		if err := a.Open(c); err != nil {
			return err
		}
	}
	if err := c.W.Flush(); err != nil {
		return err
	}
	if a.Turn == nil {
		if a.Deaf || a.Drip {
			<-quit
		} else {
			<-gone
		}
		return nil
	}
	breath := time.NewTicker(to.Breath)
	defer breath.Stop()
	for {
		if err := a.Turn(c); err != nil {
			return err
		}
		if err := c.W.Flush(); err != nil {
			return err
		}
		c.turns++
		sent.Turns.Add(1)
		select {
		case <-quit:
			return nil
		case <-breath.C:
		}
	}
}

// drip reads a byte at a time, until the socket is closed.
func drip(socket net.Conn) {
	breath := time.NewTicker(turnEvery)
	defer breath.Stop()
	for p := make([]byte, 1); ; <-breath.C {
		if _, err := socket.Read(p); err != nil {
			return
		}
	}
}

// Paths that attackers ask for.
const (
	rangePath = "/etcdserverpb.KV/Range"
	watchPath = "/etcdserverpb.Watch/Watch"
)

// headers opens the next stream.
func (c *Conn) headers(path string, end bool, more ...string) error {
	if c.ID == 0 {
		c.ID = 1
	} else {
		c.ID += 2
	}
	if c.ID > 1<<31-10 {
		return errors.New("out of streams")
	}
	return c.Fr.WriteHeaders(http2.HeadersFrameParam{StreamID: c.ID, BlockFragment: c.block(path, more...), EndHeaders: true, EndStream: end})
}

func (c *Conn) block(path string, more ...string) []byte {
	c.hdr.Reset()
	fields := append([]string{":method", "POST", ":scheme", "http", ":path", path, ":authority", "a",
		"content-type", "application/grpc", "te", "trailers"}, more...)
	for i := 0; i < len(fields); i += 2 {
		_ = c.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return c.hdr.Bytes()
}

// message sends msg on the stream opened last, with a gRPC prefix that announces size bytes.
func (c *Conn) message(flag byte, size int, msg []byte, end bool) error {
	p := binary.BigEndian.AppendUint32([]byte{flag}, uint32(size))
	p = append(p, msg...)
	for len(p) > 16<<10 {
		if err := c.Fr.WriteData(c.ID, false, p[:16<<10]); err != nil {
			return err
		}
		p = p[16<<10:]
	}
	return c.Fr.WriteData(c.ID, end, p)
}

func gzipped(n int) []byte {
	var b bytes.Buffer
	w, _ := gzip.NewWriterLevel(&b, gzip.BestCompression)
	_, _ = w.Write(make([]byte, n))
	_ = w.Close()
	return b.Bytes()
}
