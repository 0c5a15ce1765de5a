package shard

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"spindle/codec"
	"spindle/codec/tlsconn"
	"spindle/codec/tlsconn/tlstest"
)

// tlsMember is a member that demands certificates of ca.
func tlsMember(t testing.TB, ca *tlstest.CA, pair tlstest.Pair) *fakeMember {
	return newFakeMember(t, echo, grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{pair.Load(t)}, ClientCAs: ca.Pool(), ClientAuth: tls.RequireAndVerifyClientCert,
	})))
}

func (f *fakeMember) secureURL() string { return "https://" + f.addr() }

func withTLS(t testing.TB, o tlsconn.ClientOptions) func(*PoolConfig) {
	files, err := tlsconn.NewClientFiles(o, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	return func(c *PoolConfig) { c.TLS = files }
}

// TestPoolTLS: calls and a stream over mutual TLS, large ones too, and again after the connection is lost.
func TestPoolTLS(t *testing.T) {
	ca := tlstest.NewCA(t, "ca")
	m := tlsMember(t, ca, ca.Issue("member"))
	r := newRelay(t, freePort(t), m.addr())
	cli := ca.Issue("proxy")
	e := newPoolEnv(t, []string{"https://" + r.ln.Addr().String()}, withTLS(t, tlsconn.ClientOptions{CAFile: ca.File, CertFile: cli.Cert, KeyFile: cli.Key}))
	e.connected(0)
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 3))
	for range 20 {
		msg := make([]byte, rnd.IntN(1<<rnd.IntN(22)))
		for i := range msg {
			msg[i] = byte(rnd.Uint32())
		}
		if r := e.call(codec.MethodRange, msg); r.st.Code != codec.OK || !bytes.Equal(r.resp, msg) {
			t.Fatalf("seed %d: %d bytes: %v, %d bytes came back", seed, len(msg), r.st, len(r.resp))
		}
	}
	sink, h := e.watch([]byte("one"))
	if m := sink.message(t); string(m) != "one" {
		t.Errorf("stream: %q", m)
	}
	r.kill()
	if st := sink.end(t); st.Code != codec.Unavailable {
		t.Errorf("stream: %v", st)
	}
	e.loop.do(h.Close)
	e.connected(0)
	if r := e.call(codec.MethodRange, []byte("x")); r.st.Code != codec.OK {
		t.Errorf("after the loss: %v", r.st)
	}
	e.loop.do(e.pool.Close)
}

// TestPoolTLSRefusals: what does not fit is said in the log and in every answer, with what to do.
func TestPoolTLSRefusals(t *testing.T) {
	ca, other := tlstest.NewCA(t, "ca"), tlstest.NewCA(t, "other")
	cli, stranger := ca.Issue("proxy"), other.Issue("stranger")
	good := tlsconn.ClientOptions{CAFile: ca.File, CertFile: cli.Cert, KeyFile: cli.Key}
	plain := newFakeMember(t, echo)
	secure := tlsMember(t, ca, ca.Issue("member"))
	for _, c := range []struct {
		name string
		url  string
		opt  tlsconn.ClientOptions
		want string
	}{
		{"wrong CA", secure.secureURL(), tlsconn.ClientOptions{CAFile: other.File, CertFile: cli.Cert, KeyFile: cli.Key}, `its certificate is refused: "CN=member" is not signed by a CA in --shard-cacert`},
		{"expired", tlsMember(t, ca, ca.Issue("old", tlstest.Expired)).secureURL(), good, `its certificate is refused: "CN=old" is valid from`},
		{"other name", tlsMember(t, ca, ca.Issue("elsewhere", func(c *x509.Certificate) { c.IPAddresses, c.DNSNames = nil, []string{"elsewhere"} })).secureURL(), good, `is not for "127.0.0.1"`},
		{"no certificate", secure.secureURL(), tlsconn.ClientOptions{CAFile: ca.File}, "it refuses the TLS connection (tls: certificate required): does it ask for a certificate?"},
		{"strange certificate", secure.secureURL(), tlsconn.ClientOptions{CAFile: ca.File, CertFile: stranger.Cert, KeyFile: stranger.Key}, "it refuses the TLS connection"},
		{"version", newFakeMember(t, echo, grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{ca.Issue("ancient").Load(t)}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}))).secureURL(), good, "it refuses the TLS connection (tls: protocol version not supported)"},
		{"plain member", plain.secureURL(), good, "it does not speak TLS: is it to be http:// ?"},
		{"TLS member", secure.url(), good, "is it to be https:// ?"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := newPoolEnv(t, []string{c.url}, withTLS(t, c.opt))
			e.until("several attempts", func() bool { return e.pool.clusters[0].endpoints[0].slots[0].attempts > 2 })
			e.loop.do(func() {
				if got := e.pool.Unreachable(0); !strings.HasPrefix(got, "member cluster shard-1: no endpoint answers ("+c.url+": ") || !strings.Contains(got, c.want) {
					t.Errorf("unreachable: %s", got)
				}
			})
			if r := e.call(codec.MethodRange, nil); r.st.Code != codec.Unavailable || r.sent || !strings.Contains(r.st.Msg, c.want) {
				t.Errorf("call: %+v", r)
			}
			// The socket's end may be seen before the reason is read, once.
			if l := e.log.lines("does not answer"); len(l) == 0 || len(l) > 2 {
				t.Errorf("log: %q", l)
			}
		})
	}
}

// TestPoolTLSComesBackExpired: a member that was down and comes back with a bad certificate is worth another line.
func TestPoolTLSComesBackExpired(t *testing.T) {
	ca := tlstest.NewCA(t, "ca")
	cli := ca.Issue("proxy")
	addr := freePort(t)
	e := newPoolEnv(t, []string{"https://" + addr}, withTLS(t, tlsconn.ClientOptions{CAFile: ca.File, CertFile: cli.Cert, KeyFile: cli.Key}))
	e.until("down", func() bool { return e.pool.clusters[0].endpoints[0].told == toldDown })
	newRelay(t, addr, tlsMember(t, ca, ca.Issue("old", tlstest.Expired)).addr())
	e.until("told why", func() bool { return len(e.log.lines("renew it")) > 0 })
	if l := e.log.lines("does not answer"); len(l) != 2 {
		t.Errorf("log: %q", l)
	}
}

// TestPoolTLSReload: a new certificate is shown at the next connection.
func TestPoolTLSReload(t *testing.T) {
	ca, other := tlstest.NewCA(t, "ca"), tlstest.NewCA(t, "other")
	m := tlsMember(t, ca, ca.Issue("member"))
	cli := other.Issue("proxy") // signed by nobody whom the member knows
	e := newPoolEnv(t, []string{m.secureURL()}, withTLS(t, tlsconn.ClientOptions{CAFile: ca.File, CertFile: cli.Cert, KeyFile: cli.Key}))
	e.until("refused", func() bool { return e.pool.clusters[0].endpoints[0].slots[0].attempts > 0 })
	good := ca.Issue("proxy")
	move(t, good.Key, cli.Key)
	move(t, good.Cert, cli.Cert)
	e.connected(0)
}

func TestPoolTLSUnixSocket(t *testing.T) {
	ca := tlstest.NewCA(t, "ca")
	m := tlsMember(t, ca, ca.Issue("member", func(c *x509.Certificate) { c.DNSNames = []string{"member.sock"} }))
	path := filepath.Join(t.TempDir(), "member.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = m.srv.Serve(ln) }()
	cli := ca.Issue("proxy")
	e := newPoolEnv(t, []string{"unixs://" + path}, withTLS(t, tlsconn.ClientOptions{CAFile: ca.File, CertFile: cli.Cert, KeyFile: cli.Key}))
	e.connected(0)
	if r := e.call(codec.MethodRange, []byte("x")); r.st.Code != codec.OK || string(r.resp) != "x" {
		t.Errorf("%+v", r)
	}
}

// TestPoolTLSSilentMember takes the socket and says nothing: the dial's timeout covers the handshake.
func TestPoolTLSSilentMember(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	e := newPoolEnv(t, []string{"https://" + ln.Addr().String()}, func(c *PoolConfig) { c.DialTimeout = 50 * time.Millisecond })
	e.until("given up", func() bool { return e.pool.clusters[0].endpoints[0].slots[0].attempts > 1 })
	e.loop.do(func() {
		if got := e.pool.Endpoints(0)[0].LastError; got != errNoSettings.Error() {
			t.Error(got)
		}
	})
}

func move(t testing.TB, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}
