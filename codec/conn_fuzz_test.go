package codec

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"sort"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// The whole connection, fed with frames that an attacker may invent. Whatever comes, in whatever pieces: the
// same events, the same answers, output and memory within their bounds, and nothing left after Close.

// fuzzHang is how long one input may take. The fuzzer itself does not look for hangs.
const fuzzHang = time.Minute

// watchdog ends the process when an input takes too long; to be deferred: defer watchdog()().
func watchdog() func() bool {
	return time.AfterFunc(fuzzHang, func() { panic("an input takes too long") }).Stop
}

// fuzzRequests and fuzzAnswers are header blocks that an honest peer begins with.
var (
	fuzzRequests = [][]byte{
		fuzzRequest("/t/Unary"), fuzzRequest("/t/Stream"), fuzzRequest("/t/Hang"), fuzzRequest("/t/Error"),
		append(fuzzRequest("/etcdserverpb.KV/Range"), appendLiteral(nil, "grpc-timeout", "5S")...),
		append(fuzzRequest("/t/Unary"), appendLiteral(nil, "content-length", "7")...),
		append(fuzzRequest("/t/Unary"), appendLiteral(nil, "grpc-encoding", "gzip")...),
		{hpMethodPost, hpSchemeHTTP, 0x80 | 4}, // not gRPC
	}
	fuzzAnswers = [][]byte{
		responseHeaders, trailersOK, append(bytes.Clone(responseHeaders), trailersOK...),
		appendStatusFields(nil, Status{NotFound, "lost %"}), {hpStatus200},
		append(bytes.Clone(responseHeaders), appendLiteral(nil, "content-length", "7")...),
	}
)

func fuzzRequest(path string) []byte {
	b := []byte{hpMethodPost, hpSchemeHTTP}
	b = appendLiteralIdx(b, hpPath, path)
	b = appendLiteralIdx(b, hpAuthority, "h")
	return appendLiteralIdx(b, hpContentType, "application/grpc")
}

// fuzzBytes turns a script into the bytes of a peer: most scripts become well-formed frames, so that the
// fuzzer spends its time behind the frame parser, but a part of one may be any bytes.
func fuzzBytes(client bool, script []byte) []byte {
	var out []byte
	settings := true
	if len(script) > 0 {
		settings = script[0]&1 == 0
		script = script[1:]
	}
	if !client {
		out = append(out, clientPreface...)
	}
	if settings {
		out = appendFrameHeader(out, 0, frameSettings, 0, 0)
	}
	for len(script) >= 4 {
		typ, flags, id, n := script[0]%18, script[1], uint32(script[2]&0x1f), min(int(script[3]), len(script)-4)
		body := script[4 : 4+n]
		script = script[4+n:]
		switch typ {
		case 10: // as it stands
			out = append(out, body...)
		case 11: // a request or a response
			block := fuzzRequests[int(flags>>4)%len(fuzzRequests)]
			if client {
				block = fuzzAnswers[int(flags>>4)%len(fuzzAnswers)]
			}
			block = append(bytes.Clone(block), body...)
			out = appendHeaders(out, id, flags&flagEndStream != 0, block)
		case 12: // a message
			out = appendFrameHeader(out, prefixLen+n, frameData, flags&flagEndStream, id)
			out = append(appendPrefix(out, n), body...)
			out[len(out)-n-prefixLen] = flags >> 7 // compressed
		case 13: // the start of a message
			out = appendFrameHeader(out, prefixLen+n, frameData, flags&flagEndStream, id)
			out = append(appendPrefix(out, n+int(flags)), body...)
		case 14:
			out = appendFrameHeader(out, 6, frameSettings, 0, 0)
			v := uint32(0)
			for _, b := range body[:min(n, 4)] {
				v = v<<8 | uint32(b)
			}
			out = appendSetting(out, uint16(flags&7), v)
		case 15:
			out = appendWindowUpdate(out, id, uint32(flags)<<(script0(body)%24))
		case 16: // a frame whose length is a lie
			out = appendFrameHeader(out, n+int(flags), frameData, 0, id)
			out = append(out, body...)
		default:
			out = appendFrameHeader(out, n, typ, flags, id)
			out = append(out, body...)
		}
	}
	return append(out, script...)
}

func script0(b []byte) byte {
	if len(b) == 0 {
		return 0
	}
	return b[0]
}

// fuzzPeer receives the events, writes them down, and does something for each.
type fuzzPeer struct {
	t    *testing.T
	c    *Conn
	log  strings.Builder
	open map[*Stream]bool
	bad  string
}

func (p *fuzzPeer) note(s *Stream, format string, args ...any) {
	if !p.open[s] {
		p.bad = fmt.Sprintf("an event for a stream that is not open: "+format, args...)
	}
	fmt.Fprintf(&p.log, "%d: "+format+"\n", append([]any{s.ID}, args...)...)
}

func (p *fuzzPeer) finish(s *Stream, st Status) {
	delete(p.open, s)
	p.c.Finish(s, st)
}

func (p *fuzzPeer) OnRequest(s *Stream) {
	p.open[s] = true
	p.note(s, "request %s %v %v", s.Path, s.Timeout, s.HasLeader)
	if s.Path == "/t/Error" {
		p.finish(s, Status{NotFound, "nothing\nhere"})
	}
}

func (p *fuzzPeer) OnMessage(s *Stream, msg []byte) {
	p.note(s, "message %x", msg)
	if p.c.client {
		if len(msg) == 3 {
			delete(p.open, s)
			p.c.Reset(s)
		}
		return
	}
	p.c.Send(s, msg)
	if len(msg) == 1 {
		p.c.Hold(s, true)
	}
	if len(msg) == 2 {
		p.finish(s, Status{})
	}
}

func (p *fuzzPeer) OnHalfClose(s *Stream) {
	p.note(s, "half-closed")
	if s.Path != "/t/Hang" {
		p.finish(s, Status{})
	}
}

func (p *fuzzPeer) OnCancel(s *Stream) {
	p.note(s, "canceled")
	delete(p.open, s)
}

func (p *fuzzPeer) OnDrained(s *Stream) {
	if !p.open[s] {
		p.bad = "drained after its end"
	}
}

func (p *fuzzPeer) OnEnd(s *Stream, st Status, unprocessed bool) {
	p.note(s, "ended %+v %v", st, unprocessed)
	delete(p.open, s)
}
func (p *fuzzPeer) OnGoAway() { p.log.WriteString("goaway\n") }
func (p *fuzzPeer) OnPong()   { p.log.WriteString("pong\n") }

// fuzzOutcome is all that a peer can see, and the owner of the Conn was told.
type fuzzOutcome struct{ events, output, err string }

// Bounds of the answers to small input: an answer to a request is a few hundred bytes, of which the request
// may be a dozen; a message comes back as it is.
const (
	fuzzOutBase   = 4 << 10
	fuzzOutFactor = 128
)

func fuzzConnRun(t *testing.T, client bool, cfg ConnConfig, in []byte, cut func(rest int) int) fuzzOutcome {
	p := &fuzzPeer{t: t, open: map[*Stream]bool{}}
	if client {
		p.c = NewClientConn(cfg, "h", p)
		for i := range 6 {
			s := p.c.Open("/t/Unary", i&1 == 0, time.Duration(i)*time.Second)
			p.open[s] = true
			p.c.Send(s, []byte("request"))
			if i != 2 {
				p.c.CloseSend(s)
			}
		}
		p.c.Ping()
	} else {
		p.c = NewServerConn(cfg, p)
	}
	c := p.c
	var err error
	var out []byte
	for rest := in; len(rest) > 0 && err == nil; {
		n := min(len(rest), max(1, cut(len(rest))))
		piece := bytes.Clone(rest[:n])
		rest = rest[n:]
		err = c.Feed(piece)
		for i := range piece { // p is valid only during the call
			piece[i] = 0xee
		}
		fuzzBounds(t, c)
	}
	for o := c.Output(); len(o) > 0; o = c.Output() {
		out = append(out, o...)
		c.Flushed()
	}
	if len(out) > fuzzOutBase+fuzzOutFactor*len(in) {
		t.Fatalf("%d bytes of answers to %d", len(out), len(in))
	}
	errText := ""
	if err != nil {
		errText = err.Error()
	}
	p.log.WriteString("close\n")
	events := p.log.String()
	c.Close()
	if c.Streams() != 0 || c.Queued() != 0 || c.assembling != 0 || c.part != nil || c.cont.block != nil ||
		c.ready.head != nil || c.enders.head != nil || len(c.zombies) != 0 || len(p.open) != 0 {
		t.Fatalf("left behind: %d streams, %d queued, %d assembling, %d without an end", c.Streams(), c.Queued(), c.assembling, len(p.open))
	}
	if p.bad != "" {
		t.Fatal(p.bad, "\n", p.log.String())
	}
	return fuzzOutcome{events, fuzzCanonical(t, client, out), errText}
}

// fuzzBounds checks what a Conn keeps against its limits.
func fuzzBounds(t *testing.T, c *Conn) {
	t.Helper()
	if c.part != nil && cap(c.part.b) > 2*maxFrameSize {
		t.Fatalf("a frame of %d bytes is kept", cap(c.part.b))
	}
	if b := c.cont.block; b != nil && cap(b.b) > 2*max(maxFragmentFactor*c.cfg.MaxHeaderBytes, maxFrameSize) {
		t.Fatalf("a header block of %d bytes is kept", cap(b.b))
	}
	if limit := max(maxAssemblingMessages*c.cfg.MaxMessageBytes, int(c.cfg.ConnWindow)); c.assembling > 2*limit {
		t.Fatalf("%d bytes of messages in part", c.assembling)
	}
	if !c.client && c.Streams() > int(c.cfg.MaxConcurrentStreams) {
		t.Fatalf("%d streams", c.Streams())
	}
	if len(c.free) > maxFreeStreams || len(c.notes) != 0 || len(c.zombies) != 0 || c.depth != 0 {
		t.Fatalf("%d streams kept, %d notes, %d zombies, depth %d", len(c.free), len(c.notes), len(c.zombies), c.depth)
	}
	n := 0
	for _, s := range c.streams.slots {
		if s != nil {
			n += s.stream.q.n
		}
	}
	if n != c.queued {
		t.Fatalf("%d bytes wait, counted as %d", n, c.queued)
	}
}

// fuzzCanonical reads what was sent with the framer of x/net, and writes it down by stream: DATA as one
// piece, since where it is cut depends on when windows were given.
func fuzzCanonical(t *testing.T, client bool, out []byte) string {
	if client {
		if !bytes.HasPrefix(out, []byte(clientPreface)) {
			t.Fatalf("no preface: %x", out)
		}
		out = out[len(clientPreface):]
	}
	byStream := map[uint32]*strings.Builder{}
	data := map[uint32]bool{}
	put := func(id uint32, what string, isData bool) {
		b := byStream[id]
		if b == nil {
			b = &strings.Builder{}
			byStream[id] = b
		}
		if isData != data[id] {
			data[id] = isData
			b.WriteString("\n")
		}
		b.WriteString(what)
	}
	fr := http2.NewFramer(nil, bytes.NewReader(out))
	dec := hpack.NewDecoder(4096, nil)
	for read := 0; read < len(out); {
		f, err := fr.ReadFrame()
		if err != nil {
			t.Fatalf("x/net refuses what was sent: %v: %x", err, out[read:])
		}
		h := f.Header()
		read += 9 + int(h.Length)
		switch f := f.(type) {
		case *http2.DataFrame:
			put(h.StreamID, fmt.Sprintf("%x", f.Data()), true)
			if f.StreamEnded() {
				put(h.StreamID, " END\n", true)
			}
		case *http2.HeadersFrame:
			hf, err := dec.DecodeFull(f.HeaderBlockFragment())
			if err != nil || !f.HeadersEnded() {
				t.Fatalf("header block: %v", err)
			}
			put(h.StreamID, fmt.Sprintf("headers %q %v\n", fmt.Sprint(hf), f.StreamEnded()), false)
		case *http2.WindowUpdateFrame:
			if f.Increment == 0 {
				t.Fatal("WINDOW_UPDATE of 0")
			}
		case *http2.GoAwayFrame:
			put(0, fmt.Sprintf("goaway %d %v %s\n", f.LastStreamID, f.ErrCode, f.DebugData()), false)
		case *http2.RSTStreamFrame:
			put(h.StreamID, fmt.Sprintf("reset %v\n", f.ErrCode), false)
		default:
			put(h.StreamID, fmt.Sprintf("%v %v\n", h.Type, h.Flags), false)
		}
	}
	ids := make([]int, 0, len(byStream))
	for id := range byStream {
		ids = append(ids, int(id))
	}
	sort.Ints(ids)
	var all strings.Builder
	for _, id := range ids {
		fmt.Fprintf(&all, "%d: %s\n", id, byStream[uint32(id)])
	}
	return all.String()
}

func fuzzConn(t *testing.T, client bool, script []byte, cuts uint64) {
	defer watchdog()()
	if len(script) > 8<<10 {
		return
	}
	in := fuzzBytes(client, script)
	// Windows that the input cannot use up: whether a peer that ignores windows is caught depends on when
	// they were given back.
	cfg := ConnConfig{MaxConcurrentStreams: 8, MaxMessageBytes: 300, MaxHeaderBytes: 600, MaxHeaderFields: 12}
	whole := fuzzConnRun(t, client, cfg, in, func(rest int) int { return rest })
	x := cuts | 1
	random := func(int) int {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		return int(x % 40)
	}
	for name, cut := range map[string]func(int) int{"random pieces": random, "single bytes": func(int) int { return 1 }} {
		if got := fuzzConnRun(t, client, cfg, in, cut); got != whole {
			t.Fatalf("%s (%d):\n%+v\nwhole:\n%+v\ninput %x", name, cuts, got, whole, in)
		}
	}
	small := cfg
	small.StreamWindow, small.ConnWindow = uint32(cuts%200), 65535
	fuzzConnRun(t, client, small, in, random)
}

func fuzzSeeds(f *testing.F, client bool) {
	frame := func(typ, flags, id byte, body ...byte) []byte {
		return append([]byte{typ, flags, id, byte(len(body))}, body...)
	}
	seed := func(frames ...[]byte) { f.Add(append([]byte{0}, bytes.Join(frames, nil)...), uint64(len(frames))) }
	for i := range byte(8) {
		seed(frame(11, i<<4, 1), frame(12, 0, 1, 'a', 'b', 'c', 'd'), frame(12, 1, 1, 'x'), frame(11, i<<4|1, 3))
	}
	seed(frame(14, 4, 0, 0, 0, 0, 0), frame(11, 0x10, 1), frame(12, 0, 1, 'a', 'b', 'c', 'd'), frame(15, 7, 1), frame(3, 0, 1, 0, 0, 0, 8))
	seed(frame(11, 0x10, 1), frame(13, 200, 1, 1, 2, 3), frame(0, flagPadded, 1, 2, 0, 0, 0, 0), frame(6, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8))
	seed(frame(1, 0, 1, fuzzRequests[0][:5]...), frame(9, flagEndHeaders, 1, fuzzRequests[0][5:]...), frame(12, 1, 1))
	seed(frame(7, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0), frame(11, 0x21, 3), frame(3, 0, 5, 0, 0, 0, 7), frame(6, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0))
	var zip bytes.Buffer
	z := gzip.NewWriter(&zip)
	z.Write([]byte("compressed"))
	z.Close()
	seed(frame(11, 0x60, 1), frame(12, 0x80, 1, zip.Bytes()...), frame(12, 0x81, 1, 'x'))
	if client {
		seed(frame(11, 0, 1), frame(12, 0, 1, 1, 2, 3), frame(11, 0, 5), frame(12, 0, 5, 1), frame(11, 0x11, 5))
	}
}

func FuzzServerConn(f *testing.F) {
	fuzzSeeds(f, false)
	f.Fuzz(func(t *testing.T, script []byte, cuts uint64) { fuzzConn(t, false, script, cuts) })
}

func FuzzClientConn(f *testing.F) {
	fuzzSeeds(f, true)
	f.Fuzz(func(t *testing.T, script []byte, cuts uint64) { fuzzConn(t, true, script, cuts) })
}

// FuzzInflate: a compressed message becomes what compress/gzip makes of it, or is refused within its bound.
func FuzzInflate(f *testing.F) {
	var zip bytes.Buffer
	z := gzip.NewWriter(&zip)
	z.Write(bytes.Repeat([]byte("message "), 1000))
	z.Close()
	f.Add(zip.Bytes(), uint16(8000))
	f.Add(zip.Bytes(), uint16(7999))
	f.Add(append(bytes.Clone(zip.Bytes()), zip.Bytes()...), uint16(60000))
	f.Fuzz(func(t *testing.T, p []byte, limit uint16) {
		defer watchdog()()
		b, st := inflate(p, int(limit))
		r, err := gzip.NewReader(bytes.NewReader(p))
		var want []byte
		if err == nil {
			want, err = io.ReadAll(io.LimitReader(r, int64(limit)+1))
		}
		switch {
		case err == nil && len(want) <= int(limit):
			if st.Code != OK || !bytes.Equal(b.b, want) {
				t.Fatalf("%v instead of %d bytes", st, len(want))
			}
		case err == nil:
			if st.Code != ResourceExhausted {
				t.Fatalf("more than %d bytes: %v", limit, st)
			}
		case st.Code == OK:
			t.Fatalf("accepted, but %v", err)
		}
		if b != nil && len(b.b) > int(limit) {
			t.Fatalf("%d bytes", len(b.b))
		}
		putBuffer(b)
	})
}

// FuzzFrameHeader compares the nine bytes of a frame's header with x/net's framer.
func FuzzFrameHeader(f *testing.F) {
	f.Add([]byte{0, 0, 1, 2, 3, 0x80, 0, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < frameHeaderLen {
			return
		}
		h := parseFrameHeader(b)
		want, err := http2.ReadFrameHeader(bytes.NewReader(b))
		if err != nil || h.length != want.Length || h.typ != uint8(want.Type) || h.flags != uint8(want.Flags) || h.stream != want.StreamID {
			t.Fatalf("%+v, want %v %v", h, want, err)
		}
		back := appendFrameHeader(nil, int(h.length), h.typ, h.flags, h.stream)
		b[5] &= 0x7f
		if !bytes.Equal(back, b[:frameHeaderLen]) {
			t.Fatalf("% x became % x", b[:frameHeaderLen], back)
		}
	})
}
