package codec

import (
	"math/bits"
	"sync"
)

// Buffers that a connection needs for a while: half a frame, half a message, messages that wait for a
// window. They come from pools shared by all connections, so that an idle connection holds none.

const (
	minBufferBits = 9  // 512 bytes
	maxBufferBits = 22 // 4 MiB, which holds a page of a list
	// Beyond come largeSteps sizes for each power of two, since half of a large buffer is much, up to 1<<maxLargeBits: pages
	// of long lists. As garbage these cost a list of 100 MB a third of what a proxy does for it, in fresh pages of memory.
	// Larger ones are left to the garbage collector.
	maxLargeBits = 25 // 32 MiB
	largeSteps   = 8
	// queueBlock is the largest block of a queue; a message of 8 MiB takes many, and none is ever copied
	// to a larger one.
	queueBlock = 64 << 10
)

// buffer is a pooled byte slice, and a link of a queue.
type buffer struct {
	b    []byte
	off  int    // queue: bytes at the start that are already taken
	src  Source // queue: instead of b
	next *buffer
	// shared: others read b, too (Conn.SendParts), so nothing is appended to it.
	shared bool
}

// Source is a message that is made as it is sent, from memory that it holds, so that the whole of it never stands anywhere.
// It belongs to the Conn from SendFrom on.
type Source interface {
	// Next appends the next n bytes, which are no more than Len.
	Next(dst []byte, n int) []byte
	// Len is how many bytes are left.
	Len() int
	// Mem is how many bytes of memory it holds. It only falls.
	Mem() int
	// Drop lets go of all of it. Nothing else is called afterwards.
	Drop()
}

var (
	bufferPools [maxBufferBits - minBufferBits + 1]sync.Pool
	largePools  [(maxLargeBits - maxBufferBits) * largeSteps]sync.Pool
)

// largeClass returns the first class of largePools whose buffers, of size bytes, hold n.
func largeClass(n int) (class, size int) {
	k := bits.Len(uint(n-1)) - 1
	step := 1 << k / largeSteps
	i := (n - 1 - 1<<k) / step
	return (k-maxBufferBits)*largeSteps + i, 1<<k + (i+1)*step
}

// getBuffer returns an empty buffer with capacity for at least n bytes.
func getBuffer(n int) *buffer {
	class := 0
	if n > 1<<minBufferBits {
		class = bits.Len(uint(n-1)) - minBufferBits
	}
	if class >= len(bufferPools) {
		if n > 1<<maxLargeBits {
			return &buffer{b: make([]byte, 0, n)}
		}
		class, size := largeClass(n)
		if x := largePools[class].Get(); x != nil {
			return x.(*buffer)
		}
		return &buffer{b: make([]byte, 0, size)}
	}
	if x := bufferPools[class].Get(); x != nil {
		return x.(*buffer)
	}
	return &buffer{b: make([]byte, 0, 1<<(class+minBufferBits))}
}

// putBuffer gives b back; its bytes must not be used afterwards. nil is a no-op.
func putBuffer(b *buffer) {
	if b == nil || b.shared {
		return
	}
	class := bits.Len(uint(cap(b.b))) - 1 - minBufferBits
	if class < 0 || cap(b.b) > 1<<maxLargeBits {
		return
	}
	b.b, b.off, b.next = b.b[:0], 0, nil
	if n := cap(b.b); n > 1<<maxBufferBits {
		large, size := largeClass(n)
		if size > n {
			large-- // it holds what the class before holds
		}
		if large >= 0 {
			largePools[large].Put(b)
			return
		}
		class = len(bufferPools) - 1
	}
	bufferPools[class].Put(b)
}

// Recycle gives the memory of b, of which nothing is used any more, to those that need a buffer next.
func Recycle(b []byte) {
	if cap(b) >= 1<<minBufferBits {
		putBuffer(&buffer{b: b[:0]})
	}
}

// Borrow returns an empty slice for at least n bytes, from what was recycled if there is such.
func Borrow(n int) []byte { return getBuffer(n).b }

// queue holds the framed gRPC messages of one stream that wait, in blocks. The zero value is empty.
type queue struct {
	head, tail *buffer
	n          int // bytes that wait
	mem        int // memory of the blocks, the bytes included that were taken from them: what n alone would hide
}

// push copies p to the end.
func (q *queue) push(p []byte) {
	q.n += len(p)
	for len(p) > 0 {
		if q.tail == nil || q.tail.shared || len(q.tail.b) == cap(q.tail.b) {
			q.link(getBuffer(min(len(p), queueBlock)))
		}
		t := q.tail
		k := min(len(p), cap(t.b)-len(t.b))
		t.b = append(t.b, p[:k]...)
		p = p[k:]
	}
}

// pushBlock links b to the end, with all that it holds behind off.
func (q *queue) pushBlock(b *buffer) {
	if b.off == len(b.b) {
		return
	}
	q.n += len(b.b) - b.off
	q.link(b)
}

// pushSource links what src will make to the end.
func (q *queue) pushSource(src Source) {
	q.n += src.Len()
	q.link(&buffer{src: src})
	q.mem += src.Mem()
}

func (q *queue) link(b *buffer) {
	q.mem += cap(b.b)
	if q.tail == nil {
		q.head = b
	} else {
		q.tail.next = b
	}
	q.tail = b
}

// popAppend moves the first n bytes (n <= q.n) to the end of dst.
func (q *queue) popAppend(dst []byte, n int) []byte {
	q.n -= n
	for n > 0 {
		h := q.head
		if h.src != nil {
			k, mem := min(n, h.src.Len()), h.src.Mem()
			dst = h.src.Next(dst, k)
			q.mem += h.src.Mem() - mem
			n -= k
			if h.src.Len() == 0 {
				q.mem -= h.src.Mem()
				h.src.Drop()
				q.unlink()
			}
			continue
		}
		k := min(n, len(h.b)-h.off)
		dst = append(dst, h.b[h.off:h.off+k]...)
		h.off += k
		n -= k
		if h.off == len(h.b) {
			q.mem -= cap(h.b)
			q.unlink()
			putBuffer(h)
		}
	}
	return dst
}

// unlink takes the first link out.
func (q *queue) unlink() {
	q.head = q.head.next
	if q.head == nil {
		q.tail = nil
	}
}

// drop forgets everything.
func (q *queue) drop() {
	for h := q.head; h != nil; {
		next := h.next
		if h.src != nil {
			h.src.Drop()
		} else {
			putBuffer(h)
		}
		h = next
	}
	*q = queue{}
}
