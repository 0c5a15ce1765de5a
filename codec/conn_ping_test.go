package codec

import (
	"bytes"
	"testing"
	"time"
)

// The enforcement of grpc-go, which etcd turns on with five seconds.
func TestPingStrikes(t *testing.T) {
	now := int64(1)
	open := func() *rawServer {
		return newRawServer(t, ConnConfig{PingMinTime: 5 * time.Second, Now: func() int64 { return now }})
	}
	ping := appendPing(nil, false, [8]byte{})
	strikes := func(r *rawServer) (n int) {
		for ; n < 10 && r.c.Feed(ping) == nil; n++ {
			r.flush()
		}
		return n
	}
	r := open()
	if n := strikes(r); n != 3 {
		t.Errorf("without streams: ended by ping %d", n+1)
	}
	r = open()
	r.feed(r.headers("/t/Hang", false))
	for range 100 { // every five seconds is welcome, with a stream
		now += int64(5 * time.Second)
		r.feed(ping)
		r.flush()
	}
	now++
	if n := strikes(r); n != 2 {
		t.Errorf("with a stream: ended by ping %d", n+1)
	}
	r = open()
	for range 100 { // answers excuse pings: clients measure the bandwidth with them
		r.feed(r.headers("/t/Stream", false))
		r.feed(append(appendFrameHeader(nil, 5, frameData, 0, r.id), make([]byte, 5)...))
		r.feed(ping)
		r.flush()
	}
	r = open()
	for range 4 {
		_ = r.c.Feed(ping)
	}
	if !bytes.Contains(r.c.Output(), appendGoAway(nil, 0, h2EnhanceYourCalm, "too_many_pings")) {
		t.Error("clients do not find the text that they look for")
	}
}

// A server's measurement of the bandwidth is not answered for every small request, but in the end; a sign of life at once.
func TestBandwidthPing(t *testing.T) {
	e := newClientEvents()
	c := NewClientConn(ConnConfig{}, "h", e)
	out := func() []byte {
		b := bytes.Clone(c.Output())
		c.Flushed()
		return b
	}
	feed := func(p []byte) {
		t.Helper()
		if err := c.Feed(p); err != nil {
			t.Fatal(err)
		}
	}
	probe, answer := appendPing(nil, false, bandwidthPing), appendPing(nil, true, bandwidthPing)
	send := func(n int) {
		s := c.Open("/t/Unary", false, 0)
		s.User = &rpc{}
		c.Send(s, make([]byte, n))
		c.CloseSend(s)
	}
	feed(appendFrameHeader(nil, 0, frameSettings, 0, 0))
	out()

	small := bandwidthBytes / 16
	answered := 0
	send(small)
	out()
	if feed(probe); len(out()) > 0 {
		t.Error("answered at once")
	}
	for range 64 {
		send(small)
		b := out()
		feed(appendWindowUpdate(nil, 0, 1<<16))
		if !bytes.Contains(b, answer) {
			continue
		}
		if !bytes.HasSuffix(b, answer) {
			t.Error("the answer does not come behind the request that it goes with")
		}
		answered++
		feed(probe) // the next measurement
	}
	if answered < 3 || answered > 6 {
		t.Errorf("%d answers to 64 requests", answered)
	}
	c.Tick()
	if !bytes.Equal(out(), answer) {
		t.Error("a quiet connection leaves the server without an answer")
	}
	if c.Tick(); len(out()) > 0 {
		t.Error("something was said twice")
	}
	feed(probe)
	feed(probe)
	if !bytes.Equal(out(), answer) {
		t.Error("of two one is held")
	}
	c.Tick()
	out()
	send(bandwidthBytes)
	out()
	if feed(probe); !bytes.Equal(out(), answer) {
		t.Error("a measurement beside a large request has to wait")
	}
	life := [8]byte{1}
	if feed(appendPing(nil, false, life)); !bytes.Equal(out(), appendPing(nil, true, life)) {
		t.Error("a sign of life has to wait")
	}
}
