package load

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"spindle/bench/client"
)

const (
	// watchTimeout bounds the wait until all watches are created.
	watchTimeout = 30 * time.Second
	// drainTimeout bounds the wait for answers and events when the load is over.
	drainTimeout = 5 * time.Second
	drainPoll    = 5 * time.Millisecond
	// stopTimeout is how long a load that is stopped waits for connections in the middle of a write before it severs all: it has to
	// have their locks for what they counted.
	stopTimeout = time.Second
)

// run is a load under way.
type run struct {
	spec          Spec
	ctx           context.Context
	cancel        context.CancelCauseFunc
	progress      io.Writer
	base          time.Time
	keys          keys
	token         string // of spec.User; one for all connections
	authenticated bool
	podsKey       []byte
	podsEnd       []byte
	weights       int
	groups        []*group
	feeds         []*feed // of the watchers
	all           *feed   // of WatchAll, nil if there is none
	acks          acks
	before        []int64 // resident memory of the processes
	prepared      latch
	watching      latch
	connMu        sync.Mutex
	conns         []*client.Conn // all that were dialed, for sever
	stopped       atomic.Bool    // no further request
	ending        atomic.Bool    // nobody minds what ends now
	over          chan struct{}  // closed by close
}

func (r *run) now() int64 { return int64(time.Since(r.base)) }

func (r *run) say(format string, args ...any) { fmt.Fprintf(r.progress, format+"\n", args...) }

// abort ends the load with an error. It may be called anywhere.
func (r *run) abort(format string, args ...any) { r.cancel(fmt.Errorf(format, args...)) }

func (r *run) why() error { return context.Cause(r.ctx) }

// Run does one load, and says on progress what happens, a line a second. It returns an error if the load could not be
// done to its end, and with it what was measured until then, nil if that is nothing. Requests that fail are counted and no error.
func Run(ctx context.Context, spec Spec, progress io.Writer) (*Result, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	r := newRun(ctx, spec, progress)
	defer r.cancel(nil)
	defer r.close()
	if err := r.dial(); err != nil {
		return nil, err
	}
	if !spec.KeysExist {
		if err := r.prepare(); err != nil {
			return nil, err
		}
	}
	if err := r.watch(); err != nil {
		return nil, err
	}
	return r.measure(r.begin)
}

func newRun(ctx context.Context, spec Spec, progress io.Writer) *run {
	now := time.Now()
	r := &run{spec: spec, progress: progress, base: now, acks: make(acks, ackSlots)}
	r.ctx, r.cancel = context.WithCancelCause(ctx)
	r.over = make(chan struct{})
	context.AfterFunc(r.ctx, r.sever)
	r.keys = keys{prefix: spec.Prefix, spread: spec.NameSpread, tag: strconv.FormatInt(now.UnixMilli(), 36)}
	r.podsKey, r.podsEnd = r.keys.pods()
	for _, s := range spec.Mix {
		r.weights += s.Weight
	}
	for _, p := range spec.Processes {
		rss, _, _ := Memory(p.PID)
		r.before = append(r.before, rss)
	}
	return r
}

// connect dials the i-th connection.
func (r *run) connect(i int) (*client.Conn, error) {
	at := r.spec.Endpoints[i%len(r.spec.Endpoints)]
	c, err := r.dialOne(at)
	switch {
	case r.ctx.Err() != nil: // then that is what err is from
		if c != nil {
			c.Close()
		}
		return nil, r.why()
	case err != nil:
		return nil, fmt.Errorf("%s: %w%s", at, err, adviceFor(err, strings.HasPrefix(at, "https:")))
	}
	r.connMu.Lock()
	r.conns = append(r.conns, c)
	r.connMu.Unlock()
	return c, nil
}

func (r *run) dialOne(at string) (*client.Conn, error) {
	address, secure, err := endpoint(at)
	if err != nil {
		return nil, err
	}
	var cfg *tls.Config
	if secure {
		if cfg = r.spec.TLS; cfg == nil {
			cfg = &tls.Config{}
		}
	}
	if r.spec.User != "" && !r.authenticated {
		if r.token, err = client.Authenticate(r.ctx, address, cfg, r.spec.User, r.spec.Password); err != nil {
			return nil, err
		}
		r.authenticated = true
	}
	return client.Dial(r.ctx, address, cfg, r.token)
}

// sever is called when the load has been stopped. A server that does not read holds a write, that the connection's lock, and the lock
// everybody who asks what was counted.
func (r *run) sever() {
	select {
	case <-r.over:
		return
	case <-time.After(stopTimeout):
	}
	r.connMu.Lock()
	defer r.connMu.Unlock()
	for _, c := range r.conns {
		c.Sever()
	}
}

func (r *run) dial() error {
	s := &r.spec
	for i := range s.Connections {
		c, err := r.connect(i)
		if err != nil {
			return err
		}
		r.groups = append(r.groups, &group{run: r, conn: c, texts: map[string]uint64{}, value: newValue(s.ValueSize, s.Seed+uint64(i))})
	}
	for id := range s.Clients {
		g := r.groups[id%len(r.groups)]
		w := &worker{g: g, id: id}
		w.rng.Seed(s.Seed, uint64(id))
		g.workers = append(g.workers, w)
	}
	if s.Watchers > 0 {
		for i := range s.WatchConnections {
			c, err := r.connect(i)
			if err != nil {
				return err
			}
			r.feeds = append(r.feeds, &feed{run: r, conn: c})
		}
	}
	if s.WatchAll {
		c, err := r.connect(0)
		if err != nil {
			return err
		}
		r.all = &feed{run: r, conn: c}
	}
	return nil
}

func (r *run) watch() error {
	n := r.spec.Watchers
	if r.all != nil {
		r.watching.begin(n + 1)
	} else {
		r.watching.begin(n)
	}
	every := max(1, n/sampledWatchers)
	for i, f := range r.feeds {
		first, next := i*n/len(r.feeds), (i+1)*n/len(r.feeds)
		f.open(first, next-first, every, r.podsKey, r.podsEnd)
	}
	if r.all != nil {
		r.all.open(0, 1, 1, []byte{0}, []byte{0})
	}
	return r.awaitWatches(n)
}

// awaitWatches returns when all watches are created.
func (r *run) awaitWatches(n int) error {
	timeout := time.NewTimer(watchTimeout)
	defer timeout.Stop()
	select {
	case <-r.watching.open:
		return nil
	case <-r.ctx.Done():
		return r.why()
	case <-timeout.C:
		return fmt.Errorf("not all of the %d watches are created after %v", n, watchTimeout)
	}
}

// begin lets the clients begin.
func (r *run) begin() {
	s := &r.spec
	if s.Mix.has(Idle) {
		return
	}
	begin, period := r.now(), 0.0
	if s.Rate > 0 {
		period = float64(len(r.groups)) * 1e9 / s.Rate
	}
	for i, g := range r.groups {
		g.begin(begin+int64(period*float64(i)/float64(len(r.groups))), period)
	}
}

// measure runs the load.
func (r *run) measure(begin func()) (*Result, error) {
	s := &r.spec
	h := newHarvest(r)
	begin()
	if err := r.sleep(s.Warmup); err != nil {
		return nil, err
	}
	h.begin()
	var stopped error
	for n := 1; h.elapsed() < s.Duration && stopped == nil; n++ {
		stopped = r.sleep(min(time.Duration(n)*time.Second, s.Duration) - h.elapsed())
		h.second()
	}
	res := h.end()
	r.stopped.Store(true)
	if stopped != nil { // the answers under way are not waited for
		if res.Silent() && res.Total.Errors == 0 {
			return nil, stopped
		}
		res.Stopped = stopped.Error()
		return res, stopped
	}
	end := r.now()
	for _, g := range r.groups {
		g.conn.Lock()
		if g.period > 0 {
			res.NeverSent += max(0, int64(float64(end-g.first)/g.period)-g.sent)
		}
		g.conn.Unlock()
	}
	res.Unfinished = r.drain(res)
	return res, nil
}

func (r *run) sleep(d time.Duration) error {
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-r.ctx.Done():
		return r.why()
	}
}

// drain waits for the answers and events that are under way, and counts those that do not come.
func (r *run) drain(res *Result) (unfinished int) {
	for begin := time.Now(); ; {
		var wrote, pods uint64
		unfinished = 0
		for _, g := range r.groups {
			g.conn.Lock()
			unfinished += g.busy
			wrote += g.wrote
			pods += g.wrotePods
			g.conn.Unlock()
		}
		missing := int64(0)
		for i, fs := range r.watches() {
			got, want := uint64(0), uint64(0)
			for _, f := range fs.feeds {
				f.conn.Lock()
				got += f.all
				f.conn.Unlock()
			}
			if want = pods * uint64(fs.watchers); fs.everything {
				want = wrote
			}
			res.Watches[i].Missing = max(0, int64(want-got))
			missing += res.Watches[i].Missing
		}
		if unfinished == 0 && missing == 0 || time.Since(begin) > drainTimeout || r.sleep(drainPoll) != nil {
			return unfinished
		}
	}
}

// watches are the groups of feeds that are counted together.
func (r *run) watches() (all []feeds) {
	if r.all != nil {
		all = append(all, feeds{"everything", []*feed{r.all}, 1, true})
	}
	if len(r.feeds) > 0 {
		all = append(all, feeds{"pods", r.feeds, r.spec.Watchers, false})
	}
	return all
}

type feeds struct {
	name       string
	feeds      []*feed
	watchers   int
	everything bool
}

func (r *run) close() {
	close(r.over)
	r.stopped.Store(true)
	r.ending.Store(true)
	for _, g := range r.groups {
		g.conn.Close()
		g.conn.Lock()
		if g.timer != nil {
			g.timer.Stop()
		}
		g.conn.Unlock()
	}
	for _, fs := range r.watches() {
		for _, f := range fs.feeds {
			f.conn.Close()
		}
	}
}

// latch opens when it has been counted down.
type latch struct {
	left atomic.Int64
	open chan struct{}
}

func (l *latch) begin(n int) {
	l.open = make(chan struct{})
	l.left.Store(int64(n))
	if n == 0 {
		close(l.open)
	}
}

func (l *latch) done() {
	if l.left.Add(-1) == 0 {
		close(l.open)
	}
}
