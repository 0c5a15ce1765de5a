package server

import (
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestH2Spec runs h2spec, if H2SPEC names its binary, against an Engine on its socket; .ci/h2spec.sh builds it.
// The codec's test of the same name runs it against a Conn alone.
func TestH2Spec(t *testing.T) {
	bin := os.Getenv("H2SPEC")
	if bin == "" {
		t.Skip("H2SPEC is not set: .ci/h2spec.sh")
	}
	s := startServer(t, Config{Loops: 2})
	host, port, err := net.SplitHostPort(s.addr())
	if err != nil {
		t.Fatal(err)
	}
	for _, strict := range []bool{false, true} {
		args := []string{"-h", host, "-p", port, "-P", "/etcdserverpb.KV/Range", "-o", "5"}
		if strict {
			args = append(args, "--strict")
		}
		out, err := exec.Command(bin, args...).CombinedOutput()
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		t.Logf("h2spec of the server %v: %s", args, lines[len(lines)-1])
		if err != nil || !strings.Contains(lines[len(lines)-1], " 0 failed") || !strings.Contains(lines[len(lines)-1], " 0 skipped") {
			t.Errorf("%v\n%s", err, out)
		}
	}
}
