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
