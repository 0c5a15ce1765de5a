package codec

import (
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestH2Spec runs h2spec, if H2SPEC names its binary, against a server's Conn:
//
//	go get github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible && go build ... (in a scratch module)
//	H2SPEC=/path/to/h2spec go test ./codec -run H2Spec -v
func TestH2Spec(t *testing.T) {
	bin := os.Getenv("H2SPEC")
	if bin == "" {
		t.Skip("H2SPEC is not set")
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
		t.Logf("%v: %s", args, lines[len(lines)-1])
		if err != nil {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
}
