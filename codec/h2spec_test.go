package codec

import (
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestH2Spec runs h2spec, if H2SPEC names its binary, against a server's Conn; .ci/h2spec.sh builds it.
func TestH2Spec(t *testing.T) {
	bin := os.Getenv("H2SPEC")
	if bin == "" {
		t.Skip("H2SPEC is not set: .ci/h2spec.sh")
	}
	l, err := listenEcho(ConnConfig{MaxConcurrentStreams: 100})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for _, strict := range []bool{false, true} {
		args := []string{"-h", "127.0.0.1", "-p", port, "-P", "/t/Unary", "-o", "1"}
		if strict {
			args = append(args, "--strict")
		}
		out, err := exec.Command(bin, args...).CombinedOutput()
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		t.Logf("h2spec of a Conn %v: %s", args, lines[len(lines)-1])
		if err != nil {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
}
