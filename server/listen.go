package server

import (
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
	address string // host:port as gnet wants it, or the socket's path
	tls     bool
	// local is what gnet gives as the local address of a connection that came in here: the listener's, which
	// it makes of address. Names are resolved once, so that both are of one answer.
	local string
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
		// Go listens on both protocols for "::", gnet on IPv6 alone; an empty host is both for gnet.
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
		return listen{s, "tcp", address, u.Scheme == "https", addr.String()}, nil
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
		return listen{s, "unix", path, u.Scheme == "unixs", path}, nil
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

// probe looks whether one can listen here, because gnet's own error does not say where it failed. For a
// unix socket it also protects what lies at the path: gnet removes it, whatever it is.
func (ln listen) probe() error {
	if ln.network == "tcp" {
		l, err := net.Listen("tcp", ln.address)
		if err == nil {
			return l.Close()
		}
		if errors.Is(err, syscall.EADDRINUSE) {
			return fmt.Errorf("spindle: cannot listen on %s: the address is in use by another process", ln.url)
		}
		return fmt.Errorf("spindle: cannot listen on %s: %w", ln.url, err)
	}
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
	return nil
}

// reserve gives a TCP listener on port 0 a port, which is the descriptor's until that is closed: every loop listens on its
// own, and each would be given another one. Nothing listens on the descriptor.
func (ln *listen) reserve() (fd int, err error) {
	fail := func(err error) (int, error) {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return -1, fmt.Errorf("spindle: cannot listen on %s: %w", ln.url, err)
	}
	fd = -1
	addr, err := net.ResolveTCPAddr("tcp", ln.local)
	if err != nil {
		return fail(err)
	}
	var at unix.Sockaddr
	family := unix.AF_INET6
	if ip := addr.IP.To4(); ip != nil {
		family, at = unix.AF_INET, &unix.SockaddrInet4{Addr: [4]byte(ip)}
	} else {
		to := &unix.SockaddrInet6{}
		copy(to.Addr[:], addr.IP)
		at = to
	}
	if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return fail(err)
	}
	if family == unix.AF_INET6 {
		v6only := 0
		if len(addr.IP) > 0 {
			v6only = 1
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, v6only); err != nil {
			return fail(err)
		}
	}
	for _, opt := range []int{unix.SO_REUSEADDR, unix.SO_REUSEPORT} {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, 1); err != nil {
			return fail(err)
		}
	}
	if err := unix.Bind(fd, at); err != nil {
		return fail(err)
	}
	got, err := unix.Getsockname(fd)
	if err != nil {
		return fail(err)
	}
	switch got := got.(type) {
	case *unix.SockaddrInet4:
		addr.Port = got.Port
	case *unix.SockaddrInet6:
		addr.Port = got.Port
	}
	host, _, _ := net.SplitHostPort(ln.address)
	ln.address, ln.local = net.JoinHostPort(host, strconv.Itoa(addr.Port)), addr.String()
	return fd, nil
}

// findAddrs asks the kernel where gnet listens.
func (e *Engine) findAddrs(listens []listen) error {
	defer func() {
		for i, a := range e.addrs {
			e.urls = append(e.urls, listens[i].urlOf(a))
		}
	}()
	for _, ln := range listens {
		if ln.network == "unix" {
			e.addrs = append(e.addrs, &net.UnixAddr{Name: ln.address, Net: "unix"})
			continue
		}
		fd, err := e.gnet.DupListener("tcp", ln.address)
		if err != nil {
			return fmt.Errorf("spindle: the address of %s: %w", ln.url, err)
		}
		sa, err := unix.Getsockname(fd)
		_ = unix.Close(fd)
		if err != nil {
			return fmt.Errorf("spindle: the address of %s: %w", ln.url, err)
		}
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			e.addrs = append(e.addrs, &net.TCPAddr{IP: append(net.IP(nil), sa.Addr[:]...), Port: sa.Port})
		case *unix.SockaddrInet6:
			e.addrs = append(e.addrs, &net.TCPAddr{IP: append(net.IP(nil), sa.Addr[:]...), Port: sa.Port})
		default:
			return fmt.Errorf("spindle: the address of %s: unexpected %T", ln.url, sa)
		}
	}
	return nil
}
