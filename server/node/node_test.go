package node

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"spindle/codec"
)

// guard is how long a test waits for what must happen.
const guard = time.Minute

// A cluster whose connection comes and goes does not stand for another one.
func TestWhenAllCountsClusters(t *testing.T) {
	calls := 0
	f := whenAll(3, func() { calls++ })
	for _, id := range []codec.ClusterID{codec.Coordinator, 0, 0, codec.Coordinator, 0} {
		if f(id); calls != 0 {
			t.Fatal("called without cluster 1")
		}
	}
	if f(1); calls != 1 {
		t.Errorf("%d calls", calls)
	}
}

// A panic outside of what serves one client ends the proxy: no new clients, not ready, Failed says why.
func TestPanicFailsTheNode(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := "http://" + ln.Addr().String()
	_ = ln.Close()
	n, err := Start(Config{
		ListenClientURLs: []string{"http://127.0.0.1:0"},
		Shards:           []Shard{{Name: "a", URLs: []string{nobody}}},
		Coordinator:      []string{nobody},
		Log:              slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	n.panicked(errors.New("one client's"), false)
	home := n.engine.Loops()[0]
	done := make(chan struct{})
	home.Post(func() { close(done) })
	<-done
	select {
	case err := <-n.Failed():
		t.Fatalf("failed by one client's panic: %v", err)
	default:
	}
	home.Post(func() { panic("first") })
	home.Post(func() { panic("second") })
	select {
	case err := <-n.Failed():
		if !strings.Contains(err.Error(), "first") {
			t.Errorf("failed with %q", err)
		}
	case <-time.After(guard):
		t.Fatal("the node does not fail")
	}
	if ready, why := n.Status(); ready || !strings.Contains(why, "first") {
		t.Errorf("ready %v, %q", ready, why)
	}
}
