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
