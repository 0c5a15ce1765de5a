package sim

import (
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"time"

	"spindle/revclock"
	"spindle/shard"
	"spindle/watchring"
)

// proxy is one place where a proxy runs, through all its lives.
type proxy struct {
	r        *Run
	idx      int
	life     int
	host     *Host
	core     *shard.Core
	up       bool
	ready    bool
	timerAt  int64
	spinAt   int64
	spins    int
	walks    int
	clients  []*client
	followed []*follower
	hub      *watchring.Hub // made with the first watch
	viewers  []*viewer
	pump     bool // the hub has something to do
	skew     int64
	still    time.Duration // for how long it stood still, all times together
	left     bool          // it starts again by itself, and has not begun yet
	accept   bool          // this life was, or the next one is, started with the flag that accepts the loss
	born     int64         // when this life began, ns
}

// createEntries is more than the keys of a run: each life of a proxy makes a cache, and the default one is large.
const createEntries = 1 << 10

// bootPause is the pause until it is looked again whether a proxy may be started.
const bootPause = 20 * time.Millisecond

// boot starts a new life of p after d, or once somebody can know what members lack.
func (p *proxy) boot(d time.Duration) {
	r := p.r
	r.net.After(d, func() {
		if !p.left && r.forgotten() {
			p.boot(bootPause)
			return
		}
		p.life++
		p.left = false
		p.born = r.net.now
		base := r.Base
		if p.idx == r.Proxies-1 {
			base += r.Far
		}
		p.host = r.net.NewHost(fmt.Sprintf("p%d.%d", p.idx, p.life), base, r.Jitter)
		host := p.host
		p.host.Turn = func() {
			if p.host == host {
				p.turn()
			}
		}
		src := rand.New(rand.NewPCG(r.Seed, uint64(100+p.idx*1000+p.life)))
		var id revclock.ID
		id[0], id[1] = byte(p.idx), byte(p.life)
		for i := 2; i < len(id); i++ {
			id[i] = byte(src.IntN(256))
		}
		names := make([]string, r.Shards)
		for i := range names {
			names[i] = fmt.Sprintf("m%d", i)
		}
		log := slog.New(slog.NewTextHandler(io.Discard, nil))
		if r.net.Trace != nil {
			log = slog.New(slog.NewTextHandler(traceWriter{r.net, host.Name}, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: dropTime}))
		}
		accept := r.Accept
		if p.accept {
			accept = []string{names[r.loss.c.ID]}
		}
		p.core = shard.NewCore(shard.CoreConfig{
			Proxy: id, Names: names, Partition: r.partition(), AutoCompact: r.AutoCompact, Now: func() int64 { return r.net.now + p.skew }, Rand: src, Log: log,
			RingSize: r.RingSize, RingBytes: r.RingBytes, HistoryBytes: r.HistoryBytes, ReorderWindow: r.Window, ShardTimeout: r.Timeout, SnapshotEvery: r.SnapshotEvery,
			MemberMaxTxnOps: r.MaxTxnOps, MemberMaxRequestBytes: r.MaxRequestBytes, Sabotage: r.Sabotage, MemberName: host.Name,
			PageKeys: r.PageKeys, ChunkBytes: r.ChunkBytes, CreateEntries: createEntries, AcceptDataLoss: accept, AlwaysAhead: r.Ahead,
		}, p.host)
		p.host.OnConnected = p.core.Connected
		p.up, p.ready, p.timerAt = true, false, 0
		r.net.tracef("%s: starts", host.Name)
		p.core.Start()
		p.turn()
	})
}

// crash ends p's process.
func (p *proxy) crash() {
	r := p.r
	r.net.tracef("%s: crashes", p.host.Name)
	p.host.Kill()
	p.up, p.ready = false, false
	r.stats.Core = addStats(r.stats.Core, p.core.Stats())
	p.core = nil
	for _, f := range p.followed {
		f.stopped = true
	}
	for _, v := range p.viewers {
		v.died()
	}
	p.followed, p.hub, p.viewers = nil, nil, nil
	for _, c := range p.clients {
		c.proxyDied()
	}
}

// turn ends a turn of p's loop: what it has to send leaves, and its timer is set.
func (p *proxy) turn() {
	r := p.r
	if !p.up || r.fault != nil || p.host.stalled {
		return
	}
	if p.spinAt != r.net.now {
		p.spinAt, p.spins, p.walks = r.net.now, 0, 0
	}
	if p.pump {
		p.walks++ // a hub goes over a few revisions in a turn
	} else {
		p.spins++
	}
	if p.spins > maxSpins || p.walks > maxWalks {
		r.fail("%s spins: %d turns at one moment", p.host.Name, p.spins)
		return
	}
	core := p.core
	core.Flush()
	if why := core.Failed(); why != "" {
		if r.restored() || r.healed > p.born || r.losing() || r.loss != nil && r.loss.over > p.born {
			r.stats.Failures-- // it says so at its start (perhaps it stood still since it saw that), and is started again
		}
		r.stats.Failures++
		if r.stats.Failures > maxFailures {
			r.fail("%s gave up: %s", p.host.Name, why)
			return
		}
		last := p.ready // and whoever runs it starts it again at once, whatever is lost
		p.crash()
		p.left = last
		p.boot(r.net.Between(0, 100*time.Millisecond))
		return
	}
	if why := core.Outdated(); why != "" {
		r.net.tracef("%s: starts again: %s", p.host.Name, why)
		r.stats.Outdated++
		p.crash()
		p.left = true
		p.boot(r.net.Between(0, 100*time.Millisecond))
		return
	}
	if ok, _ := core.Ready(); ok && !p.ready {
		p.ready = true
		r.net.tracef("%s: ready, frontier %d", p.host.Name, core.Frontier().Get(watchring.All))
		r.part = core.Partition()
		p.follow()
		for _, c := range p.clients {
			c.proxyReady()
		}
		core.Flush()
	}
	if p.pump && p.hub != nil {
		if p.pump = p.hub.Pump(); p.pump {
			life := p.life
			r.net.After(0, func() {
				if p.life == life {
					p.turn()
				}
			})
		}
	}
	if d := core.Deadline(); d > 0 {
		d -= p.skew
		d = max(d, r.net.now)
		if p.timerAt == 0 || d < p.timerAt {
			p.timerAt = d
			life := p.life
			// Timers of a real loop are late now and then.
			at := d
			if r.net.Chance(0.3) {
				at += int64(r.net.Between(0, time.Millisecond))
			}
			host := p.host
			r.net.at(at, func() {
				host.do(func() {
					if p.life != life || !p.up || p.timerAt != d {
						return
					}
					p.timerAt = 0
					p.core.Tick()
					p.turn()
				})
			})
		}
	}
}

func dropTime(groups []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey && len(groups) == 0 {
		return slog.Attr{}
	}
	return a
}

type traceWriter struct {
	w    *Net
	name string
}

func (t traceWriter) Write(b []byte) (int, error) {
	t.w.tracef("%s: log: %s", t.name, b[:max(len(b)-1, 0)])
	return len(b), nil
}
