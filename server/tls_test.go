package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"spindle/codec/tlsconn"
	"spindle/codec/tlsconn/tlstest"
)

// logBuffer is a log that tests read.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

func (l *logBuffer) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// tlsServer is a server with mutual TLS on its first address.
type tlsServer struct {
	*testServer
	ca  *tlstest.CA
	log *logBuffer
}

func startTLS(t testing.TB, cfg Config, more ...string) *tlsServer {
	t.Helper()
	s := &tlsServer{ca: tlstest.NewCA(t, "ca"), log: &logBuffer{}}
	pair := s.ca.Issue("server")
	files, err := tlsconn.NewServerFiles(tlsconn.ServerOptions{CertFile: pair.Cert, KeyFile: pair.Key, TrustedCAFile: s.ca.File}, s.log.logger())
	if err != nil {
		t.Fatal(err)
	}
	cfg.TLS = files
	cfg.ListenURLs = append([]string{"https://127.0.0.1:0"}, more...)
	s.testServer = startServer(t, cfg, func(e *Engine) { e.refusals.log = s.log.logger() })
	return s
}

func (s *tlsServer) dialTLS(t testing.TB, cfg *tls.Config) *tls.Conn {
	t.Helper()
	c, err := tls.Dial("tcp", s.addr(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestTLSClientV3(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		s := startTLS(t, Config{Loops: loops})
		cfg := s.ca.Client(s.ca.Issue("client"))
		for range 2 * loops {
			cl, err := clientv3.New(clientv3.Config{Endpoints: s.URLs(), TLS: cfg.Clone(), Logger: zap.NewNop()})
			if err != nil {
				t.Fatal(err)
			}
			defer cl.Close()
			ctx := testContext(t)
			value := strings.Repeat("v", 100_000) // many records both ways
			if _, err := cl.Put(ctx, "a", value); err != nil {
				t.Fatal(err)
			}
			if get, err := cl.Get(ctx, "a"); err != nil || string(get.Kvs[0].Value) != value {
				t.Fatalf("Get: %v", err)
			}
		}
	})
}

// TestTLSListeners has all kinds of listeners at once; each takes its own clients, and says what is wrong with the other kind.
func TestTLSListeners(t *testing.T) {
	dir := t.TempDir()
	urls := []string{"http://0.0.0.0:0", "unix://" + filepath.Join(dir, "a"), "unixs://" + filepath.Join(dir, "b")}
	if hasIPv6() {
		if l, err := net.Listen("tcp", "[::1]:0"); err == nil {
			_ = l.Close()
			urls = append(urls, "https://[::1]:0", "http://[::]:0")
		}
	}
	s := startTLS(t, Config{Loops: 2}, urls...)
	cfg := s.ca.Client(s.ca.Issue("client"))
	want := append([]string{"https"}, urls...)
	for i, a := range s.Addrs() {
		scheme, _, _ := strings.Cut(s.URLs()[i], ":")
		if w, _, _ := strings.Cut(want[i], ":"); w != scheme {
			t.Errorf("%s shows as %s", want[i], s.URLs()[i])
		}
		secure := scheme == "https" || scheme == "unixs"
		c, err := net.Dial(a.Network(), a.String())
		if err != nil {
			t.Fatal(err)
		}
		if secure {
			c = tls.Client(c, cfg)
		}
		p := newPeer(t, c)
		p.request(1, "/etcdserverpb.KV/Range", "", marshal(t, &pb.RangeRequest{Key: []byte("x")}))
		if code, msg := p.trailers(1); code != "0" {
			t.Errorf("%s: %s %q", s.URLs()[i], code, msg)
		}
		_ = c.Close()
		// The other kind of client.
		line := "the client speaks TLS on a plain-text port"
		if secure {
			line = "the client speaks plain text on a TLS port"
		}
		before := s.log.count(line)
		s.refusals.mu.Lock()
		s.refusals.logged = 0
		s.refusals.mu.Unlock()
		if c, err = net.Dial(a.Network(), a.String()); err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(guard))
		if secure {
			_, _ = io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
			_, err = io.ReadAll(c)
			if os.IsTimeout(err) {
				t.Error("not closed")
			}
		} else if err := tls.Client(c, cfg).Handshake(); err == nil || os.IsTimeout(err) {
			t.Errorf("handshake on a plain port: %v", err)
		}
		_ = c.Close()
		eventually(t, "the log line", func() bool { return s.log.count(line) == before+1 })
	}
}

func TestTLSRefusals(t *testing.T) {
	s := startTLS(t, Config{Loops: 1})
	begun := time.Now()
	other := tlstest.NewCA(t, "other")
	noALPN := s.ca.Client(s.ca.Issue("no-alpn"))
	noALPN.NextProtos = nil
	for _, c := range []struct {
		cfg          *tls.Config
		client, line string
	}{
		{s.ca.Client(other.Issue("stranger")), "unknown certificate authority", "not signed by a CA in --trusted-ca-file"},
		{s.ca.Client(s.ca.Issue("old", tlstest.Expired)), "expired certificate", "renew it"},
		{s.ca.Client(), "certificate required", "shows no certificate"},
		{noALPN, "EOF", "does not offer HTTP/2"},
		// It hangs up as soon as it has said why.
		{other.Client(s.ca.Issue("distrustful")), "unknown authority", "the client refuses the connection"},
	} {
		refused := metricTLSRefused.Get()
		d, err := tls.Dial("tcp", s.addr(), c.cfg)
		if err == nil { // in TLS 1.3 the client is done before the server has looked
			_ = d.SetDeadline(time.Now().Add(guard))
			_, err = d.Read(make([]byte, 1))
			_ = d.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.client) {
			t.Errorf("client hears %v, want %s", err, c.client)
		}
		eventually(t, "the log line: "+c.line, func() bool { return s.log.count(c.line) == 1 })
		if metricTLSRefused.Get() != refused+1 {
			t.Error("not counted")
		}
	}
	// Further ones are counted, not logged.
	for range 3 * refusalBurst {
		c, err := net.Dial("tcp", s.addr())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\n\r\n")
		_, _ = io.ReadAll(c)
		_ = c.Close()
	}
	if n, windows := s.log.count("client refused"), 1+int(time.Since(begun)/refusalWindow); n > refusalBurst*windows {
		t.Errorf("%d lines in %d windows", n, windows)
	}
	eventually(t, "no handshake is left", func() bool { return s.gate.Pending() == 0 })
	newPeer(t, s.dialTLS(t, s.ca.Client(s.ca.Issue("good")))).ping()
}

// TestTLSCloseNotify: both sides say goodbye.
func TestTLSCloseNotify(t *testing.T) {
	s := startTLS(t, Config{Loops: 1, DrainTimeout: 200 * time.Millisecond}) // the second client stays
	cfg := s.ca.Client(s.ca.Issue("client"))
	c := s.dialTLS(t, cfg)
	newPeer(t, c).ping()
	_ = c.CloseWrite()
	_ = c.SetReadDeadline(time.Now().Add(guard))
	if _, err := io.ReadAll(c); err != nil {
		t.Errorf("the server's end: %v", err)
	}
	c = s.dialTLS(t, cfg)
	newPeer(t, c).ping()
	if err := s.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing of a handshake is left", func() bool { return goroutines("tlsconn.(*Conn).handshake") == "" })
}

// TestTLSSlowHandshake ends one that takes too long, on a clock that the test moves.
func TestTLSSlowHandshake(t *testing.T) {
	r := openRig(t)
	ca := tlstest.NewCA(t, "ca")
	pair := ca.Issue("server")
	log := &logBuffer{}
	files, err := tlsconn.NewServerFiles(tlsconn.ServerOptions{CertFile: pair.Cert, KeyFile: pair.Key}, quiet())
	if err != nil {
		t.Fatal(err)
	}
	r.loop.eng.h2TLS, r.loop.eng.refusals.log = files.H2(), log.logger()
	c := newClientConn(r.loop)
	c.count(1)
	c.secure()
	r.att = &attachment{loop: r.loop, h: c}
	r.att.event(r.sock, attachmentOpen)
	r.feed([]byte{0x16, 3, 1}) // and no more
	now := c.opened + int64(tlsconn.HandshakeTimeout) - 1
	if c.second(now); c.closed {
		t.Fatal("closed too early")
	}
	if c.second(now + 1); !c.closed || c.ending != errNoHandshake {
		t.Errorf("not closed: %v", c.ending)
	}
	if log.count("not done in time") != 1 {
		t.Error("not in the log")
	}
	eventually(t, "its goroutine ends", func() bool { return r.loop.eng.gate.Pending() == 0 })
}

// TestTLSHandshakeFlood has hundreds of half handshakes and whole ones in a row; a good client beside them is served.
// What that costs it is logged.
func TestTLSHandshakeFlood(t *testing.T) {
	if testing.Short() {
		t.Skip("hundreds of handshakes, which the race detector makes minutes")
	}
	if addr := os.Getenv(floodAddr); addr != "" {
		flood(t, addr)
		return
	}
	s := startTLS(t, Config{Loops: 1})
	cfg := s.ca.Client(s.ca.Issue("client"))
	p := newPeer(t, s.dialTLS(t, cfg))
	msg := marshal(t, &pb.RangeRequest{Key: []byte("x")})
	id := uint32(1)
	measure := func(n int) (p50, p99 time.Duration) {
		var took []time.Duration
		for range n {
			begun := time.Now()
			p.request(id, "/etcdserverpb.KV/Range", "", msg)
			if code, msg := p.trailers(id); code != "0" {
				t.Fatalf("%s %s", code, msg)
			}
			took = append(took, time.Since(begun))
			id += 2
		}
		slices.Sort(took)
		return took[n/2], took[n*99/100]
	}
	a50, a99 := measure(500)

	hello, opened := clientHello(t, cfg), time.Now()
	var slow []net.Conn
	defer func() {
		for _, c := range slow {
			_ = c.Close()
		}
	}()
	for range 500 {
		c, err := net.Dial("tcp", s.addr())
		if err != nil {
			t.Fatal(err)
		}
		slow = append(slow, c)
		if _, err := c.Write(hello); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "500 half handshakes", func() bool { return s.gate.Pending() == 500 })
	b50, b99 := measure(500)

	// The clients that flood are another process, so that their computing is not in ours.
	pair := s.ca.Issue("flood")
	cmd := exec.Command(os.Args[0], "-test.run=^TestTLSHandshakeFlood$", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), floodAddr+"="+s.addr(), "CA="+s.ca.File, "CERT="+pair.Cert, "KEY="+pair.Key)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stdin.Close(); _ = cmd.Wait() }()
	shaken := metricTLSHandshakes.Get()
	eventually(t, "the flood", func() bool { return metricTLSHandshakes.Get() > shaken+20 })
	shaken = metricTLSHandshakes.Get()
	begun := time.Now()
	c50, c99 := measure(2000)
	t.Logf("good client's p50/p99: alone %v/%v; beside 500 half handshakes %v/%v; beside %d whole ones in %v %v/%v",
		a50, a99, b50, b99, metricTLSHandshakes.Get()-shaken, time.Since(begun), c50, c99)
	// On a busy machine all this takes so long that they are ended.
	if n, took := s.gate.Pending(), time.Since(opened); n < 500 && took < tlsconn.HandshakeTimeout {
		t.Errorf("only %d half handshakes were left after %v", n, took)
	}
}

// floodAddr is the environment variable by which the test's binary becomes the flood: where to.
const floodAddr = "SPINDLE_TLS_FLOOD"

// flood shakes hands and hangs up, until its input ends.
func flood(t *testing.T, addr string) {
	ca, err := os.ReadFile(os.Getenv("CA"))
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{
		RootCAs: tlstest.PoolOf(ca), NextProtos: []string{"h2"},
		Certificates: []tls.Certificate{tlstest.Pair{Cert: os.Getenv("CERT"), Key: os.Getenv("KEY")}.Load(t)},
	}
	for range 8 {
		go func() {
			for {
				if c, err := tls.Dial("tcp", addr, cfg); err == nil {
					_ = c.Close()
				}
			}
		}()
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// clientHello is what a client sends first.
func clientHello(t testing.TB, cfg *tls.Config) []byte {
	near, far := net.Pipe()
	defer far.Close()
	go func() { _ = tls.Client(near, cfg).Handshake() }()
	defer near.Close()
	hdr := make([]byte, 5)
	if _, err := io.ReadFull(far, hdr); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(hdr[3:]))
	if _, err := io.ReadFull(far, body); err != nil {
		t.Fatal(err)
	}
	return append(hdr, body...)
}

// TestTLSReload: new connections get the new certificate, old ones go on.
func TestTLSReload(t *testing.T) {
	s := startTLS(t, Config{Loops: 1})
	cfg := s.ca.Client(s.ca.Issue("client"))
	old := s.dialTLS(t, cfg)
	p := newPeer(t, old)
	p.ping()
	serial := old.ConnectionState().PeerCertificates[0].SerialNumber
	s.ca.Issue("server")
	eventually(t, "the new certificate", func() bool {
		c := s.dialTLS(t, cfg)
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].SerialNumber.Cmp(serial) != 0
	})
	p.ping()
}

func TestTLSWithoutCertificate(t *testing.T) {
	_, err := Start(Config{ListenURLs: []string{"https://127.0.0.1:0"}, Log: quiet()})
	if err == nil || !strings.Contains(err.Error(), "--cert-file") {
		t.Errorf("got %v", err)
	}
}

// TestTLSMetrics serves /metrics and /health with the clients' certificates.
func TestTLSMetrics(t *testing.T) {
	ca := tlstest.NewCA(t, "ca")
	pair := ca.Issue("server")
	files, err := tlsconn.NewServerFiles(tlsconn.ServerOptions{CertFile: pair.Cert, KeyFile: pair.Key, TrustedCAFile: ca.File}, quiet())
	if err != nil {
		t.Fatal(err)
	}
	h := &fakeHealth{}
	if _, err := StartMetrics([]string{"https://127.0.0.1:0"}, nil, h, "v0", false, quiet()); err == nil {
		t.Error("https without a certificate")
	}
	m, err := StartMetrics([]string{"https://127.0.0.1:0", "http://127.0.0.2:0"}, files, h, "v0", false, quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	get := func(cfg *tls.Config, url string) error {
		tr := &http.Transport{TLSClientConfig: cfg}
		defer tr.CloseIdleConnections()
		resp, err := (&http.Client{Transport: tr, Timeout: guard}).Get(url + "/metrics")
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
		}
		return err
	}
	client := func(pairs ...tlstest.Pair) *tls.Config {
		c := ca.Client(pairs...)
		c.NextProtos = nil
		return c
	}
	for _, u := range m.URLs() {
		if err := get(client(ca.Issue("client")), u); err != nil {
			t.Errorf("%s: %v", u, err)
		}
	}
	if err := get(client(), m.URLs()[0]); err == nil {
		t.Error("let in without a certificate")
	}
}
