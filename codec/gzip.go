package codec

import (
	"bytes"
	"compress/gzip"
	"io"
	"strconv"
	"sync"
)

// Compressed messages (grpc-encoding gzip; etcd's server takes them too). Answers go uncompressed, which every
// client takes. What a message may become is bounded while it is inflated, so a bomb costs its bound and
// no more, and a connection has a budget of inflated bytes, because inflating is the only thing
// that a few bytes of a client make expensive here.

// gunzip is one inflater; they are pooled, since each has 40 KiB of tables.
type gunzip struct {
	in bytes.Reader
	z  gzip.Reader
}

var gunzips = sync.Pool{New: func() any { return new(gunzip) }}

// knownEncoding says whether messages with this grpc-encoding can be read.
func knownEncoding(e string) bool { return e == "" || e == "identity" || e == "gzip" }

// inflate returns what p unpacks to, in a buffer that the caller gives back, at most limit bytes. Status texts
// are grpc-go's.
func inflate(p []byte, limit int) (*buffer, Status) {
	g := gunzips.Get().(*gunzip)
	defer gunzips.Put(g)
	g.in.Reset(p)
	defer g.in.Reset(nil)
	if err := g.z.Reset(&g.in); err != nil {
		return nil, Status{Internal, "grpc: failed to decompress the message: " + err.Error()}
	}
	b := getBuffer(min(limit+1, max(minOutput, 4*len(p))))
	for {
		// One byte more than the limit tells that there is more.
		if len(b.b) == cap(b.b) {
			more := getBuffer(min(2*cap(b.b), limit+1))
			more.b = append(more.b, b.b...)
			putBuffer(b)
			b = more
		}
		n, err := g.z.Read(b.b[len(b.b):min(cap(b.b), limit+1)])
		b.b = b.b[:len(b.b)+n]
		switch {
		case len(b.b) > limit:
			putBuffer(b)
			return nil, Status{ResourceExhausted, "grpc: received message after decompression larger than max " + strconv.Itoa(limit)}
		case err == io.EOF:
			return b, Status{}
		case err != nil:
			putBuffer(b)
			return nil, Status{Internal, "grpc: failed to read decompressed data: " + err.Error()}
		}
	}
}

// InflateBudget is what gzip may give on all connections of one goroutine together (ConnConfig.Inflate), beyond
// ownInflateBytes of each: many connections are not to have the processor for themselves.
type InflateBudget struct{ left int }

// Refill gives back all of it; the owner calls it at first, then about once a second.
func (b *InflateBudget) Refill() { b.left = maxInflateBytes }

// inflated hands on a compressed message.
func (c *Conn) inflated(s *Stream, msg []byte) {
	shared := c.cfg.Inflate
	if maxInflateBytes-c.inflateLeft < ownInflateBytes {
		shared = nil
	}
	if c.inflateLeft <= 0 || shared != nil && shared.left <= 0 {
		c.hit(LimitInflate)
		c.abort(s, statusInflateBudget)
		return
	}
	b, st := inflate(msg, c.cfg.MaxMessageBytes)
	cost := c.cfg.MaxMessageBytes
	if st.Code == OK {
		cost = len(b.b)
	}
	c.inflateLeft -= cost
	if shared != nil {
		shared.left -= cost
	}
	if st.Code != OK {
		if st.Code == ResourceExhausted {
			c.hit(LimitMessage)
		}
		c.abort(s, st)
		return
	}
	c.deliverMessage(s, b.b)
	putBuffer(b)
}

var statusInflateBudget = Status{ResourceExhausted, "spindle: too many compressed bytes, send less or uncompressed"}
