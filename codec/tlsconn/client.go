package tlsconn

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"
)

// ClientOptions is TLS towards member clusters and the coordinator.
type ClientOptions struct {
	CAFile            string // empty: the system's CAs
	CertFile, KeyFile string // both, or none: no certificate is shown
}

// ClientFiles is TLS towards members, with files that are read again when they change.
type ClientFiles struct {
	opt   ClientOptions
	files files
	state atomic.Pointer[clientState]
}

type clientState struct {
	cas  *x509.CertPool
	cert []tls.Certificate
}

// NewClientFiles reads the files. Its error names the flag and says what is wrong.
func NewClientFiles(o ClientOptions, log *slog.Logger) (*ClientFiles, error) {
	if (o.CertFile == "") != (o.KeyFile == "") {
		return nil, errors.New("--shard-cert and --shard-key belong together: give both, or none")
	}
	c := &ClientFiles{opt: o}
	c.files = files{load: c.load, log: log, now: time.Now}
	for _, name := range []string{o.CAFile, o.CertFile, o.KeyFile} {
		if name != "" {
			c.files.names = append(c.files.names, name)
		}
	}
	return c, c.files.start()
}

func (c *ClientFiles) load() error {
	st := &clientState{}
	var err error
	if c.opt.CAFile != "" {
		if st.cas, err = loadPool("--shard-cacert", c.opt.CAFile); err != nil {
			return err
		}
	}
	if c.opt.CertFile != "" {
		cert, err := loadPair("--shard-cert", c.opt.CertFile, "--shard-key", c.opt.KeyFile, c.files.log)
		if err != nil {
			return err
		}
		st.cert = []tls.Certificate{*cert}
	}
	c.state.Store(st)
	return nil
}

// Config is the configuration for one connection to a server whose certificate must be for name (a host or an IP
// address). It may read files: not to be called on an event loop.
func (c *ClientFiles) Config(name string) *tls.Config {
	c.files.refresh()
	st := c.state.Load()
	return &tls.Config{
		ServerName:                  name,
		RootCAs:                     st.cas,
		Certificates:                st.cert,
		MinVersion:                  tls.VersionTLS12,
		NextProtos:                  []string{"h2"},
		DynamicRecordSizingDisabled: true,
	}
}
