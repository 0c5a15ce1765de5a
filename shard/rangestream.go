package shard

import (
	"spindle/codec"
)

// This file is etcd 3.7's KV.RangeStream: a list in chunks. As in etcd all chunks show one revision, each
// has keys behind those of the one before, and the last one alone carries header, more and count
// (etcdserver/v3_server.go, rangeStream).

const (
	// streamChunkBytes is the size that a chunk is closed at; one key may go beyond it.
	streamChunkBytes = 256 << 10
	// maxKeptChunk is the size up to which a chunk's memory is kept for the next one: a large key is an exception.
	maxKeptChunk = 2 * streamChunkBytes
	// maxRangeStreams bounds the RangeStreams that are open at a time. Beyond: ResourceExhausted
	// "etcdserver: too many requests".
	maxRangeStreams = 1024
)

// Answers of etcd 3.7 (etcdserver/api/v3rpc/key.go).
var (
	errStreamSorted   = codec.Status{Code: codec.Unimplemented, Msg: "RangeStream does not support custom sort orders"}
	errStreamFiltered = codec.Status{Code: codec.Unimplemented, Msg: "RangeStream does not support revision filters"}
)

// RangeStream is one RangeStream RPC. The server fills in Msg, Chunk and Done, and calls OpenRange,
// PullRange and CancelRange, all on the Core's goroutine.
//
// Chunk is called with one encoded RangeStreamResponse, whose bytes stay as they are until PullRange asks for the next
// one (for good if it never does), and not again before that: the stream holds one chunk and two pages of every
// shard at most, whatever its client does. Done is called once, after the last chunk or with an error, with Status set.
// After CancelRange neither is called. Each may be called from within OpenRange and PullRange.
type RangeStream struct {
	Msg    []byte // the client's RangeRequest; unchanged until Done or CancelRange
	Status codec.Status
	Chunk  func(s *RangeStream, msg []byte)
	Done   func(s *RangeStream)
	User   any

	c      *Core
	op     Op
	read   *pagedRead
	wanted bool
	over   bool
}

// OpenRange begins s. It may send one chunk.
func (c *Core) OpenRange(s *RangeStream) {
	s.c, s.wanted = c, true
	c.rangeStreams++
	if c.state != stateReady {
		_, why := c.Ready()
		s.ended(codec.Status{Code: codec.Unavailable, Msg: "etcdserver: not ready: " + why})
		return
	}
	if c.rangeStreams > maxRangeStreams {
		s.ended(codec.ErrTooManyRequests)
		return
	}
	op := &s.op
	op.Kind, op.Msg = OpRange, s.Msg
	p := &op.core.plan
	p.Reset()
	if st := p.Parse(OpRange, s.Msg, &c.cfg.Limits); st.Code != codec.OK {
		s.ended(st)
		return
	}
	spec := &p.ranges[0]
	switch {
	case spec.order != orderNone && !(spec.order == orderAscend && spec.target == sortKey):
		s.ended(errStreamSorted)
		return
	case spec.filters():
		s.ended(errStreamFiltered)
		return
	}
	spec.target, spec.order = sortKey, orderNone
	switch rev := p.Revision(); {
	case rev > 0:
		c.streamAt(s, rev)
	case p.Empty():
		c.Now(func(n int64, st codec.Status) {
			if !s.over {
				s.empty(n, st)
			}
		})
	case p.Serializable():
		s.read = c.newPagedRead(op, s)
		s.read.latest = true
		f := c.frontierOf(s.read.shards)
		s.read.lookAt(f, f)
	default:
		s.read = c.newPagedRead(op, s)
		s.read.begin()
	}
}

// streamAt begins a stream at a revision: its contents, with the present in the header.
func (c *Core) streamAt(s *RangeStream, rev int64) {
	c.presentOf(&s.op, func(n int64, st codec.Status) {
		switch {
		case s.over:
		case st.Code != codec.OK:
			s.ended(st)
		case rev > n:
			s.ended(codec.ErrFutureRev)
		case rev < c.compacted:
			s.ended(codec.ErrCompacted)
		case s.op.core.plan.Empty():
			c.lookCompacted(rev, func(st codec.Status) {
				if !s.over {
					s.empty(n, st)
				}
			})
		default:
			r := c.newPagedRead(&s.op, s)
			s.read = r
			c.awaitFrontiers(r.shards, rev, r.deadline, func() { r.lookAt(rev, n) })
		}
	})
}

// empty answers a range that holds no key that a client can see.
func (s *RangeStream) empty(n int64, st codec.Status) {
	if st.Code == codec.OK {
		hdr := s.c.hdr
		hdr.Revision = n
		chunk, m := codec.BeginMessage(nil, 1)
		chunk = codec.EndMessage(codec.AppendHeaderField(chunk, &hdr), m)
		s.wanted = false
		s.Chunk(s, chunk)
	}
	s.ended(st)
}

// PullRange asks for the next chunk; the one before has been passed on.
func (c *Core) PullRange(s *RangeStream) {
	if s.over {
		return
	}
	if c.state != stateReady {
		s.ended(codec.ErrStopped)
		return
	}
	s.wanted = true
	if s.read != nil {
		s.read.merge()
	}
}

// CancelRange ends s without a further word: nobody waits for it any more.
func (c *Core) CancelRange(s *RangeStream) {
	if !s.over {
		s.leave()
	}
}

// leave frees what s holds.
func (s *RangeStream) leave() {
	s.over = true
	s.c.rangeStreams--
	if r := s.read; r != nil {
		s.read = nil
		r.drop()
	}
}

func (s *RangeStream) ended(st codec.Status) {
	if s.over {
		return
	}
	s.leave()
	s.Status = st
	s.Done(s)
}
