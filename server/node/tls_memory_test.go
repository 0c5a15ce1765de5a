package node

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"

	"spindle/codec/tlsconn/tlstest"
)

const (
	// idleConnBytes is what a connection with mutual TLS and one idle watch may cost.
	idleConnBytes = 48 << 10
	// idleClients is the environment variable by which the test's binary becomes the clients' process: the number.
	idleClients = "SPINDLE_TLS_IDLE_CLIENTS"
)

// TestIdleTLSMemory opens 5,000 connections with mutual TLS and a watch each, from another process, and looks at what
// the proxy's process (its members included) grows by.
func TestIdleTLSMemory(t *testing.T) {
	if os.Getenv(idleClients) != "" {
		if err := beIdleClients(); err != nil {
			t.Fatal(err)
		}
		return
	}
	if testing.Short() {
		t.Skip("thousands of connections")
	}
	const n = 5000
	ca := tlstest.NewCA(t, "ca")
	node := startReady(t, secureConfig(t, ca, ca.Issue("member"), slog.New(slog.NewTextHandler(io.Discard, nil))))
	cli := ca.Issue("client")
	u, err := url.Parse(node.ClientURLs()[0])
	if err != nil {
		t.Fatal(err)
	}
	open := func(n int) (stop func()) {
		cmd := exec.Command(os.Args[0], "-test.run=^TestIdleTLSMemory$", "-test.timeout=5m")
		cmd.Env = append(os.Environ(), idleClients+"="+strconv.Itoa(n), "ADDR="+u.Host, "CA="+ca.File, "CERT="+cli.Cert, "KEY="+cli.Key)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var said bytes.Buffer
		cmd.Stderr = &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		stop = func() { _ = in.Close(); _ = cmd.Wait() }
		r := bufio.NewReader(out)
		for {
			line, err := r.ReadString('\n')
			if line == "all watch\n" {
				break
			}
			said.WriteString(line)
			if err != nil {
				stop()
				t.Fatalf("the clients: %v\n%s", err, said.String())
			}
		}
		go func() { _, _ = io.Copy(io.Discard, r) }()
		return stop
	}
	open(100)() // pools, stacks and lazy things
	before := residentBytes(t)
	begun := time.Now()
	stop := open(n)
	defer stop()
	took := time.Since(begun)
	after := residentBytes(t)
	each := (after - before) / n
	t.Logf("%d connections in %v: %d bytes each (%d MiB to %d MiB)", n, took, each, before>>20, after>>20)
	if each > idleConnBytes {
		t.Errorf("%d bytes for each connection, at most %d are allowed", each, idleConnBytes)
	}
}

func residentBytes(t *testing.T) int {
	t.Helper()
	runtime.GC()
	debug.FreeOSMemory()
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Skip("no /proc")
	}
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}

// beIdleClients opens the connections, says so, and holds them until its input ends.
func beIdleClients() error {
	n, err := strconv.Atoi(os.Getenv(idleClients))
	if err != nil {
		return err
	}
	pair, err := tls.LoadX509KeyPair(os.Getenv("CERT"), os.Getenv("KEY"))
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(os.Getenv("CA"))
	if err != nil {
		return err
	}
	cfg := &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}, RootCAs: tlstest.PoolOf(pem)}
	var mu sync.Mutex
	var conns []*tls.Conn
	var wg sync.WaitGroup
	errs := make(chan error, n)
	next := make(chan int, n)
	for i := range n {
		next <- i
	}
	close(next)
	for range 16 {
		wg.Go(func() {
			for range next {
				c, err := idleWatch(os.Getenv("ADDR"), cfg)
				if err != nil {
					errs <- err
					return
				}
				mu.Lock()
				conns = append(conns, c)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return err
	default:
	}
	fmt.Println("all watch")
	_, _ = io.Copy(io.Discard, os.Stdin)
	for _, c := range conns {
		_ = c.Close()
	}
	return nil
}

// idleWatch opens a connection, greets as a client does, and has a watch created.
func idleWatch(addr string, cfg *tls.Config) (*tls.Conn, error) {
	c, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	msg, err := proto.Marshal(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{
		CreateRequest: &pb.WatchCreateRequest{Key: []byte("/registry/pods/"), RangeEnd: []byte("/registry/pods0")},
	}})
	if err != nil {
		return nil, err
	}
	var out, hdr bytes.Buffer
	enc := hpack.NewEncoder(&hdr)
	for _, f := range [][2]string{
		{":method", "POST"}, {":scheme", "https"}, {":path", "/etcdserverpb.Watch/Watch"}, {":authority", addr},
		{"content-type", "application/grpc"}, {"te", "trailers"},
	} {
		if err := enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			return nil, err
		}
	}
	out.WriteString(http2.ClientPreface)
	fr := http2.NewFramer(&out, bufio.NewReader(c))
	_ = fr.WriteSettings()
	_ = fr.WriteSettingsAck()
	_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: hdr.Bytes(), EndHeaders: true})
	_ = fr.WriteData(1, false, append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(msg))), msg...))
	if _, err := c.Write(out.Bytes()); err != nil {
		return nil, err
	}
	for { // the created message
		f, err := fr.ReadFrame()
		if err != nil {
			return nil, err
		}
		if _, ok := f.(*http2.DataFrame); ok {
			return c, nil
		}
	}
}
