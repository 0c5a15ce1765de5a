package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"spindle/shard/embedded/embeddedtest"
)

// SIGHUP makes a process read its configuration file again: the endpoints of members move under load without an error,
// whatever else has changed is named, and a file that is no good changes nothing.
func TestReloadEndpoints(t *testing.T) {
	builtWithoutRace(t)
	t.Parallel()
	members := startMembers(t, 1)
	three := embeddedtest.Start(t, 3, nil)
	coordinator := embeddedtest.NewRelay(t) // another way to the same one
	coordinator.SetTarget(strings.TrimPrefix(members.Coordinator, "http://"))
	url, metrics := freeURL(t), freeURL(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "spindle.yaml")
	write := func(more string, coordinator string, nodes ...int) {
		t.Helper()
		if more == "" {
			more = "shard-timeout: 30s\n" // a busy machine is no lost shard
		}
		var urls []string
		for _, i := range nodes {
			urls = append(urls, three.URL(i))
		}
		text := fmt.Sprintf("listen-client-urls: %s\nlisten-metrics-urls: %s\ncoordinator: %s\nshard-max-txn-ops: 1024\nshard-max-request-bytes: 1638400\n%s"+
			"partitioner: range\nshard:\n- {name: one, urls: [%q], end: p}\n- {name: three, urls: [%s], start: p}\n",
			url, metrics, coordinator, more, members.Shards[0], strings.Join(urls, ", "))
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var p *process
	reloads := 0
	reload := func(want ...string) {
		t.Helper()
		reloads++
		p.signal(t, syscall.SIGHUP)
		waitUntil(t, "the configuration is read again", readyTimeout, func() bool {
			return strings.Count(p.log(), "the configuration was read again") == reloads
		})
		for _, w := range want {
			if !strings.Contains(p.log(), w) {
				t.Errorf("the log does not say %q:\n%s", w, p.log())
			}
		}
	}
	connected := func(cluster string, urls ...string) {
		t.Helper()
		waitUntil(t, fmt.Sprintf("%s is connected to %v and to nothing else", cluster, urls), readyTimeout, func() bool {
			_, page := httpGet(t, metrics+"/metrics")
			prefix, n := fmt.Sprintf("spindle_member_connected{cluster=%q", cluster), 0
			for line := range strings.SplitSeq(page, "\n") {
				if !strings.HasPrefix(line, prefix) {
					continue
				}
				n++
				if !strings.HasSuffix(line, "} 1") {
					return false
				}
			}
			for _, u := range urls {
				if !strings.Contains(page, fmt.Sprintf("%s,endpoint=%q} 1", prefix, u)) {
					return false
				}
			}
			return n == len(urls)
		})
	}

	write("", members.Coordinator, 0)
	p = startProcess(t, dir, "--config", file)
	p.awaitReady(t)
	l := startLoad(t, dial(t, url), "one/", "three/")
	l.progress("at first", 8)

	reload("no endpoint has changed")
	write("shard-timeout: 7s\n", coordinator.URL(), 1, 2)
	l.mark()
	reload("need a restart", "options=--shard-timeout", "three, coordinator")
	connected("three", three.URL(1), three.URL(2))
	connected("coordinator", coordinator.URL())
	l.progress("moved", 8)
	l.report("endpoints moved")

	// The node that was left may go now. It comes back at the same address, and is taken in again.
	three.Kill(0)
	l.progress("without the node that was left", 8)
	three.Restart(0)
	write("", coordinator.URL(), 0, 1, 2)
	reload()
	connected("three", three.URL(0), three.URL(1), three.URL(2))
	l.progress("with all", 8)

	write("shard-timeout: soon\n", coordinator.URL(), 1)
	reload("cannot be used")
	l.progress("after a bad file", 8)
	connected("three", three.URL(0), three.URL(1), three.URL(2))
	l.end()
	p.signal(t, syscall.SIGTERM)
	if code := p.exit(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
