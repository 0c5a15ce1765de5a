package shard

import (
	"encoding/binary"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"spindle/codec"
)

// A large reply that takes longer than an attempt may, but comes, is not given up: another one would take as long. One that stops
// on the way is.
func TestPoolWaitsForAReplyThatComes(t *testing.T) {
	const piece, pieces, span = replyProgress / 2, 30, time.Second
	var stop atomic.Bool // in the middle
	addr := rawMember(t, func(fr *http2.Framer, f http2.Frame) {
		d, ok := f.(*http2.DataFrame)
		if !ok || !d.StreamEnded() {
			return
		}
		rawHeaders(fr, d.StreamID, false, ":status", "200", "content-type", "application/grpc")
		_ = fr.WriteData(d.StreamID, false, binary.BigEndian.AppendUint32([]byte{0}, piece*pieces))
		every := time.NewTicker(3 * span / 2 / pieces)
		defer every.Stop()
		n := pieces
		if stop.Load() {
			n /= 2
		}
		for i := range n {
			for range piece / 16384 {
				_ = fr.WriteData(d.StreamID, false, make([]byte, 16384))
			}
			if i+1 < n {
				<-every.C
			}
		}
		if n == pieces {
			rawHeaders(fr, d.StreamID, true, "grpc-status", "0", "grpc-message", "")
		}
	})
	e := newPoolEnv(t, []string{"http://" + addr})
	e.connected(0)
	begin := time.Now()
	r := e.begin(0, codec.MethodRange, []byte("x"), span).wait(t)
	if r.st.Code != codec.OK || len(r.resp) != piece*pieces || time.Since(begin) < span {
		t.Errorf("%v, %d bytes after %v", r.st, len(r.resp), time.Since(begin))
	}
	stop.Store(true)
	if r := e.begin(0, codec.MethodRange, []byte("x"), span).wait(t); r.st != statusDeadline {
		t.Errorf("a reply that stopped coming: %v", r.st)
	}
}

// A large reply of which just so much comes that it never stops is given up: it would hold its list's place, and its memory,
// for as long as the member likes.
func TestPoolGivesATricklingReplyUp(t *testing.T) {
	const piece, size, span = 16 << 10, 64 << 20, 200 * time.Millisecond
	addr := rawMember(t, func(fr *http2.Framer, f http2.Frame) {
		d, ok := f.(*http2.DataFrame)
		if !ok || !d.StreamEnded() {
			return
		}
		rawHeaders(fr, d.StreamID, false, ":status", "200", "content-type", "application/grpc")
		_ = fr.WriteData(d.StreamID, false, binary.BigEndian.AppendUint32([]byte{0}, size))
		every := time.NewTicker(span / 20)
		defer every.Stop()
		for range size / piece / 2 {
			if fr.WriteData(d.StreamID, false, make([]byte, piece)) != nil {
				return
			}
			<-every.C
		}
	})
	e := newPoolEnv(t, []string{"http://" + addr})
	e.connected(0)
	begin := time.Now()
	if r := e.begin(0, codec.MethodRange, []byte("x"), span).wait(t); r.st != statusDeadline {
		t.Errorf("%v after %v", r.st, time.Since(begin))
	}
}
