package chaos

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	relayChunk = 32 << 10
	relayQueue = 64 // chunks on their way in each direction; more wait in the sender's socket
	// relaySniff is how much of a peer connection is looked at for its sender.
	relaySniff = 8 << 10
)

// link is what a fault does to the connections from one process to another. The zero link lets everything through.
type link struct {
	mu      sync.Mutex
	changed chan struct{} // closed by the next change
	state   linkState
	conns   map[*relayConn]struct{}
}

type linkState struct {
	delay time.Duration // one way, each way
	hold  bool          // bytes wait, as when packets are lost: a partition
	// Bytes in this direction vanish, and the sender hears nothing of it: a half-open connection. A connection that has
	// lost some never carries any again in this direction, as no TCP connection would go on behind a gap.
	swallow [2]bool
}

// The directions.
const (
	asking    = 0 // from who dialed
	answering = 1
)

func newLink() *link { return &link{changed: make(chan struct{}), conns: map[*relayConn]struct{}{}} }

func (l *link) set(s linkState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state = s
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *link) get() (linkState, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state, l.changed
}

// cut ends all connections with a RST to both sides. New ones are let through.
func (l *link) cut() {
	l.mu.Lock()
	conns := make([]*relayConn, 0, len(l.conns))
	for c := range l.conns {
		conns = append(conns, c)
	}
	l.mu.Unlock()
	for _, c := range conns {
		c.close()
	}
}

// pass waits while the link is held, and reports false if the connection has ended meanwhile.
func (l *link) pass(done <-chan struct{}) bool {
	for {
		s, changed := l.get()
		if !s.hold {
			return true
		}
		select {
		case <-changed:
		case <-done:
			return false
		}
	}
}

// relay is a listener whose connections go to a process, wherever that listens at the moment.
type relay struct {
	l      net.Listener
	dials  atomic.Int64           // connections that were asked for
	target atomic.Pointer[string] // nil: nowhere, connections are refused
	// linkOf returns the link of a connection, from the first bytes of it if there is more than one.
	linkOf func(first []byte) *link
	sniff  bool
}

// newRelay makes a relay for one link.
func newRelay(l *link) (*relay, error) {
	return listenRelay(&relay{linkOf: func([]byte) *link { return l }})
}

// newPeerRelay makes a relay for the connections of etcd's peers: each says in its first request which member it comes
// from.
func newPeerRelay(linkOf func(from string) *link) (*relay, error) {
	return listenRelay(&relay{sniff: true, linkOf: func(first []byte) *link { return linkOf(peerOf(first)) }})
}

func listenRelay(r *relay) (*relay, error) {
	var err error
	if r.l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := r.l.Accept()
			if err != nil {
				return
			}
			r.dials.Add(1)
			go r.serve(c)
		}
	}()
	return r, nil
}

func (r *relay) addr() string { return r.l.Addr().String() }
func (r *relay) url() string  { return "http://" + r.addr() }

func (r *relay) point(addr string) { r.target.Store(&addr) }

// peerOf returns the member ID that an etcd names in a request to its peer, "" if none.
func peerOf(head []byte) string {
	const field = "X-Server-From: "
	i := bytes.Index(head, []byte(field))
	if i < 0 {
		return ""
	}
	id, _, _ := bytes.Cut(head[i+len(field):], []byte("\r\n"))
	return string(id)
}

// readHead returns the head of an HTTP request without taking it from r.
func readHead(r *bufio.Reader) []byte {
	for n := 1; ; {
		b, err := r.Peek(n)
		if err != nil || len(b) >= relaySniff || bytes.Contains(b, []byte("\r\n\r\n")) {
			return b
		}
		if n = r.Buffered(); n <= len(b) {
			n = len(b) + 1
		}
	}
}

type relayConn struct {
	from, to net.Conn // to is nil until the other side was dialed
	mu       sync.Mutex
	done     chan struct{}
	once     sync.Once
}

// close resets both sides.
func (c *relayConn) close() {
	c.once.Do(func() {
		close(c.done)
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, s := range []net.Conn{c.from, c.to} {
			if s != nil {
				_ = s.(*net.TCPConn).SetLinger(0)
				s.Close()
			}
		}
	})
}

// end closes both sides in order.
func (c *relayConn) end() {
	c.once.Do(func() {
		close(c.done)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.from.Close()
		if c.to != nil {
			c.to.Close()
		}
	})
}

func (r *relay) serve(from net.Conn) {
	c := &relayConn{from: from, done: make(chan struct{})}
	defer c.close()
	in := bufio.NewReaderSize(from, relaySniff)
	var head []byte
	if r.sniff {
		head = readHead(in)
	}
	l := r.linkOf(head)
	l.mu.Lock()
	l.conns[c] = struct{}{}
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		delete(l.conns, c)
		l.mu.Unlock()
	}()
	if !l.pass(c.done) {
		return
	}
	if s, _ := l.get(); s.swallow != [2]bool{} {
		// Whoever dials into the void is accepted by somebody on the way and never hears from anybody.
		_, _ = io.Copy(io.Discard, in)
		return
	}
	target := r.target.Load()
	if target == nil {
		return
	}
	to, err := net.Dial("tcp", *target)
	if err != nil {
		return
	}
	c.mu.Lock()
	c.to = to
	c.mu.Unlock()
	select {
	case <-c.done: // cut meanwhile
		to.Close()
		return
	default:
	}
	var wg sync.WaitGroup
	wg.Go(func() { c.pump(l, in, to, asking) })
	wg.Go(func() { c.pump(l, to, from, answering) })
	wg.Wait()
}

// chunk is some bytes that go on at a time.
type chunk struct {
	b   []byte
	due time.Time
}

// pump carries one direction until it ends.
func (c *relayConn) pump(l *link, src io.Reader, dst net.Conn, dir int) {
	queue := make(chan chunk, relayQueue)
	go func() {
		defer close(queue)
		for {
			b := make([]byte, relayChunk)
			n, err := src.Read(b)
			if n > 0 {
				s, _ := l.get()
				select {
				case queue <- chunk{b[:n], time.Now().Add(s.delay)}:
				case <-c.done:
					return
				}
			}
			if err != nil {
				return
			}
		}
	}()
	lost := false
	for k := range queue {
		if wait := time.Until(k.due); wait > 0 {
			select {
			case <-time.After(wait):
			case <-c.done:
				return
			}
		}
		if !l.pass(c.done) {
			return
		}
		s, _ := l.get()
		if lost = lost || s.swallow[dir]; lost {
			continue
		}
		if _, err := dst.Write(k.b); err != nil {
			c.close()
			return
		}
	}
	// The end travels as the bytes do.
	if !l.pass(c.done) {
		return
	}
	if s, _ := l.get(); lost || s.swallow[dir] {
		<-c.done // until the other side gives up
		return
	}
	c.end()
}
