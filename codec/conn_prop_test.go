package codec

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// Two Conns, client and server, on one goroutine: bytes travel in random pieces, windows are small, sockets
// block at random, handlers act at random. Every stream must deliver what was sent, whole and in order, and
// end once; nothing may be left when all is done.

type propStream struct {
	s        *Stream
	rnd      *rand.Rand
	toSend   int // messages still to send
	sent     int // messages sent, each carries its number and a length that follows from it
	got      int
	closing  bool
	finished bool // server: Finish called; client: OnEnd seen
	canceled bool
	reset    bool // the client will reset it
	want     Status
}

func propMessage(id uint32, side byte, n, size int) []byte {
	b := make([]byte, 9+size)
	binary.BigEndian.PutUint32(b, id)
	b[4] = side
	binary.BigEndian.PutUint32(b[5:], uint32(n))
	for i := 9; i < len(b); i++ {
		b[i] = byte(i*7 + n)
	}
	return b
}

type propSide struct {
	t    *testing.T
	name string
	rnd  *rand.Rand
	c    *Conn
	all  map[uint32]*propStream
	opts *propWorld
}

type propWorld struct {
	seed   uint64
	max    int
	server propSide
	client propSide
	pipes  [2][]byte // to server, to client
}

func (p *propSide) fail(format string, args ...any) {
	p.t.Helper()
	p.t.Fatalf("seed %d, %s: %s", p.opts.seed, p.name, fmt.Sprintf(format, args...))
}

func (p *propSide) size() int {
	switch p.rnd.IntN(10) {
	case 0:
		return p.rnd.IntN(p.opts.max - 9)
	case 1, 2:
		return 0
	}
	return p.rnd.IntN(min(300, p.opts.max-9))
}

func (p *propSide) check(ps *propStream, side byte, msg []byte) {
	if len(msg) < 9 || binary.BigEndian.Uint32(msg) != ps.s.ID || msg[4] != side ||
		binary.BigEndian.Uint32(msg[5:]) != uint32(ps.got) {
		p.fail("stream %d: message %d is %d bytes, % x", ps.s.ID, ps.got, len(msg), msg[:min(9, len(msg))])
	}
	if !bytes.Equal(msg, propMessage(ps.s.ID, side, ps.got, len(msg)-9)) {
		p.fail("stream %d: message %d has wrong bytes", ps.s.ID, ps.got)
	}
	ps.got++
}

// step lets a stream do one thing.
func (p *propSide) step(ps *propStream, side byte) {
	if ps.finished || ps.canceled || ps.closing {
		return
	}
	switch {
	case ps.reset && p.rnd.IntN(4) == 0:
		ps.finished = true
		p.c.Reset(ps.s)
	case ps.toSend > 0:
		ps.toSend--
		p.c.Send(ps.s, propMessage(ps.s.ID, side, ps.sent, p.size()))
		ps.sent++
	case p.c.client:
		ps.closing = true
		p.c.CloseSend(ps.s)
	}
	if p.rnd.IntN(6) == 0 && !ps.finished {
		p.c.Hold(ps.s, p.rnd.IntN(2) == 0)
	}
}

// serverSide and clientSide receive the events.
type serverSide struct{ *propSide }

func (p serverSide) OnRequest(s *Stream) {
	ps := &propStream{s: s, toSend: p.rnd.IntN(6)}
	if p.rnd.IntN(3) == 0 {
		ps.want = Status{Code(1 + p.rnd.IntN(16)), fmt.Sprintf("status of %d %%", s.ID)}
	}
	s.User = ps
	p.all[s.ID] = ps
	if p.rnd.IntN(20) == 0 { // answer at once, without reading
		p.finish(ps)
	}
}

func (p serverSide) finish(ps *propStream) {
	ps.finished = true
	p.c.Finish(ps.s, ps.want)
}

func (p serverSide) OnMessage(s *Stream, msg []byte) {
	ps := s.User.(*propStream)
	if ps.finished || ps.canceled {
		p.fail("stream %d: a message after its end", s.ID)
	}
	p.check(ps, 'c', msg)
	if p.rnd.IntN(3) == 0 {
		p.step(ps, 's')
	}
	if p.rnd.IntN(40) == 0 {
		p.finish(ps)
	}
}

func (p serverSide) OnHalfClose(s *Stream) {
	ps := s.User.(*propStream)
	if ps.finished || ps.canceled {
		p.fail("stream %d: OnHalfClose after its end", s.ID)
	}
	if want := p.opts.client.all[s.ID]; want.sent != ps.got {
		p.fail("stream %d: %d messages of %d", s.ID, ps.got, want.sent)
	}
	for ps.toSend > 0 {
		p.step(ps, 's')
	}
	p.finish(ps)
}

func (p serverSide) OnCancel(s *Stream) {
	ps := s.User.(*propStream)
	if ps.canceled || ps.finished {
		p.fail("stream %d: OnCancel after its end", s.ID)
	}
	ps.canceled = true
}

func (p serverSide) OnDrained(s *Stream) {
	ps := s.User.(*propStream)
	if ps.finished || ps.canceled || s.Queued() != 0 {
		p.fail("stream %d: OnDrained with %d bytes, finished %v, canceled %v", s.ID, s.Queued(), ps.finished, ps.canceled)
	}
	p.step(ps, 's')
}

type clientSide struct{ *propSide }

func (p clientSide) OnMessage(s *Stream, msg []byte) {
	ps := s.User.(*propStream)
	if ps.finished {
		p.fail("stream %d: a message after its end", s.ID)
	}
	p.check(ps, 's', msg)
	if p.rnd.IntN(3) == 0 {
		p.step(ps, 'c')
	}
}

func (p clientSide) OnEnd(s *Stream, st Status, unprocessed bool) {
	ps := s.User.(*propStream)
	if ps.finished {
		p.fail("stream %d: ended twice", s.ID)
	}
	ps.finished = true
	srv := p.opts.server.all[s.ID]
	if unprocessed {
		if srv != nil || (st.Code != Unavailable) {
			p.fail("stream %d: unprocessed, with %+v", s.ID, st)
		}
		return
	}
	if srv == nil || !srv.finished || srv.want != st {
		p.fail("stream %d: %+v, want %+v", s.ID, st, srv)
	}
	if ps.got != srv.sent {
		p.fail("stream %d: %d messages of %d", s.ID, ps.got, srv.sent)
	}
}

func (p clientSide) OnGoAway() { p.fail("GOAWAY") }
func (p clientSide) OnPong()   {}

// carry moves some bytes from one side's Output into the pipe, and some from the pipe to the other side.
func (w *propWorld) carry(from, to *propSide, pipe *[]byte) (moved bool) {
	if from.rnd.IntN(3) > 0 {
		if out := from.c.Output(); len(out) > 0 {
			*pipe = append(*pipe, out...)
			from.c.Flushed()
			moved = true
		}
	}
	if from.rnd.IntN(8) == 0 {
		from.c.SetBlocked(from.rnd.IntN(2) == 0)
	}
	for i := from.rnd.IntN(4); i > 0 && len(*pipe) > 0; i-- {
		n := 1 + from.rnd.IntN(min(len(*pipe), 1<<from.rnd.IntN(16)))
		piece := bytes.Clone((*pipe)[:n])
		*pipe = (*pipe)[n:]
		if err := to.c.Feed(piece); err != nil {
			to.fail("Feed: %v", err)
		}
		for j := range piece { // p is valid only during the call
			piece[j] = 0xee
		}
		moved = true
	}
	return moved
}

func runProp(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 3))
	window := func() uint32 { return uint32(1 + rnd.IntN(1<<(1+rnd.IntN(17)))) }
	swin, cwin := window(), window()
	// A message takes a round trip for each window of it: small windows, small messages.
	w := &propWorld{seed: seed, max: min(1<<(8+rnd.IntN(10)), 128*int(min(swin, cwin))+64)}
	for _, p := range []*propSide{&w.server, &w.client} {
		*p = propSide{t: t, rnd: rnd, all: map[uint32]*propStream{}, opts: w}
	}
	w.server.name, w.client.name = "server", "client"
	scfg := ConnConfig{StreamWindow: swin, ConnWindow: window(), MaxMessageBytes: w.max,
		MaxConcurrentStreams: uint32(1 + rnd.IntN(30))}
	ccfg := ConnConfig{StreamWindow: cwin, ConnWindow: window(), MaxMessageBytes: w.max}
	w.server.c = NewServerConn(scfg, serverSide{&w.server})
	w.client.c = NewClientConn(ccfg, "prop", clientSide{&w.client})

	toOpen := 1 + rnd.IntN(60)
	for round := 0; ; round++ {
		if toOpen > 0 && rnd.IntN(4) == 0 {
			if s := w.client.c.Open(fmt.Sprintf("/p/%d", rnd.IntN(5)), rnd.IntN(2) == 0, time.Duration(rnd.IntN(2))*time.Hour); s != nil {
				ps := &propStream{s: s, toSend: rnd.IntN(6), reset: rnd.IntN(15) == 0}
				s.User = ps
				w.client.all[s.ID] = ps
				toOpen--
			}
		}
		live := 0
		for id := uint32(1); id < w.client.c.nextID; id += 2 {
			ps := w.client.all[id]
			if !ps.finished {
				live++
				if rnd.IntN(4) == 0 {
					w.client.step(ps, 'c')
				}
			}
			if srv := w.server.all[id]; srv != nil && !srv.finished && !srv.canceled && rnd.IntN(4) == 0 {
				w.server.step(srv, 's')
				if rnd.IntN(100) == 0 {
					serverSide{&w.server}.finish(srv)
				}
			}
		}
		moved := w.carry(&w.client, &w.server, &w.pipes[0])
		if w.carry(&w.server, &w.client, &w.pipes[1]) {
			moved = true
		}
		if live == 0 && toOpen == 0 && !moved && len(w.pipes[0])+len(w.pipes[1]) == 0 &&
			w.server.c.Streams() == 0 && w.client.c.Streams() == 0 &&
			len(w.server.c.Output()) == 0 && len(w.client.c.Output()) == 0 {
			break
		}
		if round > 2_000_000 {
			t.Fatalf("seed %d: no progress: %+v %+v: %d live, %d to open, server streams %d queued %d, client streams %d queued %d",
				seed, scfg, ccfg, live, toOpen, w.server.c.Streams(), w.server.c.Queued(), w.client.c.Streams(), w.client.c.Queued())
		}
		if round%1000 == 999 { // holds end, some time
			for _, p := range []*propSide{&w.server, &w.client} {
				p.c.SetBlocked(false)
				for _, ps := range p.all {
					if !ps.finished && !ps.canceled {
						p.c.Hold(ps.s, false)
					}
				}
			}
		}
	}
	for _, p := range []*propSide{&w.server, &w.client} {
		if p.c.Queued() != 0 || p.c.assembling != 0 || p.c.ready.head != nil || p.c.enders.head != nil || len(p.c.zombies) != 0 {
			p.fail("left behind: queued %d, assembling %d", p.c.Queued(), p.c.assembling)
		}
		if p.c.recvWin+p.c.recvUnacked != int64(p.c.cfg.ConnWindow) {
			p.fail("receive window leaks: %d + %d of %d", p.c.recvWin, p.c.recvUnacked, p.c.cfg.ConnWindow)
		}
	}
	if w.server.c.sendWin != w.client.c.recvWin || w.client.c.sendWin != w.server.c.recvWin {
		// Updates may still be in Output of a side; they were moved, or the loop would not have ended.
		t.Fatalf("seed %d: the two ends disagree on windows", seed)
	}
}

func TestConnToConnRandom(t *testing.T) {
	base := uint64(time.Now().UnixNano())
	n := 60
	if testing.Short() {
		n = 10
	}
	for i := range n {
		runProp(t, base+uint64(i))
	}
}

// The server must do the same whatever the pieces in which bytes arrive.
func TestSplitPoints(t *testing.T) {
	var in []byte
	ev := newClientEvents()
	cl := NewClientConn(ConnConfig{}, "h", ev)
	for i := 0; i < 3; i++ {
		s := cl.Open("/t/Unary", true, time.Second)
		s.User = &rpc{}
		cl.Send(s, bytes.Repeat([]byte{byte(i)}, i*40))
		cl.CloseSend(s)
	}
	in = append(in, cl.Output()...)
	// A padded DATA frame, trailers, and a header block over CONTINUATION frames.
	block := cl.req.append(nil, "/t/Unary", false, 0)
	in = appendFrameHeader(in, 1, frameHeaders, 0, 7)
	in = append(in, block[0])
	in = appendFrameHeader(in, len(block)-1, frameContinuation, flagEndHeaders, 7)
	in = append(in, block[1:]...)
	in = appendFrameHeader(in, 1+5+3+4, frameData, flagPadded, 7)
	in = append(in, 4)
	in = append(appendPrefix(in, 3), "abc\x00\x00\x00\x00"...)
	trailer := appendLiteral(nil, "x", "y")
	in = appendHeaders(in, 7, true, trailer)
	in = appendPing(in, false, [8]byte{9})

	run := func(cuts ...int) []byte {
		e := &echo{}
		e.c = NewServerConn(ConnConfig{}, e)
		prev := 0
		for _, cut := range append(cuts, len(in)) {
			piece := bytes.Clone(in[prev:cut])
			if err := e.c.Feed(piece); err != nil {
				t.Fatalf("cuts %v: %v", cuts, err)
			}
			clear(piece)
			prev = cut
		}
		if e.requests != 4 || e.c.Streams() != 0 {
			t.Fatalf("cuts %v: %d requests, %d streams", cuts, e.requests, e.c.Streams())
		}
		return bytes.Clone(e.c.Output())
	}
	want := run()
	for i := range in {
		if got := run(i); !bytes.Equal(got, want) {
			t.Fatalf("cut at %d: % x, want % x", i, got, want)
		}
		for j := i; j < len(in); j += 7 {
			if got := run(i, j); !bytes.Equal(got, want) {
				t.Fatalf("cuts at %d, %d", i, j)
			}
		}
	}
	all := make([]int, len(in))
	for i := range all {
		all[i] = i
	}
	if got := run(all...); !bytes.Equal(got, want) {
		t.Fatal("byte by byte")
	}
}
