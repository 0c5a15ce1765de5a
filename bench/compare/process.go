package compare

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	stopTimeout = 10 * time.Second
	// logTail is how much of a process's log is shown when it fails.
	logTail = 2000
	// maxPortTries is how many ports may be taken before freePort gives up.
	maxPortTries = 1000
)

// process is a server under measurement.
type process struct {
	name string
	cmd  *exec.Cmd
	log  string        // file
	web  string        // URL of its profiles; "": none
	done chan struct{} // closed when it has ended
	err  error         // of Wait
}

// starter starts processes from one thread that lives as long as this program: they are killed when the thread
// that started them ends, which must be at the end of this program, however it comes.
var starter = sync.OnceValue(func() chan func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

// startProcess starts a program with nothing in its environment but what it needs; its output goes to a file in dir.
func startProcess(name, dir, program string, args ...string) (*process, error) {
	p := &process{name: name, log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	out, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p.cmd = exec.Command(program, args...)
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = dir, out, out
	p.cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}
	// It is killed when this program is; and it has a group of its own, so that Ctrl-C reaches this program alone,
	// which then stops it in order.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error)
	starter() <- func() { started <- p.cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("cannot start %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(stopTimeout):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// failure describes how p ended, with the end of its log.
func (p *process) failure() error {
	return fmt.Errorf("%s has ended: %v\n%s", p.name, p.err, p.said())
}

// said returns the end of p's log.
func (p *process) said() []byte {
	b, _ := os.ReadFile(p.log)
	return bytes.TrimSpace(b[max(0, len(b)-logTail):])
}

// await calls ready every now and then until it says yes.
func await(ctx context.Context, what string, timeout time.Duration, procs []*process, ready func() error) error {
	every := time.NewTicker(50 * time.Millisecond)
	defer every.Stop()
	for begin := time.Now(); ; {
		err := ready()
		if err == nil {
			return nil
		}
		if time.Since(begin) > timeout {
			return fmt.Errorf("%s does not serve after %v: %w", what, timeout, err)
		}
		for _, p := range procs {
			select {
			case <-p.done:
				return p.failure()
			default:
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-every.C:
		}
	}
}

// freePort returns an address on 127.0.0.1 whose port was free a moment ago. It lies below the ports that kernels hand
// out by themselves (32768 and more on Linux), so no connection of anybody is given it before it is used.
func freePort() (string, error) {
	for tries := 1; ; tries++ {
		l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(12000+rand.IntN(20000)))
		if err == nil {
			defer l.Close()
			return l.Addr().String(), nil
		}
		if tries == maxPortTries {
			return "", err
		}
	}
}
