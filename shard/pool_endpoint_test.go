package shard

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"spindle/codec"
)

func TestPoolEndpointDownThenUp(t *testing.T) {
	m := newFakeMember(t, echo)
	addr := freePort(t)
	e := newPoolEnv(t, []string{"http://" + addr})
	e.until("an attempt failed twice", func() bool {
		ep := e.pool.clusters[0].endpoints[0]
		return ep.slots[0].attempts >= 2
	})
	r := e.call(codec.MethodRange, []byte("x"))
	if r.st.Code != codec.Unavailable || r.sent || !strings.Contains(r.st.Msg, "member cluster shard-1: no endpoint answers (http://"+addr+": connection refused)") {
		t.Errorf("call while down: %+v", r)
	}
	sink, h := e.watch(nil)
	if st := sink.end(t); st != r.st {
		t.Errorf("watch while down: %+v", st)
	}
	e.loop.do(func() { h.Send(nil); h.Hold(true); h.Close() })
	e.loop.do(func() {
		s := e.pool.Endpoints(0)
		if len(s) != 1 || s[0].Connected || s[0].LastError != "connection refused" || s[0].Since.IsZero() {
			t.Errorf("status while down: %+v", s)
		}
		if e.pool.Connected(0) || e.pool.Unreachable(0) != r.st.Msg {
			t.Errorf("unreachable: %q", e.pool.Unreachable(0))
		}
	})

	newRelay(t, addr, m.addr())
	e.connected(0)
	if r := e.call(codec.MethodRange, []byte("x")); r.st.Code != codec.OK || string(r.resp) != "x" {
		t.Errorf("call when up: %+v", r)
	}
	e.loop.do(func() {
		s := e.pool.Endpoints(0)
		if len(s) != 1 || !s[0].Connected || s[0].LastError != "" || e.pool.Unreachable(0) != "" {
			t.Errorf("status when up: %+v", s)
		}
	})
	if l := e.log.lines("does not answer: connection refused; trying again"); len(l) != 1 {
		t.Errorf("%d lines say that it is down: %q", len(l), l)
	}
	if l := e.log.lines("answers"); len(l) != 1 {
		t.Errorf("%d lines say that it is up: %q", len(l), l)
	}
}

// A listener that takes connections and says nothing is no endpoint.
func TestPoolSilentListener(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	e := newPoolEnv(t, []string{"http://" + ln.Addr().String()}, func(c *PoolConfig) { c.DialTimeout = 50 * time.Millisecond })
	e.until("given up", func() bool { return e.pool.Endpoints(0)[0].LastError == errNoSettings.Error() })
	e.loop.do(func() {
		if e.pool.Connected(0) {
			t.Error("counts as connected")
		}
	})
}

// What is no HTTP/2 is no endpoint either.
func TestPoolNotHTTP2(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
			c.Close()
		}
	}()
	e := newPoolEnv(t, []string{"http://" + ln.Addr().String()})
	e.until("several attempts", func() bool { return e.pool.clusters[0].endpoints[0].slots[0].attempts > 3 })
	if r := e.call(codec.MethodRange, nil); r.st.Code != codec.Unavailable || r.sent {
		t.Errorf("got %+v", r)
	}
	if l := e.log.lines("does not answer"); len(l) != 1 {
		t.Errorf("log: %q", l)
	}
}

func TestPoolUnixSocket(t *testing.T) {
	m := newFakeMember(t, echo)
	path := t.TempDir() + "/member"
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = m.srv.Serve(ln) }()
	e := newPoolEnv(t, []string{"unix://" + path})
	e.connected(0)
	if r := e.call(codec.MethodRange, []byte("x")); r.st.Code != codec.OK || string(r.resp) != "x" {
		t.Errorf("%+v", r)
	}
}

func TestPoolEndpointURLs(t *testing.T) {
	for _, c := range []struct{ in, network, address, authority, server, err string }{
		{"http://127.0.0.1:2379", "tcp", "127.0.0.1:2379", "127.0.0.1:2379", "", ""},
		{"http://etcd-0.etcd:2379/", "tcp", "etcd-0.etcd:2379", "etcd-0.etcd:2379", "", ""},
		{"http://[::1]:2379", "tcp", "[::1]:2379", "[::1]:2379", "", ""},
		{"unix:///run/etcd.sock", "unix", "/run/etcd.sock", "localhost", "", ""},
		{"unix://etcd:0", "unix", "etcd:0", "localhost", "", ""},
		{"unix:", "", "", "", "", "no socket path"},
		{"https://127.0.0.1:2379", "tcp", "127.0.0.1:2379", "127.0.0.1:2379", "127.0.0.1", ""},
		{"https://[::1]:2379", "tcp", "[::1]:2379", "[::1]:2379", "::1", ""},
		{"https://etcd-0.etcd:2379/", "tcp", "etcd-0.etcd:2379", "etcd-0.etcd:2379", "etcd-0.etcd", ""},
		{"unixs:///run/etcd.sock", "unix", "/run/etcd.sock", "localhost", "etcd.sock", ""},
		{"http://127.0.0.1", "", "", "", "", "a host and a port"},
		{"http://:2379", "", "", "", "", "a host and a port"},
		{"127.0.0.1:2379", "", "", "", "", "not a URL"},
		{"localhost:2379", "", "", "", "", "want http://host:port"},
		{"http://127.0.0.1:2379/v3", "", "", "", "", "nothing may follow"},
		{"http://u:p@127.0.0.1:2379", "", "", "", "", "nothing may follow"},
		{"", "", "", "", "", "want http://host:port"},
	} {
		got, err := parseEndpoint(c.in)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: error %v", c.in, err)
			}
			continue
		}
		if err != nil || got != (endpointAddr{c.network, c.address, c.authority, c.server}) {
			t.Errorf("%q: %+v, %v", c.in, got, err)
		}
	}
	cfg := PoolConfig{Clusters: map[codec.ClusterID][]string{codec.Coordinator: {"http://a:1"}, 0: {"http://b:1", "ftp://c:1"}}}
	if err := cfg.Validate(); err == nil || !strings.HasPrefix(err.Error(), "member cluster shard-0: endpoint") {
		t.Errorf("Validate: %v", err)
	}
	// A pool with such a cluster works for the others, and says what is wrong with this one.
	m := newFakeMember(t, echo)
	e := newPoolEnv(t, []string{m.url()}, func(c *PoolConfig) { c.Clusters[codec.Coordinator] = []string{"ftp://c:1"} })
	e.connected(0)
	if r := e.begin(codec.Coordinator, codec.MethodRange, nil, time.Second).wait(t); !strings.HasPrefix(r.st.Msg, "coordinator: ") || !strings.Contains(r.st.Msg, "want http://host:port") {
		t.Errorf("%+v", r)
	}
}
