package server

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// congestion returns what decides how fast nc sends; set, unless it is "", is chosen before. ok false: this machine has not got it.
func congestion(t *testing.T, nc net.Conn, set string) (cc string, ok bool) {
	t.Helper()
	rc, err := nc.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if cerr := rc.Control(func(fd uintptr) {
		if set != "" && unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, set) != nil {
			return
		}
		cc, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		ok = true
	}); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return cc, ok
}

// TestUnpace: a connection within the machine sends without a timer; another kind than BBR stays.
func TestUnpace(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	nc, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	for set, want := range map[string]string{"bbr": "reno", "cubic": "cubic", "reno": "reno"} {
		if _, ok := congestion(t, nc, set); !ok {
			t.Logf("no %s here", set)
			continue
		}
		unpace(nc.(*net.TCPConn))
		if got, _ := congestion(t, nc, ""); got != want {
			t.Errorf("%s became %s, want %s", set, got, want)
		}
	}
}

// TestLoopUnpaces: what a loop takes in is looked at, clients and connections to members alike.
func TestLoopUnpaces(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	nc, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := congestion(t, nc, "bbr"); !ok {
		t.Skip("no BBR here")
	}
	rc, err := nc.(*net.TCPConn).File() // the loop closes nc
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	l := &Loop{stopped: true}
	_, _ = l.register(nc, nil)
	if cc, err := unix.GetsockoptString(int(rc.Fd()), unix.IPPROTO_TCP, unix.TCP_CONGESTION); err != nil || cc != "reno" {
		t.Errorf("%q, %v", cc, err)
	}
}

func TestSameMachine(t *testing.T) {
	addr := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 1} }
	for _, x := range []struct {
		local, remote net.Addr
		want          bool
	}{
		{addr("127.0.0.1"), addr("127.0.0.1"), true},
		{addr("127.0.0.1"), addr("127.8.0.1"), true},
		{addr("::1"), addr("::1"), true},
		{addr("10.0.0.1"), addr("10.0.0.1"), true},
		{addr("10.0.0.1"), addr("::ffff:10.0.0.1"), true},
		{addr("10.0.0.1"), addr("10.0.0.2"), false},
		{addr("fe80::1"), addr("fe80::2"), false},
		{&net.UnixAddr{Name: "a"}, addr("127.0.0.1"), false},
		{nil, nil, false},
	} {
		if got := sameMachine(x.local, x.remote); got != x.want {
			t.Errorf("%v and %v: %v", x.local, x.remote, got)
		}
	}
}

// TestListenerIsUnpaced: what is accepted from this machine never had BBR; what comes from elsewhere gets it back.
func TestListenerIsUnpaced(t *testing.T) {
	if !pacing(congestionDefault()) {
		t.Skip("this machine does not use BBR")
	}
	l, err := (&listen{network: "tcp", address: "127.0.0.1:0"}).open()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	repace(in)
	if cc, _ := congestion(t, in, ""); cc != unpaced {
		t.Errorf("%s accepted from this machine", cc)
	}
	rc, err := in.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	setCongestion(rc, func(cc string) bool { return cc == unpaced }, congestionDefault())
	if cc, _ := congestion(t, in, ""); cc != congestionDefault() {
		t.Errorf("%s given back, want %s", cc, congestionDefault())
	}
}
