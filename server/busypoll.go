package server

import (
	"reflect"
	"runtime"
	"time"

	"github.com/panjf2000/gnet/v2"
	"golang.org/x/sys/unix"
)

// A loop that has nothing to do sleeps, and to be woken up costs it some tens of µs, on a virtual machine whose processor
// was halted more than the whole turn. A request of a client that is alone pays that twice (a read) or three times (a write).
// So with few requests under way a loop looks for its next event for a short time before it sleeps. With many it need not: the next
// event is there mostly, and the members have more use for the processor.

const (
	// busyPollOps is how many unary requests may be under way while a loop polls: of its clients, and at the core's loop of all
	// clients. With more it sleeps at once, as ever, and for the next busyPollRare turns.
	busyPollOps = 4
	// busyPollTries is how many times in a row a loop may have polled in vain; from then on it sits out, and polls in one
	// turn of busyPollRare at least. One success is enough to have it poll in each turn again.
	busyPollTries = 3
	busyPollRare  = 64
)

// busyPoll looks for a loop's next event. It belongs to the loop; its zero value never looks.
type busyPoll struct {
	span   time.Duration  // how long, at most
	fd     [1]unix.PollFd // gnet's epoll instance, which is readable when it has an event
	vain   int            // times in a row that nothing came
	sitOut int            // turns until it polls again
}

// open has b poll the poller of el for at most span. If el does not show its poller, or nobody else could run meanwhile, so that
// there is nothing to wait for, b never polls.
func (b *busyPoll) open(el gnet.EventLoop, span time.Duration) {
	fd, ok := pollerOf(el)
	if !ok || span <= 0 || fewProcessors(runtime.GOMAXPROCS(0), runtime.NumCPU()) {
		return
	}
	b.span = span
	b.fd[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
}

// fewProcessors says that a loop that polls may take what others need: there is one processor, or a limit of the container that may
// be less than two (Go takes two for any of those). A container that has used up its time stands still as a whole.
func fewProcessors(procs, cpus int) bool { return min(procs, cpus) < 2 || procs == 2 && cpus > 2 }

// pollerOf returns the descriptor of el's epoll instance, which gnet keeps to itself. It is only ever asked whether it is
// readable: that takes no event away from gnet, not even one that is told once (EPOLLET, gnet's own doorbell).
func pollerOf(el gnet.EventLoop) (fd int, ok bool) {
	v := reflect.ValueOf(el)
	for _, field := range [...]string{"poller", "fd"} {
		if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
			return 0, false
		}
		v = v.Elem().FieldByName(field)
	}
	if !v.CanInt() {
		return 0, false
	}
	return int(v.Int()), true
}

// idle returns when the loop has an event, or b has looked long enough. It lets everybody else have the processor meanwhile.
func (b *busyPoll) idle() {
	if b.sitOut > 0 {
		b.sitOut--
		return
	}
	for start := time.Now(); ; {
		if n, _ := unix.Poll(b.fd[:], 0); n > 0 { // EINTR: the runtime has sent a signal
			b.vain = 0
			return
		}
		if time.Since(start) >= b.span {
			break
		}
		_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
	if b.vain++; b.vain >= busyPollTries {
		b.sitOut = min(1<<min(b.vain, 30), busyPollRare) - 1
	}
}

// idle is called at the end of each event of a socket, outside of a turn. What gnet itself is asked for meanwhile (to enroll
// a socket, say) may wait until it returns.
func (l *Loop) idle() {
	switch {
	case l.poll.span == 0:
	case l.underWay() > busyPollOps:
		l.poll.sitOut = busyPollRare // one batch may answer them all, and they come back
	default:
		l.poll.idle()
	}
}

// underWay counts the unary requests that l may have to do with soon.
func (l *Loop) underWay() (n int64) {
	if l.index > 0 {
		return l.inflight.Load()
	}
	for _, other := range l.eng.loops {
		n += other.inflight.Load()
	}
	return n
}
