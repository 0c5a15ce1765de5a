package server

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

func TestPortInUse(t *testing.T) {
	s := startServer(t, Config{})
	url := "http://" + s.addr()
	_, err := Start(Config{ListenURLs: []string{"http://127.0.0.1:0", url}, Log: quiet()})
	if err == nil || !strings.Contains(err.Error(), url) || !strings.Contains(err.Error(), "in use") {
		t.Errorf("got %v", err)
	}
}

func TestListenURLs(t *testing.T) {
	for _, bad := range []string{
		"", "127.0.0.1:1", "http://", "http://127.0.0.1", "http://127.0.0.1:0/path", "https://127.0.0.1",
		"ftp://127.0.0.1:0", "unix://", "unix:///tmp/a?b", "unixs://", "http://no.such.host.invalid:1", "http://[fe80::1%25lo]:1", "%zz",
	} {
		if ln, err := parseListen(bad); err == nil {
			t.Errorf("%q was taken as %+v", bad, ln)
		} else if !strings.Contains(err.Error(), fmt.Sprintf("%q", bad)) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := parseListens([]string{"http://127.0.0.1:1", "tcp://127.0.0.1:1"}); err == nil {
		t.Error("the same address twice")
	}
	if _, err := parseListens(nil); err == nil {
		t.Error("no URL at all")
	}
}

func TestListenSeveral(t *testing.T) {
	dir := t.TempDir()
	sock := filepath.Join(dir, "s.sock")
	urls := []string{"http://127.0.0.1:0", "unix://" + sock}
	if hasIPv6() {
		if l, err := net.Listen("tcp", "[::1]:0"); err == nil {
			_ = l.Close()
			urls = append(urls, "http://[::1]:0")
		}
	}
	s := startServer(t, Config{ListenURLs: urls, Loops: 2})
	for i, a := range s.Addrs() {
		c, err := net.Dial(a.Network(), a.String())
		if err != nil {
			t.Fatalf("%s: %v", urls[i], err)
		}
		p := newPeer(t, c)
		p.request(1, "/etcdserverpb.KV/Range", "", marshal(t, &pb.RangeRequest{Key: []byte("x")}))
		if code, msg := p.trailers(1); code != "0" {
			t.Errorf("%s: %s %q", urls[i], code, msg)
		}
		_ = c.Close()
	}
	if _, err := Start(Config{ListenURLs: []string{"unix://" + sock}, Log: quiet()}); err == nil || !strings.Contains(err.Error(), sock) {
		t.Errorf("a second server on the socket: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(Config{ListenURLs: []string{"unix://" + file}, Log: quiet()}); err == nil {
		t.Error("a plain file was replaced by a socket")
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Error("the file is gone")
	}
}

// Clients are counted before the next is accepted, whichever way they come: else a flood of connections takes all
// descriptors.
func TestUnixBesideTCP(t *testing.T) {
	const most = 5
	sock := filepath.Join(t.TempDir(), "s")
	for _, urls := range [][]string{{"http://127.0.0.1:0", "unix://" + sock}, {"unix://" + sock}} {
		s := startServer(t, Config{ListenURLs: urls, Loops: 2, MaxConns: most})
		hits := limitHits[limitConns].Get()
		var open []net.Conn
		for range most {
			c, err := net.Dial("unix", sock)
			if err != nil {
				t.Fatal(err)
			}
			newPeer(t, c).ping()
			open = append(open, c)
		}
		for _, l := range s.Loops() {
			if n := l.clients.Load(); n < most/2 {
				t.Errorf("%d clients on one loop", n)
			}
		}
		c, err := net.Dial("unix", sock)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("%d bytes for a client too many", n)
		}
		_ = c.Close()
		if limitHits[limitConns].Get() != hits+1 {
			t.Error("not refused")
		}
		_ = open[0].Close()
		eventually(t, "one place is free", func() bool { return s.conns.Load() == most-1 })
		if c, err = net.Dial("unix", sock); err != nil {
			t.Fatal(err)
		}
		newPeer(t, c).ping()
		for _, c := range append(open, c) {
			_ = c.Close()
		}
		if err := s.Stop(testContext(t)); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(sock); !os.IsNotExist(err) {
			t.Errorf("the socket is left behind: %v", err)
		}
	}
}

// TestPortZero: a port that the kernel chose, and clients come to all loops.
func TestPortZero(t *testing.T) {
	urls := []string{"http://127.0.0.1:0", "http://0.0.0.0:0"}
	if hasIPv6() {
		if l, err := net.Listen("tcp", "[::1]:0"); err == nil {
			_ = l.Close()
			urls = append(urls, "http://[::1]:0", "http://[::]:0")
		}
	}
	s := startServer(t, Config{Loops: 3, ListenURLs: urls})
	for i, a := range s.Addrs() {
		for n := range 64 {
			c, err := net.Dial("tcp", a.String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if n%16 == 0 {
				newPeer(t, c).ping()
			}
		}
		for _, l := range s.Loops() {
			eventually(t, "clients of "+s.URLs()[i]+" on each loop", func() bool { return l.clients.Load() >= int64(4*(i+1)) })
		}
	}
}

// A connection that its loop could not take counts no more, and one that it does not take at all never does.
func TestEnrollFailedIsNotCounted(t *testing.T) {
	r := openRig(t)
	same := func() {
		t.Helper()
		if n, m := r.loop.eng.conns.Load(), r.loop.clients.Load(); n != 1 || m != 1 {
			t.Errorf("%d connections, %d of the loop, with one client", n, m)
		}
	}
	c := newClientConn(r.loop)
	c.count(1)
	c.OnClose(nil, errNotEnrolled)
	c.OnClose(nil, errNotEnrolled)
	if same(); !c.closed {
		t.Error("not closed")
	}
	a, b := net.Pipe()
	defer b.Close()
	if _, err := newClientConn(r.loop).enroll(a); err == nil {
		t.Error("a pipe was enrolled")
	}
	same()
}

// A loop that ends by itself ends the engine, which says so: nothing would be served there any more.
func TestLoopThatEndsIsNoticed(t *testing.T) {
	s := startServer(t, Config{Loops: 2})
	c := s.dialTCP(t)
	newPeer(t, c).ping()
	if err := unix.Shutdown(s.Loops()[1].bell, unix.SHUT_RDWR); err != nil { // its end is what gnet closes then
		t.Fatal(err)
	}
	receive(t, "the end", s.Done())
	if err := s.Err(); err != errLoopEnded {
		t.Errorf("Err: %v", err)
	}
	if _, err := net.Dial("tcp", s.addr()); err == nil {
		t.Error("somebody still listens")
	}
}

// A socket of which it cannot be told that nobody listens stays where it is: that of a busy server, whose queue is full.
func TestBusySocketIsKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	for {
		c, err := net.Dial("unix", path)
		if err != nil {
			break
		}
		defer c.Close()
	}
	ln := &listen{url: "unix://" + path, network: "unix", address: path}
	if err := ln.clear(); err == nil || !strings.Contains(err.Error(), ln.url) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the socket is gone: %v", err)
	}
	_ = unix.Close(fd) // nobody listens any more
	if err := ln.clear(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("a dead socket is left: %v", err)
	}
	if err := ln.clear(); err != nil {
		t.Error(err)
	}
}
