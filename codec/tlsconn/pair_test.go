package tlsconn

import (
	"bytes"
	"crypto/tls"
	"io"
	"log/slog"
	"sync"
	"testing"
	"time"

	"spindle/codec/tlsconn/tlstest"
)

const guard = time.Minute

// end is one side: an Owner whose loop is the test's goroutine.
type end struct {
	t      testing.TB
	conn   *Conn
	notify chan struct{}
	got    []byte
	plain  func([]byte) error // default: append to got
	err    error
}

func newEnd(t testing.TB) *end { return &end{t: t, notify: make(chan struct{}, 1)} }

func (e *end) TLSNotify() { e.notify <- struct{}{} } // never blocks: Advance comes between two

func (e *end) TLSPlain(p []byte) error {
	if e.plain != nil {
		return e.plain(p)
	}
	e.got = append(e.got, p...)
	return nil
}

func (e *end) receive(p []byte) {
	if err := e.conn.Receive(p); err != nil && e.err == nil {
		e.err = err
	}
}

// advance takes a notification if there is one.
func (e *end) advance() bool {
	select {
	case <-e.notify:
	default:
		return false
	}
	if err := e.conn.Advance(); err != nil && e.err == nil {
		e.err = err
	}
	return true
}

func (e *end) output() []byte {
	p := bytes.Clone(e.conn.Output())
	e.conn.Written()
	return p
}

// pipe are two ends, and bytes on their way in both directions.
type pipe struct {
	t        testing.TB
	cli, srv *end
	toSrv    []byte
	toCli    []byte
	chunk    func() int // how many bytes arrive at once
	hold     bool       // nothing arrives at the server
}

func newPipe(t testing.TB, srv, cli *tls.Config, gate *Gate) *pipe {
	p := &pipe{t: t, cli: newEnd(t), srv: newEnd(t), chunk: func() int { return 1 << 20 }}
	p.srv.conn = Server(srv, gate, p.srv)
	p.cli.conn = Client(cli, p.cli)
	t.Cleanup(func() { p.cli.conn.Close(); p.srv.conn.Close() })
	return p
}

// turn moves what there is; false: nothing was to be done.
func (p *pipe) turn() bool {
	moved := p.srv.advance()
	moved = p.cli.advance() || moved
	p.toSrv = append(p.toSrv, p.cli.output()...)
	p.toCli = append(p.toCli, p.srv.output()...)
	for _, d := range []struct {
		buf *[]byte
		to  *end
	}{{&p.toSrv, p.srv}, {&p.toCli, p.cli}} {
		if n := min(len(*d.buf), p.chunk()); n > 0 && !(p.hold && d.to == p.srv) {
			d.to.receive((*d.buf)[:n])
			*d.buf = (*d.buf)[n:]
			moved = true
		}
	}
	return moved
}

// until turns until f is true, waiting for the handshakes' goroutines.
func (p *pipe) until(what string, f func() bool) {
	p.t.Helper()
	deadline := time.After(guard)
	for !f() {
		if p.turn() {
			continue
		}
		select {
		case <-p.srv.notify:
			p.srv.notify <- struct{}{}
		case <-p.cli.notify:
			p.cli.notify <- struct{}{}
		case <-deadline:
			p.t.Fatalf("%s: server %v (open %v), client %v (open %v)", what, p.srv.err, p.srv.conn.Open(), p.cli.err, p.cli.conn.Open())
		}
	}
}

func (p *pipe) bothOpen() bool { return p.srv.conn.Open() && p.cli.conn.Open() }

type world struct {
	ca       *tlstest.CA
	pair     tlstest.Pair
	srv, cli *tls.Config
}

func newWorld(t testing.TB) *world {
	ca := tlstest.NewCA(t, "ca")
	w := &world{ca: ca, pair: ca.Issue("good")}
	w.srv = &tls.Config{
		Certificates: []tls.Certificate{w.pair.Load(t)}, ClientCAs: ca.Pool(), ClientAuth: tls.RequireAndVerifyClientCert,
		NextProtos: []string{"h2"}, DynamicRecordSizingDisabled: true,
	}
	w.cli = ca.Client(w.pair)
	return w
}

// echo makes the server send back what it gets.
func (p *pipe) echo() { p.srv.plain = func(b []byte) error { return p.srv.conn.Seal(b) } }

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	if !wait(f) {
		t.Fatalf("waited too long: %s", what)
	}
}

func wait(f func() bool) bool {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(guard); !f(); <-tick.C {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }
