package load

import (
	"time"

	"spindle/bench/client"
	"spindle/bench/hist"
	"spindle/codec"
)

const (
	// errorPause is how long a client rests after an error, so that a server that refuses everything is not
	// asked a hundred thousand times a second.
	errorPause = 10 * time.Millisecond
	// minPause is the shortest sleep of an open loop: requests that fall due within go out together.
	minPause = 50 * time.Microsecond
	// maxTexts bounds the different error texts that are kept.
	maxTexts = 16
)

// stat is what was counted of one kind of request since the last harvest.
type stat struct {
	lat       hist.Hist
	errors    uint64
	conflicts uint64
}

// group is one connection and the clients that share it. All of it is guarded by the connection's lock.
type group struct {
	run     *run
	conn    *client.Conn
	workers []*worker
	value   []byte

	stats  [kindCount]*stat
	texts  map[string]uint64
	busy   int       // requests under way
	idle   []*worker // open loop: clients without a request
	parked []*worker // resting after an error
	timer  *time.Timer

	wrote, wrotePods uint64 // acknowledged since the beginning of the load

	// Open loop: request k is due at first + k*period.
	first  int64
	period float64
	sent   int64
}

func (g *group) stat(k Kind) *stat {
	if g.stats[k] == nil {
		g.stats[k] = new(stat) // once
	}
	return g.stats[k]
}

func (g *group) failed(s *stat, st codec.Status) {
	if g.run.refused(st) {
		return
	}
	s.errors++
	if _, ok := g.texts[st.Msg]; ok || len(g.texts) < maxTexts {
		g.texts[st.Msg]++
	}
}

// lost: the connection takes no more requests.
func (g *group) lost() {
	switch err := g.conn.Lost(); {
	case g.run.stopped.Load():
	case err != nil:
		g.run.abort("a connection to the server is lost: %w", err)
	default:
		g.run.abort("a connection to the server takes no more requests")
	}
}

// begin starts the load; in an open loop the first request is due at first.
func (g *group) begin(first int64, period float64) {
	g.conn.Lock()
	defer g.conn.Unlock()
	g.first, g.period = first, period
	if period > 0 {
		g.idle = append(g.idle, g.workers...)
		g.timer = time.AfterFunc(0, g.beat)
		return
	}
	now := g.run.now()
	for _, w := range g.workers {
		w.next(now, now)
	}
}

func (g *group) due() int64 { return g.first + int64(float64(g.sent)*g.period) }

// pump sends what is due, as far as there are free clients.
func (g *group) pump(now int64) {
	for len(g.idle) > 0 {
		due := g.due()
		if due > now {
			return
		}
		w := g.idle[len(g.idle)-1]
		g.idle = g.idle[:len(g.idle)-1]
		g.sent++
		w.next(due, now)
	}
}

// free gives w its next request.
func (g *group) free(w *worker, now int64) {
	if g.period == 0 {
		w.next(now, now)
		return
	}
	g.idle = append(g.idle, w)
	g.pump(now)
}

// park lets w rest.
func (g *group) park(w *worker) {
	g.parked = append(g.parked, w)
	if len(g.parked) == 1 && g.period == 0 {
		if g.timer == nil {
			g.timer = time.AfterFunc(errorPause, g.beat)
		} else {
			g.timer.Reset(errorPause)
		}
	}
}

// beat is called by the timer.
func (g *group) beat() {
	g.conn.Lock()
	defer g.conn.Unlock()
	if g.run.stopped.Load() {
		return
	}
	now := g.run.now()
	for n := len(g.parked); n > 0; n-- {
		w := g.parked[0]
		g.parked = append(g.parked[:0], g.parked[1:]...)
		if w.prepping {
			w.next(now, now)
		} else {
			g.free(w, now)
		}
	}
	if g.period == 0 {
		return
	}
	g.pump(now)
	wait := max(time.Duration(g.due()-now), minPause)
	if len(g.idle) == 0 {
		wait = errorPause // whoever becomes free looks by itself
	}
	g.timer.Reset(min(wait, errorPause))
}
