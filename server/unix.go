package server

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// Unix sockets are accepted here, not by gnet: with one among its listeners gnet has one acceptor for all, which takes what
// comes uncounted until descriptors run out, and that ends its engine.

// acceptPause is how long nothing is accepted when accept failed, for want of descriptors say.
const acceptPause = 100 * time.Millisecond

// listenUnix opens the unix sockets among listens. gnet has begun, and no longer needs one that it may have.
func (e *Engine) listenUnix(listens []listen) error {
	for i := range listens {
		ln := &listens[i]
		if ln.network != "unix" {
			continue
		}
		_ = os.Remove(ln.address) // probe found nobody behind it
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: ln.address, Net: "unix"})
		if err != nil {
			return fmt.Errorf("spindle: cannot listen on %s: %w", ln.url, err)
		}
		e.unixMu.Lock()
		if e.unixClosed {
			_ = l.Close()
		} else {
			e.unix = append(e.unix, l)
		}
		e.unixMu.Unlock()
		go e.acceptUnix(l, ln)
	}
	return nil
}

// closeUnix closes them.
func (e *Engine) closeUnix() {
	e.unixMu.Lock()
	defer e.unixMu.Unlock()
	e.unixClosed = true
	for _, l := range e.unix {
		_ = l.Close()
	}
}

// acceptUnix takes one connection after the other, each when the one before is counted by its loop.
func (e *Engine) acceptUnix(l *net.UnixListener, ln *listen) {
	for {
		nc, err := l.AcceptUnix()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			e.log.Error("cannot accept a client on a unix socket, trying again; perhaps the limit of open files is too low", "url", ln.url, "error", err)
			select {
			case <-time.After(acceptPause):
			case <-e.done:
				return
			}
		case !e.admits():
			_ = nc.Close()
		default:
			l := e.idlest()
			cc := newClientConn(l)
			if ln.tls {
				cc.secure()
			}
			if x, err := l.register(nc, cc); err == nil {
				x.wait()
			}
		}
	}
}

// admits says that one more client may come.
func (e *Engine) admits() bool {
	if !e.ready.Load() {
		return false
	}
	if e.conns.Load() >= int64(e.cfg.MaxConns) {
		metricConnsRefused.Inc()
		hitLimit(limitConns)
		return false
	}
	return true
}

// idlest is the loop with the fewest clients.
func (e *Engine) idlest() *Loop {
	best := e.loops[0]
	for _, l := range e.loops[1:] {
		if l.clients.Load() < best.clients.Load() {
			best = l
		}
	}
	return best
}
