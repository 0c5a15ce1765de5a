package codec

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// keeper is a client that keeps what it may.
type keeper struct {
	c    *Conn
	kept [][]byte
	may  []bool
}

func (k *keeper) OnMessage(_ *Stream, msg []byte) {
	k.may = append(k.may, k.c.KeepMessage())
	k.kept = append(k.kept, msg)
	if k.c.KeepMessage() {
		panic("one message was given away twice")
	}
}
func (k *keeper) OnEnd(*Stream, Status, bool) {}
func (k *keeper) OnGoAway()                   {}
func (k *keeper) OnPong()                     {}

// TestKeepMessage: a message that came in pieces may be kept, and no later one is put together in its memory. One that lies in
// what Feed was given may not.
func TestKeepMessage(t *testing.T) {
	k := &keeper{}
	k.c = NewClientConn(ConnConfig{}, "h", k)
	if err := k.c.Feed(appendFrameHeader(nil, 0, frameSettings, 0, 0)); err != nil {
		t.Fatal(err)
	}
	s := k.c.Open(MethodPath(MethodRange), false, 0)
	k.c.Output()
	k.c.Flushed()
	if err := k.c.Feed(append(appendFrameHeader(nil, len(responseHeaders), frameHeaders, flagEndHeaders, s.ID), responseHeaders...)); err != nil {
		t.Fatal(err)
	}
	const size = 3 * maxFrameSize
	send := func(fill byte, n int) {
		t.Helper()
		data := append(appendPrefix(nil, n), bytes.Repeat([]byte{fill}, n)...)
		for len(data) > 0 {
			part := data[:min(len(data), maxFrameSize)]
			data = data[len(part):]
			if err := k.c.Feed(append(appendFrameHeader(nil, len(part), frameData, 0, s.ID), part...)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for fill := range byte(8) {
		send(fill, size)
	}
	for i, msg := range k.kept {
		if !k.may[i] || !bytes.Equal(msg, bytes.Repeat([]byte{byte(i)}, size)) {
			t.Errorf("message %d: may be kept: %v, begins with %d", i, k.may[i], msg[:4])
		}
	}
	if k.c.Partial() != 0 {
		t.Errorf("%d bytes count as received in part", k.c.Partial())
	}
	send(9, 100)
	if k.may[8] {
		t.Error("a view may be kept")
	}
}

// halver leaves every second byte.
type halver struct {
	n      int
	pieces int
}

func (h *halver) Rewrite(dst, p []byte) []byte {
	h.pieces++
	for _, b := range p {
		if h.n++; h.n%2 == 0 {
			dst = append(dst, b)
		}
	}
	return dst
}

// TestRewriter: a message that comes in pieces is what its Rewriter left of it, and the receiver's, whatever comes behind it in
// whichever pieces; how much came is counted all the same. Nothing is rewritten of one that lies whole in what Feed was given, and nothing
// on a stream without a Rewriter.
func TestRewriter(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 5))
	k := &keeper{}
	k.c = NewClientConn(ConnConfig{}, "h", k)
	if err := k.c.Feed(appendFrameHeader(nil, 0, frameSettings, 0, 0)); err != nil {
		t.Fatal(err)
	}
	s, plain := k.c.Open(MethodPath(MethodRange), false, 0), k.c.Open(MethodPath(MethodRange), false, 0)
	k.c.Output()
	k.c.Flushed()
	for _, s := range []*Stream{s, plain} {
		if err := k.c.Feed(append(appendFrameHeader(nil, len(responseHeaders), frameHeaders, flagEndHeaders, s.ID), responseHeaders...)); err != nil {
			t.Fatal(err)
		}
	}
	const rounds = 20
	var want [][]byte
	for round := range rounds {
		to := s
		if round%4 == 3 {
			to = plain
		}
		h := new(halver)
		s.Rewriter = h
		msg := make([]byte, 2*maxFrameSize+rng.IntN(100_000))
		for i := range msg {
			msg[i] = byte(rng.Uint32())
		}
		var wire []byte
		for data := append(appendPrefix(nil, len(msg)), msg...); len(data) > 0; {
			n := min(len(data), maxFrameSize)
			wire = append(appendFrameHeader(wire, n, frameData, 0, to.ID), data[:n]...)
			data = data[n:]
		}
		came := 0
		for most := 1 + rng.IntN(70_000); len(wire) > 0; {
			n := min(len(wire), 1+rng.IntN(most))
			piece := bytes.Clone(wire[:n])
			wire = wire[n:]
			if err := k.c.Feed(piece); err != nil {
				t.Fatal(err)
			}
			clear(piece)
			if got := to.Received(); got < came && len(wire) > 0 || to.Incoming() != len(msg) && got > 0 {
				t.Fatalf("seed %d, round %d: %d of %d bytes came, %d before", seed, round, got, to.Incoming(), came)
			} else {
				came = got
			}
			k.c.Output()
			k.c.Flushed()
		}
		if to == plain {
			want = append(want, msg)
		} else {
			want = append(want, (&halver{}).Rewrite(nil, msg))
			if h.n != len(msg) {
				t.Fatalf("seed %d, round %d: %d bytes of %d were seen", seed, round, h.n, len(msg))
			}
		}
	}
	small := []byte("abcdef")
	data := append(appendPrefix(nil, len(small)), small...)
	if err := k.c.Feed(append(appendFrameHeader(nil, len(data), frameData, 0, s.ID), data...)); err != nil {
		t.Fatal(err)
	}
	if len(k.kept) != rounds+1 || string(k.kept[rounds]) != "abcdef" || k.may[rounds] {
		t.Fatalf("seed %d: %d messages, a small one is %q", seed, len(k.kept), k.kept[len(k.kept)-1])
	}
	for i, w := range want {
		if !k.may[i] || !bytes.Equal(k.kept[i], w) {
			t.Errorf("seed %d: message %d: may be kept: %v, %d bytes, want %d", seed, i, k.may[i], len(k.kept[i]), len(w))
		}
	}
	if k.c.Partial() != 0 {
		t.Errorf("%d bytes count as received in part", k.c.Partial())
	}
}

// TestRecycle: what was recycled is lent again.
func TestRecycle(t *testing.T) {
	Recycle(nil)
	Recycle(make([]byte, 3))
	for _, n := range []int{1, 600, 64 << 10, 1<<22 + 1} {
		b := Borrow(n)
		if len(b) != 0 || cap(b) < n {
			t.Errorf("%d: %d of %d", n, len(b), cap(b))
		}
		Recycle(b[:n])
	}
}

// TestLargeBuffers: a buffer of any size holds what it is asked for, with a fourth more at most, whatever was recycled before.
func TestLargeBuffers(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 3))
	for range 300 {
		n := 1<<maxBufferBits - 1000 + rng.IntN(1<<maxLargeBits)
		switch rng.IntN(4) {
		case 0:
			n = 1<<(maxBufferBits+rng.IntN(4)) + rng.IntN(3) - 1
		case 1:
			n = 1<<maxBufferBits + rng.IntN(1<<20)
		}
		b := Borrow(n)
		if len(b) != 0 || cap(b) < n || cap(b) > max(1<<maxBufferBits, n+n/4+largeSteps) {
			t.Fatalf("seed %d: %d bytes for %d", seed, cap(b), n)
		}
		Recycle(b[: rng.IntN(n) : cap(b)-rng.IntN(1000)]) // or a part of it
	}
}
