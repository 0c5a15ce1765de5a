package shard

import "spindle/codec/tlsconn"

var _ tlsconn.Owner = (*poolLink)(nil)

// TLSNotify implements tlsconn.Owner.
func (l *poolLink) TLSNotify() { l.pool.loop.Post(l.advance) }

// advance goes on with the handshake. The pool's timer of the link bounds how long it takes.
func (l *poolLink) advance() {
	switch {
	case l.dead:
	case l.gc == nil:
		if err := l.tls.Advance(); err != tlsconn.ErrClosed {
			l.ending = err
		}
		l.die(l.ending)
	default:
		l.fed(l.tls.Advance())
	}
}

// hungUp is the end of the socket, by err, in the handshake: the last bytes may say why, so the link dies when they
// were looked at.
func (l *poolLink) hungUp(err error) {
	l.ending = err
	l.tls.Close()
}

// TLSPlain implements tlsconn.Owner.
func (l *poolLink) TLSPlain(p []byte) error {
	if l.dead {
		return tlsconn.ErrClosed
	}
	return l.feed(p)
}

// sealed is output with TLS: before the handshake is done, its own bytes only.
func (l *poolLink) sealed() []byte {
	if l.tls.Open() {
		if out := l.conn.Output(); len(out) > 0 {
			err := l.tls.Seal(out)
			l.conn.Flushed()
			if err != nil && l.ending == nil {
				l.ending = err
			}
		}
	}
	return l.tls.Output()
}

// farewell tells the member that the end of the connection is meant (RFC 8446 6.1).
func (l *poolLink) farewell() {
	if l.tls == nil || l.gc == nil {
		return
	}
	l.tls.Finish()
	if out := l.tls.Output(); len(out) > 0 {
		_ = l.write(out)
	}
}
