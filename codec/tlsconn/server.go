package tlsconn

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"
)

// ServerOptions is what etcd's flags of the same names say about serving TLS.
type ServerOptions struct {
	CertFile, KeyFile string
	// TrustedCAFile holds the CAs of clients' certificates. As in etcd, naming it demands certificates, with or
	// without ClientCertAuth; ClientCertAuth alone trusts the system's CAs.
	TrustedCAFile  string
	ClientCertAuth bool
	// CRLFile is a DER list of revoked certificates.
	CRLFile string
	// AllowedHostnames are names one of which a client's certificate must be for; empty: any.
	AllowedHostnames []string
	// CipherSuites are IANA names, for TLS 1.2; empty: Go's choice, without those that RFC 9113 forbids.
	CipherSuites []string
	// MinVersion and MaxVersion are TLS1.2, TLS1.3 or empty (1.2; the newest).
	MinVersion, MaxVersion string
}

// ServerFiles is TLS towards clients, with files that are read again when they change.
type ServerFiles struct {
	opt    ServerOptions
	files  files
	suites []uint16
	min    uint16
	max    uint16
	h2     atomic.Pointer[tls.Config]
	http1  atomic.Pointer[tls.Config]
}

// NewServerFiles reads the files. Its error names the flag and says what is wrong.
func NewServerFiles(o ServerOptions, log *slog.Logger) (*ServerFiles, error) {
	s := &ServerFiles{opt: o}
	if o.CertFile == "" || o.KeyFile == "" {
		return nil, errors.New("TLS needs both --cert-file and --key-file")
	}
	var err error
	if s.min, s.max, err = versions(o.MinVersion, o.MaxVersion); err != nil {
		return nil, err
	}
	if s.suites, err = suites(o.CipherSuites); err != nil {
		return nil, err
	}
	if len(o.CipherSuites) > 0 && s.min == tls.VersionTLS13 {
		return nil, errors.New("--cipher-suites has no effect on TLS 1.3, and --tls-min-version allows nothing else: leave out one of the two")
	}
	s.files = files{load: s.load, log: log, now: time.Now}
	for _, name := range []string{o.CertFile, o.KeyFile, o.TrustedCAFile, o.CRLFile} {
		if name != "" {
			s.files.names = append(s.files.names, name)
		}
	}
	return s, s.files.start()
}

// H2 is the configuration for gRPC; it never changes, but gives each handshake what the files hold.
func (s *ServerFiles) H2() *tls.Config { return s.front(&s.h2) }

// HTTP1 is the same for an HTTP/1.1 server, for metrics.
func (s *ServerFiles) HTTP1() *tls.Config { return s.front(&s.http1) }

func (s *ServerFiles) front(cur *atomic.Pointer[tls.Config]) *tls.Config {
	cfg := cur.Load().Clone()
	cfg.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		s.files.refresh()
		return cur.Load(), nil
	}
	return cfg
}

func (s *ServerFiles) load() error {
	cert, err := loadPair("--cert-file", s.opt.CertFile, "--key-file", s.opt.KeyFile, s.files.log)
	if err != nil {
		return err
	}
	cfg := &tls.Config{
		Certificates:                []tls.Certificate{*cert},
		MinVersion:                  s.min,
		MaxVersion:                  s.max,
		CipherSuites:                s.suites,
		NextProtos:                  []string{"h2"},
		DynamicRecordSizingDisabled: true,
	}
	if s.opt.TrustedCAFile != "" || s.opt.ClientCertAuth {
		cfg.ClientAuth = tls.RequireAndVerifyClientCert
	}
	if s.opt.TrustedCAFile != "" {
		if cfg.ClientCAs, err = loadPool("--trusted-ca-file", s.opt.TrustedCAFile); err != nil {
			return err
		}
	}
	revoked, err := loadCRL(s.opt.CRLFile)
	if err != nil {
		return err
	}
	if len(revoked) > 0 || len(s.opt.AllowedHostnames) > 0 {
		// Unlike VerifyPeerCertificate, this is asked for resumed sessions too.
		cfg.VerifyConnection = func(st tls.ConnectionState) error { return s.verify(st, revoked) }
	}
	http1 := cfg.Clone()
	http1.NextProtos = []string{"http/1.1"}
	s.h2.Store(cfg)
	s.http1.Store(http1)
	return nil
}

func (s *ServerFiles) verify(st tls.ConnectionState, revoked map[string]bool) error {
	for _, c := range st.PeerCertificates {
		if revoked[string(c.SerialNumber.Bytes())] {
			return fmt.Errorf("the client's certificate, serial number %x, is in --client-crl-file", c.SerialNumber)
		}
	}
	if len(s.opt.AllowedHostnames) == 0 || len(st.PeerCertificates) == 0 {
		return nil
	}
	for _, host := range s.opt.AllowedHostnames {
		if st.PeerCertificates[0].VerifyHostname(host) == nil {
			return nil
		}
	}
	return errors.New("the client's certificate is for none of --client-cert-allowed-hostname")
}

// loadPair reads a certificate with its key. One that is out of date is taken, with a warning: the clock may be wrong,
// and whoever verifies it says the same.
func loadPair(certFlag, certFile, keyFlag, keyFile string, log *slog.Logger) (*tls.Certificate, error) {
	cert, err := os.ReadFile(certFile)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", certFlag, err)
	}
	key, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keyFlag, err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s %s with %s %s: %w", certFlag, certFile, keyFlag, keyFile, err)
	}
	if now := time.Now(); log != nil && (now.After(pair.Leaf.NotAfter) || now.Before(pair.Leaf.NotBefore)) {
		log.Warn("certificate is out of date: renew it", "file", certFile, "from", pair.Leaf.NotBefore, "to", pair.Leaf.NotAfter)
	}
	return &pair, nil
}

func loadPool(flag, file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: there is no certificate in %s", flag, file)
	}
	return pool, nil
}

func loadCRL(file string) (map[string]bool, error) {
	if file == "" {
		return nil, nil
	}
	der, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("--client-crl-file: %w", err)
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, fmt.Errorf("--client-crl-file: %s is no DER revocation list: %w", file, err)
	}
	revoked := make(map[string]bool, len(list.RevokedCertificateEntries))
	for _, e := range list.RevokedCertificateEntries {
		revoked[string(e.SerialNumber.Bytes())] = true
	}
	return revoked, nil
}

func versions(minName, maxName string) (lo, hi uint16, err error) {
	if lo, err = version("--tls-min-version", minName); err != nil {
		return 0, 0, err
	}
	if hi, err = version("--tls-max-version", maxName); err != nil {
		return 0, 0, err
	}
	if lo == 0 {
		lo = tls.VersionTLS12
	}
	if hi != 0 && hi < lo {
		return 0, 0, fmt.Errorf("--tls-max-version %s is below --tls-min-version %s", maxName, minName)
	}
	return lo, hi, nil
}

func version(flag, name string) (uint16, error) {
	switch name {
	case "":
		return 0, nil
	case "TLS1.2":
		return tls.VersionTLS12, nil
	case "TLS1.3":
		return tls.VersionTLS13, nil
	}
	return 0, fmt.Errorf("%s %q: say TLS1.2 or TLS1.3", flag, name)
}

// suites turns names into numbers. Without names it leaves out what RFC 9113 appendix A forbids, as grpc-go does: all
// without forward secrecy or an AEAD.
func suites(names []string) ([]uint16, error) {
	var out []uint16
	if len(names) == 0 {
		for _, s := range tls.CipherSuites() {
			switch s.ID {
			case tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA,
				tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA:
			default:
				out = append(out, s.ID)
			}
		}
		return out, nil
	}
	known := map[string]uint16{
		// etcd knows these two by their older names too.
		"TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305":   tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		"TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305": tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
	}
	for _, s := range append(tls.CipherSuites(), tls.InsecureCipherSuites()...) {
		known[s.Name] = s.ID
	}
	for _, name := range names {
		id, ok := known[name]
		if !ok {
			return nil, fmt.Errorf("--cipher-suites: there is no suite %q: use names such as TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", name)
		}
		out = append(out, id)
	}
	return out, nil
}
