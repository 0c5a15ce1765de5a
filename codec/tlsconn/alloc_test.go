//go:build !race

package tlsconn

import "testing"

// TestAllocs: a record in and a record out cost no more than what crypto/tls itself needs.
func TestAllocs(t *testing.T) {
	w := newWorld(t)
	p := newPipe(t, w.srv, w.cli, nil)
	p.until("handshake", p.bothOpen)
	p.until("rest", func() bool { return !p.turn() })
	msg := make([]byte, 400)
	p.srv.plain = func(b []byte) error { return p.srv.conn.Seal(b) }
	p.cli.plain = func([]byte) error { return nil }
	n := testing.AllocsPerRun(2000, func() {
		if err := p.cli.conn.Seal(msg); err != nil {
			t.Fatal(err)
		}
		_ = p.srv.conn.Receive(p.cli.conn.Output())
		p.cli.conn.Written()
		_ = p.cli.conn.Receive(p.srv.conn.Output())
		p.srv.conn.Written()
	})
	t.Logf("%v allocations for a record there and back", n)
	if n > 4 {
		t.Errorf("%v allocations, want at most 4: crypto/tls has one for each look for a record, and looks once in vain", n)
	}
}
