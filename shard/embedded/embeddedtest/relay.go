package embeddedtest

import (
	"net"
	"sync"
	"testing"
	"time"
)

// Relay passes TCP connections on to a target, and does harm to them when it is told to. All methods may be called
// on any goroutine, at any time.
type Relay struct {
	l net.Listener

	mu     sync.Mutex
	target string        // "" refuses
	mute   chan struct{} // closed when bytes pass; nil: they pass
	delay  time.Duration
	pairs  map[*pair]struct{}
	seen   int
	closed bool
}

// pair is one connection and its continuation.
type pair struct {
	a, b net.Conn // b is nil while it is dialed
}

// chunk is bytes on their way, and when they are to arrive.
type chunk struct {
	b   []byte
	due time.Time
}

const (
	chunkBytes = 32 << 10
	// maxChunks on their way in one direction; more wait in the sender's socket.
	maxChunks = 256
)

// NewRelay listens on a free port of 127.0.0.1 until the test ends. Connections are closed at once until SetTarget.
func NewRelay(t testing.TB) *Relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &Relay{l: l, pairs: map[*pair]struct{}{}}
	go r.accept()
	t.Cleanup(func() {
		r.mu.Lock()
		r.closed = true
		r.mu.Unlock()
		l.Close()
		r.Pass()
		r.SetTarget("")
	})
	return r
}

// Addr returns the relay's own host:port.
func (r *Relay) Addr() string { return r.l.Addr().String() }

// URL returns the relay's own URL, without TLS.
func (r *Relay) URL() string { return "http://" + r.Addr() }

// SetTarget says where connections go from now on (host:port); those that exist are reset. "" refuses new ones.
func (r *Relay) SetTarget(target string) {
	r.mu.Lock()
	r.target = target
	r.mu.Unlock()
	r.Reset()
}

// Reset ends all connections at once, as a machine does that crashed and is back.
func (r *Relay) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for p := range r.pairs {
		p.reset()
	}
}

// Mute holds all bytes back, in both directions, also those of connections that are made from now on: what a network
// that loses every packet looks like. Pass lets everything go on.
func (r *Relay) Mute() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mute == nil && !r.closed {
		r.mute = make(chan struct{})
	}
}

// Pass ends Mute: what was held back arrives.
func (r *Relay) Pass() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mute != nil {
		close(r.mute)
		r.mute = nil
	}
}

// Delay makes all bytes arrive d later, in each direction.
func (r *Relay) Delay(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.delay = d
}

// Open returns the number of connections that pass through now, Accepted of those that ever asked.
func (r *Relay) Open() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.pairs)
}

// Accepted returns the number of connections that were ever made to the relay, refused ones included.
func (r *Relay) Accepted() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen
}

func (r *Relay) accept() {
	for {
		a, err := r.l.Accept()
		if err != nil {
			return
		}
		r.mu.Lock()
		p, target := &pair{a: a}, r.target
		r.seen++
		if target == "" || r.closed {
			p.reset()
		} else {
			r.pairs[p] = struct{}{}
			go r.run(p, target)
		}
		r.mu.Unlock()
	}
}

func (r *Relay) run(p *pair, target string) {
	b, err := net.Dial("tcp", target)
	r.mu.Lock()
	if _, live := r.pairs[p]; err != nil || !live {
		p.reset()
		delete(r.pairs, p)
		r.mu.Unlock()
		if b != nil {
			b.Close()
		}
		return
	}
	p.b = b
	r.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() { r.pump(p.a, p.b) })
	wg.Go(func() { r.pump(p.b, p.a) })
	wg.Wait()
	p.a.Close()
	p.b.Close()
	r.mu.Lock()
	delete(r.pairs, p)
	r.mu.Unlock()
}

// pump passes bytes on until one side ends; then the other one hears of it.
func (r *Relay) pump(from, to net.Conn) {
	chunks := make(chan chunk, maxChunks)
	go func() {
		defer close(chunks)
		for {
			buf := make([]byte, chunkBytes)
			n, err := from.Read(buf)
			if n > 0 {
				r.mu.Lock()
				due := time.Now().Add(r.delay)
				r.mu.Unlock()
				chunks <- chunk{buf[:n], due}
			}
			if err != nil {
				return
			}
		}
	}()
	for c := range chunks {
		if d := time.Until(c.due); d > 0 {
			<-time.After(d) // the delay itself
		}
		r.pass()
		if _, err := to.Write(c.b); err != nil {
			break
		}
	}
	r.pass() // a mute network does not tell of an end, either
	// Neither gRPC nor etcd's peers use half-closed connections.
	from.Close()
	to.Close()
	for range chunks { // its reader ends
	}
}

// pass waits while the relay is mute.
func (r *Relay) pass() {
	r.mu.Lock()
	mute := r.mute
	r.mu.Unlock()
	if mute != nil {
		<-mute
	}
}

// reset ends the pair without a word more than TCP's.
func (p *pair) reset() {
	for _, c := range []net.Conn{p.a, p.b} {
		if tc, ok := c.(*net.TCPConn); ok {
			_ = tc.SetLinger(0) // RST instead of FIN
			_ = tc.Close()
		}
	}
}
