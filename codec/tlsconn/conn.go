package tlsconn

import (
	"crypto/tls"
	"errors"
	"sync"
)

const (
	// maxHandshakeInput is how many bytes of one connection may wait for its handshake to read them: the
	// largest certificate message that crypto/tls takes is 256 KiB, but it reads as they come, so what waits is
	// mostly what a client sends behind its handshake, at most HTTP/2's first window of 64 KiB. Beyond: ErrFlood.
	maxHandshakeInput = 128 << 10
	// maxPlain is the most that one TLS record holds (RFC 8446 5.1).
	maxPlain = 16 << 10
	// maxKeptOutput is the capacity up to which a buffer of encrypted bytes goes back to the pool.
	maxKeptOutput = 256 << 10
	// recordHandshake is the first byte of everything that a TLS client sends (RFC 8446 5.1).
	recordHandshake = 0x16
)

// Why a connection ends, other than by crypto/tls.
var (
	// ErrPlainText says that what came first is no TLS.
	ErrPlainText = errors.New("plain text where TLS is spoken")
	// ErrNoHTTP2 says that the other side does not choose h2 by ALPN (RFC 9113 3.2), which grpc-go demands too.
	ErrNoHTTP2 = errors.New("HTTP/2 was not offered (ALPN h2)")
	// ErrFlood says that more came than a handshake can have.
	ErrFlood = errors.New("too much was sent before the TLS handshake was done")
	// ErrCrowded says that a newer handshake took this one's place in the Gate.
	ErrCrowded = errors.New("too many TLS handshakes at once")
	// ErrClosed is what a Conn says that was closed.
	ErrClosed = errors.New("tlsconn: closed")
)

// Owner is who has a Conn.
type Owner interface {
	// TLSNotify says that Conn.Advance is to be called on the loop's goroutine. It is called on any goroutine,
	// only before the handshake is done, and not again before Advance was called.
	TLSNotify()
	// TLSPlain takes decrypted bytes, on the loop, from within Receive or Advance. They are valid only during the
	// call. An error ends the connection; Receive or Advance returns it.
	TLSPlain(p []byte) error
}

// Conn is one TLS connection without its socket. All methods belong to the loop's goroutine.
//
// After an error of Receive, Advance or Seal: what Output holds (an alert, mostly) is to be written, then the
// socket closed. Close is to be called in any case when the socket is gone.
type Conn struct {
	tls    *tls.Conn
	owner  Owner
	gate   *Gate // nil: unbounded
	client bool

	// The loop's.
	open    bool   // the handshake is done; from here on the handshake's goroutine has no part in it
	started bool   // the goroutine was started
	closed  bool   // by Close
	err     error  // why it ended
	in      []byte // bytes of the socket during Receive
	records records
	out     *outBuffer

	// The handshake's goroutine's.
	token  bool // holds the right to compute
	waited bool // has waited for the peer: what comes next is the peer's answer

	mu       sync.Mutex
	early    []byte // bytes of the socket that were not read yet
	earlyOff int
	earlyOut []byte // to be written
	told     bool   // TLSNotify was called, Advance not yet
	done     bool   // the goroutine has ended, with result
	result   error
	dead     error         // the goroutine is to give up
	turn     chan struct{} // the Gate says that c may compute
	wake     chan struct{} // early or dead has news; nil before the start
	quit     chan struct{} // closed with dead

	prev, next *Conn // in gate
}

// outBuffer is encrypted bytes on their way.
type outBuffer struct{ b []byte }

var (
	outBuffers = sync.Pool{New: func() any { return new(outBuffer) }}
	plainBytes = sync.Pool{New: func() any { return new([maxPlain]byte) }}
)

// Server makes the server's side. Its handshake begins with the first byte; before, it costs no goroutine.
func Server(cfg *tls.Config, gate *Gate, owner Owner) *Conn {
	c := &Conn{owner: owner, gate: gate}
	c.tls = tls.Server((*wire)(c), cfg)
	return c
}

// Client makes the client's side; TLSNotify may be called before it returns.
func Client(cfg *tls.Config, owner Owner) *Conn {
	c := &Conn{owner: owner, client: true}
	c.tls = tls.Client((*wire)(c), cfg)
	c.start()
	return c
}

// Partial is how many bytes of a record that is not here as a whole are kept, once the handshake is done.
func (c *Conn) Partial() int {
	if !c.open || c.closed {
		return 0
	}
	return c.records.partial()
}

// Open says that the handshake is done: Seal may be called.
func (c *Conn) Open() bool { return c.open }

// Shaking says that the handshake's goroutine was started, and has not been found done by Advance.
func (c *Conn) Shaking() bool { return c.started && !c.open && c.err == nil }

// Receive takes bytes of the socket; p is not kept.
func (c *Conn) Receive(p []byte) error {
	switch {
	case c.err != nil:
		return c.err
	case len(p) == 0:
		return nil
	case c.open:
		return c.pump(p, c.records.scan(p))
	case !c.started:
		if p[0] != recordHandshake {
			return c.end(ErrPlainText)
		}
		c.start()
	}
	if err := c.records.brought(0, c.records.scan(p)); err != nil {
		return c.end(err)
	}
	return c.feedHandshake(p)
}

// Advance goes on after TLSNotify: Output may have more, the handshake may be done. After Close it returns what the
// handshake failed for, if it found a reason in the last bytes that came, else ErrClosed.
func (c *Conn) Advance() error {
	if c.closed {
		return c.lastWords()
	}
	if c.err != nil || c.open {
		return c.err
	}
	c.mu.Lock()
	c.told = false
	done := c.done
	c.mu.Unlock()
	if !done {
		return nil
	}
	// The goroutine has ended: no lock is needed any more.
	if c.result != nil {
		return c.end(c.result)
	}
	early := c.early[c.earlyOff:]
	if len(c.earlyOut) > 0 {
		c.append(c.earlyOut)
	}
	c.letGo()
	c.open = true
	c.wake, c.quit = nil, nil
	return c.pump(early, 0) // their records were counted
}

func (c *Conn) lastWords() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.told = false
	if c.done && c.result != nil {
		return c.result
	}
	return ErrClosed
}

// letGo forgets the bytes of the handshake.
func (c *Conn) letGo() {
	c.forgetInput()
	c.earlyOut = nil
}

func (c *Conn) forgetInput() {
	if c.gate != nil {
		c.gate.hold(-(len(c.early) - c.earlyOff))
	}
	c.early, c.earlyOff = nil, 0
}

// pump decrypts p, in which so many records end, and what crypto/tls has already.
func (c *Conn) pump(p []byte, ended int) error {
	bytes, useful := 0, 0
	plain := plainBytes.Get().(*[maxPlain]byte)
	c.in = p
	defer func() {
		c.in = nil
		plainBytes.Put(plain)
	}()
	for {
		n, err := c.tls.Read(plain[:]) // of one record
		if bytes += n; n >= usefulRecord {
			useful++
		}
		if n > 0 {
			if err := c.owner.TLSPlain(plain[:n]); err != nil {
				return c.end(err)
			}
		}
		switch {
		case c.closed:
			return c.err
		case err == errWouldBlock:
			if err := c.records.brought(bytes, ended-useful); err != nil {
				return c.end(err)
			}
			return nil
		case err != nil:
			return c.end(err)
		}
	}
}

// end remembers the first error.
func (c *Conn) end(err error) error {
	if c.err == nil {
		c.err = err
	}
	return c.err
}

// Seal encrypts p into Output. To be called only when Open.
func (c *Conn) Seal(p []byte) error {
	if !c.open || c.closed {
		return ErrClosed
	}
	_, err := c.tls.Write(p)
	return err
}

// Finish puts the alert that says "no more follows" (RFC 8446 6.1) into Output, unless crypto/tls has said worse.
func (c *Conn) Finish() {
	if c.open && !c.closed {
		_ = c.tls.CloseWrite()
		c.end(ErrClosed)
	}
}

// Output is what is to be written to the socket now; it is valid until Written, to be called when it was taken.
func (c *Conn) Output() []byte {
	if !c.open {
		c.mu.Lock()
		if len(c.earlyOut) > 0 {
			c.append(c.earlyOut)
			c.earlyOut = c.earlyOut[:0]
		}
		c.mu.Unlock()
	}
	if c.out == nil {
		return nil
	}
	return c.out.b
}

// Written says that all bytes of Output were taken.
func (c *Conn) Written() {
	if b := c.out; b != nil {
		c.out = nil
		if cap(b.b) <= maxKeptOutput {
			b.b = b.b[:0]
			outBuffers.Put(b)
		}
	}
}

func (c *Conn) append(p []byte) {
	if c.out == nil {
		c.out = outBuffers.Get().(*outBuffer)
	}
	c.out.b = append(c.out.b, p...)
}

// Close ends the goroutine of a handshake that is under way; TLSNotify tells when it has. The socket is gone.
func (c *Conn) Close() {
	if c.closed {
		return
	}
	c.closed = true
	c.end(ErrClosed)
	if c.started && !c.open {
		c.abandon(ErrClosed)
	}
	c.out = nil // not to the pool: the socket's Write, which may have led here, is reading it
}
