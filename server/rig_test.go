package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"testing"
	"time"

	"github.com/panjf2000/gnet/v2"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"spindle/shard"
)

// rig is one client connection on a loop without gnet: requests go in as bytes, answers are counted.
type rig struct {
	loop *Loop
	conn *clientConn
	att  *attachment
	sock *fakeSock
	core *fixedCore
	el   *fakeEL

	frame []byte // HEADERS and DATA of one request
	ids   []int  // where the stream's identifier stands in it
	id    uint32
}

// fakeSock is a gnet.Conn that takes everything.
type fakeSock struct {
	gnet.Conn // nil: what is not below is not called
	in        []byte
	written   int
	writes    int
	largest   int // bytes of one Write
	waiting   int // what the test says that gnet's buffer holds
}

func (f *fakeSock) Peek(int) ([]byte, error)   { return f.in, nil }
func (f *fakeSock) Discard(n int) (int, error) { f.in = f.in[n:]; return n, nil }
func (f *fakeSock) OutboundBuffered() int      { return f.waiting }
func (f *fakeSock) Fd() int                    { return -1 }
func (f *fakeSock) RemoteAddr() net.Addr       { return &net.UnixAddr{} }

func (f *fakeSock) Write(p []byte) (int, error) {
	f.written += len(p)
	f.writes++
	f.largest = max(f.largest, len(p))
	return len(p), nil
}

// fakeEL is a gnet.EventLoop whose mailbox the test empties, by rig.mail.
type fakeEL struct {
	gnet.EventLoop // nil
	r              *rig
	rung           []gnet.Runnable
}

func (f *fakeEL) Execute(_ context.Context, x gnet.Runnable) error {
	f.rung = append(f.rung, x)
	return nil
}

func (f *fakeEL) Close(c gnet.Conn) error {
	f.r.att.close(c, nil)
	return nil
}

// mail runs turns until the mailbox is empty.
func (r *rig) mail() {
	for len(r.el.rung) > 0 {
		x := r.el.rung[0]
		r.el.rung = r.el.rung[:copy(r.el.rung, r.el.rung[1:])]
		_ = x.Run(context.Background())
	}
}

// fixedCore answers everything at once with the same bytes.
type fixedCore struct {
	resp []byte
	n    int
}

func (f *fixedCore) Submit(op *shard.Op) {
	f.n++
	op.Resp = append(op.Resp, f.resp...)
	op.Done(op)
}
func (f *fixedCore) Cancel(*shard.Op) {}

// openRig opens a connection on which nothing was said yet.
func openRig(t testing.TB) *rig {
	base := time.Now()
	e := newEngine(Config{
		Log: quiet(), Now: func() int64 { return int64(time.Since(base)) + 1 },
		MaxOutbound: 1 << 20, StallTimeout: time.Minute, GreetTimeout: defaultGreetTimeout,
		OnPanic: func(err error, _ bool) { t.Error(err) },
	})
	r := &rig{sock: &fakeSock{}, core: &fixedCore{resp: bytes.Repeat([]byte("r"), 340)}, id: 1}
	r.el = &fakeEL{r: r}
	r.loop = newLoop(e, 0, r.el)
	e.loops = []*Loop{r.loop}
	e.SetCore(r.core)
	r.conn = newClientConn(r.loop)
	r.conn.count(1)
	r.att = &attachment{loop: r.loop, h: r.conn}
	r.att.event(r.sock, attachmentOpen)
	return r
}

func newRig(t testing.TB, timeout string) *rig {
	t.Helper()
	r := openRig(t)
	var buf, hdr bytes.Buffer
	fr := http2.NewFramer(&buf, nil)
	buf.WriteString(http2.ClientPreface)
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	check(fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1}))
	check(fr.WriteWindowUpdate(0, 1<<31-1-65535))
	r.feed(buf.Bytes())
	enc := hpack.NewEncoder(&hdr)
	for range 2 { // the second block has all its fields from the table, and so has every further one
		buf.Reset()
		hdr.Reset()
		fields := []string{":method", "POST", ":scheme", "http", ":path", "/etcdserverpb.KV/Range",
			":authority", "test", "content-type", "application/grpc", "user-agent", "test", "te", "trailers"}
		if timeout != "" {
			fields = append(fields, "grpc-timeout", timeout)
		}
		for i := 0; i < len(fields); i += 2 {
			check(enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}))
		}
		check(fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: hdr.Bytes(), EndHeaders: true}))
		data := buf.Len()
		msg := bytes.Repeat([]byte("q"), 40)
		framed := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(msg)))
		check(fr.WriteData(1, true, append(framed, msg...)))
		r.frame = append(r.frame[:0], buf.Bytes()...)
		r.ids = []int{5, data + 5}
		r.request()
	}
	return r
}

// openStream begins a streaming RPC as stream 1, with all the window that there is.
func (r *rig) openStream(path string) {
	var buf, hdr bytes.Buffer
	fr, enc := http2.NewFramer(&buf, nil), hpack.NewEncoder(&hdr)
	buf.WriteString(http2.ClientPreface)
	_ = fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
	_ = fr.WriteWindowUpdate(0, 1<<31-1-65535)
	fields := []string{":method", "POST", ":scheme", "http", ":path", path, ":authority", "test",
		"content-type", "application/grpc", "te", "trailers"}
	for i := 0; i < len(fields); i += 2 {
		_ = enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: hdr.Bytes(), EndHeaders: true})
	r.feed(buf.Bytes())
}

// data returns a DATA frame of stream 1 with one message.
func (r *rig) data(msg []byte) []byte {
	var buf bytes.Buffer
	_ = http2.NewFramer(&buf, nil).WriteData(1, false, append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(msg))), msg...))
	return buf.Bytes()
}

func (r *rig) feed(p []byte) {
	r.sock.in = p
	r.att.event(r.sock, attachmentTraffic)
}

// request is one turn with one request.
func (r *rig) request() { r.feed(r.next()) }

// next returns the frames of one more request, until it is called again.
func (r *rig) next() []byte {
	for _, at := range r.ids {
		binary.BigEndian.PutUint32(r.frame[at:], r.id)
	}
	r.id += 2
	return r.frame
}

func BenchmarkUnary(b *testing.B) {
	r := newRig(b, "5S")
	b.ReportAllocs()
	for b.Loop() {
		r.request()
		if r.id > 1<<31-10 {
			b.Fatal("out of stream identifiers")
		}
	}
}
