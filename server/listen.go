package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"spindle/codec/tlsconn"
)

// probeTimeout bounds the look whether somebody answers on a unix socket.
const probeTimeout = time.Second

// listen is one place where clients connect.
type listen struct {
	url     string // as configured
	network string // "tcp" or "unix"
	address string // host:port, or the socket's path
	tls     bool
}

// parseListens understands the URLs of a configuration; two equal ones are an error.
func parseListens(urls []string) ([]listen, error) {
	if len(urls) == 0 {
		return nil, errors.New("spindle: no listen URL given")
	}
	var out []listen
	seen := make(map[string]string)
	for _, s := range urls {
		ln, err := parseListen(s)
		if err != nil {
			return nil, err
		}
		if first, ok := seen[ln.network+ln.address]; ok {
			return nil, fmt.Errorf("spindle: listen URLs %s and %s are the same", first, s)
		}
		seen[ln.network+ln.address] = s
		out = append(out, ln)
	}
	return out, nil
}

func parseListen(s string) (listen, error) {
	bad := func(why string) (listen, error) {
		return listen{}, fmt.Errorf("spindle: listen URL %q %s", s, why)
	}
	u, err := url.Parse(s)
	if err != nil {
		return bad("is not a URL")
	}
	switch u.Scheme {
	case "http", "tcp", "https":
		if u.Path != "" && u.Path != "/" {
			return bad("must not have a path")
		}
		host, port, err := net.SplitHostPort(u.Host)
		if err != nil || port == "" {
			return bad("needs host:port")
		}
		if strings.Contains(host, "%") {
			return bad("must not have an IPv6 zone")
		}
		// An empty host is both protocols, as "::" is.
		if ip := net.ParseIP(host); ip != nil && ip.To4() == nil && ip.IsUnspecified() {
			host = ""
		}
		if host == "" && !hasIPv6() {
			host = "0.0.0.0"
		}
		addr, err := net.ResolveTCPAddr("tcp", net.JoinHostPort(host, port))
		if err != nil {
			return bad("names no address: " + err.Error())
		}
		address := net.JoinHostPort(host, strconv.Itoa(addr.Port))
		if host != "" {
			address = addr.String()
		}
		return listen{s, "tcp", address, u.Scheme == "https"}, nil
	case "unix", "unixs":
		if strings.ContainsAny(s, "?#%@") {
			return bad("has a character that is not supported in a socket's path (? # % @)")
		}
		path := u.Host + u.Path
		if path == "" {
			return bad("needs a path")
		}
		path, err := filepath.Abs(path)
		if err != nil {
			return bad("has no absolute path: " + err.Error())
		}
		return listen{s, "unix", path, u.Scheme == "unixs"}, nil
	}
	return bad("needs the scheme http, https, unix or unixs")
}

// needTLS reports a URL that cannot be served without certificates.
func needTLS(listens []listen, files *tlsconn.ServerFiles) error {
	for _, ln := range listens {
		if ln.tls && files == nil {
			return fmt.Errorf("spindle: listen URL %q needs a certificate: --cert-file and --key-file", ln.url)
		}
	}
	return nil
}

// urlOf is the URL of an address that is listened on.
func (ln listen) urlOf(a net.Addr) string {
	scheme := map[string]string{"tcp": "http", "unix": "unix"}[ln.network]
	if ln.tls {
		scheme += "s"
	}
	return scheme + "://" + a.String()
}

func hasIPv6() bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	_ = unix.Close(fd)
	return true
}

// open listens. Its error names the URL.
func (ln *listen) open() (net.Listener, error) {
	network := ln.network
	if host, _, _ := net.SplitHostPort(ln.address); network == "tcp" && net.ParseIP(host).To4() != nil {
		network = "tcp4" // Go takes 0.0.0.0 for both protocols
	}
	if network == "unix" {
		if err := ln.clear(); err != nil {
			return nil, err
		}
	}
	cfg := net.ListenConfig{Control: unpaceListener, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: keepAlive, Interval: keepAlive / keepAliveProbes, Count: keepAliveProbes}}
	l, err := cfg.Listen(context.Background(), network, ln.address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("spindle: cannot listen on %s: the address is in use by another process", ln.url)
	}
	if err != nil {
		return nil, fmt.Errorf("spindle: cannot listen on %s: %w", ln.url, err)
	}
	return l, nil
}

// clear makes room for a unix socket: one behind which nobody listens any more is removed, whatever else lies at the path
// stays, and is an error.
func (ln *listen) clear() error {
	info, err := os.Lstat(ln.address)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("spindle: cannot listen on %s: %w", ln.url, err)
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return fmt.Errorf("spindle: cannot listen on %s: the path exists and is not a socket", ln.url)
	}
	c, err := net.DialTimeout("unix", ln.address, probeTimeout)
	if err == nil {
		_ = c.Close()
		return fmt.Errorf("spindle: cannot listen on %s: the socket is in use by another process", ln.url)
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		err = os.Remove(ln.address)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // EAGAIN: somebody listens, and is busy
		return fmt.Errorf("spindle: cannot listen on %s: a socket is there that may be in use; remove it if it is not: %w", ln.url, err)
	}
	return nil
}
