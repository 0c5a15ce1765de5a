package e2e

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"spindle/shard/embedded/embeddedtest"
)

// limitFiles sets the soft limit of a process's descriptors, from outside.
func limitFiles(t testing.TB, pid int, n uint64) {
	t.Helper()
	var lim unix.Rlimit
	err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &lim)
	if err == nil {
		lim.Cur = n
		err = unix.Prlimit(pid, unix.RLIMIT_NOFILE, &lim, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// filesOf returns how many descriptors a process has.
func filesOf(t testing.TB, pid int) uint64 {
	t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Skip(err)
	}
	return uint64(len(files))
}

// A proxy that has no file descriptors left serves those who are connected and turns others away; once there is not even
// one to turn somebody away with, clients wait, and so do lost connections to members. It says what to do, costs no
// CPU meanwhile, and recovers by itself. (gnet's own accept would have ended the process.)
func TestOutOfDescriptors(t *testing.T) {
	t.Parallel()
	builtWithoutRace(t)
	const tells = "no file descriptors are left"
	members := startMembers(t, 2)
	relay := embeddedtest.NewRelay(t)
	relay.SetTarget(strings.TrimPrefix(members.Shards[1], "http://"))
	url, metrics := freeURL(t), freeURL(t)
	config := filepath.Join(t.TempDir(), "spindle.yaml")
	err := os.WriteFile(config, fmt.Appendf(nil, "partitioner: range\nshard:\n- {name: %s, urls: %q, end: p}\n- {name: %s, urls: %q, start: p}\n",
		members.Names[0], members.Shards[0], members.Names[1], relay.URL()), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, t.TempDir(), "--config", config, "--coordinator", members.Coordinator, "--listen-client-urls", url,
		"--listen-metrics-urls", metrics, "--shard-max-txn-ops", "1024", "--shard-max-request-bytes", "1638400",
		"--shard-timeout", "10s") // a shard that is away is waited for a quarter of it
	p.awaitReady(t)
	pid := p.cmd.Process.Pid
	var all unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &all); err != nil {
		t.Skip(err)
	}
	conn := dial(t, url)
	l := startLoad(t, conn, "one/", "two/")
	one, two := l.areas[0], l.areas[1]
	l.progress("at first", 10)

	// A few are left. Clients take them; everybody else is turned away, and nobody waits.
	limitFiles(t, pid, filesOf(t, pid)+4)
	for n := range 40 {
		c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetReadDeadline(time.Now().Add(callTimeout))
		if _, err := c.Read(make([]byte, 1)); os.IsTimeout(err) {
			t.Fatalf("client %d was neither served nor turned away", n)
		}
	}
	if !strings.Contains(p.log(), tells) {
		t.Errorf("clients have taken all descriptors, and nothing was said:\n%s", p.log())
	}
	l.progress("clients have taken all descriptors", 8)

	// None is left for anything.
	before, begun := cpuOf(t, p), time.Now()
	l.progress("before", 16)
	busy := (cpuOf(t, p) - before) / time.Since(begun).Seconds()
	limitFiles(t, pid, 3)
	late := make(chan error, 1)
	go func() {
		_, err := dial(t, url).kv.Put(callContext(t), &pb.PutRequest{Key: []byte("one/late")})
		late <- err
	}()
	for _, a := range []*loadArea{two, l.all, l.leases} {
		a.mayFail.Store(true)
	}
	relay.Reset()
	waitUntil(t, "the shard to which the connection was lost is refused, and why", callTimeout, func() bool {
		l.check()
		_, err := conn.kv.Put(callContext(t), &pb.PutRequest{Key: []byte("two/x")})
		st := status.Convert(err)
		return st.Code() == codes.Unavailable && strings.Contains(st.Message(), members.Names[1]) && strings.Contains(st.Message(), "too many open files in this process")
	})
	operator := &http.Client{Timeout: 200 * time.Millisecond, Transport: &http.Transport{DisableKeepAlives: true}}
	if r, err := operator.Get(metrics + "/readyz"); err == nil {
		r.Body.Close()
		t.Error("there was a descriptor for an operator")
	}
	before, begun = cpuOf(t, p), time.Now()
	l.progress("there are no descriptors", 16, one)
	l.pause(time.Second)
	if now := (cpuOf(t, p) - before) / time.Since(begun).Seconds(); now > busy+0.5 {
		t.Errorf("the proxy takes %.2f cores without descriptors, %.2f before", now, busy)
	}
	select {
	case err := <-late:
		t.Errorf("a client came in without a descriptor: %v", err)
	default:
	}

	limitFiles(t, pid, all.Cur)
	begun = time.Now()
	if err := <-late; err != nil {
		t.Errorf("the client that waited: %v", err)
	}
	waitUntil(t, "the shard is back", callTimeout, func() bool {
		_, err := conn.kv.Put(callContext(t), &pb.PutRequest{Key: []byte("two/x")})
		return err == nil
	})
	back := time.Since(begun)
	l.progress("descriptors are there again", 8)
	waitUntil(t, "the operator is served", callTimeout, func() bool {
		code, _ := httpGet(t, metrics+"/readyz")
		return code == http.StatusOK
	})
	if hits := limitHits(t, metrics); hits["descriptors"] < 20 {
		t.Errorf("%d clients were turned away for want of descriptors", hits["descriptors"])
	}
	l.end()
	n := strings.Count(p.log(), tells)
	t.Logf("%d lines in the log; all is well %v after descriptors are there", n, back.Round(time.Millisecond))
	if n > 1+int(time.Since(begun)/(10*time.Second))+6 || !strings.Contains(p.log(), "raise the limit") {
		t.Errorf("%d lines in the log, or they do not say what to do:\n%s", n, p.log())
	}
	select {
	case <-p.done:
		t.Error("the process has ended")
	default:
	}
}
