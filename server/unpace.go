package server

import (
	"net"
	"strings"

	"golang.org/x/sys/unix"
)

// unpace takes BBR from a connection that stays within the machine, and gives it reno instead, which is part of every Linux and
// which everyone may use. BBR sends by a timer, at the rate that it has measured. Between two processes of one machine that rate
// tells what the other one was able to take beside whatever else it did, and each timer costs about as much as to copy
// what it lets go: a list of 100 MB took 5 to 15 % longer. On connections that leave the machine, and where something else
// than BBR is in use, nothing changes.
func unpace(nc *net.TCPConn) {
	if !sameMachine(nc.LocalAddr(), nc.RemoteAddr()) {
		return
	}
	rc, err := nc.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Control(func(fd uintptr) {
		cc, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		if err == nil && strings.HasPrefix(cc, "bbr") {
			_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno") // it is slower without, no more
		}
	})
}

// sameMachine says that the two ends of a connection are on one machine.
func sameMachine(local, remote net.Addr) bool {
	l, ok := local.(*net.TCPAddr)
	r, ok2 := remote.(*net.TCPAddr)
	return ok && ok2 && (r.IP.IsLoopback() || r.IP.Equal(l.IP))
}
