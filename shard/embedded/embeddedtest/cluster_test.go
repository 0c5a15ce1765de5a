package embeddedtest

import (
	"context"
	"io"
	"net"
	"strconv"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func client(t *testing.T, urls ...string) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: urls, DialTimeout: patience, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// One of three nodes may fail in every way, and comes back with what was written meanwhile.
func TestThreeNodes(t *testing.T) {
	c := Start(t, 3, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 5*patience)
	defer cancel()
	put := func(v string, nodes ...int) {
		t.Helper()
		for _, i := range nodes {
			var last error
			c.wait("a put", func() bool { // the leader may change once more
				_, last = client(t, c.URL(i)).Put(ctx, "k", v)
				return last == nil || ctx.Err() != nil
			})
			if last != nil {
				t.Fatalf("through node %d: %v", i, last)
			}
		}
	}
	read := func(i int, want string) {
		t.Helper()
		r, err := client(t, c.URL(i)).Get(ctx, "k")
		if err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != want {
			t.Fatalf("node %d: %v, %v; expected %q", i, r, err, want)
		}
	}
	others := func(i int) (int, int) { return (i + 1) % 3, (i + 2) % 3 }

	leader := c.AwaitLeader(-1)
	next, _ := others(leader)
	c.MoveLeader(next)
	if got := c.Leader(); got != next {
		t.Fatalf("%d leads after MoveLeader(%d)", got, next)
	}
	put("moved", 0, 1, 2)

	for name, end := range map[string]func(int){"stopped": c.Stop, "killed": c.Kill} {
		down := c.AwaitLeader(-1)
		end(down)
		if c.Etcd(down) != nil {
			t.Error("it still runs")
		}
		c.AwaitLeader(down)
		a, b := others(down)
		put(name, a, b)
		c.Restart(down)
		c.AwaitHealthy()
		read(down, name)
	}

	// A leader that is cut off is not one any more, and serves no linearizable read.
	cut := c.AwaitLeader(-1)
	c.Cut(cut)
	c.AwaitLeader(cut)
	a, b := others(cut)
	put("cut", a, b)
	short, stop := context.WithTimeout(ctx, 300*time.Millisecond)
	defer stop()
	if _, err := client(t, c.URL(cut)).Get(short, "k"); err == nil {
		t.Error("a node that is cut off has served a linearizable read")
	}
	c.Heal(cut)
	c.AwaitHealthy(cut)
	read(cut, "cut")
}

// A relay passes, delays, holds back, resets and refuses.
func TestRelay(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			go io.Copy(nc, nc)
		}
	}()
	r := NewRelay(t)
	dial := func() net.Conn {
		nc, err := net.Dial("tcp", r.Addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { nc.Close() })
		return nc
	}
	echo := func(nc net.Conn, timeout time.Duration) error {
		nc.SetDeadline(time.Now().Add(timeout))
		if _, err := nc.Write([]byte("x")); err != nil {
			return err
		}
		_, err := io.ReadFull(nc, make([]byte, 1))
		return err
	}
	if nc, err := net.Dial("tcp", r.Addr()); err == nil {
		if err := echo(nc, patience); err == nil {
			t.Error("without a target something answers")
		}
		nc.Close()
	}
	r.SetTarget(l.Addr().String())
	nc := dial()
	if err := echo(nc, patience); err != nil {
		t.Fatal(err)
	}
	r.Delay(30 * time.Millisecond)
	begun := time.Now()
	if err := echo(nc, patience); err != nil || time.Since(begun) < 60*time.Millisecond {
		t.Errorf("delayed: %v after %v", err, time.Since(begun))
	}
	r.Delay(0)
	r.Mute()
	if err := echo(nc, 50*time.Millisecond); err == nil {
		t.Error("a mute relay passes bytes")
	}
	r.Pass()
	nc.SetDeadline(time.Now().Add(patience))
	if _, err := io.ReadFull(nc, make([]byte, 1)); err != nil {
		t.Errorf("what was held back: %v", err)
	}
	r.Reset()
	if err := echo(nc, patience); err == nil {
		t.Error("a connection has lived through Reset")
	}
	if err := echo(dial(), patience); err != nil {
		t.Error(err)
	}
}

// No two addresses are the same, nobody listens there, and no kernel hands them out.
func TestFreeAddr(t *testing.T) {
	seen := map[string]bool{}
	for range 200 {
		addr := FreeAddr(t)
		_, port, err := net.SplitHostPort(addr)
		if n, _ := strconv.Atoi(port); err != nil || n < firstFreePort || n > lastFreePort || seen[addr] {
			t.Fatalf("%s: %v, %d before it", addr, err, len(seen))
		}
		seen[addr] = true
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
}
