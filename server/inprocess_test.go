package server

import (
	"context"
	"errors"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// A connection without a network is a client's like any other, and goes with the engine.
func TestDial(t *testing.T) {
	forLoops(t, func(t *testing.T, loops int) {
		s := startServer(t, Config{Loops: loops})
		dialed := 0
		cc, err := grpc.NewClient("passthrough:///nowhere", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { dialed++; return s.Dial() }))
		if err != nil {
			t.Fatal(err)
		}
		defer cc.Close()
		kv := pb.NewKVClient(cc)
		if _, err := kv.Put(testContext(t), &pb.PutRequest{Key: []byte("k"), Value: []byte("v")}); err != nil {
			t.Fatal(err)
		}
		if r, err := kv.Range(testContext(t), &pb.RangeRequest{Key: []byte("k")}); err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != "v" {
			t.Errorf("%v, %v", r, err)
		}
		if n := s.conns.Load(); n != 1 || dialed != 1 {
			t.Errorf("%d connections, %d dialed", n, dialed)
		}
		if err := s.Stop(testContext(t)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Dial(); !errors.Is(err, errStopping) {
			t.Errorf("Dial after Stop: %v", err)
		}
		if n := s.conns.Load(); n != 0 {
			t.Errorf("%d connections after Stop", n)
		}
	})
}
