package compare

import "syscall"

// dieWithParent: the process is killed when its parent is; and it has a group of its own, so that Ctrl-C reaches
// the parent alone, which then stops it in order.
func dieWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
}
