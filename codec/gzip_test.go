package codec

import (
	"bytes"
	"compress/gzip"
	"io"
	"math/rand/v2"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/gzip"
)

// oddCompressor is one that only the client has.
type oddCompressor struct{}

func (oddCompressor) Name() string                                 { return "odd" }
func (oddCompressor) Compress(w io.Writer) (io.WriteCloser, error) { return nopCloser{w}, nil }
func (oddCompressor) Decompress(r io.Reader) (io.Reader, error)    { return r, nil }

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func init() { encoding.RegisterCompressor(oddCompressor{}) }

func zip(p []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = w.Write(p)
	_ = w.Close()
	return b.Bytes()
}

func TestServerTakesGzip(t *testing.T) {
	cc := dialEcho(t, ConnConfig{})
	ctx := testContext(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, n := range []int{0, 1, 1000, 100_000, 300_000} {
		msg := make([]byte, n)
		for i := range msg {
			msg[i] = byte(rnd.IntN(4))
		}
		got, err := unary(ctx, cc, "/t/Unary", msg, grpc.UseCompressor("gzip"))
		if err != nil || !bytes.Equal(got, msg) {
			t.Errorf("%d bytes: %d came back, %v", n, len(got), err)
		}
	}
}

func TestInflateBounds(t *testing.T) {
	const limit = 100_000
	for n, want := range map[int]Code{0: OK, limit - 1: OK, limit: OK, limit + 1: ResourceExhausted, 1000 * limit: ResourceExhausted} {
		b, st := inflate(zip(make([]byte, n)), limit)
		if st.Code != want || st.Code == OK && len(b.b) != n {
			t.Errorf("%d bytes: %v", n, st)
		}
	}
	good := zip(make([]byte, 1000))
	for name, p := range map[string][]byte{"empty": nil, "no gzip": []byte("hello world, this is no gzip"), "cut": good[:len(good)-9],
		"wrong sum": append(bytes.Clone(good[:len(good)-8]), make([]byte, 8)...)} {
		if _, st := inflate(p, limit); st.Code != Internal {
			t.Errorf("%s: %v", name, st)
		}
	}
}

// All connections that share a budget have one together, but each a little for itself.
func TestZipBombsOfManyConnections(t *testing.T) {
	budget := &InflateBudget{}
	budget.Refill()
	hits := map[Limit]int{}
	cfg := ConnConfig{Inflate: budget, OnLimit: func(l Limit) { hits[l]++ }}
	open := func(size int) (send func()) {
		r := newRawServer(t, cfg)
		r.id = 0xffffffff
		msg := zip(make([]byte, size))
		msg = append([]byte{1, byte(len(msg) >> 24), byte(len(msg) >> 16), byte(len(msg) >> 8), byte(len(msg))}, msg...)
		return func() {
			r.id += 2
			block := encodeBlock(r.enc, &r.buf, ":method", "POST", ":scheme", "http", ":path", "/t/Unary", ":authority", "a",
				"content-type", "application/grpc", "te", "trailers", "grpc-encoding", "gzip")
			r.feed(appendHeaders(nil, r.id, false, block))
			r.feed(append(appendFrameHeader(nil, len(msg), frameData, 0, r.id), msg...))
			r.flush()
		}
	}
	const conns, each, most = 10, 20, maxInflateBytes / defaultMaxMessageBytes
	for range conns {
		send := open(defaultMaxMessageBytes + 1)
		for range each {
			send()
		}
	}
	if n := hits[LimitMessage]; n > most+conns || n < most || hits[LimitInflate] != conns*each-n {
		t.Errorf("%d bombs were inflated, %d not", n, hits[LimitInflate])
	}
	refused := hits[LimitInflate]
	good := open(1000)
	for range 100 {
		good()
	}
	if hits[LimitInflate] != refused {
		t.Error("a client with small messages was refused")
	}
	budget.Refill()
	send := open(defaultMaxMessageBytes + 1)
	for range each {
		send()
	}
	if hits[LimitInflate] != refused {
		t.Error("no budget after a second")
	}
}

// A stream of bombs costs its budget in a second, and no more; the next second gives another.
func TestAttackZipBombs(t *testing.T) {
	hits := map[Limit]int{}
	r := newRawServer(t, ConnConfig{OnLimit: func(l Limit) { hits[l]++ }})
	bomb := zip(make([]byte, 16<<20))
	bomb = append([]byte{1, byte(len(bomb) >> 24), byte(len(bomb) >> 16), byte(len(bomb) >> 8), byte(len(bomb))}, bomb...)
	send := func() {
		r.id += 2
		block := encodeBlock(r.enc, &r.buf, ":method", "POST", ":scheme", "http", ":path", "/t/Unary", ":authority", "a",
			"content-type", "application/grpc", "te", "trailers", "grpc-encoding", "gzip")
		r.feed(appendHeaders(nil, r.id, false, block))
		for p := bomb; len(p) > 0; {
			n := min(len(p), maxFrameSize)
			r.feed(append(appendFrameHeader(nil, n, frameData, 0, r.id), p[:n]...))
			p = p[n:]
		}
		r.flush()
	}
	r.id = 0xffffffff
	const most = maxInflateBytes / defaultMaxMessageBytes
	for range most + 10 {
		send()
	}
	if hits[LimitMessage] != most || hits[LimitInflate] != 10 || r.c.Streams() != 0 {
		t.Errorf("%d were inflated, %d not, %d streams left", hits[LimitMessage], hits[LimitInflate], r.c.Streams())
	}
	r.c.Tick()
	if send(); hits[LimitMessage] != most+1 {
		t.Error("no budget after a second")
	}
}

// What is taken over is sent like what is copied, and freed.
func TestSendOwned(t *testing.T) {
	var s *Stream
	r := newRawServer(t, ConnConfig{})
	r.e.onReq = func(x *Stream) { s = x }
	r.feed(r.headers("/t/Hang", false))
	r.flush()
	msg := bytes.Repeat([]byte("0123456789"), 100_000)
	r.c.SendOwned(s, msg)
	r.c.Finish(s, Status{})
	var got []byte
	for range 1000 {
		out := r.flush()
		for len(out) > 0 {
			h := parseFrameHeader(out)
			if h.typ == frameData {
				got = append(got, out[frameHeaderLen:frameHeaderLen+int(h.length)]...)
			}
			out = out[frameHeaderLen+int(h.length):]
		}
		if r.c.Streams() == 0 {
			break
		}
		r.feed(appendWindowUpdate(appendWindowUpdate(nil, 0, 50_000), r.id, 50_000))
	}
	if len(got) != prefixLen+len(msg) || !bytes.Equal(got[prefixLen:], msg) || r.c.Queued() != 0 || r.c.QueueMemory() != 0 {
		t.Errorf("%d bytes came, %d are queued in %d", len(got), r.c.Queued(), r.c.QueueMemory())
	}
}

// An answer of which the client leaves a few bytes is in memory as a whole, and counted so.
func TestQueueMemoryCountsWhatWasSent(t *testing.T) {
	for _, size := range []int{20_000, 260 << 10, 4 << 20} {
		for _, owned := range []bool{true, false} {
			r := newRawServer(t, ConnConfig{})
			r.feed(appendSetting(appendFrameHeader(nil, 6, frameSettings, 0, 0), settingInitialWindowSize, uint32(size-60)))
			r.feed(appendWindowUpdate(nil, 0, 1<<30))
			var all []*Stream
			r.e.onReq = func(x *Stream) { all = append(all, x) }
			const n = 3
			for range n {
				r.feed(r.headers("/t/Hang", false))
				if owned {
					r.c.SendOwned(all[len(all)-1], make([]byte, size))
				} else {
					r.c.Send(all[len(all)-1], make([]byte, size))
				}
				for len(r.flush()) > 0 {
				}
			}
			// What is copied goes to blocks, which are given back one by one.
			pinned := n * size
			if !owned {
				pinned = n * (60 + prefixLen)
			}
			if got := r.c.QueueMemory(); r.c.Queued() != n*(60+prefixLen) || got < pinned || got > pinned+n*(queueBlock+minOutput) {
				t.Errorf("%d bytes, owned %v: %d wait in %d", size, owned, r.c.Queued(), got)
			}
			if got := all[0].QueueMemory(); got < pinned/n {
				t.Errorf("%d bytes, owned %v: %d bytes of a stream", size, owned, got)
			}
			r.c.Reset(all[0])
			r.feed(appendWindowUpdate(nil, all[1].ID, 100))
			r.flush()
			r.c.Finish(all[2], Status{})
			r.c.Close()
			if r.c.Queued() != 0 || r.c.QueueMemory() != 0 {
				t.Errorf("%d bytes, owned %v: %d wait in %d at the end", size, owned, r.c.Queued(), r.c.QueueMemory())
			}
		}
	}
}
