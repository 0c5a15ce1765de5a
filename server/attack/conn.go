// Package attack has clients that mean harm: one for each class of attack on HTTP/2 and gRPC servers that is
// known, and for each bound of this server. Tests run them for a moment and look at what the server counts;
// `make attack` runs them for longer beside a good client. It imports nothing of Spindle.
package attack

import (
	"bufio"
	"bytes"
	"compress/gzip"
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

// turnEvery is how often a connection sends a burst: the attackers share the machine with the members and the good
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
	// Deaf says that nothing the server sends is read.
	Deaf bool
}

// Conn is one connection of an attacker.
type Conn struct {
	C   net.Conn
	W   *bufio.Writer
	Fr  *http2.Framer
	ID  uint32 // the stream opened last
	enc *hpack.Encoder
	hdr bytes.Buffer

	sent *Sent
}

// Sent counts what an attack sent, over all its connections.
type Sent struct {
	Conns, Turns, Bytes atomic.Int64
}

// Write counts; it is what the Framer writes to, by way of W.
func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.C.Write(p)
	c.sent.Bytes.Add(int64(n))
	return n, err
}

// Run attacks addr until quit is closed, with new connections for those that are closed. It returns when all
// is over.
func Run(a *Attack, addr string, quit <-chan struct{}, sent *Sent) {
	var wg sync.WaitGroup
	for range max(a.Conns, 1) {
		wg.Go(func() {
			for {
				select {
				case <-quit:
					return
				default:
				}
				if err := a.once(addr, quit, sent); errors.Is(err, errDial) {
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
func (a *Attack) once(addr string, quit <-chan struct{}, sent *Sent) error {
	nc, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return errDial
	}
	gone := make(chan struct{})
	defer nc.Close()
	c := &Conn{C: nc, sent: sent}
	c.W = bufio.NewWriterSize(c, 32<<10)
	c.Fr = http2.NewFramer(c.W, nc)
	c.Fr.AllowIllegalWrites = true
	c.enc = hpack.NewEncoder(&c.hdr)
	sent.Conns.Add(1)
	go func() { // Write blocks on a server that does not read
		select {
		case <-quit:
		case <-gone:
		}
		nc.Close()
	}()
	if !a.Deaf {
		go func() {
			defer close(gone)
			_, _ = io.Copy(io.Discard, nc)
		}()
	} else {
		defer close(gone)
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
		if a.Deaf {
			<-quit
		} else {
			<-gone
		}
		return nil
	}
	breath := time.NewTicker(turnEvery)
	defer breath.Stop()
	for {
		if err := a.Turn(c); err != nil {
			return err
		}
		if err := c.W.Flush(); err != nil {
			return err
		}
		sent.Turns.Add(1)
		select {
		case <-quit:
			return nil
		case <-breath.C:
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
