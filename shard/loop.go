package shard

import (
	"net"

	"github.com/panjf2000/gnet/v2"
)

// Loop is an event loop as the core and the connections to member clusters see it. One goroutine runs
// it, turn by turn: a turn is one event of one socket, or one emptying of the mailbox, followed by the
// hooks. Package server implements it over gnet.
type Loop interface {
	// Post runs f on the loop, after everything that was posted before it. It may be called on any
	// goroutine, also on the loop itself, and never blocks. After the loop has stopped f is dropped.
	Post(f func())
	// Enroll hands the socket nc (a *net.TCPConn or *net.UnixConn) to the loop, which reports its events
	// to h. It may be called on any goroutine and does not wait: OnOpen tells that it worked, or OnClose
	// with a nil connection that it did not. nc belongs to the loop from the call on, whatever it returns;
	// after an error, none of h's methods is called.
	Enroll(nc net.Conn, h LoopConn) error
	// OnTurnEnd adds a hook that runs at the end of each turn, after those that were added before it. It
	// may be called on any goroutine. Output to clients is written after all hooks.
	OnTurnEnd(f func())
}

// LoopConn handles the events of one socket on a Loop, all of them on the loop's goroutine.
//
// A failed Write closes the socket at once and calls OnClose before it returns, so every caller of Write
// must expect to find its connection gone afterwards. After OnClose c must not be touched any more: its
// file descriptor may belong to another connection.
type LoopConn interface {
	OnOpen(c gnet.Conn)
	// OnTraffic reports that bytes can be taken by Peek and Discard, or that Wake was called. What Peek
	// gives is valid only during the call.
	OnTraffic(c gnet.Conn)
	// OnClose reports the end of the socket, exactly once; err is nil when this side closed it. c is nil
	// when the socket could not be enrolled (there was no OnOpen then).
	OnClose(c gnet.Conn, err error)
}
