package tlsconn

import (
	"crypto/tls"
	"errors"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"
)

// TestRecordsScan counts records however the bytes are cut.
func TestRecordsScan(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		var stream []byte
		want := rnd.IntN(20)
		for range want {
			n := []int{0, 1, 255, 256, 3000, 1<<14 + 256}[rnd.IntN(6)]
			stream = append(stream, 23, 3, 3, byte(n>>8), byte(n))
			stream = append(stream, make([]byte, n)...)
		}
		half := rnd.IntN(10)
		stream = append(stream, []byte{23, 3, 3, 0, 100, 1, 2, 3, 4, 5}[:half]...)
		var r records
		got := 0
		for p := stream; len(p) > 0; {
			n := 1 + rnd.IntN(min(len(p), 5000))
			got += r.scan(p[:n])
			p = p[n:]
		}
		if got != want || r.partial() != half {
			t.Fatalf("seed %d: %d records and %d bytes, want %d and %d", seed, got, r.partial(), want, half)
		}
	}
}

// TestRecordsBudget: what honest writers do is never too much; KeyUpdates without end are, and so are crumbs.
func TestRecordsBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r records
		for range 100_000 { // a long write's last record
			if err := r.brought(1<<14, 1); err != nil {
				t.Fatal("records of 16 KiB: ", err)
			}
		}
		r = records{}
		for range 100_000 { // a client that writes a frame's header and its few bytes apart, for hours
			<-time.After(time.Second / 50) // of the bubble
			if err := r.brought(17, 1); err != nil {
				t.Fatal("two a frame: ", err)
			}
		}
		r = records{}
		n := 0
		for ; n < 10*uselessBurst && r.brought(1, 16) == nil; n++ { // KeyUpdates, as many as crypto/tls lets pass between two bytes
			<-time.After(time.Millisecond)
		}
		if n < uselessBurst/16-1 || n > uselessBurst/16+20 {
			t.Errorf("ended after %d", n)
		}
		r = records{}
		for n = 0; n < 10*uselessBurst && r.brought(1, 1) == nil; n++ {
		}
		if n != uselessBurst {
			t.Errorf("ended after %d bytes", n)
		}
	})
}

// TestCrumbs ends a connection whose records bring a byte each, and none that writes frames.
func TestCrumbs(t *testing.T) {
	w := newWorld(t)
	open := func(suite uint16, max uint16) *pipe {
		srv, cli := w.srv.Clone(), w.cli.Clone()
		cli.MaxVersion = max
		if suite != 0 {
			cli.CipherSuites = []uint16{suite}
		}
		p := newPipe(t, srv, cli, NewGate())
		p.until("handshake", p.bothOpen)
		return p
	}
	for _, p := range []*pipe{open(0, tls.VersionTLS13), open(tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.VersionTLS12)} {
		for range 5 * uselessBurst {
			if err := p.cli.conn.Seal(make([]byte, usefulRecord)); err != nil {
				t.Fatal(err)
			}
			p.srv.receive(p.cli.output())
		}
		if p.srv.err != nil || len(p.srv.got) != 5*uselessBurst*usefulRecord {
			t.Fatalf("frames: %v after %d bytes", p.srv.err, len(p.srv.got))
		}
		begun := len(p.srv.got)
		for range 5 * uselessBurst {
			if err := p.cli.conn.Seal([]byte{1}); err != nil {
				t.Fatal(err)
			}
			p.srv.receive(p.cli.output())
		}
		if n := len(p.srv.got) - begun; !errors.Is(p.srv.err, ErrRecords) || n < uselessBurst || n > 2*uselessBurst {
			t.Errorf("crumbs: %v after %d", p.srv.err, n)
		}
	}
}
