package tlsconn

import (
	"runtime"
	"slices"
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
// waits for its peer holds no token. Those that have an answer of their peer go first: what is begun is finished before
// more is begun, else a burst of clients would all wait until each has had its first flight, and none be done in time.
type Gate struct {
	input atomic.Int64
	limit int
	width int // how many may compute

	mu          sync.Mutex
	first, last *Conn // under way, the oldest first
	n           int
	computing   int
	answered    []*Conn // wait for their turn to compute, with the peer's answer; the oldest first
	fresh       []*Conn // the same, at their beginning
}

// NewGate makes a Gate with the limits named above.
func NewGate() *Gate {
	return &Gate{width: max(1, runtime.GOMAXPROCS(0)/2), limit: maxHandshakes}
}

// take waits for the right to compute; false: c was told to quit before.
func (g *Gate) take(c *Conn) bool {
	g.mu.Lock()
	if g.computing < g.width {
		g.computing++
		g.mu.Unlock()
		return true
	}
	line := &g.fresh
	if c.waited {
		line = &g.answered
	}
	*line = append(*line, c)
	g.mu.Unlock()
	select {
	case <-c.turn:
		return true
	case <-c.quit:
	}
	g.mu.Lock()
	i := slices.Index(*line, c)
	if i >= 0 {
		*line = slices.Delete(*line, i, i+1)
	}
	g.mu.Unlock()
	if i < 0 { // its turn has come meanwhile
		<-c.turn
		g.release()
	}
	return false
}

// release gives the right to compute to the next.
func (g *Gate) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	line := &g.answered
	if len(*line) == 0 {
		line = &g.fresh
	}
	if len(*line) == 0 {
		g.computing--
		return
	}
	next := (*line)[0]
	*line = slices.Delete(*line, 0, 1)
	next.turn <- struct{}{} // there is room: it waits in one line, once
}

// Pending is the number of handshakes under way. On any goroutine.
func (g *Gate) Pending() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.n
}

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
