package recipes

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	epb "go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	lpb "go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"

	"spindle/codec"
	"spindle/server"
)

// Answers that are not the services' own; the texts are grpc-go's.
var (
	statusNoMessage  = codec.Status{Code: codec.Unknown, Msg: "EOF"}
	statusBadMessage = codec.Status{Code: codec.Internal, Msg: "grpc: error unmarshalling request: proto: cannot parse invalid wire-format data"}
)

// runner does one method's work, on a goroutine of its own.
type runner func(ctx context.Context, b *backend, msg []byte, out *call) error

var methods = []struct {
	path string
	run  runner
}{
	{lpb.Lock_Lock_FullMethodName, unary(new(lpb.LockRequest), func(b *backend) rpcFunc[*lpb.LockRequest, *lpb.LockResponse] { return b.lock.Lock })},
	{lpb.Lock_Unlock_FullMethodName, unary(new(lpb.UnlockRequest), func(b *backend) rpcFunc[*lpb.UnlockRequest, *lpb.UnlockResponse] { return b.lock.Unlock })},
	{epb.Election_Campaign_FullMethodName, unary(new(epb.CampaignRequest), func(b *backend) rpcFunc[*epb.CampaignRequest, *epb.CampaignResponse] { return b.election.Campaign })},
	{epb.Election_Proclaim_FullMethodName, unary(new(epb.ProclaimRequest), func(b *backend) rpcFunc[*epb.ProclaimRequest, *epb.ProclaimResponse] { return b.election.Proclaim })},
	{epb.Election_Leader_FullMethodName, unary(new(epb.LeaderRequest), func(b *backend) rpcFunc[*epb.LeaderRequest, *epb.LeaderResponse] { return b.election.Leader })},
	{epb.Election_Resign_FullMethodName, unary(new(epb.ResignRequest), func(b *backend) rpcFunc[*epb.ResignRequest, *epb.ResignResponse] { return b.election.Resign })},
	{epb.Election_Observe_FullMethodName, observe},
}

// rpcFunc is a unary method as generated interfaces have it.
type rpcFunc[Req, Resp proto.Message] func(context.Context, Req) (Resp, error)

// unary makes the runner of a unary method; zero is an empty request.
func unary[Req, Resp proto.Message](zero Req, of func(*backend) rpcFunc[Req, Resp]) runner {
	return func(ctx context.Context, b *backend, msg []byte, out *call) error {
		req := zero.ProtoReflect().New().Interface().(Req)
		if proto.Unmarshal(msg, req) != nil {
			return statusBadMessage
		}
		resp, err := of(b)(ctx, req)
		if err != nil {
			return err
		}
		return out.send(ctx, resp)
	}
}

func observe(ctx context.Context, b *backend, msg []byte, out *call) error {
	req := new(epb.LeaderRequest)
	if proto.Unmarshal(msg, req) != nil {
		return statusBadMessage
	}
	return b.election.Observe(req, &observer{ctx: ctx, out: out})
}

// observer is the stream of answers that etcd's Observe writes to.
type observer struct {
	grpc.ServerStream // nil: Observe uses what is below
	ctx               context.Context
	out               *call
}

func (o *observer) Context() context.Context            { return o.ctx }
func (o *observer) Send(resp *epb.LeaderResponse) error { return o.out.send(o.ctx, resp) }

// call is one RPC. Its methods of server.StreamHandler, and what it posts, run on its client's event loop, which
// also owns its fields; run and send are the goroutine's.
type call struct {
	s      *Service
	run    runner
	rpc    *server.RPC
	cancel context.CancelFunc // nil before the request has come
	over   bool
	taken  chan struct{} // of the one answer that waits for its client
}

var _ server.StreamHandler = (*call)(nil)

// Open implements server.StreamHandler.
func (c *call) Open(rpc *server.RPC) { c.rpc = rpc }

// Message implements server.StreamHandler. There is one request; as with grpc-go what follows it is not read.
func (c *call) Message(msg []byte) {
	if c.cancel != nil || c.over {
		return
	}
	if st := c.s.begin(len(msg)); st.Code != codec.OK {
		c.finish(st)
		return
	}
	var ctx context.Context
	ctx, c.cancel = context.WithCancel(c.s.ctx)
	own, loop := append([]byte(nil), msg...), c.rpc.Loop()
	go func() {
		st := c.s.perform(ctx, c.run, own, c)
		loop.Post(func() { c.finish(st) })
	}()
}

// HalfClose implements server.StreamHandler.
func (c *call) HalfClose() {
	if c.cancel == nil {
		c.finish(statusNoMessage)
	}
}

// Cancel implements server.StreamHandler.
func (c *call) Cancel() {
	c.over = true
	if c.cancel != nil {
		c.cancel()
	}
}

// Drained implements server.StreamHandler.
func (c *call) Drained() {
	if c.taken != nil {
		close(c.taken)
		c.taken = nil
	}
}

func (c *call) finish(st codec.Status) {
	if c.over {
		return
	}
	c.over = true
	if c.cancel != nil {
		c.cancel()
	}
	c.rpc.Finish(st)
}

// send queues one answer and returns when the client has taken it, so that a slow one holds back no more than that.
func (c *call) send(ctx context.Context, m proto.Message) error {
	msg, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	taken := make(chan struct{})
	c.rpc.Loop().Post(func() {
		if c.over {
			return // ctx is canceled
		}
		c.rpc.Send(msg)
		if c.rpc.Queued() == 0 {
			close(taken)
		} else {
			c.taken = taken
		}
	})
	select {
	case <-taken:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
