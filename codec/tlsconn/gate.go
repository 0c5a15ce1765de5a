package tlsconn

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// HandshakeTimeout is how long a client's handshake may take, from the accept on; etcd's own. Owners see to it.
	HandshakeTimeout = 10 * time.Second
	// maxHandshakes is how many may be under way, each with a goroutine and some 40 KiB. Beyond, the one that
	// has been under way longest ends with ErrCrowded: a good client is done long before it is the oldest,
	// unless more come than the processor can compute.
	maxHandshakes = 4096
	// maxHandshakesInput bounds what all of them together have been sent and not read yet. Beyond: ErrFlood for the
	// one that receives more.
	maxHandshakesInput = 64 << 20
)

// Gate bounds the handshakes of all connections that share it. A full handshake costs about a millisecond of
// computing; at most half of the processors do that at a time, so that the event loops keep the others. Who
// waits for its peer holds no token.
type Gate struct {
	tokens chan struct{}
	input  atomic.Int64
	limit  int

	mu          sync.Mutex
	first, last *Conn // under way, the oldest first
	n           int
}

// NewGate makes a Gate with the limits named above.
func NewGate() *Gate {
	return &Gate{tokens: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)), limit: maxHandshakes}
}

// Pending is the number of handshakes under way. On any goroutine.
func (g *Gate) Pending() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.n
}

func (g *Gate) release() { <-g.tokens }

// hold counts n more bytes (or fewer, if negative); false: that would be too many, and they are not counted.
func (g *Gate) hold(n int) bool {
	if g.input.Add(int64(n)) > maxHandshakesInput && n > 0 {
		g.input.Add(-int64(n))
		return false
	}
	return true
}

func (g *Gate) enter(c *Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.n >= g.limit {
		oldest := g.first
		g.remove(oldest)
		oldest.abandon(ErrCrowded)
	}
	if c.prev = g.last; c.prev != nil {
		c.prev.next = c
	} else {
		g.first = c
	}
	g.last = c
	g.n++
}

func (g *Gate) leave(c *Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c.prev != nil || g.first == c {
		g.remove(c)
	}
}

func (g *Gate) remove(c *Conn) {
	if c.prev != nil {
		c.prev.next = c.next
	} else {
		g.first = c.next
	}
	if c.next != nil {
		c.next.prev = c.prev
	} else {
		g.last = c.prev
	}
	c.prev, c.next = nil, nil
	g.n--
}
