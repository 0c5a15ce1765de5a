package chaos

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// serveTimeout is how long a process may take until it serves; the machines are busy.
const serveTimeout = 60 * time.Second

// logKept is how many of a process's latest lines are kept for a failure.
const logKept = 400

// process is a running program, the last one of its name.
type process struct {
	name string
	cmd  *exec.Cmd
	log  *lineLog
	done chan struct{} // closed when it has ended
}

// lineLog keeps the last lines that the processes of one name said.
type lineLog struct {
	mu    sync.Mutex
	start time.Time
	lines []string
}

func (l *lineLog) add(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.lines) == logKept {
		l.lines = append(l.lines[:0], l.lines[logKept/4:]...)
	}
	l.lines = append(l.lines, fmt.Sprintf("%8.3f %s", time.Since(l.start).Seconds(), line))
}

func (l *lineLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "\n")
}

// starter starts processes from one thread that lives as long as this program: they are killed when the thread that
// started them ends, so that none survives a test that panics.
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

// startProcess starts a program. hear gets every line of its stdout and stderr, one at a time.
func startProcess(name, dir string, log *lineLog, hear func(line string), env []string, program string, args ...string) (*process, error) {
	p := &process{name: name, log: log, cmd: exec.Command(program, args...), done: make(chan struct{})}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = dir, w, w
	p.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}, env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	starter() <- func() { started <- p.cmd.Start() }
	err = <-started
	w.Close()
	if err != nil {
		r.Close()
		return nil, fmt.Errorf("cannot start %s: %w", name, err)
	}
	go func() {
		defer r.Close()
		lines := bufio.NewReader(r)
		for {
			line, err := lines.ReadString('\n')
			if line = strings.TrimSuffix(line, "\n"); line != "" {
				log.add(line)
				hear(line)
			}
			if err != nil {
				break
			}
		}
		_ = p.cmd.Wait()
		log.add("-- ended: " + p.cmd.ProcessState.String())
		close(p.done)
	}()
	return p, nil
}

func (p *process) signal(s syscall.Signal) error {
	p.log.add("-- " + s.String())
	return p.cmd.Process.Signal(s)
}

// kill ends it, also if it is stopped, and waits for that.
func (p *process) kill() {
	_ = p.signal(syscall.SIGKILL)
	<-p.done
}

// etcdEnv is the environment variable that makes this binary an etcd: an etcdSpec as JSON.
const etcdEnv = "SPINDLE_CHAOS_ETCD"

// etcdSpec says what etcd to be.
type etcdSpec struct {
	Name, Dir, Token  string
	Peer              string // the URL by which others reach it
	InitialCluster    string
	TickMs, ElectMs   uint
	MaxTxnOps, MaxReq uint
	Disk              bool // its disk may be slow
}

// What an etcd says on stdout, as JSON behind a mark: where it listens and its member ID first, then that it serves.
type etcdSays struct {
	Client, Peer, ID string
	Ready            bool
	Disk             bool // its disk can be made slow
}

const etcdMark = "ETCD "

// beEtcd runs an etcd until this process is killed. It listens on ports of the kernel's choice, and tells them.
func beEtcd(spec string) error {
	var s etcdSpec
	if err := json.Unmarshal([]byte(spec), &s); err != nil {
		return err
	}
	slowable := beDisk()
	if !slowable && os.Getenv(diskEnv) == "" && s.Disk {
		if err := takeDisk(); err != nil {
			fmt.Fprintln(os.Stderr, errNoSlowDisk, err)
		}
	}
	anyPort, err := url.Parse("http://127.0.0.1:0")
	if err != nil {
		return err
	}
	peer, err := url.Parse(s.Peer)
	if err != nil {
		return err
	}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir, cfg.InitialClusterToken, cfg.InitialCluster = s.Name, s.Dir, s.Token, s.InitialCluster
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*anyPort}, []url.URL{*anyPort}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{*anyPort}, []url.URL{*peer}
	cfg.LogLevel, cfg.LogOutputs = "warn", []string{"stderr"}
	cfg.EnableGRPCGateway = false
	// A process that is killed loses nothing that it has written, so no test here needs the disk. beDisk answers for it.
	cfg.UnsafeNoFsync = !slowable
	cfg.TickMs, cfg.ElectionMs = s.TickMs, s.ElectMs
	cfg.MaxTxnOps, cfg.MaxRequestBytes = s.MaxTxnOps, s.MaxReq
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	says := etcdSays{Client: e.Clients[0].Addr().String(), Peer: e.Peers[0].Addr().String(), ID: e.Server.MemberID().String(), Disk: slowable}
	tell := func() {
		b, _ := json.Marshal(says)
		fmt.Println(etcdMark + string(b))
	}
	tell()
	<-e.Server.ReadyNotify()
	says.Ready = true
	tell()
	return <-e.Err()
}

// startEtcd starts an etcd process. heard is called with what it says about itself.
func startEtcd(spec etcdSpec, dir string, log *lineLog, heard func(etcdSays)) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	return startProcess(spec.Name, dir, log, func(line string) {
		var says etcdSays
		if rest, ok := strings.CutPrefix(line, etcdMark); ok && json.Unmarshal([]byte(rest), &says) == nil {
			heard(says)
		}
	}, []string{etcdEnv + "=" + string(b), "GOMAXPROCS=2"}, self)
}

// readyLine is what a spindle says when it serves.
var readyLine = regexp.MustCompile(`Spindle is ready.* client=http://(\S+)`)

// startSpindle starts a proxy. ready is called with its address when it serves.
func startSpindle(name, dir string, log *lineLog, ready func(addr string), args ...string) (*process, error) {
	binary, err := spindleBinary()
	if err != nil {
		return nil, err
	}
	return startProcess(name, dir, log, func(line string) {
		if m := readyLine.FindStringSubmatch(line); m != nil {
			ready(m[1])
		}
	}, nil, binary, args...)
}

// spindleBinary builds the program once and returns its path.
var spindleBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "spindle-chaos-")
	if err != nil {
		return "", err
	}
	binaryDir = dir
	path := filepath.Join(dir, "spindle")
	if out, err := exec.Command("go", "build", "-o", path, "spindle").CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

var binaryDir string

func TestMain(m *testing.M) {
	if spec := os.Getenv(etcdEnv); spec != "" {
		fmt.Fprintln(os.Stderr, beEtcd(spec))
		os.Exit(1)
	}
	code := m.Run()
	if binaryDir != "" {
		os.RemoveAll(binaryDir)
	}
	os.Exit(code)
}
