package tlsconn

import (
	"net"
	"time"
)

// wire is a Conn as the net.Conn below its tls.Conn. Once the handshake is done Read never waits, and Write
// takes everything: an error of either would be final for crypto/tls, except a temporary one of Read, after
// which the next Read goes on in the middle of a record.
type wire Conn

// wouldBlock is the temporary error.
type wouldBlock struct{}

var errWouldBlock net.Error = wouldBlock{}

func (wouldBlock) Error() string   { return "tlsconn: no more bytes yet" }
func (wouldBlock) Timeout() bool   { return true }
func (wouldBlock) Temporary() bool { return true }

func (w *wire) Read(p []byte) (int, error) {
	c := (*Conn)(w)
	if !c.open {
		return c.readEarly(p)
	}
	if len(c.in) == 0 {
		return 0, errWouldBlock
	}
	n := copy(p, c.in)
	c.in = c.in[n:]
	return n, nil
}

func (w *wire) Write(p []byte) (int, error) {
	c := (*Conn)(w)
	if !c.open {
		c.writeEarly(p)
	} else {
		c.append(p)
	}
	return len(p), nil
}

// Close is called by crypto/tls in no case that concerns us; the owner closes the socket.
func (w *wire) Close() error { return nil }

func (w *wire) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (w *wire) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (w *wire) SetDeadline(time.Time) error      { return nil }
func (w *wire) SetReadDeadline(time.Time) error  { return nil }
func (w *wire) SetWriteDeadline(time.Time) error { return nil }
