package tlsconn

import (
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"testing"
)

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
