package compare

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	memoryDir = "/dev/shm"
	// enoughMemory is what memoryDir must have to be taken without being asked for: a comparison of five targets leaves 3 GiB there.
	// Containers often have 64 MiB.
	enoughMemory = 4 << 30
	// nearlyFull is what etcd needs at once for its next log, and a little more.
	nearlyFull = 80 << 20
)

// free is how many bytes can be written to dir; all, if that cannot be known.
func free(dir string) uint64 {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 1 << 62
	}
	return st.Bavail * uint64(st.Bsize)
}

// usualDir is where data lies if nobody says where: in memory, if there is enough.
func (e *Env) usualDir() string {
	if st, err := os.Stat(memoryDir); err != nil || !st.IsDir() {
		return os.TempDir()
	}
	if n := free(memoryDir); n < enoughMemory {
		e.say("data in %s, and what is measured may be its disk: %s has %d MiB (--dir says where)", os.TempDir(), memoryDir, n>>20)
		return os.TempDir()
	}
	return memoryDir
}

// explain adds to the error of a target what its processes could not say: their logs lie in e.dir, too.
func (e *Env) explain(err error) error {
	if n := free(e.dir); n < nearlyFull {
		return errors.Join(fmt.Errorf("%s is full, %d MiB are free", e.dir, n>>20), err)
	}
	return err
}
