package shard

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/panjf2000/gnet/v2"
)

// testLoop is a Loop over one event loop of gnet: mailbox, hooks, nothing else. Unlike the server's, it does not
// survive panics.
type testLoop struct {
	gnet.BuiltinEventEngine
	el     gnet.EventLoop
	booted chan struct{}
	found  chan struct{}
	done   chan struct{}

	mu      sync.Mutex
	letters []func()
	rung    bool
	hooks   []func()
	inTurn  bool // loop only
}

// testGuard is how long a test waits for what must happen.
const testGuard = time.Minute

// sharedLoop is started once: gnet takes half a second to stop, so the tests leave it to the end of the process.
var sharedLoop = sync.OnceValues(func() (*testLoop, error) {
	dir, err := os.MkdirTemp("", "spindle")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	// gnet hands out its event loops with connections only: dial one.
	sock := filepath.Join(dir, "loop")
	l := &testLoop{booted: make(chan struct{}), found: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(l.done)
		err = gnet.Run(l, "unix://"+sock, gnet.WithNumEventLoop(1), gnet.WithLogger(silent{}))
	}()
	select {
	case <-l.booted:
	case <-l.done:
		return nil, err
	}
	nc, err := net.Dial("unix", sock)
	if err != nil {
		return nil, err
	}
	<-l.found
	return l, nc.Close()
})

func newTestLoop(t testing.TB) *testLoop {
	t.Helper()
	l, err := sharedLoop()
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// silent is a logger of gnet.
type silent struct{}

func (silent) Debugf(string, ...any) {}
func (silent) Infof(string, ...any)  {}
func (silent) Warnf(string, ...any)  {}
func (silent) Errorf(string, ...any) {}
func (silent) Fatalf(string, ...any) {}

func (l *testLoop) Post(f func()) {
	l.mu.Lock()
	l.letters = append(l.letters, f)
	ring := !l.rung
	l.rung = true
	l.mu.Unlock()
	if ring {
		_ = l.el.Execute(context.Background(), gnet.RunnableFunc(func(context.Context) error {
			l.turn(func() {
				l.mu.Lock()
				letters := l.letters
				l.letters, l.rung = nil, false
				l.mu.Unlock()
				for _, f := range letters {
					f()
				}
			})
			return nil
		}))
	}
}

// do runs f on the loop and waits for it.
func (l *testLoop) do(f func()) {
	done := make(chan struct{})
	l.Post(func() { f(); close(done) })
	select {
	case <-done:
	case <-time.After(testGuard):
		panic("the loop does not turn")
	}
}

func (l *testLoop) OnTurnEnd(f func()) {
	l.mu.Lock()
	l.hooks = append(l.hooks, f)
	l.mu.Unlock()
}

func (l *testLoop) Enroll(nc net.Conn, h LoopConn) error {
	res, err := l.el.Enroll(gnet.NewContext(context.Background(), h), nc)
	if err != nil {
		nc.Close()
		return err
	}
	go func() {
		select {
		case r := <-res:
			if r.Err != nil {
				l.Post(func() { h.OnClose(nil, r.Err) })
			}
		case <-l.done:
		}
	}()
	return nil
}

func (l *testLoop) turn(f func()) {
	if l.inTurn { // OnClose within Write
		f()
		return
	}
	l.inTurn = true
	f()
	l.mu.Lock()
	hooks := l.hooks
	l.mu.Unlock()
	for _, h := range hooks {
		h()
	}
	l.inTurn = false
}

func (l *testLoop) OnBoot(gnet.Engine) gnet.Action {
	close(l.booted)
	return gnet.None
}

func (l *testLoop) OnOpen(c gnet.Conn) ([]byte, gnet.Action) {
	if h, ok := c.Context().(LoopConn); ok {
		l.turn(func() { h.OnOpen(c) })
	} else if l.el == nil {
		l.el = c.EventLoop()
		close(l.found)
	}
	return nil, gnet.None
}

func (l *testLoop) OnTraffic(c gnet.Conn) gnet.Action {
	if h, ok := c.Context().(LoopConn); ok {
		l.turn(func() { h.OnTraffic(c) })
	}
	return gnet.None
}

func (l *testLoop) OnClose(c gnet.Conn, err error) gnet.Action {
	if h, ok := c.Context().(LoopConn); ok {
		l.turn(func() { h.OnClose(c, err) })
	}
	return gnet.None
}

var errTestGuard = errors.New("waited too long")
