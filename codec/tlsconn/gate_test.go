package tlsconn

import (
	"crypto/tls"
	"sync/atomic"
	"testing"
)

// busy is how many compute or wait for it.
func (g *Gate) busy() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.computing + len(g.answered) + len(g.fresh)
}

// TestBegunIsFinishedFirst: who has the client's answer computes before all that begin, however long they have waited.
// Else a burst of handshakes ends in no connection at all: all have their first flight before one has its second.
func TestBegunIsFinishedFirst(t *testing.T) {
	w := newWorld(t)
	gate := NewGate()
	gate.width = 1
	log := make(chan string, 100)
	logged := func(name string) *tls.Config {
		cfg := w.srv.Clone()
		cfg.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
			log <- name + " begins"
			return nil, nil
		}
		cfg.VerifyConnection = func(tls.ConnectionState) error {
			log <- name + " ends"
			return nil
		}
		return cfg
	}
	begun := newPipe(t, logged("begun"), w.cli, gate)
	begun.until("the ClientHello is there", func() bool { return begun.srv.conn.started })
	begun.hold = true
	begun.until("the client's answer", func() bool { return len(begun.toSrv) > 0 && begun.cli.conn.Open() })
	eventually(t, "nobody computes", func() bool { return gate.busy() == 0 })
	if !gate.take(begun.srv.conn) {
		t.Fatal("no turn")
	}
	const n = 10
	var fresh []*pipe
	for i := range n {
		p := newPipe(t, logged("fresh"), w.cli, gate)
		p.until("the ClientHello is there", func() bool { return p.srv.conn.started })
		eventually(t, "it waits", func() bool { return gate.busy() == 2+i })
		fresh = append(fresh, p)
	}
	begun.hold = false
	begun.turn()
	eventually(t, "it waits", func() bool { return gate.busy() == 2+n })
	gate.release()
	begun.until("it is open", begun.bothOpen)
	for _, p := range fresh {
		p.until("the others are open", p.bothOpen)
	}
	if a, b := <-log, <-log; a != "begun begins" || b != "begun ends" {
		t.Errorf("%s, then %s", a, b)
	}
	if gate.busy() != 0 {
		t.Errorf("%d are left", gate.busy())
	}
}

// TestNoHandshakeForTheDead: a client that went away after its answer costs no computing, and no turn.
func TestNoHandshakeForTheDead(t *testing.T) {
	w := newWorld(t)
	gate := NewGate()
	var ends atomic.Int32
	cfg := w.srv.Clone()
	cfg.VerifyConnection = func(tls.ConnectionState) error { ends.Add(1); return nil }
	p := newPipe(t, cfg, w.cli, gate)
	p.until("the ClientHello is there", func() bool { return p.srv.conn.started })
	p.hold = true
	p.until("the client's answer", func() bool { return len(p.toSrv) > 0 && p.cli.conn.Open() })
	eventually(t, "nobody computes", func() bool { return gate.busy() == 0 })
	gate.mu.Lock()
	gate.computing = gate.width
	gate.mu.Unlock()
	p.srv.receive(p.toSrv)
	eventually(t, "it waits", func() bool { return gate.busy() == gate.width+1 })
	p.srv.conn.Close()
	eventually(t, "it has left", func() bool { return gate.busy() == gate.width && gate.Pending() == 0 && gate.input.Load() == 0 })
	if ends.Load() != 0 {
		t.Error("the handshake was computed")
	}
}

// TestCrowded: with the gate full, the oldest gives way, and one that waits for its peer holds no token.
func TestCrowded(t *testing.T) {
	w := newWorld(t)
	gate := NewGate()
	gate.limit = 3
	var slow []*pipe
	for range 3 {
		p := newPipe(t, w.srv, w.cli, gate)
		p.until("the ClientHello is there", func() bool { return p.srv.conn.started })
		p.chunk = func() int { return 0 } // the server's answer stays on its way
		slow = append(slow, p)
	}
	eventually(t, "tokens given back", func() bool { return gate.busy() == 0 })
	good := newPipe(t, w.srv, w.cli, gate)
	good.until("the good client", good.bothOpen)
	slow[0].until("the oldest ends", func() bool { return slow[0].srv.err != nil })
	if slow[0].srv.err != ErrCrowded {
		t.Errorf("the oldest ended with %v", slow[0].srv.err)
	}
	for _, p := range slow[1:] {
		p.chunk = func() int { return 1 << 20 }
		p.until("the others finish", p.bothOpen)
	}
	if gate.Pending() != 0 || gate.first != nil || gate.last != nil {
		t.Errorf("%d are left", gate.Pending())
	}
}

// TestClosedInHandshake closes at every stage; the goroutine ends, and its news harm nobody.
func TestClosedInHandshake(t *testing.T) {
	w := newWorld(t)
	gate := NewGate()
	for n := range 60 {
		p := newPipe(t, w.srv, w.cli, gate)
		p.chunk = func() int { return 50 }
		for range n {
			p.turn()
		}
		p.srv.conn.Close()
		p.cli.conn.Close()
		p.srv.advance()
		p.cli.advance()
		p.srv.receive([]byte("x"))
	}
	eventually(t, "all gone", func() bool { return gate.Pending() == 0 && gate.busy() == 0 && gate.input.Load() == 0 })
}
