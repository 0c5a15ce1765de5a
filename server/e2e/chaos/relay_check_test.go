package chaos

import (
	"bufio"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// echo is a server that sends back every line; its relay and link.
func echo(t *testing.T) (*relay, *link) {
	t.Helper()
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := server.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	l := newLink()
	r, err := newRelay(l)
	if err != nil {
		t.Fatal(err)
	}
	r.point(server.Addr().String())
	t.Cleanup(func() { r.l.Close(); server.Close() })
	return r, l
}

type caller struct {
	t  *testing.T
	c  net.Conn
	in *bufio.Reader
}

func call(t *testing.T, r *relay) *caller {
	t.Helper()
	c, err := net.Dial("tcp", r.addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &caller{t, c, bufio.NewReader(c)}
}

// ask sends a line and waits for it to come back.
func (c *caller) ask(line string, patience time.Duration) error {
	if _, err := io.WriteString(c.c, line+"\n"); err != nil {
		return err
	}
	return c.hear(line, patience)
}

func (c *caller) hear(line string, patience time.Duration) error {
	_ = c.c.SetReadDeadline(time.Now().Add(patience))
	got, err := c.in.ReadString('\n')
	if err == nil && got != line+"\n" {
		c.t.Errorf("heard %q instead of %q", got, line)
	}
	return err
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

const (
	patience = 30 * time.Second
	silence  = 50 * time.Millisecond // long enough to hear what should not come, on most machines
)

func TestRelay(t *testing.T) {
	r, l := echo(t)
	c := call(t, r)
	if err := c.ask("plain", patience); err != nil {
		t.Fatal(err)
	}

	const delay = 30 * time.Millisecond
	l.set(linkState{delay: delay})
	begun := time.Now()
	if err := c.ask("delayed", patience); err != nil || time.Since(begun) < 2*delay {
		t.Errorf("delayed by %v each way: %v after %v", delay, err, time.Since(begun))
	}

	// A partition loses nothing.
	l.set(linkState{hold: true})
	late := call(t, r)
	for _, c := range []*caller{c, late} {
		if err := c.ask("held", silence); !isTimeout(err) {
			t.Errorf("heard through a partition: %v", err)
		}
	}
	l.set(linkState{})
	for _, c := range []*caller{c, late} {
		if err := c.hear("held", patience); err != nil {
			t.Errorf("after the partition: %v", err)
		}
	}

	// A half-open connection is not mended, a new one works.
	for _, s := range [][2]bool{{asking: true}, {answering: true}, {true, true}} {
		l.set(linkState{swallow: s})
		void := call(t, r)
		for _, c := range []*caller{c, void} {
			if err := c.ask("lost", silence); !isTimeout(err) {
				t.Errorf("%v: heard through a half-open connection: %v", s, err)
			}
		}
		l.set(linkState{})
		for _, c := range []*caller{c, void} {
			if err := c.ask("lost too", silence); !isTimeout(err) {
				t.Errorf("%v: heard after the half-open connection: %v", s, err)
			}
		}
		c = call(t, r)
		if err := c.ask("anew", patience); err != nil {
			t.Errorf("%v: a new connection: %v", s, err)
		}
	}

	l.cut()
	if err := c.ask("cut", patience); err == nil || isTimeout(err) {
		t.Errorf("after the cut: %v", err)
	}
	if err := call(t, r).ask("anew", patience); err != nil {
		t.Errorf("a new connection after the cut: %v", err)
	}
}

func TestPeerOf(t *testing.T) {
	const head = "GET /raft/stream/message/a HTTP/1.1\r\nHost: b\r\nX-Server-From: 8211f1d0f64f3269\r\nX-Raft-To: a\r\n\r\n"
	if got := peerOf(readHead(bufio.NewReaderSize(strings.NewReader(head), relaySniff))); got != "8211f1d0f64f3269" {
		t.Errorf("from %q", got)
	}
	if got := peerOf([]byte("GET /version HTTP/1.1\r\n\r\n")); got != "" {
		t.Errorf("from %q", got)
	}
}
