package tlsconn

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"spindle/codec/tlsconn/tlstest"
)

const guard = 20 * time.Second

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

// TestChunks sends data both ways with every way of cutting the bytes, over both versions.
func TestChunks(t *testing.T) {
	w := newWorld(t)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, most := range []int{1, 7, 600, 1 << 16} {
			t.Run(fmt.Sprintf("%s/%d", tls.VersionName(version), most), func(t *testing.T) {
				seed := rand.Uint64()
				rnd := rand.New(rand.NewPCG(seed, 1))
				srv := w.srv.Clone()
				srv.MaxVersion = version
				gate := NewGate()
				p := newPipe(t, srv, w.cli, gate)
				p.chunk = func() int { return 1 + rnd.IntN(most) }
				p.echo()
				p.until("handshake", p.bothOpen)
				if v := p.srv.conn.tls.ConnectionState().Version; v != version {
					t.Fatalf("version %x", v)
				}
				var sent []byte
				for range 20 {
					b := make([]byte, rnd.IntN(min(40*most, 40000)))
					for i := range b {
						b[i] = byte(rnd.Uint32())
					}
					if err := p.cli.conn.Seal(b); err != nil {
						t.Fatal(err)
					}
					sent = append(sent, b...)
					if rnd.IntN(2) == 0 {
						p.turn()
					}
				}
				p.until("echo", func() bool { return len(p.cli.got) >= len(sent) })
				if !bytes.Equal(p.cli.got, sent) {
					t.Errorf("seed %d: something else came back", seed)
				}
				p.cli.conn.Finish()
				p.until("close-notify", func() bool { return p.srv.err != nil })
				if p.srv.err != io.EOF || p.cli.err != nil {
					t.Errorf("seed %d: the end is %v, %v", seed, p.srv.err, p.cli.err)
				}
				if n := gate.input.Load(); n != 0 || gate.Pending() != 0 || gate.busy() != 0 {
					t.Errorf("the gate still counts %d bytes, %d handshakes, %d tokens", n, gate.Pending(), gate.busy())
				}
			})
		}
	}
}

// TestDataBehindHandshake: what the client sends right behind its Finished is there when the handshake is done.
func TestDataBehindHandshake(t *testing.T) {
	w := newWorld(t)
	p := newPipe(t, w.srv, w.cli, NewGate())
	p.until("the ClientHello is there", func() bool { return p.srv.conn.started })
	p.hold = true
	p.until("the client's handshake", p.cli.conn.Open)
	msg := bytes.Repeat([]byte("early"), 8000)
	if err := p.cli.conn.Seal(msg); err != nil {
		t.Fatal(err)
	}
	p.turn()
	p.hold = false
	p.until("the data", func() bool { return len(p.srv.got) == len(msg) })
	if !bytes.Equal(p.srv.got, msg) {
		t.Error("something else came")
	}
}

// TestRefused: each failure is told to the operator, the other side gets an alert, and nothing is left.
func TestRefused(t *testing.T) {
	w := newWorld(t)
	other := tlstest.NewCA(t, "other")
	expired := w.ca.Issue("expired", tlstest.Expired)
	elsewhere := w.ca.Issue("elsewhere", func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = []string{"elsewhere"}, nil })
	with := func(base *tls.Config, f func(*tls.Config)) *tls.Config {
		c := base.Clone()
		f(c)
		return c
	}
	for _, c := range []struct {
		name           string
		srv, cli       *tls.Config
		server, client string // what the operators read; "" for no failure there
	}{
		{"wrong CA", w.srv, w.ca.Client(other.Issue("stranger")), `"CN=stranger" is not signed by a CA in --trusted-ca-file`, "it refuses the TLS connection (tls: unknown certificate authority)"},
		{"expired", w.srv, w.ca.Client(expired), `"CN=expired" is valid from`, "it refuses the TLS connection (tls: expired certificate)"},
		{"none", w.srv, w.ca.Client(), "shows no certificate", "it refuses the TLS connection (tls: certificate required)"},
		{"http/1.1", w.srv, with(w.cli, func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }), "does not offer HTTP/2", ""},
		{"no ALPN", w.srv, with(w.cli, func(c *tls.Config) { c.NextProtos = nil }), "does not offer HTTP/2", ""},
		{"ALPN x", w.srv, with(w.cli, func(c *tls.Config) { c.NextProtos = []string{"x"} }), "does not offer HTTP/2", ""},
		{"server's CA", w.srv, other.Client(w.pair), "the client refuses the connection (tls: bad certificate)", `"CN=good" is not signed by a CA in --shard-cacert`},
		{"server expired", with(w.srv, func(c *tls.Config) { c.Certificates = []tls.Certificate{expired.Load(t)} }), w.cli, "the client refuses", "valid from"},
		{"server's name", with(w.srv, func(c *tls.Config) { c.Certificates = []tls.Certificate{elsewhere.Load(t)} }), w.cli, "the client refuses", `is not for "localhost"`},
		{"version", with(w.srv, func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 }), with(w.cli, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }), "unsupported versions", "protocol version"},
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			if c.name == "version" && version == tls.VersionTLS12 {
				continue
			}
			t.Run(c.name+"/"+tls.VersionName(version), func(t *testing.T) {
				gate := NewGate()
				p := newPipe(t, with(c.srv, func(s *tls.Config) { s.MaxVersion = version }), c.cli, gate)
				p.until("both ends", func() bool { return p.srv.err != nil && p.cli.err != nil || c.client == "" && p.srv.err != nil })
				if got := ExplainClient(p.srv.err); !strings.Contains(got, c.server) {
					t.Errorf("server: %s", got)
				}
				if c.client != "" {
					got := ExplainServer(p.cli.err, "localhost")
					if version == tls.VersionTLS12 && strings.Contains(c.client, "certificate required") {
						got = strings.Replace(got, "handshake failure", "certificate required", 1) // TLS 1.2 has no such alert
						got = strings.Replace(got, "bad certificate", "certificate required", 1)
					}
					if !strings.Contains(got, c.client) {
						t.Errorf("client: %s", got)
					}
				}
				if n := gate.input.Load(); n != 0 || gate.Pending() != 0 || gate.busy() != 0 {
					t.Errorf("the gate still counts %d bytes, %d handshakes, %d tokens", n, gate.Pending(), gate.busy())
				}
			})
		}
	}
}

// TestPlainText: what is no TLS costs no goroutine.
func TestPlainText(t *testing.T) {
	w := newWorld(t)
	gate := NewGate()
	for _, in := range []string{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "GET / HTTP/1.1\r\n", "\x00"} {
		e := newEnd(t)
		e.conn = Server(w.srv, gate, e)
		if e.receive([]byte(in)); e.err != ErrPlainText || e.conn.started {
			t.Errorf("%q: %v", in, e.err)
		}
		if !strings.Contains(ExplainClient(e.err), "plain text on a TLS port") {
			t.Error(ExplainClient(e.err))
		}
		e.conn.Close()
	}
}

// TestGarbage: bytes that begin like TLS and go on like nothing never hang, panic or open.
func TestGarbage(t *testing.T) {
	w := newWorld(t)
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 2))
	gate := NewGate()
	for range 300 {
		e := newEnd(t)
		e.conn = Server(w.srv, gate, e)
		b := make([]byte, 5+rnd.IntN(300))
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		b[0], b[1], b[2], b[3], b[4] = 0x16, 3, 1, 0, byte(rnd.IntN(len(b)))
		e.receive(b)
		if e.conn.Open() {
			t.Fatalf("seed %d: open", seed)
		}
		e.conn.Close()
	}
	eventually(t, "all gone", func() bool { return gate.Pending() == 0 && gate.busy() == 0 && gate.input.Load() == 0 })
}

// TestCorrupted flips a byte on an open connection: the end, not a wrong byte.
func TestCorrupted(t *testing.T) {
	w := newWorld(t)
	p := newPipe(t, w.srv, w.cli, nil)
	p.until("handshake", p.bothOpen)
	p.until("rest", func() bool { return !p.turn() })
	_ = p.cli.conn.Seal([]byte("hello"))
	b := p.cli.output()
	b[len(b)-1] ^= 1
	p.srv.receive(b)
	if p.srv.err == nil || len(p.srv.got) != 0 {
		t.Errorf("%v, got %q", p.srv.err, p.srv.got)
	}
	p.until("the alert", func() bool { return p.cli.err != nil })
	if !strings.Contains(p.cli.err.Error(), "bad record MAC") {
		t.Errorf("the client hears %v", p.cli.err)
	}
}

// TestFlood: a client that talks instead of shaking hands is cut off.
func TestFlood(t *testing.T) {
	w := newWorld(t)
	gate := NewGate()
	gate.computing = gate.width // nobody computes, so nobody reads
	e := newEnd(t)
	e.conn = Server(w.srv, gate, e)
	chunk := bytes.Repeat([]byte{0x16}, 4096)
	n := 0
	for e.err == nil && n < 10*maxHandshakeInput {
		e.receive(chunk)
		n += len(chunk)
	}
	if e.err != ErrFlood || n > maxHandshakeInput+len(chunk) {
		t.Errorf("%v after %d bytes", e.err, n)
	}
	e.conn.Close()
	eventually(t, "forgotten", func() bool { return gate.Pending() == 0 && gate.input.Load() == 0 })
	// All together.
	gate.input.Store(maxHandshakesInput - 100)
	e = newEnd(t)
	e.conn = Server(w.srv, gate, e)
	if e.receive(chunk); e.err != ErrFlood {
		t.Errorf("over the total: %v", e.err)
	}
	e.conn.Close()
	eventually(t, "forgotten", func() bool { return gate.Pending() == 0 && gate.input.Load() == maxHandshakesInput-100 })
}

// busy is how many compute or wait for it.
func (g *Gate) busy() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.computing + len(g.answered) + len(g.fresh)
}

// TestBegunIsFinishedFirst: who has the client's answer computes before all that begin, however long they have waited.
// Else a burst of handshakes ends in no connection at all: all have their first flight before one has its second.
func TestBegunIsFinishedFirst(t *testing.T) {
	w := newWorld(t)
	gate := NewGate()
	gate.width = 1
	log := make(chan string, 100)
	logged := func(name string) *tls.Config {
		cfg := w.srv.Clone()
		cfg.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
			log <- name + " begins"
			return nil, nil
		}
		cfg.VerifyConnection = func(tls.ConnectionState) error {
			log <- name + " ends"
			return nil
		}
		return cfg
	}
	begun := newPipe(t, logged("begun"), w.cli, gate)
	begun.until("the ClientHello is there", func() bool { return begun.srv.conn.started })
	begun.hold = true
	begun.until("the client's answer", func() bool { return len(begun.toSrv) > 0 && begun.cli.conn.Open() })
	eventually(t, "nobody computes", func() bool { return gate.busy() == 0 })
	if !gate.take(begun.srv.conn) {
		t.Fatal("no turn")
	}
	const n = 10
	var fresh []*pipe
	for i := range n {
		p := newPipe(t, logged("fresh"), w.cli, gate)
		p.until("the ClientHello is there", func() bool { return p.srv.conn.started })
		eventually(t, "it waits", func() bool { return gate.busy() == 2+i })
		fresh = append(fresh, p)
	}
	begun.hold = false
	begun.turn()
	eventually(t, "it waits", func() bool { return gate.busy() == 2+n })
	gate.release()
	begun.until("it is open", begun.bothOpen)
	for _, p := range fresh {
		p.until("the others are open", p.bothOpen)
	}
	if a, b := <-log, <-log; a != "begun begins" || b != "begun ends" {
		t.Errorf("%s, then %s", a, b)
	}
	if gate.busy() != 0 {
		t.Errorf("%d are left", gate.busy())
	}
}

// TestNoHandshakeForTheDead: a client that went away after its answer costs no computing, and no turn.
func TestNoHandshakeForTheDead(t *testing.T) {
	w := newWorld(t)
	gate := NewGate()
	var ends atomic.Int32
	cfg := w.srv.Clone()
	cfg.VerifyConnection = func(tls.ConnectionState) error { ends.Add(1); return nil }
	p := newPipe(t, cfg, w.cli, gate)
	p.until("the ClientHello is there", func() bool { return p.srv.conn.started })
	p.hold = true
	p.until("the client's answer", func() bool { return len(p.toSrv) > 0 && p.cli.conn.Open() })
	eventually(t, "nobody computes", func() bool { return gate.busy() == 0 })
	gate.mu.Lock()
	gate.computing = gate.width
	gate.mu.Unlock()
	p.srv.receive(p.toSrv)
	eventually(t, "it waits", func() bool { return gate.busy() == gate.width+1 })
	p.srv.conn.Close()
	eventually(t, "it has left", func() bool { return gate.busy() == gate.width && gate.Pending() == 0 && gate.input.Load() == 0 })
	if ends.Load() != 0 {
		t.Error("the handshake was computed")
	}
}

// TestCrowded: with the gate full, the oldest gives way, and one that waits for its peer holds no token.
func TestCrowded(t *testing.T) {
	w := newWorld(t)
	gate := NewGate()
	gate.limit = 3
	var slow []*pipe
	for range 3 {
		p := newPipe(t, w.srv, w.cli, gate)
		p.until("the ClientHello is there", func() bool { return p.srv.conn.started })
		p.chunk = func() int { return 0 } // the server's answer stays on its way
		slow = append(slow, p)
	}
	eventually(t, "tokens given back", func() bool { return gate.busy() == 0 })
	good := newPipe(t, w.srv, w.cli, gate)
	good.until("the good client", good.bothOpen)
	slow[0].until("the oldest ends", func() bool { return slow[0].srv.err != nil })
	if slow[0].srv.err != ErrCrowded {
		t.Errorf("the oldest ended with %v", slow[0].srv.err)
	}
	for _, p := range slow[1:] {
		p.chunk = func() int { return 1 << 20 }
		p.until("the others finish", p.bothOpen)
	}
	if gate.Pending() != 0 || gate.first != nil || gate.last != nil {
		t.Errorf("%d are left", gate.Pending())
	}
}

// TestClosedInHandshake closes at every stage; the goroutine ends, and its news harm nobody.
func TestClosedInHandshake(t *testing.T) {
	w := newWorld(t)
	gate := NewGate()
	for n := range 60 {
		p := newPipe(t, w.srv, w.cli, gate)
		p.chunk = func() int { return 50 }
		for range n {
			p.turn()
		}
		p.srv.conn.Close()
		p.cli.conn.Close()
		p.srv.advance()
		p.cli.advance()
		p.srv.receive([]byte("x"))
	}
	eventually(t, "all gone", func() bool { return gate.Pending() == 0 && gate.busy() == 0 && gate.input.Load() == 0 })
}

// TestReasonBehindTheEnd: the socket goes right behind an alert; the reason is known all the same.
func TestReasonBehindTheEnd(t *testing.T) {
	w := newWorld(t)
	other := tlstest.NewCA(t, "other")
	gate := NewGate()
	for range 20 {
		p := newPipe(t, w.srv, other.Client(w.pair), gate)
		p.until("the ClientHello is there", func() bool { return p.srv.conn.started })
		p.hold = true
		p.until("the client's end", func() bool { return p.cli.err != nil })
		p.toSrv = append(p.toSrv, p.cli.output()...)
		p.srv.receive(p.toSrv)
		p.srv.conn.Close()
		p.srv.err, p.toSrv = nil, nil
		p.until("the reason", func() bool { return p.srv.err != nil })
		if !strings.Contains(ExplainClient(p.srv.err), "the client refuses the connection (tls: bad certificate)") {
			t.Fatal(p.srv.err)
		}
	}
	eventually(t, "all gone", func() bool { return gate.Pending() == 0 && gate.busy() == 0 && gate.input.Load() == 0 })
}

// TestOpenSSL has openssl's client ask for new keys (K: and for ours too).
func TestOpenSSL(t *testing.T) {
	path, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	w := newWorld(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	pair := w.ca.Issue("openssl")
	cmd := exec.Command(path, "s_client", "-connect", ln.Addr().String(), "-CAfile", w.ca.File, "-cert", pair.Cert, "-key", pair.Key, "-alpn", "h2", "-tls1_3", "-verify_return_error")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out lockedBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	nc, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()

	e := newEnd(t)
	e.plain = func(b []byte) error {
		e.got = append(e.got, b...)
		return e.conn.Seal(b)
	}
	e.conn = Server(w.srv, NewGate(), e)
	defer e.conn.Close()
	in := make(chan []byte)
	go func() {
		defer close(in)
		for {
			b := make([]byte, 3) // cut into small pieces
			n, err := nc.Read(b)
			if err != nil {
				return
			}
			in <- b[:n]
		}
	}()
	// openssl takes a command only if it is all that it reads at once: each waits for what the one before it shows.
	spoke := make(chan struct{})
	driven := make(chan error, 1)
	go func() {
		<-spoke
		updates := 0
		for _, line := range []string{"line-1", "K", "line-2", "k", "line-3", "K", "line-4"} {
			_, _ = io.WriteString(stdin, line+"\n")
			shown := func() bool { return strings.Contains(out.String(), line) }
			if len(line) == 1 {
				updates++
				shown = func() bool { return strings.Count(out.String(), "KEYUPDATE") == updates }
			}
			if !wait(shown) {
				driven <- fmt.Errorf("openssl does not go on after %q", line)
				return
			}
		}
		driven <- nil
	}()
	for open := false; ; {
		select {
		case b, ok := <-in:
			if !ok {
				t.Fatalf("openssl went away; got %q\n%s", e.got, out.String())
			}
			e.receive(b)
		case <-e.notify:
			if err := e.conn.Advance(); err != nil {
				t.Fatal(err)
			}
		case err := <-driven:
			if err != nil {
				t.Fatalf("%v; got %q\n%s", err, e.got, out.String())
			}
			if want := "line-1\nline-2\nline-3\nline-4\n"; string(e.got) != want {
				t.Errorf("got %q", e.got)
			}
			return
		}
		if e.err != nil {
			t.Fatalf("%v\n%s", e.err, out.String())
		}
		if o := e.output(); len(o) > 0 {
			if _, err := nc.Write(o); err != nil {
				t.Fatal(err)
			}
		}
		if !open && e.conn.Open() {
			open = true
			close(spoke)
		}
	}
}

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

// TestReload changes the files under a ServerFiles.
func TestReload(t *testing.T) {
	ca := tlstest.NewCA(t, "ca")
	pair := ca.Issue("server")
	var log lockedBuffer
	s, err := NewServerFiles(ServerOptions{CertFile: pair.Cert, KeyFile: pair.Key, TrustedCAFile: ca.File}, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	s.files.now = func() time.Time { return now }
	cli := ca.Client(ca.Issue("client"))
	front := s.H2()
	serial := func() string {
		p := newPipe(t, front, cli, nil)
		p.until("handshake", p.bothOpen)
		return p.cli.conn.tls.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	pass := func() { now = now.Add(lookEvery) }
	first := serial()
	ca.Issue("server")
	if got := serial(); got != first {
		t.Error("looked again within the second")
	}
	pass()
	second := serial()
	if second == first {
		t.Error("the new certificate is not used")
	}
	good, err := os.ReadFile(pair.Cert)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"no certificate", ""} {
		if err := os.WriteFile(pair.Cert, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			pass()
			if got := serial(); got != second {
				t.Error("a broken file is used")
			}
		}
	}
	if n := strings.Count(log.String(), "cannot be used"); n != 2 {
		t.Errorf("%d lines about 2 broken files:\n%s", n, log.String())
	}
	if err := os.Remove(pair.Cert); err != nil {
		t.Fatal(err)
	}
	pass()
	if got := serial(); got != second {
		t.Error("a missing file is used")
	}
	if err := os.WriteFile(pair.Cert, good, 0o600); err != nil {
		t.Fatal(err)
	}
	pass()
	serial()
	if !strings.Contains(log.String(), "were read again") {
		t.Error(log.String())
	}
	// Another CA for clients: who was let in is not any more, and the other way round.
	other := tlstest.NewCA(t, "other")
	pem, err := os.ReadFile(other.File)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(ca.File, pem, 0o600); err != nil {
		t.Fatal(err)
	}
	pass()
	p := newPipe(t, front, cli, nil)
	p.until("refused", func() bool { return p.srv.err != nil })
	if !strings.Contains(ExplainClient(p.srv.err), "not signed by a CA") {
		t.Error(p.srv.err)
	}
	cli = ca.Client(other.Issue("client"))
	serial()
}

// TestOptions are what operators write wrong.
func TestOptions(t *testing.T) {
	ca := tlstest.NewCA(t, "ca")
	a, b := ca.Issue("a"), ca.Issue("b")
	ok := ServerOptions{CertFile: a.Cert, KeyFile: a.Key}
	with := func(f func(*ServerOptions)) ServerOptions { o := ok; f(&o); return o }
	for _, c := range []struct {
		o    ServerOptions
		want string
	}{
		{ServerOptions{CertFile: a.Cert}, "both --cert-file and --key-file"},
		{with(func(o *ServerOptions) { o.CertFile += "x" }), "--cert-file: open"},
		{with(func(o *ServerOptions) { o.KeyFile = b.Key }), "private key does not match"},
		{with(func(o *ServerOptions) { o.TrustedCAFile = a.Key }), "--trusted-ca-file: there is no certificate"},
		{with(func(o *ServerOptions) { o.CRLFile = a.Key }), "--client-crl-file"},
		{with(func(o *ServerOptions) { o.CipherSuites = []string{"ROT13"} }), `"ROT13"`},
		{with(func(o *ServerOptions) { o.MinVersion = "TLS1.1" }), "--tls-min-version"},
		{with(func(o *ServerOptions) { o.MaxVersion = "1.3" }), "--tls-max-version"},
		{with(func(o *ServerOptions) { o.MinVersion, o.MaxVersion = "TLS1.3", "TLS1.2" }), "is below"},
		{with(func(o *ServerOptions) {
			o.MinVersion, o.CipherSuites = "TLS1.3", []string{"TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"}
		}), "no effect on TLS 1.3"},
	} {
		if _, err := NewServerFiles(c.o, quiet()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.o, err)
		}
	}
	if _, err := NewClientFiles(ClientOptions{CertFile: a.Cert}, quiet()); err == nil || !strings.Contains(err.Error(), "--shard-key") {
		t.Error(err)
	}
	if _, err := NewClientFiles(ClientOptions{CAFile: a.Key}, quiet()); err == nil || !strings.Contains(err.Error(), "--shard-cacert") {
		t.Error(err)
	}
}

// TestClientChecks are the revocation list and the allowed names, for resumed sessions too.
func TestClientChecks(t *testing.T) {
	ca := tlstest.NewCA(t, "ca")
	srv, revoked, fine := ca.Issue("server"), ca.Issue("revoked"), ca.Issue("fine", func(c *x509.Certificate) { c.DNSNames = []string{"apiserver.example"} })
	s, err := NewServerFiles(ServerOptions{
		CertFile: srv.Cert, KeyFile: srv.Key, TrustedCAFile: ca.File, CRLFile: ca.Revoke(revoked),
		AllowedHostnames: []string{"nobody.example", "apiserver.example"},
		CipherSuites:     []string{"TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305"}, MaxVersion: "TLS1.2",
	}, quiet())
	if err != nil {
		t.Fatal(err)
	}
	refused := func(cfg *tls.Config) error {
		p := newPipe(t, s.H2(), cfg, nil)
		p.until("an end", func() bool { return p.srv.err != nil || p.bothOpen() })
		if p.srv.err == nil {
			if id := p.cli.conn.tls.ConnectionState().CipherSuite; id != tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256 {
				t.Errorf("suite %s", tls.CipherSuiteName(id))
			}
		}
		return p.srv.err
	}
	if err := refused(ca.Client(fine)); err != nil {
		t.Error(err)
	}
	if err := refused(ca.Client(revoked)); err == nil || !strings.Contains(ExplainClient(err), "--client-crl-file") {
		t.Error(err)
	}
	if err := refused(ca.Client(ca.Issue("nameless"))); err == nil || !strings.Contains(ExplainClient(err), "--client-cert-allowed-hostname") {
		t.Error(err)
	}
}
