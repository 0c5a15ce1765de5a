package tlsconn

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"spindle/codec/tlsconn/tlstest"
)

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
