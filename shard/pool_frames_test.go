package shard

import (
	"bytes"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"spindle/codec"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Without streams nothing is pinged (etcd would close the connection); the first stream after a long silence has a
// ping follow at once.
func TestPoolPingsOnlyWithStreams(t *testing.T) {
	var pings, streams atomic.Int32
	pinged := make(chan int32, 100)
	addr := rawMember(t, func(fr *http2.Framer, f http2.Frame) {
		switch f := f.(type) {
		case *http2.PingFrame:
			if !f.IsAck() {
				pings.Add(1)
				_ = fr.WritePing(true, f.Data)
				pinged <- streams.Load()
			}
		case *http2.HeadersFrame:
			streams.Add(1)
		}
	})
	e := newPoolEnv(t, []string{"http://" + addr}, func(c *PoolConfig) {
		c.PingInterval, c.PingTimeout = 20*time.Millisecond, testGuard
	})
	e.connected(0)
	l := e.pool.clusters[0].ready[0]
	e.until("a long silence", func() bool { return e.pool.timers.now()-l.lastRecv > int64(100*time.Millisecond) })
	if n := pings.Load(); n != 0 {
		t.Errorf("%d pings without a stream", n)
	}
	_, h := e.watch(nil)
	for range 3 {
		select {
		case n := <-pinged:
			if n != 1 {
				t.Errorf("ping with %d streams", n)
			}
		case <-time.After(testGuard):
			t.Fatal("no ping")
		}
	}
	e.loop.do(h.Close)
	e.until("pings stop", func() bool { return l.pinged == 0 && l.timer.place == 0 })
}

// rawMember is an HTTP/2 server made of frames: handle sees every frame after the SETTINGS were exchanged.
func rawMember(t testing.TB, handle func(*http2.Framer, http2.Frame)) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				preface := make([]byte, len(http2.ClientPreface))
				if _, err := io.ReadFull(c, preface); err != nil || string(preface) != http2.ClientPreface {
					return
				}
				fr := http2.NewFramer(c, c)
				_ = fr.WriteSettings()
				for {
					f, err := fr.ReadFrame()
					if err != nil {
						return
					}
					if s, ok := f.(*http2.SettingsFrame); ok && !s.IsAck() {
						_ = fr.WriteSettingsAck()
						continue
					}
					handle(fr, f)
				}
			}()
		}
	}()
	return ln.Addr().String()
}

// rawHeaders writes a header block of literals.
func rawHeaders(fr *http2.Framer, id uint32, end bool, kv ...string) {
	var b bytes.Buffer
	enc := hpack.NewEncoder(&b)
	for i := 0; i < len(kv); i += 2 {
		_ = enc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1], Sensitive: true})
	}
	_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: b.Bytes(), EndStream: end, EndHeaders: true})
}

func rawAnswer(fr *http2.Framer, id uint32, msg string) {
	rawHeaders(fr, id, false, ":status", "200", "content-type", "application/grpc")
	_ = fr.WriteData(id, false, append([]byte{0, 0, 0, 0, byte(len(msg))}, msg...))
	rawHeaders(fr, id, true, "grpc-status", "0", "grpc-message", "")
}

func TestPoolResetStreams(t *testing.T) {
	for _, c := range []struct {
		code http2.ErrCode
		sent bool
	}{{http2.ErrCodeRefusedStream, false}, {http2.ErrCodeInternal, true}, {http2.ErrCodeCancel, true}} {
		addr := rawMember(t, func(fr *http2.Framer, f http2.Frame) {
			if d, ok := f.(*http2.DataFrame); ok && d.StreamEnded() {
				if d.StreamID == 1 {
					_ = fr.WriteRSTStream(1, c.code)
				} else {
					rawAnswer(fr, d.StreamID, "x")
				}
			}
		})
		e := newPoolEnv(t, []string{"http://" + addr})
		e.connected(0)
		if r := e.call(codec.MethodTxn, []byte("x")); r.st.Code == codec.OK || r.sent != c.sent {
			t.Errorf("%v: %+v", c.code, r)
		}
		if r := e.call(codec.MethodTxn, []byte("x")); r.st.Code != codec.OK || string(r.resp) != "x" {
			t.Errorf("%v, the next call: %+v", c.code, r)
		}
	}
}

// After GOAWAY the streams above its last one are unsent, those below finish, and new calls go to a new connection.
func TestPoolGoAway(t *testing.T) {
	var conns atomic.Int32
	finish := make(chan struct{})
	addr := rawMember(t, func(fr *http2.Framer, f http2.Frame) {
		switch f := f.(type) {
		case *http2.WindowUpdateFrame:
		case *http2.DataFrame:
			if !f.StreamEnded() {
				return
			}
			if f.StreamID == 1 {
				if conns.Add(1) > 1 {
					rawAnswer(fr, 1, "new")
				}
				return
			}
			_ = fr.WriteGoAway(1, http2.ErrCodeNo, nil)
			go func() {
				<-finish
				rawAnswer(fr, 1, "old")
			}()
		}
	})
	e := newPoolEnv(t, []string{"http://" + addr})
	e.connected(0)
	var one, two chanDone = make(chanDone, 1), make(chanDone, 1)
	e.loop.do(func() {
		e.pool.Call(0, codec.MethodTxn, []byte("1"), testGuard, one)
		e.pool.Call(0, codec.MethodTxn, []byte("2"), testGuard, two)
	})
	if r := two.wait(t); r.st.Code != codec.Unavailable || r.sent {
		t.Errorf("above the last stream: %+v", r)
	}
	e.connected(0)
	if r := e.call(codec.MethodTxn, []byte("3")); r.st.Code != codec.OK || string(r.resp) != "new" {
		t.Errorf("on the new connection: %+v", r)
	}
	if len(one) > 0 {
		t.Errorf("the old stream ended early: %+v", <-one)
	}
	close(finish)
	if r := one.wait(t); r.st.Code != codec.OK || string(r.resp) != "old" {
		t.Errorf("on the old connection: %+v", r)
	}
	e.until("the old link is closed", func() bool { return len(e.pool.links) == 1 })
	if l := e.log.lines("does not answer"); len(l) != 0 {
		t.Errorf("a graceful end was logged as a failure: %q", l)
	}
}
