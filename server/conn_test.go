package server

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"spindle/codec"
	"spindle/shard"
	"spindle/watchring"
)

// What a connection does about clients that say nothing or take nothing, on a clock that the test moves.

// clockRig is a rig whose client is frames, and whose clock stands still.
type clockRig struct {
	*rig
	t   *testing.T
	now int64
}

func newClockRig(t *testing.T) *clockRig {
	r := &clockRig{t: t}
	r.rig = openRig(t)
	r.loop.eng.now = func() int64 { return r.now + 1 }
	r.conn.opened = 1
	return r
}

// frames feeds what write makes, as one turn.
func (r *clockRig) frames(write func(*http2.Framer)) {
	var buf bytes.Buffer
	write(http2.NewFramer(&buf, nil))
	r.feed(buf.Bytes())
}

// greet lets the server send window bytes on each stream, and as much as it likes on the connection.
func (r *clockRig) greet(window uint32) {
	r.feed([]byte(http2.ClientPreface))
	r.frames(func(fr *http2.Framer) {
		_ = fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window})
		_ = fr.WriteWindowUpdate(0, 1<<31-1-65535)
	})
}

func (r *clockRig) window(id, n uint32) {
	r.frames(func(fr *http2.Framer) { _ = fr.WriteWindowUpdate(id, n) })
}

// send opens stream id with one message.
func (r *clockRig) send(id uint32, path string, end bool, msg []byte) {
	r.frames(func(fr *http2.Framer) {
		var hdr bytes.Buffer
		enc := hpack.NewEncoder(&hdr)
		fields := []string{":method", "POST", ":scheme", "http", ":path", path, ":authority", "test",
			"content-type", "application/grpc", "te", "trailers"}
		for i := 0; i < len(fields); i += 2 {
			_ = enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1], Sensitive: true})
		}
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: hdr.Bytes(), EndHeaders: true})
		framed := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(msg)))
		_ = fr.WriteData(id, end, append(framed, msg...))
	})
}

// pass moves the clock by whole seconds, with what the loop does at each.
func (r *clockRig) pass(d time.Duration) {
	for ; d > 0 && !r.conn.closed; d -= time.Second {
		r.now += int64(time.Second)
		r.loop.Post(r.loop.secondFn)
		r.mail()
	}
}

func TestSilentConnIsClosed(t *testing.T) {
	for name, say := range map[string]func(*clockRig){
		"nothing":         func(*clockRig) {},
		"half a preface":  func(r *clockRig) { r.feed([]byte(http2.ClientPreface[:10])) },
		"only a preface":  func(r *clockRig) { r.feed([]byte(http2.ClientPreface)) },
		"half a SETTINGS": func(r *clockRig) { r.feed([]byte(http2.ClientPreface + "\x00\x00\x06\x04")) },
	} {
		r := newClockRig(t)
		say(r)
		r.pass(defaultGreetTimeout - time.Second)
		if r.conn.closed {
			t.Errorf("%s: closed early", name)
		}
		if r.pass(time.Second); !r.conn.closed || len(r.loop.conns) != 0 {
			t.Errorf("%s: still open", name)
		}
	}
	r := newClockRig(t)
	r.greet(0)
	if r.pass(10 * defaultGreetTimeout); r.conn.closed {
		t.Error("an idle client was closed")
	}
}

// Answers for which the client gives no HTTP/2 window do not wait for ever; those that it takes slowly do.
func TestStalledAnswersEndTheConnection(t *testing.T) {
	const size = maxStalledReplies + maxStalledReplies/2
	limit := func(r *clockRig) time.Duration { return r.loop.eng.cfg.StallTimeout }
	ask := func(r *clockRig, window uint32) {
		r.core.resp = make([]byte, size)
		r.greet(window)
		r.send(1, "/etcdserverpb.KV/Range", true, []byte("q"))
	}
	dropped := metricConnsDropped.Get()
	r := newClockRig(t)
	ask(r, 0)
	r.pass(limit(r) - time.Second)
	if r.conn.closed {
		t.Fatal("dropped early")
	}
	if r.pass(2 * time.Second); !r.conn.closed || metricConnsDropped.Get() != dropped+1 {
		t.Error("not dropped")
	}

	r = newClockRig(t)
	ask(r, 0)
	for range 10 {
		r.window(1, 100)
		r.pass(limit(r) - time.Second)
	}
	if r.conn.closed {
		t.Error("a slow reader was dropped")
	}
	r.window(1, size)
	if r.conn.h2.Streams() != 0 || r.sock.written < size {
		t.Errorf("%d bytes came", r.sock.written)
	}

	// What waits on streams is held back by their handlers, and does not count.
	r = newClockRig(t)
	r.loop.eng.HandleStream("/test/Burst", func(*Loop) StreamHandler {
		return &burstStream{n: 1, msg: make([]byte, size), queued: make(chan int, 1), t: t}
	})
	r.greet(0)
	for id := uint32(1); id < 20; id += 2 {
		r.send(id, "/test/Burst", false, []byte("go"))
	}
	if r.pass(10 * limit(r)); r.conn.closed {
		t.Error("a client that does not read its streams was dropped")
	}
	for id := uint32(1); id < 20; id += 2 {
		r.window(id, 2*size)
	}
	if len(r.conn.streaming) != 0 || r.conn.h2.Queued() != 0 {
		t.Errorf("%d streams are left, %d bytes", len(r.conn.streaming), r.conn.h2.Queued())
	}
}

// A large answer may be waiting for window when a new connection is looked at for the first time, however long the process has
// been there by then. It was dropped if that was longer than StallTimeout: in a suite of lists once in some thirty.
func TestNewConnectionWithALargeAnswerIsKept(t *testing.T) {
	r := newClockRig(t)
	r.now = int64(10 * r.loop.eng.cfg.StallTimeout)
	r.conn.kill()
	r.conn = newClientConn(r.loop)
	r.conn.count(1)
	r.att = &attachment{loop: r.loop, h: r.conn}
	r.loop.clock = 0 // another turn
	r.att.event(r.sock, attachmentOpen)
	r.core.resp = make([]byte, 10<<20)
	r.greet(64 << 10)
	r.send(1, "/etcdserverpb.KV/Range", true, []byte("q"))
	for range 5 {
		if r.pass(time.Second); r.conn.closed {
			t.Fatal("a client that has just begun to read its list was dropped")
		}
	}
}

// A client that takes its answers is not dropped when more of them wait each time that it is looked at.
func TestBusyReaderIsKept(t *testing.T) {
	r := newClockRig(t)
	r.greet(0)
	const size = 1 << 20
	id := uint32(1)
	for sec := range int(2 * r.loop.eng.cfg.StallTimeout / time.Second) {
		r.core.resp = make([]byte, size+sec)
		r.send(id, "/etcdserverpb.KV/Range", true, []byte("q"))
		r.core.resp = make([]byte, size+sec+1)
		r.send(id+2, "/etcdserverpb.KV/Range", true, []byte("q"))
		r.window(id, 2*size) // one of the two is taken, and some of the other
		r.window(id+2, size-1000)
		id += 4
		if r.pass(time.Second); r.conn.closed {
			t.Fatalf("dropped after %d s", sec+1)
		}
		if sec == 0 && r.conn.h2.Queued() == 0 {
			t.Fatal("nothing waits")
		}
	}
}

// A watch that was held back goes on in the turn in which its client takes what waited: Drained is called from
// within that turn's output, after the hooks, and nothing else may happen on the loop for long.
func TestDrainedWatchGoesOnInTheSameTurn(t *testing.T) {
	r := newClockRig(t)
	e := r.loop.eng
	t.Cleanup(func() { close(e.done) })
	front := watchring.NewFrontier(1, 0)
	ring := watchring.NewRing(64, 1<<30, 0)
	svc := NewWatchService(e, WatchConfig{
		Ring: ring, Frontier: front,
		ShardsOf: func(key, end []byte) int { return 0 },
		Now:      func(func(int64, codec.Status)) {},
	})
	r.greet(1 << 10)
	create := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte("k"), StartRevision: 1,
	}}}
	r.send(1, WatchPath, false, marshal(t, create))
	const revs, size = 20, watchHighWater / 2
	for rev := int64(1); rev <= revs; rev++ {
		body, err := proto.Marshal(&mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: make([]byte, size), ModRevision: rev}})
		if err != nil {
			t.Fatal(err)
		}
		ring.Publish(&watchring.Entry{Rev: rev, Size: len(body), Events: []watchring.Event{{Key: []byte("k"), Body: body, NoPrev: len(body)}}})
		front.Set(0, rev)
		svc.FrontierRose()
		r.mail()
	}
	if q := r.conn.h2.Queued(); q < watchHighWater || q > 2*watchHighWater {
		t.Fatalf("%d bytes wait", q)
	}
	before := r.sock.written
	r.window(1, 1<<30)
	if got := r.sock.written - before; got < (revs-1)*size {
		t.Errorf("got %d bytes of %d at once", got, revs*size)
	}
}

// What a Hub has for many watches is written while it is still being sent, not all of it at the end of the turn: neither
// it nor an answer that was there before waits for megabytes.
func TestFanOutIsWrittenPieceByPiece(t *testing.T) {
	r := newClockRig(t)
	e := r.loop.eng
	t.Cleanup(func() { close(e.done) })
	front := watchring.NewFrontier(1, 0)
	ring := watchring.NewRing(64, 1<<30, 0)
	svc := NewWatchService(e, WatchConfig{
		Ring: ring, Frontier: front,
		ShardsOf: func(key, end []byte) int { return 0 },
		Now:      func(func(int64, codec.Status)) {},
	})
	r.greet(1 << 30)
	create := marshal(t, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte("k"), StartRevision: 1,
	}}})
	const watches, size = 61, 32 << 10
	for i := range uint32(watches) {
		r.send(2*i+1, WatchPath, false, create)
	}
	body, err := proto.Marshal(&mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: make([]byte, size), ModRevision: 1}})
	if err != nil {
		t.Fatal(err)
	}
	ring.Publish(&watchring.Entry{Rev: 1, Size: len(body), Events: []watchring.Event{{Key: []byte("k"), Body: body, NoPrev: len(body)}}})
	front.Set(0, 1)
	before, within := r.sock.written, 0
	r.loop.OnTurnEnd(func() { within = max(within, r.sock.written-before) }) // behind the Hub, before the end of the turn
	svc.FrontierRose()
	r.mail()
	all := r.sock.written - before
	if all < watches*size || within < watches*size-pushTarget || within == all {
		t.Errorf("%d of %d bytes were written when the Hub was done", within, all)
	}
	if r.sock.largest > 2*pushTarget {
		t.Errorf("%d bytes in one write", r.sock.largest)
	}
}

type panicCore struct{}

func (panicCore) Submit(*shard.Op) { panic("in the core") }
func (panicCore) Cancel(*shard.Op) {}

// A panic while one client is served costs its connection; one in the core is everybody's affair.
func TestPanicOfOneClient(t *testing.T) {
	for where, wantFatal := range map[string]bool{"/test/Panic": false, "/etcdserverpb.KV/Range": true} {
		r := newClockRig(t)
		var fatal []bool
		r.loop.eng.cfg.OnPanic = func(_ error, f bool) { fatal = append(fatal, f) }
		r.loop.eng.HandleStream("/test/Panic", func(*Loop) StreamHandler { panic("in a handler") })
		r.loop.eng.core = panicCore{}
		r.greet(1 << 20)
		r.send(1, where, true, []byte("q"))
		if len(fatal) != 1 || fatal[0] != wantFatal {
			t.Errorf("%s: fatal %v", where, fatal)
		}
		if !r.conn.closed {
			t.Errorf("%s: the connection is open", where)
		}
		var hook bool
		r.loop.OnTurnEnd(func() {
			if !hook {
				hook = true
				panic("in a hook")
			}
		})
		r.loop.Post(func() {})
		r.mail()
		if len(fatal) != 2 || !fatal[1] {
			t.Errorf("in a hook: %v", fatal)
		}
	}
}
