package server

import (
	"spindle/codec"
	"spindle/shard"
)

// RangeStreamPath is the :path of etcd 3.7's KV.RangeStream.
const RangeStreamPath = "/etcdserverpb.KV/RangeStream"

// maxRangeQueued is how many bytes of one RangeStream may wait for its client before no further chunk is
// asked for; the last chunk goes beyond it.
const maxRangeQueued = 256 << 10

// RangeCore is what serves RangeStreams: a *shard.Core. All methods are called on loop 0.
type RangeCore interface {
	OpenRange(*shard.RangeStream)
	PullRange(*shard.RangeStream)
	CancelRange(*shard.RangeStream)
}

// ServeRangeStream registers RangeStream with e. To be called before Engine.SetReady(true).
func ServeRangeStream(e *Engine, core RangeCore) {
	home := e.Loops()[0]
	e.HandleStream(RangeStreamPath, func(l *Loop) StreamHandler {
		return &rangeStream{loop: l, home: home, core: core}
	})
}

// rangeStream is one RangeStream. It lives on its client's loop, the list itself on the core's: at any
// time either a chunk was asked for, or the client has to read first. Everything between them is posted,
// also where both are one loop: a long list must not keep the loop from its other work.
type rangeStream struct {
	loop, home *Loop
	core       RangeCore
	rpc        *RPC
	s          *shard.RangeStream // nil before the request has come
	waiting    bool               // for the client to read
	over       bool
}

// Open implements StreamHandler.
func (h *rangeStream) Open(rpc *RPC) { h.rpc = rpc }

// Message implements StreamHandler. There is one request; as with grpc-go what follows it is not read.
func (h *rangeStream) Message(msg []byte) {
	if h.s != nil || h.over {
		return
	}
	s := &shard.RangeStream{Msg: append([]byte(nil), msg...)}
	h.s = s
	s.Chunk = func(_ *shard.RangeStream, chunk []byte) { h.loop.Post(func() { h.chunk(chunk) }) }
	s.Done = func(s *shard.RangeStream) {
		st := s.Status
		h.loop.Post(func() { h.done(st) })
	}
	h.home.Post(func() { h.core.OpenRange(s) })
}

// HalfClose implements StreamHandler.
func (h *rangeStream) HalfClose() {
	if h.s == nil && !h.over {
		h.over = true
		h.rpc.Finish(statusNoMessage)
	}
}

// Cancel implements StreamHandler.
func (h *rangeStream) Cancel() {
	if h.over {
		return
	}
	h.over = true
	if s := h.s; s != nil {
		h.home.Post(func() { h.core.CancelRange(s) })
	}
}

// Drained implements StreamHandler.
func (h *rangeStream) Drained() {
	if h.waiting && !h.over {
		h.waiting = false
		h.pull()
	}
}

func (h *rangeStream) pull() { h.home.Post(func() { h.core.PullRange(h.s) }) }

func (h *rangeStream) chunk(chunk []byte) {
	if h.over {
		return
	}
	h.rpc.Send(chunk)
	if h.rpc.Queued() > maxRangeQueued {
		h.waiting = true
		return
	}
	h.pull()
}

func (h *rangeStream) done(st codec.Status) {
	if h.over {
		return
	}
	h.over = true
	h.rpc.Finish(st)
}
