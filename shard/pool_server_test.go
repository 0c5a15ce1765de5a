package shard_test

import (
	"context"
	"net"
	"testing"
	"time"

	"spindle/codec"
	"spindle/server"
	"spindle/shard"

	"github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

type outcomes chan codec.Status

func (o outcomes) Complete(_ []byte, st codec.Status, _ bool) { o <- st }

// TestPoolOnServerLoop runs the pool on the event loop that it runs on in production. The member is a gRPC server that
// knows none of etcd's methods, which is answer enough.
func TestPoolOnServerLoop(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	member := grpc.NewServer()
	healthpb.RegisterHealthServer(member, health.NewServer())
	go func() { _ = member.Serve(ln) }()
	defer member.Stop()

	eng, err := server.Start(server.Config{ListenURLs: []string{"unix://" + t.TempDir() + "/clients"}, Loops: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = eng.Stop(context.Background()) }()
	loop := eng.Loops()[0]
	p := shard.NewPool(shard.PoolConfig{
		Clusters: map[codec.ClusterID][]string{codec.Coordinator: {"http://" + ln.Addr().String()}},
		Metrics:  metrics.NewSet(),
	}, loop)
	const n = 1000
	got := make(outcomes, n+1)
	start := func() {
		for range n {
			p.Call(codec.Coordinator, codec.MethodTxn, []byte("x"), time.Minute, got)
		}
	}
	loop.Post(func() {
		if p.Connected(codec.Coordinator) {
			start()
		} else {
			p.OnConnected(func(codec.ClusterID) { start() })
		}
	})
	deadline := time.After(time.Minute)
	for range n {
		select {
		case st := <-got:
			if st.Code != codec.Unimplemented {
				t.Fatalf("%+v", st)
			}
		case <-deadline:
			t.Fatal("not all calls came back")
		}
	}
	closed := make(chan struct{})
	loop.Post(func() {
		p.Close()
		p.Call(codec.Coordinator, codec.MethodTxn, nil, time.Second, got)
		close(closed)
	})
	<-closed
	if st := <-got; st.Code != codec.Unavailable {
		t.Errorf("after Close: %+v", st)
	}
}
