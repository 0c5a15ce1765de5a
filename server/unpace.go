package server

import (
	"net"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Where the machine uses BBR, this file takes it from connections that stay within the machine, and gives them reno instead, which is
// part of every Linux and which everyone may use. BBR sends by a timer, at the rate that it has measured. Between two processes of one
// machine that rate tells what the other one was able to take beside whatever else it did, and each timer costs about as much as to copy
// what it lets go: a list of 100 MB took 5 to 15 % longer. On connections that leave the machine, and where something else
// than BBR is in use, nothing changes.
//
// A socket that has once had BBR is paced for ever, only faster without it. So a listener has reno from the start, which what it accepts inherits,
// and who comes from elsewhere gets the machine's choice back.

const unpaced = "reno"

// congestionDefault is what new sockets of this process have, "" if that cannot be told.
var congestionDefault = sync.OnceValue(func() string {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	cc, _ := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	return cc
})

func pacing(cc string) bool { return strings.HasPrefix(cc, "bbr") }

// unpaceListener is a net.ListenConfig's Control.
func unpaceListener(network, _ string, rc syscall.RawConn) error {
	if strings.HasPrefix(network, "tcp") && pacing(congestionDefault()) {
		setCongestion(rc, func(string) bool { return true }, unpaced)
	}
	return nil
}

// repace gives an accepted connection that leaves the machine what the machine has for it.
func repace(nc net.Conn) {
	tc, ok := nc.(*net.TCPConn)
	if !ok || !pacing(congestionDefault()) || sameMachine(nc.LocalAddr(), nc.RemoteAddr()) {
		return
	}
	if rc, err := tc.SyscallConn(); err == nil {
		setCongestion(rc, func(cc string) bool { return cc == unpaced }, congestionDefault())
	}
}

// unpace does what can be done for any other connection that stays within the machine, one to a member.
func unpace(nc *net.TCPConn) {
	if !sameMachine(nc.LocalAddr(), nc.RemoteAddr()) {
		return
	}
	if rc, err := nc.SyscallConn(); err == nil {
		setCongestion(rc, pacing, unpaced)
	}
}

// setCongestion sets a socket's congestion control if what it has is to change. Where it may not, the socket is slower, no more.
func setCongestion(rc syscall.RawConn, change func(cc string) bool, to string) {
	_ = rc.Control(func(fd uintptr) {
		cc, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		if err == nil && change(cc) {
			_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, to)
		}
	})
}

// sameMachine says that the two ends of a connection are on one machine.
func sameMachine(local, remote net.Addr) bool {
	l, ok := local.(*net.TCPAddr)
	r, ok2 := remote.(*net.TCPAddr)
	return ok && ok2 && (r.IP.IsLoopback() || r.IP.Equal(l.IP))
}
