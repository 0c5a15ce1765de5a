package e2e

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"spindle/shard/embedded/embeddedtest"
)

var binary struct {
	once sync.Once
	path string
	err  error
}

// spindleBinary builds the program once and returns its path.
func spindleBinary(t testing.TB) string {
	t.Helper()
	binary.once.Do(func() {
		dir, err := os.MkdirTemp("", "spindle-e2e-")
		if err != nil {
			binary.err = err
			return
		}
		binary.path = filepath.Join(dir, "spindle")
		cmd := exec.Command("go", "build", "-o", binary.path, "spindle")
		if out, err := cmd.CombinedOutput(); err != nil {
			binary.err = fmt.Errorf("go build: %w\n%s", err, out)
		}
	})
	if binary.err != nil {
		t.Fatal(binary.err)
	}
	return binary.path
}

// builtWithoutRace skips a test whose proxies are processes when the tests have the race detector: the processes have not, so it would find nothing
// more in them.
func builtWithoutRace(t *testing.T) {
	t.Helper()
	if raceEnabled {
		t.Skip("its proxies are processes, which are built without the race detector")
	}
}

// sideBySide is how many tests run at once that say t.Parallel: those that mostly wait, or compare answers however long
// they take. They come after the others, which measure time, memory or CPU and have the machine to themselves.
// More would make the deadlines of leases and shards in these tests tight on two cores.
// Under the race detector, which multiplies the memory of the embedded etcds, too, it is half of that, and Go's heap has a soft limit: the whole took
// 5.2 GB once.
const (
	sideBySide     = 4
	sideBySideRace = 2
	heapRace       = 1 << 30 // bytes; what the race detector itself keeps comes on top
)

func TestMain(m *testing.M) {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	n := sideBySide
	if raceEnabled {
		n = sideBySideRace
		if os.Getenv("GOMEMLIMIT") == "" {
			debug.SetMemoryLimit(heapRace)
		}
	}
	if !given {
		if err := flag.Set("test.parallel", strconv.Itoa(n)); err != nil {
			panic(err)
		}
	}
	code := m.Run()
	if binary.path != "" {
		os.RemoveAll(filepath.Dir(binary.path))
	}
	os.Exit(code)
}

// process is a running spindle.
type process struct {
	cmd    *exec.Cmd
	mu     sync.Mutex
	stderr strings.Builder
	ready  chan struct{} // closed when it has said that it serves
	done   chan struct{} // closed when it has ended
	err    error         // of Wait
}

// startProcess starts the program in dir with args, and kills it at the end of the test.
func startProcess(t testing.TB, dir string, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(spindleBinary(t), args...), ready: make(chan struct{}), done: make(chan struct{})}
	p.cmd.Dir = dir
	p.cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}
	pipe, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		said := false
		for lines := bufio.NewScanner(pipe); lines.Scan(); {
			p.mu.Lock()
			p.stderr.WriteString(lines.Text() + "\n")
			p.mu.Unlock()
			if !said && strings.Contains(lines.Text(), "Spindle is ready") {
				said = true
				close(p.ready)
			}
		}
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			t.Logf("stderr of %s:\n%s", strings.Join(p.cmd.Args, " "), p.log())
		}
	})
	return p
}

func (p *process) log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stderr.String()
}

func (p *process) awaitReady(t testing.TB) {
	t.Helper()
	select {
	case <-p.ready:
	case <-p.done:
		t.Fatalf("spindle ended: %v\n%s", p.err, p.log())
	case <-time.After(readyTimeout):
		t.Fatalf("spindle is not ready:\n%s", p.log())
	}
}

// exit waits for the end and returns the exit code.
func (p *process) exit(t testing.TB) int {
	t.Helper()
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(readyTimeout):
		t.Fatalf("spindle does not end:\n%s", p.log())
		return 0
	}
}

func (p *process) signal(t testing.TB, s os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// freeURL returns a URL on 127.0.0.1 whose port is free now.
func freeURL(t testing.TB) string {
	t.Helper()
	return "http://" + embeddedtest.FreeAddr(t)
}

// run starts the program, waits for its end, and returns exit code and stderr.
func run(t testing.TB, dir string, args ...string) (int, string) {
	t.Helper()
	p := startProcess(t, dir, args...)
	return p.exit(t), p.log()
}

// Started in an empty directory, stopped by Ctrl-C, started again: everything is still there.
func TestRunKeepsDataAndRevisions(t *testing.T) {
	builtWithoutRace(t)
	t.Parallel()
	dir, url := t.TempDir(), freeURL(t)
	args := []string{"--listen-client-urls", url, "--listen-metrics-urls", freeURL(t)}
	ctx, cancel := context.WithTimeout(context.Background(), 2*readyTimeout)
	defer cancel()

	p := startProcess(t, dir, args...)
	p.awaitReady(t)
	for _, want := range []string{url, "/metrics", "etcdctl --endpoints", "3 embedded", filepath.Join(dir, "spindle.data")} {
		if !strings.Contains(p.log(), want) {
			t.Errorf("the start line does not say %q:\n%s", want, p.log())
		}
	}
	c := client(t, url)
	const keys = 50
	revs := map[string]int64{}
	var last int64
	for i := range keys {
		k := fmt.Sprintf("run/%02d", i)
		r, err := c.Put(ctx, k, k)
		if err != nil {
			t.Fatal(err)
		}
		revs[k], last = r.Header.Revision, r.Header.Revision
	}
	p.signal(t, syscall.SIGINT)
	if code := p.exit(t); code != 0 {
		t.Fatalf("exit code %d after SIGINT:\n%s", code, p.log())
	}

	p = startProcess(t, dir, args...)
	p.awaitReady(t)
	resp, err := c.Get(ctx, "run/", withPrefix()...)
	if err != nil {
		t.Fatal(err)
	}
	if resp.Header.Revision < last {
		t.Errorf("revision %d after the restart, %d before", resp.Header.Revision, last)
	}
	if len(resp.Kvs) != keys {
		t.Errorf("%d keys after the restart", len(resp.Kvs))
	}
	for _, kv := range resp.Kvs {
		if string(kv.Value) != string(kv.Key) || kv.ModRevision != revs[string(kv.Key)] || kv.Version != 1 {
			t.Errorf("after the restart: %v, written at %d", kv, revs[string(kv.Key)])
		}
	}
	// The past is there too, though the new process remembers nothing of it.
	for _, i := range []int{0, 7, keys / 2, keys - 1} {
		k := fmt.Sprintf("run/%02d", i)
		resp, err := c.Get(ctx, "run/", append(withPrefix(), clientv3.WithRev(revs[k]))...)
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.Kvs) != i+1 || string(resp.Kvs[i].Key) != k {
			t.Errorf("at revision %d after the restart: %d keys, expected those up to %s", revs[k], len(resp.Kvs), k)
		}
	}
	r, err := c.Put(ctx, "run/00", "again")
	if err != nil || r.Header.Revision <= last {
		t.Errorf("the first put after the restart: %v, %v", r, err)
	}

	// Nobody else may use the data meanwhile, or the ports.
	code, out := run(t, dir, "--listen-client-urls", freeURL(t), "--listen-metrics-urls", freeURL(t))
	expectError(t, code, out, "spindle.data", "in use", "--data-dir")
	code, out = run(t, t.TempDir(), "--listen-client-urls", url, "--listen-metrics-urls", freeURL(t))
	expectError(t, code, out, url, "in use", "--listen-client-urls")

	p.signal(t, syscall.SIGTERM)
	if code := p.exit(t); code != 0 {
		t.Errorf("exit code %d after SIGTERM:\n%s", code, p.log())
	}
	code, out = run(t, dir, append(args, "--embedded-shards", "4")...)
	expectError(t, code, out, "holds 3 shards", "--embedded-shards says 4")
}

// expectError: exit code 1, one line on stderr, which says all of want.
func expectError(t *testing.T, code int, out string, want ...string) {
	t.Helper()
	if code != 1 || strings.Count(strings.TrimSpace(out), "\n") != 0 {
		t.Errorf("exit code %d, expected 1 and one line:\n%s", code, out)
	}
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("the error does not say %q: %s", w, out)
		}
	}
}

func TestRunErrors(t *testing.T) {
	builtWithoutRace(t)
	t.Parallel()
	dir := t.TempDir()
	code, out := run(t, dir, "--lisen-client-urls", "http://127.0.0.1:0")
	expectError(t, code, out, "--lisen-client-urls", "did you mean --listen-client-urls")
	code, out = run(t, dir, "--reorder-window", "soon")
	expectError(t, code, out, "--reorder-window", "soon")

	foreign := t.TempDir()
	if err := os.WriteFile(filepath.Join(foreign, "letter.txt"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	code, out = run(t, dir, "--data-dir", foreign)
	expectError(t, code, out, foreign, "letter.txt", "--data-dir")

	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	code, out = run(t, dir, "--listen-client-urls", "http://127.0.0.1:0", "--listen-metrics-urls", "http://"+taken.Addr().String())
	expectError(t, code, out, taken.Addr().String(), "in use", "--listen-metrics-urls")

	code, out = run(t, dir, "--version")
	if code != 0 {
		t.Errorf("--version: exit code %d, stderr %q", code, out)
	}
}

// Members that do not answer are named and tried again; until then nobody is served.
func TestRunWaitsForMembers(t *testing.T) {
	builtWithoutRace(t)
	t.Parallel()
	members := startMembers(t, 2)
	late, url, metrics := freeURL(t), freeURL(t), freeURL(t)
	p := startProcess(t, t.TempDir(), "--listen-client-urls", url, "--listen-metrics-urls", metrics,
		"--shard", "here="+members.Shards[0], "--shard", "late="+late, "--coordinator", members.Coordinator)
	waitUntil(t, "the log names the missing member", readyTimeout, func() bool { return strings.Contains(p.log(), "late") })
	waitUntil(t, "/readyz names the missing member", readyTimeout, func() bool {
		code, body := httpGet(t, metrics+"/readyz")
		return code == 503 && strings.Contains(body, "late")
	})
	if code, body := httpGet(t, metrics+"/livez"); code != 200 {
		t.Errorf("/livez while a member is missing: %d %s", code, body)
	}
	select {
	case <-p.ready:
		t.Error("ready without all members")
	default:
	}
	forward(t, strings.TrimPrefix(late, "http://"), strings.TrimPrefix(members.Shards[1], "http://"))
	p.awaitReady(t)
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	if _, err := client(t, url).Put(ctx, "k", "v"); err != nil {
		t.Error(err)
	}
	for path, want := range map[string]string{
		"/readyz": "ok", "/health": `"health":"true"`, "/livez": "ok", "/version": `"etcdserver":"3.`, "/metrics": "spindle_",
	} {
		if code, body := httpGet(t, metrics+path); code != 200 || !strings.Contains(body, want) {
			t.Errorf("%s: %d %.300s", path, code, body)
		}
	}
}
