package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/gzip"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"spindle/server/node"
)

// unheard is a compressor that no server has (but the etcd in this process: codec tests what Spindle says to it).
type unheard struct{}

func (unheard) Name() string                                 { return "unheard" }
func (unheard) Compress(w io.Writer) (io.WriteCloser, error) { return writeCloser{w}, nil }
func (unheard) Decompress(r io.Reader) (io.Reader, error)    { return r, nil }

type writeCloser struct{ io.Writer }

func (writeCloser) Close() error { return nil }

func init() { encoding.RegisterCompressor(unheard{}) }

// TestWireAsEtcd asks a plain etcd and Spindle the same, and compares how they answer at the level of gRPC.
func TestWireAsEtcd(t *testing.T) {
	t.Parallel()
	n := startSpindle(t, 2, 1, func(c *node.Config) { c.MaxRequestBytes = 1536 << 10 })[0]
	servers := []*rpc{dial(t, n.ClientURLs()[0]), dial(t, startEtcd(t))}
	key := []byte("wire")
	for name, ask := range map[string]func(ctx context.Context, s *rpc) (string, error){
		"gzip": func(ctx context.Context, s *rpc) (string, error) {
			_, err := s.kv.Put(ctx, &pb.PutRequest{Key: key, Value: bytes.Repeat([]byte("v"), 100_000)}, grpc.UseCompressor("gzip"))
			return "", err
		},
		"gzip bomb": func(ctx context.Context, s *rpc) (string, error) {
			_, err := s.kv.Put(ctx, &pb.PutRequest{Key: key, Value: make([]byte, 16<<20)}, grpc.UseCompressor("gzip"))
			return "", err
		},
		"gzip, a list": func(ctx context.Context, s *rpc) (string, error) {
			r, err := s.kv.Range(ctx, &pb.RangeRequest{Key: []byte("nothing"), RangeEnd: []byte("nothinh")}, grpc.UseCompressor("gzip"))
			return fmt.Sprint(len(r.GetKvs())), err
		},
		"unknown encoding, unknown method": func(ctx context.Context, s *rpc) (string, error) {
			return "", s.conn.Invoke(ctx, "/etcdserverpb.KV/Odd", &pb.RangeRequest{Key: key}, &pb.RangeResponse{}, grpc.UseCompressor("unheard"))
		},
		"too large for etcd": func(ctx context.Context, s *rpc) (string, error) {
			_, err := s.kv.Put(ctx, &pb.PutRequest{Key: key, Value: make([]byte, 1600<<10)})
			return "", err
		},
		"too large for gRPC": func(ctx context.Context, s *rpc) (string, error) {
			_, err := s.kv.Put(ctx, &pb.PutRequest{Key: key, Value: make([]byte, 3<<20)})
			return "", err
		},
		"metadata": func(ctx context.Context, s *rpc) (string, error) {
			ctx = metadata.AppendToOutgoingContext(ctx, "x", "plain", "x", "twice", "x-bin", "\x00\xff\x80", "empty", "", "authorization", strings.Repeat("t", 4000))
			_, err := s.kv.Range(ctx, &pb.RangeRequest{Key: []byte("nothing")})
			return "", err
		},
		"health": func(ctx context.Context, s *rpc) (string, error) {
			r, err := healthpb.NewHealthClient(s.conn).Check(ctx, &healthpb.HealthCheckRequest{})
			return r.GetStatus().String(), err
		},
		"health of a service": func(ctx context.Context, s *rpc) (string, error) {
			_, err := healthpb.NewHealthClient(s.conn).Check(ctx, &healthpb.HealthCheckRequest{Service: "etcdserverpb.KV"})
			return "", err
		},
	} {
		var got [2]string
		for i, s := range servers {
			out, err := ask(callContext(t), s)
			got[i] = out + " " + status.Convert(err).String()
		}
		if got[0] != got[1] {
			t.Errorf("%s: %s\netcd: %s", name, got[0], got[1])
		}
	}
}

// TestListsShareMemory has more large answers asked for at a time than memory allows: they take turns, and all
// are right.
func TestListsShareMemory(t *testing.T) {
	const keys, limit = 4000, 6 << 20 // 4 MiB a list
	n := startSpindle(t, 2, 1, func(c *node.Config) { c.MaxClientMemory = limit })[0]
	url := n.ClientURLs()[0]
	fill(t, url, keys)
	var wg sync.WaitGroup
	errs := make(chan error, 1)
	clients := 20
	if raceEnabled {
		clients = 8 // which take their time to read so much
	}
	for i := range clients {
		s := dial(t, url)
		wg.Go(func() {
			for range scale(5) {
				r, err := s.kv.Range(context.Background(), &pb.RangeRequest{Key: []byte("m/"), RangeEnd: []byte("m0"), Serializable: i%3 == 0})
				if err != nil || len(r.Kvs) != keys {
					fatalOnce(errs, "%d keys, %v", len(r.GetKvs()), err)
					return
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		t.Error(err)
	default:
	}
	_, page := httpGet(t, n.MetricsURLs()[0]+"/metrics")
	if strings.Contains(page, "spindle_large_lists_waited_total 0\n") || !strings.Contains(page, "spindle_large_lists_waited_total") {
		t.Error("no list had to wait")
	}
	waitUntil(t, "nothing is held", readyTimeout, func() bool {
		_, page := httpGet(t, n.MetricsURLs()[0]+"/metrics")
		return strings.Contains(page, "spindle_client_memory_bytes 0\n")
	})
}
