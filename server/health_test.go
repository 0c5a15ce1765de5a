package server

import (
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// The health service answers as grpc-go's, which etcd registers.
func TestHealthAsGRPCGo(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ref := grpc.NewServer()
	healthpb.RegisterHealthServer(ref, health.NewServer())
	go ref.Serve(l)
	t.Cleanup(ref.Stop)
	theirs, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = theirs.Close() })
	s := startServer(t, Config{})
	ours := s.dial(t)
	ctx := testContext(t)
	for _, service := range []string{"", "etcdserverpb.KV", "nothing"} {
		req := &healthpb.HealthCheckRequest{Service: service}
		var got, want [2]proto.Message
		var errs [2]error
		for i, cc := range []*grpc.ClientConn{ours, theirs} {
			r, err := healthpb.NewHealthClient(cc).Check(ctx, req)
			st, werr := healthpb.NewHealthClient(cc).Watch(ctx, req)
			if werr != nil {
				t.Fatal(werr)
			}
			first, werr := st.Recv()
			if werr != nil {
				t.Fatal(werr)
			}
			errs[i] = err
			if i == 0 {
				got = [2]proto.Message{r, first}
			} else {
				want = [2]proto.Message{r, first}
			}
		}
		if status.Convert(errs[0]).String() != status.Convert(errs[1]).String() || errs[0] == nil && !proto.Equal(got[0], want[0]) ||
			!proto.Equal(got[1], want[1]) {
			t.Errorf("%q: %v %v, want %v %v", service, got, errs[0], want, errs[1])
		}
	}
	a, err := healthpb.NewHealthClient(ours).List(ctx, &healthpb.HealthListRequest{})
	b, err2 := healthpb.NewHealthClient(theirs).List(ctx, &healthpb.HealthListRequest{})
	if err != nil || err2 != nil || !proto.Equal(a, b) {
		t.Errorf("List: %v %v, want %v %v", a, err, b, err2)
	}

	// A server that goes away says so first.
	st, err := healthpb.NewHealthClient(ours).Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := st.Recv(); err != nil || r.Status != healthpb.HealthCheckResponse_SERVING {
		t.Fatal(r, err)
	}
	go s.Stop(ctx)
	if r, err := st.Recv(); err != nil || r.Status != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Error(r, err)
	}
	if _, err := st.Recv(); status.Code(err) != codes.Unavailable {
		t.Error(err)
	}
}
