// Package recipes serves etcd's Lock and Election services (v3lockpb.Lock, v3electionpb.Election). They are
// nothing but clients of the etcd API that run in the server: etcd's own implementation does the work here too,
// with a clientv3 that is connected to this proxy's event loop by a socket pair. So all that they do takes the same
// road as any client's requests, with the same promises.
//
// These calls are rare and wait long, so each runs on a goroutine of its own, at most maxCalls of them. A call's
// stream lives on its client's event loop (type call); what crosses over is posted. The client is made by the first
// call; before, there is nothing.
package recipes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election"
	epb "go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock"
	lpb "go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"spindle/codec"
	"spindle/server"
)

const (
	// maxCalls is how many calls of a proxy may be under way, those that wait for a lock or observe an election
	// included. Beyond: ResourceExhausted "etcdserver: too many requests".
	maxCalls = 1024
	// maxCallBytes bounds the bytes of their requests together; the same answer beyond.
	maxCallBytes = 64 << 20
	// closeTimeout is how long Close waits for calls to end: those that wait for a lock give up their place in the
	// queue first.
	closeTimeout = 2 * time.Second
)

var (
	metricRefused = metrics.GetOrCreateCounter(`spindle_requests_refused_total`)
	metricPanics  = metrics.GetOrCreateCounter(`spindle_panics_total`)
)

// Service is the two services on one Engine. Any goroutine may call its methods.
type Service struct {
	dial func() (net.Conn, error)
	log  *slog.Logger
	ctx  context.Context // of all calls; canceled by Close
	stop context.CancelFunc

	mu     sync.Mutex
	calls  int
	bytes  int
	closed bool
	idle   chan struct{} // closed when closed and calls is 0
	now    *backend      // nil before the first call
}

// backend is one client and the services on it. Fields are guarded by Service.mu.
type backend struct {
	client   *clientv3.Client
	lock     lpb.LockServer
	election epb.ElectionServer
	calls    int
	retired  bool // closed when calls is 0
}

// Serve registers the services with e. To be called before Engine.SetReady(true).
func Serve(e *server.Engine, log *slog.Logger) *Service {
	s := &Service{dial: e.Dial, log: log, idle: make(chan struct{})}
	s.ctx, s.stop = context.WithCancel(context.Background())
	for _, m := range methods {
		e.HandleStream(m.path, func(*server.Loop) server.StreamHandler { return &call{s: s, run: m.run} })
	}
	return s
}

// Close ends all calls with etcd's "server stopped". To be called before Engine.Stop, so that those that wait for a
// lock can take their keys back.
func (s *Service) Close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.closed = true
	if s.calls == 0 {
		close(s.idle)
	}
	b := s.now
	s.mu.Unlock()
	s.stop()
	late := time.NewTimer(closeTimeout)
	defer late.Stop()
	select {
	case <-s.idle:
	case <-late.C:
		s.log.Warn("lock and election calls did not end in time; their keys go with their leases")
	}
	if b != nil {
		_ = b.client.Close()
	}
}

// begin takes one of the places for calls.
func (s *Service) begin(size int) codec.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return codec.ErrStopped
	case s.calls >= maxCalls || s.bytes+size > maxCallBytes:
		metricRefused.Inc()
		return codec.ErrTooManyRequests
	}
	s.calls++
	s.bytes += size
	return codec.Status{}
}

func (s *Service) end(size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls--
	s.bytes -= size
	if s.closed && s.calls == 0 {
		close(s.idle)
	}
}

// perform runs one call, which begin has let in, to its end.
func (s *Service) perform(ctx context.Context, run runner, msg []byte, out *call) (st codec.Status) {
	defer s.end(len(msg))
	defer func() {
		if r := recover(); r != nil {
			metricPanics.Inc()
			s.log.Error("panic in a lock or election call", "panic", r, "stack", string(debug.Stack()))
			st = codec.Status{Code: codec.Internal, Msg: fmt.Sprintf("spindle: panic: %v", r)}
		}
	}()
	b, err := s.acquire()
	if err == nil {
		err = run(ctx, b, msg, out)
		s.release(b, err)
	}
	if err != nil && s.ctx.Err() != nil {
		return codec.ErrStopped
	}
	return statusOf(err)
}

// acquire returns the client, and makes one if there is none.
func (s *Service) acquire() (*backend, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, codec.ErrStopped
	}
	if s.now == nil {
		c, err := clientv3.New(clientv3.Config{
			Endpoints: []string{"spindle"}, // a name for nothing: dial is asked whatever it is
			Logger:    zap.NewNop(),
			DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
				return s.dial()
			})},
		})
		if err != nil {
			return nil, err
		}
		s.now = &backend{client: c, lock: v3lock.NewLockServer(c), election: v3election.NewElectionServer(c)}
	}
	s.now.calls++
	return s.now, nil
}

// release takes note of how a call on b ended. A clientv3 whose keep-alive stream has ended with an error that it
// takes for final keeps no lease alive any more: the next call gets a new one.
func (s *Service) release(b *backend, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.calls--
	var halted clientv3.ErrKeepAliveHalted
	if errors.As(err, &halted) && !s.closed {
		b.retired = true
		if s.now == b {
			s.now = nil
		}
	}
	if b.retired && b.calls == 0 {
		go b.client.Close()
	}
}

// statusOf is what grpc-go makes of an error that a service returns. etcd's services return clientv3's errors, which
// carry no code for it: the text is etcd's, the code Unknown.
func statusOf(err error) codec.Status {
	var own codec.Status
	switch st, ok := status.FromError(err); {
	case err == nil:
		return codec.Status{}
	case errors.As(err, &own):
		return own
	case ok:
		return codec.Status{Code: codec.Code(st.Code()), Msg: st.Message()}
	}
	st := status.FromContextError(err)
	return codec.Status{Code: codec.Code(st.Code()), Msg: st.Message()}
}
