package server

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/panjf2000/gnet/v2"
	"golang.org/x/sys/unix"
)

// neverReady is the reading end of a pipe, and its writing end.
func neverReady(t *testing.T) (r, w int) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Close(fds[0])
		_ = unix.Close(fds[1])
	})
	return fds[0], fds[1]
}

// TestBusyPollFindsThePoller fails when a new gnet has its poller elsewhere: loops would sleep at once, and nobody notice.
func TestBusyPollFindsThePoller(t *testing.T) {
	s := startServer(t, Config{Loops: 2})
	for _, l := range s.Loops() {
		fd, ok := pollerOf(l.el)
		if !ok {
			t.Fatal("not found")
		}
		if is, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil || is != "anon_inode:[eventpoll]" {
			t.Errorf("descriptor %d is %q, %v", fd, is, err)
		}
		if l.poll.span != 0 {
			t.Error("polls without being told to")
		}
	}
	if _, ok := pollerOf(&fakeEL{}); ok {
		t.Error("found in a loop that is not gnet's")
	}
	if _, ok := pollerOf(nil); ok {
		t.Error("found in none")
	}
}

func TestBusyPollFewProcessors(t *testing.T) {
	for _, c := range []struct {
		procs, cpus int
		few         bool
	}{{1, 1, true}, {1, 8, true}, {2, 2, false}, {2, 8, true}, {4, 8, false}, {4, 1, true}} {
		if fewProcessors(c.procs, c.cpus) != c.few {
			t.Errorf("%+v", c)
		}
	}
}

type runnable func()

func (r runnable) Run(context.Context) error { r(); return nil }

var _ gnet.Runnable = runnable(nil)

// TestBusyPollLeavesEvents has a loop poll whenever gnet's own doorbell is rung, which epoll tells of once only.
func TestBusyPollLeavesEvents(t *testing.T) {
	if fewProcessors(runtime.GOMAXPROCS(0), runtime.NumCPU()) {
		t.Skip("one CPU, or a limit: nothing polls")
	}
	s := startServer(t, Config{Loops: 2, BusyPoll: 20 * time.Millisecond})
	for _, l := range s.Loops() {
		if l.poll.span == 0 {
			t.Fatal("does not poll")
		}
		for range 8 {
			onLoop(l, func() {})
			done := make(chan error, 1)
			if err := l.el.Execute(context.Background(), runnable(func() { done <- nil })); err != nil {
				t.Fatal(err)
			}
			receive(t, "the end of a task", done)
		}
	}
}

// TestBusyPollSitsOut counts how often a loop polls in vain, and looks that one success is enough to begin again.
func TestBusyPollSitsOut(t *testing.T) {
	r, w := neverReady(t)
	b := busyPoll{span: time.Nanosecond}
	b.fd[0] = unix.PollFd{Fd: int32(r), Events: unix.POLLIN}
	const turns = 10 * busyPollRare
	polls := 0
	for range turns {
		if b.sitOut == 0 {
			polls++
		}
		b.idle()
	}
	// The first ones, those after 7, 15 and 31 turns, and the rare ones.
	if polls < turns/busyPollRare || polls > busyPollTries+3+turns/busyPollRare {
		t.Errorf("%d polls in %d turns", polls, turns)
	}
	if _, err := unix.Write(w, ding[:]); err != nil {
		t.Fatal(err)
	}
	for range busyPollRare {
		b.idle()
	}
	if b.vain != 0 || b.sitOut != 0 {
		t.Errorf("after an event: in vain %d, sits out %d", b.vain, b.sitOut)
	}
}

// TestBusyPollOnlyForFew: with more than a few requests under way a loop sleeps at once, and the core's loop counts everybody's.
func TestBusyPollOnlyForFew(t *testing.T) {
	r, _ := neverReady(t)
	e := &Engine{}
	for i := range 2 {
		e.loops = append(e.loops, newLoop(e, i, nil))
	}
	for _, c := range []struct {
		home, other           int64 // requests under way
		homePolls, otherPolls bool
	}{
		{0, busyPollOps + 1, false, false},
		{0, busyPollOps, true, true},
		{1, busyPollOps, false, true},
		{busyPollOps + 1, 0, false, true},
	} {
		e.loops[0].inflight.Store(c.home)
		e.loops[1].inflight.Store(c.other)
		for i, want := range []bool{c.homePolls, c.otherPolls} {
			l := e.loops[i]
			l.poll = busyPoll{span: time.Nanosecond}
			l.poll.fd[0] = unix.PollFd{Fd: int32(r), Events: unix.POLLIN}
			l.idle()
			if polled := l.poll.vain > 0; polled != want {
				t.Errorf("with %d and %d under way loop %d polls: %v", c.home, c.other, i, polled)
			}
			if out := l.poll.sitOut > 0; out == want {
				t.Errorf("with %d and %d under way loop %d sits out: %v", c.home, c.other, i, out)
			}
		}
	}
}
