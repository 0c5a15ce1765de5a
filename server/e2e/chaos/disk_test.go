package chaos

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A slow disk without a disk: the kernel asks this process about each fsync and fdatasync of an etcd (seccomp's user
// notification, see seccomp_unotify(2)), which says "done", at once or late. Nothing is synced either way: a process
// that is killed loses nothing that it has written. It needs no privileges.

const (
	// slowFsync is how long an fsync takes on a slow disk.
	slowFsync = 100 * time.Millisecond
	// diskEnv names the descriptor on which the kernel asks.
	diskEnv = "SPINDLE_CHAOS_DISK"
	// The signals that make an etcd's disk slow, and well again.
	slowDown, speedUp = syscall.SIGUSR1, syscall.SIGUSR2
)

// The structures of <linux/seccomp.h>.
type (
	seccompData struct {
		nr   int32
		arch uint32
		ip   uint64
		args [6]uint64
	}
	seccompNotif struct {
		id    uint64
		pid   uint32
		flags uint32
		data  seccompData
	}
	seccompResp struct {
		id    uint64
		val   int64
		err   int32
		flags uint32
	}
)

// takeDisk starts this program anew in this process, in such a way that the kernel asks it about fsyncs. It returns only if
// that cannot be done.
func takeDisk() error {
	runtime.LockOSThread() // the filter is the thread's, and the one thread that execve leaves has it
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // seccompData.nr
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_FSYNC, Jt: 1},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_FDATASYNC, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return errno
	}
	if _, err := unix.FcntlInt(fd, unix.F_SETFD, 0); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return syscall.Exec(self, os.Args, append(os.Environ(), fmt.Sprintf("%s=%d", diskEnv, fd)))
}

// beDisk answers the kernel, if takeDisk was here, and reports whether it does.
func beDisk() bool {
	fd, err := strconv.Atoi(os.Getenv(diskEnv))
	if err != nil {
		return false
	}
	var slow atomic.Bool
	told := make(chan os.Signal, 16)
	signal.Notify(told, slowDown, speedUp)
	go func() {
		for s := range told {
			slow.Store(s == slowDown)
		}
	}()
	done := func(id uint64) {
		resp := seccompResp{id: id}
		// An error means that nobody waits any more.
		_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&resp)))
	}
	go func() {
		for {
			var n seccompNotif // to be zero
			_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n)))
			switch {
			case errno == unix.EINTR || errno == unix.ENOENT:
			case errno != 0:
				panic(fmt.Sprintf("the kernel asks no more about fsyncs: %v", errno))
			case slow.Load():
				time.AfterFunc(slowFsync, func() { done(n.id) })
			default:
				done(n.id)
			}
		}
	}()
	return true
}

var errNoSlowDisk = errors.New("no slow disk here: the kernel lets this process install no seccomp filter")
