// Package compare sets up etcd, etcd grpc-proxy and Spindle on this machine and measures them with the same load, in the
// same run, in turns. Every server is a process of its own; all of them, their data and the disks that are made
// for them are gone when it returns, also after an error.
package compare

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
)

// Config says where and with what.
type Config struct {
	Dir string // for the servers' data; "": /dev/shm if it has room, else the system's place for temporary files
	// Spindle is the binary; "": it is built from the module in the current directory.
	Spindle     string
	SpindleArgs []string // given to it besides
	Rounds      int
	// Profile is a directory that gets a CPU and an allocation profile of Spindle and the etcds without TLS for each round, and a CPU
	// profile of the generator; "": none.
	Profile string
	// DiskBps is how many bytes a second a throttled disk writes.
	DiskBps  int
	Progress io.Writer
}

// Env is where targets are started. Close removes everything.
type Env struct {
	cfg   Config
	dir   string
	self  string // this program, which is an etcd too
	build sync.Once
	bin   string
	err   error
	disks []*disk
}

// NewEnv prepares an empty directory.
func NewEnv(cfg Config) (*Env, error) {
	e := &Env{cfg: cfg}
	var err error
	if cfg.Spindle != "" {
		if e.cfg.Spindle, err = filepath.Abs(cfg.Spindle); err == nil { // servers have another working directory
			_, err = exec.LookPath(e.cfg.Spindle)
		}
		if err != nil {
			return nil, fmt.Errorf("--spindle: %w", err)
		}
	}
	if e.self, err = os.Executable(); err != nil {
		return nil, err
	}
	dir := cfg.Dir
	if dir == "" {
		e.sweep(memoryDir) // what is left there may be all that it lacks
		dir = e.usualDir()
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	e.sweep(dir)
	if e.dir, err = os.MkdirTemp(dir, dirPrefix); err != nil {
		return nil, fmt.Errorf("--dir: %w", err)
	}
	if err := os.WriteFile(filepath.Join(e.dir, ownerFile), strconv.AppendInt(nil, int64(os.Getpid()), 10), 0o600); err != nil {
		return nil, err
	}
	return e, nil
}

const (
	dirPrefix = "spindle-bench-"
	ownerFile = "pid" // in it: whose directory it is
)

// sweep removes what runs that were killed have left in dir.
func (e *Env) sweep(dir string) {
	left, _ := filepath.Glob(filepath.Join(dir, dirPrefix+"*", ownerFile))
	for _, file := range left {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		pid, err := strconv.Atoi(string(b))
		if err != nil || alive(pid) {
			continue
		}
		e.say("removing what a run that was killed has left in %s", filepath.Dir(file))
		images, _ := filepath.Glob(filepath.Join(filepath.Dir(file), "disk-*.img"))
		for _, image := range images {
			if err := leftDisk(image).remove(); err != nil {
				e.say("%v", err)
			}
		}
		if err := os.RemoveAll(filepath.Dir(file)); err != nil {
			e.say("%v", err)
		}
	}
}

// alive says whether there is such a process, also one that is another user's.
func alive(pid int) bool {
	err := syscall.Kill(pid, 0)
	return err == nil || errors.Is(err, syscall.EPERM)
}

// Close removes the disks and the directory. The targets must be stopped.
func (e *Env) Close() {
	for _, d := range e.disks {
		if err := d.remove(); err != nil {
			fmt.Fprintln(e.cfg.Progress, err)
		}
	}
	if err := os.RemoveAll(e.dir); err != nil {
		fmt.Fprintln(e.cfg.Progress, err)
	}
}

// spindle returns the binary, and builds it at the first call.
func (e *Env) spindle() (string, error) {
	if e.cfg.Spindle != "" {
		return e.cfg.Spindle, nil
	}
	e.build.Do(func() {
		e.bin = filepath.Join(e.dir, "spindle")
		fmt.Fprintln(e.cfg.Progress, "building spindle")
		if out, err := exec.Command("go", "build", "-o", e.bin, "spindle").CombinedOutput(); err != nil {
			e.err = fmt.Errorf("cannot build spindle (run this in its module, or give the binary with --spindle): %w\n%s", err, out)
		}
	})
	return e.bin, e.err
}
