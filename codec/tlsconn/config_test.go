package tlsconn

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"spindle/codec/tlsconn/tlstest"
)

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
